"""Orders, prices and quantities as texts write them, in English and Chinese.

Every repeat is bounded, so no text takes longer than its length. Offsets count characters (Unicode code points).
"""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from enum import Enum
from typing import NamedTuple

_MICROS = 1_000_000
Span = tuple[int, int]
"""From the first character to behind the last."""


class Bound(Enum):
    """How a price is meant: as it stands, or as the most or the least that something may cost."""

    EXACT = "exact"
    MOST = "most"
    LEAST = "least"


class OrderMention(NamedTuple):
    """An order's id, as it was written."""

    span: Span
    order_id: str


class PriceMention(NamedTuple):
    """An amount in millionths of the currency unit; ``currency`` is an ISO 4217 code, empty where the text names none."""

    span: Span
    micros: int
    currency: str
    bound: Bound


class QuantityMention(NamedTuple):
    """How many of something, 1 to 9,999."""

    span: Span
    number: int


_NUMBER = r"(?<!\d)\d{1,3}(?:,\d{3}){1,3}(?:\.\d{1,2})?|(?<!\d)\d{1,9}(?:\.\d{1,2})?"
_CURRENCIES = {
    "USD": ("us$", "$", "usd", "dollar", "dollars", "buck", "bucks", "美元", "美金"),
    "EUR": ("€", "eur", "euro", "euros", "欧元"),
    "GBP": ("£", "gbp", "pound", "pounds", "quid", "英镑"),
    "CNY": ("cn¥", "¥", "￥", "cny", "rmb", "yuan", "元", "块", "块钱", "人民币"),
    "HKD": ("hk$", "hkd", "港币", "港元"),
    "JPY": ("jpy", "yen", "日元"),
}
_CURRENCY_OF = {sign: code for code, signs in _CURRENCIES.items() for sign in signs}


def _any(words: Sequence[str]) -> str:
    """Returns a pattern of any of these, the longest first; one in Latin letters is a whole word."""
    return "|".join(
        rf"(?<![a-z]){re.escape(word)}(?![a-z])" if word.isascii() and word[-1].isalpha() else re.escape(word)
        for word in sorted(words, key=lambda word: (-len(word), word))
    )


_SIGN = _any(tuple(_CURRENCY_OF))
_AMOUNT = rf"(?:(?:{_SIGN})\s?(?:{_NUMBER})(?![\d])|(?:{_NUMBER})\s?(?:{_SIGN}))"
_MOST_WORDS: tuple[str, ...] = (
    "under",
    "below",
    "less than",
    "at most",
    "no more than",
    "not more than",
    "up to",
    "cheaper than",
    "maximum",
    "max",
)
_MOST_WORDS += ("within", "不超过", "低于", "少于", "最多", "不到", "小于", "便宜于", "不高于")
_LEAST_WORDS = (
    "over",
    "above",
    "more than",
    "at least",
    "no less than",
    "minimum",
    "min",
    "高于",
    "超过",
    "至少",
    "不低于",
    "大于",
    "不少于",
)
_MOST_AFTER = ("or less", "or under", "or cheaper", "at most", "max", "tops", "以下", "以内", "之内", "之下")
_LEAST_AFTER = ("or more", "or above", "at least", "以上", "起")
# A bound before a bare number makes it a price where nothing follows that would make it a length, a time or a count.
_NOT_COUNTED = r"(?=\s{0,3}(?:$|[.,;:!?，。；：！？、)]|(?:or|and|please|but|for|if|in|that|which|with|的|吧|吗|左右)))(?!\s{0,3}[.,]\d)"
_PRICE = re.compile(
    rf"(?P<most>{_any(_MOST_WORDS)})?(?P<least>{_any(_LEAST_WORDS)})?(?(most)|(?(least)|))\s{{0,3}}"
    rf"(?P<amount>{_AMOUNT}|(?(most)(?:{_NUMBER}){_NOT_COUNTED}|(?(least)(?:{_NUMBER}){_NOT_COUNTED}|(?!))))"
    rf"(?:\s{{0,2}}(?P<most_after>{_any(_MOST_AFTER)})|\s{{0,2}}(?P<least_after>{_any(_LEAST_AFTER)}))?",
    re.IGNORECASE,
)
_RANGE = re.compile(
    rf"(?:(?:between|from)\s{{1,3}})?(?P<low>(?:(?:{_SIGN})\s?)?(?:{_NUMBER})(?:\s?(?:{_SIGN}))?)\s{{0,3}}(?:-|–|~|and|to|到|至)\s{{0,3}}"
    rf"(?P<high>(?:(?:{_SIGN})\s?)?(?:{_NUMBER})(?![\d.])(?:\s?(?:{_SIGN}))?)",
    re.IGNORECASE,
)
_PARTS = re.compile(rf"(?P<sign>{_SIGN})|(?P<number>{_NUMBER})", re.IGNORECASE)

_ORDER = re.compile(
    r"(?:(?<![a-z])(?:order|purchase|invoice)(?![a-z])|订单|单号|订购)\s{0,2}(?:(?:number|no\.?|num|id|nr\.?|编号|号码|号)\s{0,2})?"
    r"(?:is|是|为|[:#：=])?\s{0,2}#?\s?(?P<named>(?=[a-z-]{0,6}\d)[a-z0-9](?:[a-z0-9-]{1,30}[a-z0-9]))(?![a-z0-9])"
    r"|#\s?(?P<marked>(?=[a-z-]{0,6}\d)[a-z0-9](?:[a-z0-9-]{1,30}[a-z0-9]))(?![a-z0-9])"
    r"|(?<![a-z0-9-])(?P<bare>[A-Z]{2,5}-\d{4,12}(?:-\d{1,8})?)(?![a-z0-9-])",
    re.IGNORECASE,
)

_SPELT = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_WORD_COUNTS = {word: k for k, word in enumerate(_SPELT, start=1)}
_HAN_COUNTS = {word: k for k, word in enumerate("一二三四五六七八九十", start=1)} | {"两": 2, "十一": 11, "十二": 12}
_COUNT = rf"(?P<count>\d{{1,4}}(?![\d.,]\d|\d)|{_any(tuple(_WORD_COUNTS))}|十[一二]|[一二两三四五六七八九十])"
_PIECES = _any(
    ("piece", "pieces", "pcs", "unit", "units", "item", "items", "pair", "pairs", "set", "sets", "pack", "packs", "bottle", "bottles")
)
_PIECES += rf"|{_any(('box', 'boxes', 'bag', 'bags', 'of them', 'of these', 'of those', 'x'))}|[个件双套盒瓶包条台只把张本箱袋支份]"
_QUANTITIES = (
    re.compile(rf"(?<![a-z0-9.,-]){_COUNT}\s{{0,2}}(?:{_PIECES})", re.IGNORECASE),
    re.compile(rf"(?<![\w.])x\s?{_COUNT}(?!\w)", re.IGNORECASE),
    re.compile(rf"(?:{_any(('quantity', 'qty'))}|数量)\s{{0,2}}(?:is|of|[:：=是为])?\s{{0,2}}{_COUNT}(?!\w)", re.IGNORECASE),
)
_COUNT_BEFORE = re.compile(rf"(?<![\w.,#-]){_COUNT}\s{{1,3}}(?:of\s{{1,3}})?(?:(?:the|these|those|your)\s{{1,3}})?$", re.IGNORECASE)
_LOOK_BACK = 32  # characters before an item's name that may say how many


def orders(text: str) -> Iterator[OrderMention]:
    """Yields order ids: letters, digits and hyphens with a digit among the first seven, 3 to 32 of them.

    They follow "order", "purchase" or "invoice" (订单, 单号), or a number sign, or are capitals, a hyphen and four digits at least.
    """
    for match in _ORDER.finditer(text):
        name = next(name for name in ("named", "marked", "bare") if match[name])
        if name != "bare" or match[name].split("-")[0].isupper():
            yield OrderMention(match.span(name), match[name])


def prices(text: str) -> Iterator[PriceMention]:
    """Yields amounts with a currency, and amounts without one that stand after a bound such as "under" where nothing is counted.

    A range ("20 to 30 euros", 20到30元) is two: the least and the most.
    """
    taken: list[Span] = []
    for match in _RANGE.finditer(text):
        low, high = _read(match["low"]), _read(match["high"])
        currency = low[1] or high[1]
        if currency and low[0] <= high[0] and (low[1] or currency) == (high[1] or currency):
            taken.append(match.span())
            yield PriceMention(match.span("low"), low[0], currency, Bound.LEAST)
            yield PriceMention(match.span("high"), high[0], currency, Bound.MOST)
    for match in _PRICE.finditer(text):
        if any(overlap(match.span("amount"), span) for span in taken):
            continue
        micros, currency = _read(match["amount"])
        most, least = match["most"] or match["most_after"], match["least"] or match["least_after"]
        yield PriceMention(match.span("amount"), micros, currency, Bound.MOST if most else Bound.LEAST if least else Bound.EXACT)


def quantities(text: str, names: Sequence[Span] = ()) -> Iterator[QuantityMention]:
    """Yields counts of pieces, and counts that stand directly before one of ``names``, the spans of items and categories."""
    for pattern in _QUANTITIES:
        for match in pattern.finditer(text):
            yield from _counted(match, 0)
    for start, _ in names:
        since = max(start - _LOOK_BACK, 0)
        if before := _COUNT_BEFORE.search(text[since:start]):
            yield from _counted(before, since)


def overlap(one: Span, other: Span) -> bool:
    """Returns whether two spans share a character."""
    return one[0] < other[1] and other[0] < one[1]


def _counted(match: "re.Match[str]", offset: int) -> Iterator[QuantityMention]:
    said = match["count"].casefold()
    count = _WORD_COUNTS.get(said) or _HAN_COUNTS.get(said) or int(said)
    if count:
        yield QuantityMention((match.start("count") + offset, match.end("count") + offset), count)


def _read(amount: str) -> tuple[int, str]:
    """Returns millionths and the currency of an amount as it was written."""
    micros, currency = 0, ""
    for match in _PARTS.finditer(amount):
        if match["sign"]:
            currency = _CURRENCY_OF[match["sign"].casefold()]
        else:
            micros = int(Decimal(match["number"].replace(",", "")) * _MICROS)
    return micros, currency
