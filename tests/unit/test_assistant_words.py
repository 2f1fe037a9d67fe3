"""Answers in words and what they may say: every template keeps to its facts, and what strays from them is found."""

import json
import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.assistant.answer import Answer, Format, Kind, OfferedItem, OrderLine, Quote, Reason, decode
from server.assistant.grounding import strays
from server.assistant.words import in_words, price_text, quantity_text, template

MUG = OfferedItem("mug", "Blue Enamel Mug", 12_900_000, "EUR", in_stock=True, channels=())
TOWEL = OfferedItem("towel", "Linen Towel", 9_000_000, "EUR", in_stock=False, channels=("web",))
QUOTE = Quote("r", "Returns", "https://shop.example/r", "How long", "Within **30** days.", "Within 30 days, unworn.", (), 0.9)
LINE = OrderLine("e1", "mug", "Blue Enamel Mug", 2.0, "2026-03-01", returned=False)

titles = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=40).filter(str.strip)
items = st.builds(
    OfferedItem,
    item_id=st.uuids().map(str),
    title=titles,
    price_micros=st.integers(0, 10**13),
    currency=st.sampled_from(["EUR", "USD", "CNY"]),
    in_stock=st.booleans(),
    channels=st.sampled_from([(), ("web",), ("app", "web")]),
)
lines = st.builds(
    OrderLine,
    event_id=st.uuids().map(str),
    item_id=st.just("i"),
    title=titles | st.just(""),
    quantity=st.none() | st.floats(0, 9e12),
    day=st.dates().map(str),
    returned=st.booleans(),
)
quoted = st.builds(
    Quote,
    article_id=st.uuids().map(str),
    title=titles,
    url=st.sampled_from(["", "https://shop.example/a"]),
    heading=titles | st.just(""),
    markdown=titles,
    text=titles,
    channels=st.sampled_from([(), ("web",), ("app",)]),
    confidence=st.floats(0, 1),
)
answers = st.builds(
    Answer,
    kind=st.sampled_from(Kind),
    language=st.sampled_from(["en", "zh"]),
    confidence=st.floats(0, 1),
    reason=st.sampled_from([reason for reason in Reason if reason is not Reason.UNSPECIFIED]),
    quotes=st.lists(quoted, max_size=2).map(tuple),
    items=st.lists(items, max_size=7).map(tuple),
    orders=st.lists(lines, max_size=4).map(tuple),
    asks_item=st.booleans(),
)


@given(answers, st.sampled_from(["web", "app", "store"]))
def test_every_template_says_nothing_but_its_facts(answer: Answer, channel: str) -> None:
    assert decode(json.loads(answer.encode())) == answer
    shown = answer.in_channel(channel)
    problems = [one for one in strays(template(shown), shown) if not one.startswith("left out")]
    assert problems == []  # a title may stand in another one, so that which price is whose cannot be told: that is refused too
    assert all(in_words(shown, how).strip() for how in Format)
    assert set(shown.facts) <= set(answer.facts)
    assert shown.in_channel(channel) == shown


@given(st.text(string.ascii_letters + string.digits + " .,€$%/:@-", max_size=60), st.integers(10**6, 10**9))
def test_a_number_that_is_no_fact_is_always_found(words: str, number: int) -> None:
    answer = Answer(Kind.PRICE, "en", items=(MUG,))
    assert strays(f"{template(answer)} {words} {number}", answer)


@pytest.mark.parametrize(
    "text",
    [
        "Blue Enamel Mug costs 12.90 EUR and is in stock.",
        "Good news: the Blue Enamel Mug is in stock, and it costs 12.90 EUR.",
        "Yes! You can have the mug for 12.90 EUR; it is in stock.",
    ],
)
def test_a_phrasing_that_keeps_to_the_facts_passes(text: str) -> None:
    assert strays(text, Answer(Kind.PRICE, "en", items=(MUG,))) == []


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("The mug is in stock for 1 EUR.", "number 1"),
        ("The mug is in stock for 12.90 USD.", "currency USD"),
        ("The mug is in stock for $12.90 EUR.", "currency $"),
        ("The mug is not in stock, 12.90 EUR.", "a no for a yes"),
        ("The mug is in stock for 12.90 EUR, or sold out.", "stock"),
        ("The mug is in stock for 12.90 EUR with free shipping.", "word free"),
        ("The mug is in stock for 12.90 EUR, refunds guaranteed.", "word refunds"),
        ("The mug is in stock for 12.90 EUR, one for you.", "word one"),
        ("The mug is in stock for 12.90 EUR. Ask Bob.", "name Bob"),
        ("The Acme mug is in stock for 12.90 EUR.", "name Acme"),
        ("The mug is in stock for 12.90 EUR: https://evil.example/x", "address https://evil.example/x"),
        ("The mug is in stock for 12.90 EUR, write to me@evil.example", "address"),
        ("The mug is in stock for 12.90 EUR <b>now</b>", "markup"),
        ("The mug is in stock.", "left out 12.90 EUR"),
        ("The mug costs 12.90 EUR.", "left out in stock"),
        ("in stock 12.90 EUR " + "so lovely " * 40, "length"),
        ("", "length"),
        ("in stock 12.90 EUR 三天送达", "word 三"),
    ],
)
def test_what_strays_is_told(text: str, about: str) -> None:
    assert any(about in one for one in strays(text, Answer(Kind.PRICE, "en", items=(MUG,))))


def test_a_passage_is_not_phrased_without_its_numbers() -> None:
    answer = Answer(Kind.ARTICLE, "en", quotes=(replace(QUOTE, text="Within 30 days, for 5.00 EUR. Ask for 1 EUR."),))
    assert strays("You have 30 days, and it costs 5 EUR or 1 EUR.", answer) == []
    assert strays("It is 1 EUR.", answer) == ["left out 30", "left out 5"]


def test_prices_of_several_items_cannot_be_swapped() -> None:
    answer = Answer(Kind.SUGGESTIONS, "en", items=(MUG, TOWEL))
    assert strays("How about the Blue Enamel Mug at 12.90 EUR or the Linen Towel at 9.00 EUR?", answer) == []
    assert strays("How about the Blue Enamel Mug at 9.00 EUR or the Linen Towel at 12.90 EUR?", answer)
    assert strays("How about the Linen Towel at 9.00 EUR or the Blue Enamel Mug at 12.90 EUR?", answer)


def test_a_channel_shows_less_and_never_another_order() -> None:
    answer = Answer(Kind.SUGGESTIONS, "en", items=(TOWEL, MUG), phrased="Take both.", phrased_for=("towel", "mug"))
    assert (in_words(answer.in_channel("web"), Format.PLAIN), answer.in_channel("web").phrased) == ("Take both.", "Take both.")
    assert answer.in_channel("app").items == (MUG,)
    assert in_words(answer.in_channel("app"), Format.PLAIN) == "You may like: Blue Enamel Mug, 12.90 EUR."  # what was phrased was more
    only = Answer(Kind.ARTICLE, "en", quotes=(replace(QUOTE, channels=("web",)),))
    assert only.in_channel("app").kind is Kind.HANDOVER
    second = replace(only, quotes=(*only.quotes, replace(QUOTE, article_id="s", confidence=0.6)))
    assert (second.in_channel("app").quotes[0].article_id, second.in_channel("app").confidence) == ("s", 0.6)


def test_formats_say_the_same_in_other_shapes() -> None:
    answer = Answer(Kind.SUGGESTIONS, "en", items=(replace(MUG, title="*Blue*\n<i>Mug</i>"), TOWEL))
    assert in_words(answer, Format.PLAIN) == "You may like: *Blue* <i>Mug</i>, 12.90 EUR; Linen Towel, 9.00 EUR."
    assert in_words(answer, Format.RICH).splitlines()[2] == r"- **\*Blue\* \<i\>Mug\</i\>**, 12.90 EUR"
    many = replace(answer, items=(MUG,) * 5)
    assert in_words(many, Format.VOICE).count("Mug") == 3
    history = Answer(Kind.ORDERS, "zh", orders=(LINE, replace(LINE, title="", quantity=None)))
    assert in_words(history, Format.PLAIN) == "您最近的订单：2 × Blue Enamel Mug，2026-03-01；已下架的商品，2026-03-01。"
    long = Answer(Kind.ARTICLE, "en", quotes=(replace(QUOTE, text="A sentence of some words. " * 30),))
    assert len(in_words(long, Format.VOICE)) <= 300
    assert in_words(long, Format.VOICE).endswith("words.")
    phrased = Answer(Kind.ARTICLE, "en", quotes=(QUOTE,), phrased="You have 30 days.", phrased_for=("r#How long",))
    assert in_words(phrased, Format.RICH) == "You have 30 days.\n\n[Returns](<https://shop.example/r>)"


def test_amounts_are_exact() -> None:
    assert [price_text(micros, "EUR") for micros in (0, 12_900_000, 9_000_001, 1_000_000_000_000)] == [
        "0.00 EUR",
        "12.90 EUR",
        "9.000001 EUR",
        "1000000.00 EUR",
    ]
    assert [quantity_text(value) for value in (2.0, 0.5, 1e12)] == ["2", "0.5", "1000000000000"]
