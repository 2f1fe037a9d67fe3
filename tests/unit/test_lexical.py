"""Words, terms, BM25 and corrections: the lexical half of search."""

import os
import subprocess
import sys

import numpy as np
import pytest

from features.lexical import Field, LexicalIndex, analyse, words

TITLES = (
    "Garnier Fructis Color Shield Shampoo, 13 fl oz",
    "OPI Nail Lacquer - Pompeii Purple",
    "OPI Nail Lacquer, Simmer and Shimmer",
    "L'Oréal Paris Revitalift Night Cream 50ml",
    "小米蓝牙无线耳机",
    "Nail polish remover",
    "",
)


@pytest.fixture(scope="module")
def index() -> LexicalIndex:
    return LexicalIndex([Field(TITLES)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L'Oréal WOMEN’S Anti-Aging", ["loreal", "womens", "anti", "aging"]),
        ("500ml 500 ml B12", ["500", "ml", "500", "ml", "b", "12"]),
        ("ﬁne ｓｈａｍｐｏｏ straße", ["fine", "shampoo", "strasse"]),
        ("无线蓝牙耳机", ["无线", "蓝牙", "耳机"]),
        ("小米Type-C充电器", ["小米", "type", "c", "充电", "电器", "充电器"]),
        ("カメラ", ["カメ", "メラ"]),
        ("हिन्दी", ["हिन्दी"]),
        ("\u202eשלום\u202c العَرَبِيَّة", ["שלום", "العربية"]),
        ("co\u00adoperate zero\u200bwidth", ["cooperate", "zerowidth"]),
        ("<b>mug</b>; DROP TABLE items --", ["b", "mug", "b", "drop", "table", "items"]),
        ("🎉👩‍👩‍👧🎉 !?% \x01\t\n", []),
        ("", []),
    ],
)
def test_what_a_text_says_in_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_latin_words_are_stemmed_and_nothing_else_is() -> None:
    assert analyse("Moisturizing creams, приветы, 耳机") == ["moistur", "cream", "приветы", "耳机"]


def test_a_long_text_is_read_to_its_end() -> None:
    assert len(words("mug " * 2_500)) == 2_500
    assert "".join(words("好" * 10_000)) == "好" * 10_000


def test_the_document_that_has_more_and_rarer_terms_scores_higher(index: LexicalIndex) -> None:
    scores = index.scores(analyse("OPI nail lacquer simmer"))
    assert scores.dtype == np.float32
    assert scores.shape == (len(TITLES),)
    assert scores.argsort()[::-1][:3].tolist() == [2, 1, 5]
    assert not scores[[0, 3, 4, 6]].any()
    assert index.scores(analyse("耳机")).argmax() == 4


def test_scores_are_lucenes_bm25(index: LexicalIndex) -> None:
    lengths = np.array([len(words(title)) for title in TITLES], np.float64)
    rarity = np.log(1 + (len(TITLES) - 1 + 0.5) / (1 + 0.5))
    expected = rarity / (1.2 * (0.25 + 0.75 * lengths[2] / lengths.mean()) + 1)
    assert index.scores(["simmer"])[2] == pytest.approx(expected, rel=1e-6)


def test_relevance_is_a_share_and_an_unknown_word_costs_some_of_it(index: LexicalIndex) -> None:
    whole, part = index.relevance(analyse("nail lacquer")), index.relevance(analyse("nail lacquer zzz"))
    assert 0 < part[1] < whole[1] < 1
    assert index.relevance(analyse("nail nail nail lacquer")).tobytes() == whole.tobytes()


def test_relevance_does_not_depend_on_what_else_is_found() -> None:
    # A second document with the word changes how rare it is, and nothing else may.
    fields = [Field(("red mug", "blue plate"))]
    one, again = LexicalIndex(fields).relevance(["mug"]), LexicalIndex(fields).relevance(["mug"])
    assert one.tobytes() == again.tobytes()


def test_a_field_counts_by_its_weight() -> None:
    titles, texts = ("blue mug", "plate"), ("a thing to drink from", "goes with the blue mug")
    plain = LexicalIndex([Field(titles), Field(texts)]).scores(["mug"])
    weighted = LexicalIndex([Field(titles, weight=3), Field(texts)]).scores(["mug"])
    assert weighted[0] / weighted[1] > plain[0] / plain[1]


@pytest.mark.parametrize(
    ("query", "corrected", "terms"),
    [
        ("shampo", "shampoo", ["shampoo"]),
        ("OPI laqcuer", "opi lacquer", ["opi", "lacquer"]),  # two neighbours swapped
        ("nailpolish", "nail polish", ["nail", "polish"]),
        ("revitelfit cream", "revitalift cream", ["revitalift", "cream"]),  # two edits in a long word
        ("gel", "", ["gel"]),  # too short to be told apart
        ("oqi", "", ["oqi"]),
        ("50mk", "", ["50", "mk"]),
        ("shampoos", "", ["shampoo"]),  # known by its stem
        ("zzzzzz", "", ["zzzzzz"]),
        ("蓝牙耳机 shampo", "蓝牙耳机 shampoo", ["蓝牙", "耳机", "shampoo"]),
        ("", "", []),
    ],
)
def test_unknown_words_are_taken_for_known_ones(index: LexicalIndex, query: str, corrected: str, terms: list[str]) -> None:
    assert index.corrected(query) == (corrected, terms)


def test_of_equally_near_words_the_frequent_one_is_meant() -> None:
    index = LexicalIndex([Field(("cream soap", "cream", "creak"))])
    assert index.corrected("creaf").text == "cream"


def test_no_more_than_eight_words_are_corrected(index: LexicalIndex) -> None:
    assert index.corrected("zzzzz shampo").text == "zzzzz shampoo"
    assert index.corrected(" ".join(f"zzzz{letter}" for letter in "abcdefgh") + " shampo").text == ""


@pytest.mark.parametrize("texts", [(), ("", ""), ("🎉", "!")])
def test_documents_without_words_are_no_error(texts: tuple[str, ...]) -> None:
    index = LexicalIndex([Field(texts)])
    assert index.relevance(analyse("mug")).tolist() == [0.0] * len(texts)
    assert index.corrected("shampo").text == ""


def test_equal_documents_give_equal_bits_in_another_process(index: LexicalIndex) -> None:
    query = analyse("opi nail polish cream shampoo 耳机 50ml")
    program = (
        "from tests.unit.test_lexical import TITLES; from features.lexical import *; import sys;"
        f"sys.stdout.write(LexicalIndex([Field(TITLES)]).scores({query!r}).tobytes().hex())"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
        assert run.stdout == index.scores(query).tobytes().hex()
