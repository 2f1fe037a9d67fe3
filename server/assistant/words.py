"""Answers in words: templates that fill in nothing but the facts of the answer, for each language and format."""

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple, TypeVar

from features.articles import escaped
from server.assistant.answer import Answer, Format, Kind, OfferedItem, OrderLine, Quote, Reason

T = TypeVar("T")

# To be spoken: of a list the first few, of a passage about two sentences.
_SPOKEN_ITEMS, _SPOKEN_CHARS = 3, 300


class _Words(NamedTuple):
    """One language; the last four are its punctuation."""

    costs: str
    in_stock: str
    out_of_stock: str
    not_here: str
    orders: str
    returns: str
    no_orders: str
    no_returns: str
    gone: str
    suggestions: str
    no_suggestions: str
    courtesy: str
    which_item: str
    unreadable: str
    reasons: dict[Reason, str]
    separator: str
    stop: str
    comma: str
    space: str


WORDS = {
    "en": _Words(
        costs="{title} costs {price} and is {stock}.",
        in_stock="in stock",
        out_of_stock="out of stock",
        not_here="I cannot find that item here.",
        orders="Your most recent orders:",
        returns="Your most recent returns:",
        no_orders="I find no such order of yours.",
        no_returns="I find no return of yours.",
        gone="an item no longer sold",
        suggestions="You may like:",
        no_suggestions="I find nothing like that at the moment.",
        courtesy="Hello! How can I help you with the shop?",
        which_item="Which item do you mean?",
        unreadable="I could not read that. Please write it in words.",
        reasons={
            Reason.LOW_CONFIDENCE: "I am not sure about that, so I am handing you over to a person.",
            Reason.ASKED_FOR_PERSON: "I am handing you over to a person.",
            Reason.OUT_OF_SCOPE: "I can only help with the shop. A person will see whether they can help with that.",
            Reason.COMPLAINT: "I am sorry to hear that. I am handing you over to a person.",
        },
        separator="; ",
        stop=".",
        comma=", ",
        space=" ",
    ),
    "zh": _Words(
        costs="{title}的价格是 {price}，{stock}。",
        in_stock="有货",
        out_of_stock="暂时缺货",
        not_here="这里找不到这件商品。",
        orders="您最近的订单：",
        returns="您最近的退货：",
        no_orders="没有找到您的相关订单。",
        no_returns="没有找到您的退货。",
        gone="已下架的商品",
        suggestions="您可能会喜欢：",
        no_suggestions="目前没有找到这样的商品。",
        courtesy="您好！请问有什么可以帮您？",
        which_item="请问您指的是哪件商品？",
        unreadable="没有读懂，请用文字描述。",
        reasons={
            Reason.LOW_CONFIDENCE: "这个问题我不太确定，马上为您转接人工客服。",
            Reason.ASKED_FOR_PERSON: "马上为您转接人工客服。",
            Reason.OUT_OF_SCOPE: "我只能回答与本店有关的问题，人工客服会看看能否帮到您。",
            Reason.COMPLAINT: "非常抱歉，马上为您转接人工客服。",
        },
        separator="；",
        stop="。",
        comma="，",
        space="",
    ),
}


def in_words(answer: Answer, how: Format) -> str:
    """Returns an answer of one channel (see ``Answer.in_channel``) in words; the formats say the same facts, VOICE maybe fewer."""
    if answer.phrased and (how is not Format.VOICE or len(answer.phrased) <= _SPOKEN_CHARS):
        return "\n\n".join([escaped(answer.phrased), *_sources(answer)]) if how is Format.RICH else answer.phrased
    return _template(answer, how)


def template(answer: Answer) -> str:
    """Returns the plain words of an answer, before any generator."""
    return _template(answer, Format.PLAIN)


def price_text(micros: int, currency: str) -> str:
    """Returns an amount as digits and currency code, exact, with two decimals or as many as it takes."""
    units, rest = divmod(micros, 1_000_000)
    decimals = f"{rest:06d}".rstrip("0").ljust(2, "0")
    return f"{units}.{decimals} {currency}"


def quantity_text(quantity: float) -> str:
    """Returns a number of units, exact, without an empty fraction."""
    return f"{int(quantity)}" if quantity.is_integer() else f"{Decimal(repr(quantity)):f}"


def _template(answer: Answer, how: Format) -> str:
    words = WORDS[answer.language]
    match answer.kind:
        case Kind.ARTICLE:
            return _quoted(answer.quotes[0], how)
        case Kind.PRICE | Kind.STOCK:
            return words.space.join(_offer(item, words, how) for item in _few(answer.items, how)) or words.not_here
        case Kind.ORDERS | Kind.RETURNS:
            return _history(answer, words, how)
        case Kind.SUGGESTIONS:
            entries = [words.comma.join([_title(item.title, how), _price(item)]) for item in _few(answer.items, how)]
            return _listed(words.suggestions, entries, words, how) if entries else words.no_suggestions
        case Kind.HANDOVER:
            return words.reasons[answer.reason]
        case Kind.COURTESY:
            return words.courtesy
        case Kind.CLARIFY:
            return words.which_item if answer.asks_item else words.unreadable


def _few(facts: Sequence[T], how: Format) -> Sequence[T]:
    return facts[:_SPOKEN_ITEMS] if how is Format.VOICE else facts


def _quoted(quote: Quote, how: Format) -> str:
    if how is Format.RICH:  # HTML in an article is text: no channel's page must take it for its own
        return "\n\n".join([quote.markdown.replace("<", "&lt;"), *_source(quote)])
    return quote.text if how is Format.PLAIN else _spoken(line_of(quote.text))


def _spoken(text: str) -> str:
    """Returns the first sentences of a text, as many as can be listened to; at a word's end where the first is longer."""
    if len(text) <= _SPOKEN_CHARS:
        return text
    head = text[:_SPOKEN_CHARS]
    end = max((head.rfind(stop) for stop in (". ", "! ", "? ", "。", "！", "？")), default=-1)
    return head[: end + 1] if end > 0 else head[: max(head.rfind(" "), 0)] or head


def _source(quote: Quote) -> list[str]:
    return [f"[{escaped(line_of(quote.title))}](<{quote.url}>)"] if quote.url else []


def _sources(answer: Answer) -> list[str]:
    return [link for quote in answer.quotes for link in _source(quote)]


def _offer(item: OfferedItem, words: _Words, how: Format) -> str:
    stock = words.in_stock if item.in_stock else words.out_of_stock
    return words.costs.format(title=_title(item.title, how), price=_price(item), stock=stock)


def _price(item: OfferedItem) -> str:
    return price_text(item.price_micros, item.currency)


def _history(answer: Answer, words: _Words, how: Format) -> str:
    orders = answer.kind is Kind.ORDERS
    entries = [_entry(line, words, how) for line in _few(answer.orders, how)]
    if entries:
        listed = _listed(words.orders if orders else words.returns, entries, words, how)
    else:
        listed = words.no_orders if orders else words.no_returns
    return "\n\n".join([listed, *(_quoted(quote, how) for quote in answer.quotes if how is not Format.VOICE)])


def _entry(line: OrderLine, words: _Words, how: Format) -> str:
    count = "" if line.quantity is None else f"{quantity_text(line.quantity)} × "
    return words.comma.join([count + (_title(line.title, how) if line.title else words.gone), line.day])


def _listed(head: str, entries: Sequence[str], words: _Words, how: Format) -> str:
    if how is Format.RICH:
        return "\n".join([head, "", *(f"- {entry}" for entry in entries)])
    return f"{head}{words.space}{words.separator.join(entries)}{words.stop}"


def _title(title: str, how: Format) -> str:
    return f"**{escaped(line_of(title))}**" if how is Format.RICH else line_of(title)


def line_of(text: str) -> str:
    """Returns a text on one line."""
    return " ".join(text.split())
