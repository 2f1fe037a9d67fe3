"""Completions: phrases, categories and brands, the popular first, typos in the last word, and only what may be shown."""

from dataclasses import replace

import numpy as np
import pytest

from features.completions import Completion, CompletionKind, Completions
from features.item_table import POPULARITY
from tests.unit.tables import table

TITLES = (
    "Enamel mug, blue",
    "Enamel mug, red",
    "Enamel teapot",
    "Linen towel",
    "Linen towel 50 x 70",
    "小米无线蓝牙耳机",
    "华为无线蓝牙耳机",
    "",
)


def completions(popularity: dict[int, float] | None = None) -> Completions:
    counts = np.zeros((len(TITLES), len(POPULARITY)), np.float32)
    for row, value in (popularity or {}).items():
        counts[row, 1] = value
    items = replace(
        table(len(TITLES)),
        titles=TITLES,
        category_names=("Kitchen", "Kitchen", "Kitchen", "Bath", "Bath", "Audio", "Audio", ""),
        brand_names=("Nord", "Nord", "Ena", "Lino", "Lino", "Xiaomi", "Huawei", ""),
        popularity=counts,
    )
    return Completions(items)


def texts(found: list[Completion]) -> list[str]:
    return [one.text for one in found]


def everything(_row: int) -> bool:
    return True


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("en", ["enamel", "enamel mug", "Ena"]),  # three items, two, and a brand of one
        ("ENAMEL M", ["enamel mug"]),
        ("enamel mug", ["enamel mug"]),
        ("towel lin", ["towel linen", "towel linen towel"]),
        ("lín", ["linen", "linen towel", "Lino"]),
        ("kit", ["Kitchen"]),
        ("无线", ["无线", "无线蓝牙", "无线蓝牙耳机"]),
        ("zzz", []),
        ("tea", []),  # one title has it: no phrase of many
    ],
)
def test_what_goes_on_from_a_prefix(prefix: str, expected: list[str]) -> None:
    assert texts(completions().complete(prefix, 8, everything)) == expected


def test_each_says_what_it_is() -> None:
    kinds = {one.text: one.kind for one in completions().complete("en", 8, everything)}
    assert kinds == {"enamel": CompletionKind.PHRASE, "enamel mug": CompletionKind.PHRASE, "Ena": CompletionKind.BRAND}


def test_the_popular_come_first() -> None:
    assert texts(completions({3: 50.0}).complete("", 8, everything)) == ["Bath", "Kitchen", "Audio"]
    assert texts(completions({5: 50.0}).complete("", 2, everything)) == ["Audio", "Kitchen"]


@pytest.mark.parametrize("prefix", ["", " ", "🎁", "!?", "\x01"])
def test_without_a_word_there_are_the_categories(prefix: str) -> None:
    assert {one.kind for one in completions().complete(prefix, 8, everything)} == {CompletionKind.CATEGORY}


@pytest.mark.parametrize("prefix", ["enma", "enaml", "inamel", "xnamel"])
def test_one_letter_of_the_last_word_may_be_wrong(prefix: str) -> None:
    assert texts(completions().complete(prefix, 8, everything)) == ["enamel", "enamel mug"]


def test_short_words_and_numbers_are_not_corrected() -> None:
    assert completions().complete("xna", 8, everything) == []
    assert completions().complete("7700", 8, everything) == []


def test_a_completion_needs_an_item_that_may_be_shown() -> None:
    found = texts(completions().complete("en", 8, lambda row: row == 2))
    assert found == ["enamel", "Ena"]
    assert completions().complete("en", 8, lambda _: False) == []


def test_equal_tables_give_equal_completions_and_a_limit_is_a_prefix() -> None:
    one, other = completions({1: 3.0}), completions({1: 3.0})
    for prefix in ("", "e", "l", "en", "enma"):
        whole = one.complete(prefix, 20, everything)
        assert whole == other.complete(prefix, 20, everything)
        assert one.complete(prefix, 2, everything) == whole[:2]


def test_an_empty_catalogue_completes_nothing() -> None:
    assert Completions(table(0)).complete("mug", 8, everything) == []
    assert Completions(table(0)).complete("", 8, everything) == []


def test_long_and_hostile_prefixes_are_text() -> None:
    for prefix in ("a" * 100, "enamel " * 14, "' OR 1=1", "<b>", "\u202eשלום", "%_%"):
        assert isinstance(completions().complete(prefix, 8, everything), list)
