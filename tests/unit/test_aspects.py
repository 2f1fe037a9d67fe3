"""Aspects: which words name them, where their clauses begin and end, and how many of them there can be."""

import pytest

from features.aspects import ASPECTS, MOST_MENTIONS, mentions


def named(text: str, language: str = "en") -> list[tuple[str, str]]:
    return [(one.aspect, text[one.start : one.end]) for one in mentions(text, language)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Love the color but it runs small.", [("colour", "Love the color"), ("size", "but it runs small")]),
        ("Fabric feels cheap, shipping took 3.5 weeks!", [("quality", "Fabric feels cheap"), ("price", "Fabric feels cheap"),
                                                          ("delivery", "shipping took 3.5 weeks")]),
        ("True to size; the size fits", [("size", "True to size"), ("size", "the size fits")]),
        ("COLOR\n\n  fits  \n", [("colour", "COLOR"), ("size", "fits")]),
        ("however the box was crushed", [("packaging", "however the box was crushed")]),
        ("a benefit of outfits, colorado-like prizes", [("colour", "colorado-like prizes")]),  # a stem: what it begins may be another word
        ("I bought it for my mother", []),
        ("<b>tasty</b>'; DROP TABLE items; -- great value", [("taste", "<b>tasty</b>'"), ("price", "-- great value")]),
    ],
)  # fmt: skip
def test_english_clauses(text: str, expected: list[tuple[str, str]]) -> None:
    assert named(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("质量很好，但是快递太慢了。颜色有色差", [("quality", "质量很好"), ("delivery", "但是快递太慢了"), ("colour", "颜色有色差")]),
        ("包装不错就是味道一般", [("packaging", "包装不错"), ("taste", "就是味道一般")]),
        ("😍 iPhone 的屏幕", [("function", "的屏幕")]),
        ("还行", []),
    ],
)
def test_chinese_clauses(text: str, expected: list[tuple[str, str]]) -> None:
    assert named(text, "zh") == expected


def test_offsets_count_characters_not_bytes() -> None:
    (one,) = mentions("👩‍👧 质量好 — 好. The price is fine", "en")
    assert (one.aspect, one.term, one.start, one.end) == ("price", "price", 13, 30)


@pytest.mark.parametrize("text", ["", " ", ".,;!", "\x00\x01", "but", "\u202e\u202c", "🎉" * 50])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_where_nothing_is_named_nothing_is_found(text: str, language: str) -> None:
    assert mentions(text, language) == []


def test_a_long_text_has_a_bounded_number_of_them() -> None:
    found = mentions("the price is bad, " * 555, "en")
    assert len(found) == MOST_MENTIONS
    assert mentions("price " + "x" * 9_994, "en")[0].end == 10_000


def test_both_languages_know_the_same_aspects() -> None:
    words = {
        "size": "尺码",
        "quality": "质量",
        "colour": "颜色",
        "appearance": "款式",
        "comfort": "舒服",
        "price": "价格",
        "delivery": "快递",
    }
    words |= {"service": "客服", "packaging": "包装", "taste": "味道", "function": "屏幕"}
    assert set(words) == set(ASPECTS)
    assert {aspect: named(word, "zh")[0][0] for aspect, word in words.items()} == {aspect: aspect for aspect in words}
