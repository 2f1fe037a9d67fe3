"""Whether a text says nothing but what is cited: its numbers, prices, dates, names, addresses, promises, and yes or no.

It is strict on purpose: a text that is refused is replaced by the template, which says the same. It reads English and Chinese.
"""

import re
from collections.abc import Iterable

from features.lexical import words
from server.assistant.answer import Answer, Kind, OrderLine
from server.assistant.words import WORDS, line_of, price_text, quantity_text, template

_MOST_CHARS = 300  # a phrasing may be this long, or twice its template
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_ADDRESS = re.compile(r"(?:https?:|www\.|\S@)\S*", re.IGNORECASE)
_CURRENCY = re.compile(r"[$€£¥₹₽₩₺₫฿₴₪元块]|\b[A-Z]{3}\b|(?i:\b(?:dollars?|euros?|pounds?|yuan|rupees?|cents?|bucks?)\b)")
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_SENTENCE_START = re.compile(r"(?:^|[.!?:;。！？：；]\s*|\n\s*[-*]?\s*)(?=[^\W\d_])")
_MARKUP = re.compile(r"[<>`\[\]{}|]|\*\*|__")
# Said in words, a number, a time or a promise is one all the same.
_COUNTED = re.compile(
    r"""\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety
    |hundreds?|thousands?|millions?|dozens?|half|double|twice|triple|percent|first|second|third|zero
    |free|guarantee[ds]?|refund(?:ed|s)?|discount(?:ed|s)?|gifts?|vouchers?|coupons?|cashback|always|never|lifetime|forever
    |today|tomorrow|tonight|yesterday|(?:mon|tues|wednes|thurs|fri|satur|sun)days?|weeks?|months?|years?|hours?|days?
    |january|february|march|april|june|july|august|september|october|november|december)\b
    |[一二三四五六七八九十百千万两半零]|免费|保证|退款|折扣|优惠|赠送|永远|今天|明天|星期|小时|天内""",
    re.IGNORECASE | re.VERBOSE,
)
_NEGATION = re.compile(
    r"\b(?:not|no|never|none|cannot|without|unable|unfortunately|neither|nor)\b|n['’]t\b|不|没|无法|未|别", re.IGNORECASE
)
_UNAVAILABLE = re.compile(r"\bout of stock\b|\bsold out\b|\bunavailable\b|\bbackorder|缺货|无货|售罄", re.IGNORECASE)
# What a sentence may begin with, and so has a capital, although no fact says it.
_OPENER = re.compile(
    r"""a|about|all|also|an|and|any|are|as|at|be|both|but|by|can|currently|do|does|feel|for|from|good|great|have|hello|here|hi|how|i|if|in|is|it
    |its|just|let|looking|need|no|not|of|on|or|our|please|question|right|see|should|so|sorry|sure|thank|thanks|that|the|their|there|these
    |they|this|those|to|unfortunately|we|what|when|where|which|while|will|with|would|yes|you|your""",
    re.IGNORECASE | re.VERBOSE,
)


def strays(text: str, answer: Answer) -> list[str]:
    """Returns what a text says that the facts of an answer do not, or leaves out that it must say; empty when it keeps to them.

    Args:
        text: without markup.
        answer: of one channel, see ``Answer.in_channel``.
    """
    wanted = template(answer)
    cited = "\n".join([wanted, *_cited(answer)])
    found = [f"number {number}" for number in _numbers(text) - _numbers(cited)]
    found += [f"address {one}" for one in _ADDRESS.findall(text) if one.rstrip(".,;:!?)。，") not in cited]
    found += [f"currency {one}" for one in _unlike(_CURRENCY.findall(text), _CURRENCY.findall(cited))]
    found += [f"word {one}" for one in _unlike(_COUNTED.findall(text), _COUNTED.findall(cited))]
    known = set(words(cited))
    found += [f"name {name}" for name in _names(text) if not set(words(name)) <= known]
    if bool(_NEGATION.search(text)) != bool(_NEGATION.search(wanted)):
        found.append("a no for a yes, or a yes for a no")
    if bool(_UNAVAILABLE.search(text)) != bool(_UNAVAILABLE.search(wanted)):
        found.append("stock")
    if _MARKUP.search(text) and not _MARKUP.search(wanted):
        found.append("markup")
    if len(text) > max(_MOST_CHARS, 2 * len(wanted)) or not text.strip():
        found.append("length")
    return found + _left_out(text, answer)


def _cited(answer: Answer) -> list[str]:
    """Returns the words of every fact."""
    quotes = [part for quote in answer.quotes for part in (quote.title, quote.heading, quote.text, quote.url)]
    items = [part for item in answer.items for part in (item.title, price_text(item.price_micros, item.currency))]
    orders = [part for line in answer.orders for part in (line.title, line.day, _count(line))]
    return quotes + items + orders


def _count(line: OrderLine) -> str:
    return "" if line.quantity is None else quantity_text(line.quantity)


def _left_out(text: str, answer: Answer) -> list[str]:
    """Returns what must be said and is not: prices, days, a passage's numbers; of several things each its own, so that none are swapped."""
    stock = WORDS[answer.language]
    facts: list[tuple[str, list[str]]] = []
    for item in answer.items:
        needed = [price_text(item.price_micros, item.currency)]
        if answer.kind in (Kind.PRICE, Kind.STOCK):
            needed.append(stock.in_stock if item.in_stock else stock.out_of_stock)
        facts.append((line_of(item.title), needed))
    facts += [(line_of(line.title) if line.title else stock.gone, [line.day]) for line in answer.orders]
    numbers = {number for quote in answer.quotes for number in _numbers(quote.text)}
    missing = [f"left out {number}" for number in sorted(numbers - _numbers(text))]
    if missing or not facts:
        return missing
    if len(facts) == 1:
        return [f"left out {fact}" for fact in facts[0][1] if fact not in text]
    found, end = [], 0
    for place, (title, needed) in enumerate(facts):
        start = text.find(title, end)
        after = text.find(facts[place + 1][0], start + len(title)) if place + 1 < len(facts) else len(text)
        if start < 0 or after < 0:
            return [f"left out {title}, or another comes first"]
        end = start + len(title)
        found += [f"left out {fact}" for fact in needed if fact not in text[end:after]]
    return found


def _numbers(text: str) -> set[str]:
    """Returns the numbers of a text as they would be compared: 12.90 is 12.9, 1,000 is 1000, ２ is 2."""
    return {_canonical(number) for number in _NUMBER.findall(text)}


def _canonical(number: str) -> str:
    plain = "".join(str(int(each)) if each.isdecimal() else each for each in number)
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", plain):
        plain = plain.replace(",", "")
    whole, point, decimals = plain.partition(".")
    return f"{whole.lstrip('0') or '0'}.{decimals.rstrip('0')}".rstrip(".") if point and decimals.isdigit() else plain


def _names(text: str) -> Iterable[str]:
    """Yields capitalised words, except those that any sentence may begin with where one begins."""
    starts = {match.end() for match in _SENTENCE_START.finditer(text)}
    for match in _WORD.finditer(text):
        word = match.group()
        if word[0].isupper() and not (match.start() in starts and _OPENER.fullmatch(word)) and word not in ("I", "I'm", "I’m"):
            yield word


def _unlike(said: Iterable[str], known: Iterable[str]) -> list[str]:
    cited = {one.casefold() for one in known}
    return [one for one in said if one.casefold() not in cited]
