"""Known-item queries, and the search measured on a part of the real sets."""

import random
from pathlib import Path

import pandas as pd
import pytest

from training.quality.search import KINDS, SYNONYMS, customers_queries, known_item_queries, known_item_query, reviewed_items, run

TITLE = "Garnier Fructis Color Shield Fortifying Shampoo, Moisturizer Lotion Kit 13 Fluid Ounce"


def test_a_query_is_made_of_the_titles_own_words() -> None:
    rng = random.Random(1)
    for _ in range(50):
        said = known_item_query(TITLE, "words", rng).split()
        assert 2 <= len(said) <= 4
        assert set(said) <= set(TITLE.lower().replace(",", "").split()) - {"fluid", "ounce", "13"}
        assert "garnier" not in known_item_query(TITLE, "no_brand", rng).split()


def test_a_typo_is_one_word_said_wrong_and_a_synonym_one_said_otherwise() -> None:
    rng = random.Random(2)
    known = set(TITLE.lower().replace(",", "").split())
    wrong = [set(query.split()) - known for query in (known_item_query(TITLE, "typo", rng) for _ in range(40)) if query]
    assert {len(words) for words in wrong} <= {0, 1}  # swapping two equal letters says the same
    assert sum(len(words) for words in wrong) > 30
    for _ in range(20):
        assert set(known_item_query(TITLE, "synonym", rng).split()) & {"set", "cream"}  # not lotion, which stands there


def test_titles_that_say_too_little_make_no_query() -> None:
    assert known_item_query("Soap 12 oz", "words", random.Random(3)) == ""
    assert known_item_query("Red blue green soap", "synonym", random.Random(3)) == ""


def test_queries_repeat_with_their_seed_and_come_of_all_kinds_alike() -> None:
    made = known_item_queries([TITLE, TITLE.replace("Garnier", "Loreal")], 40, random.Random(4))
    assert made == known_item_queries([TITLE, TITLE.replace("Garnier", "Loreal")], 40, random.Random(4))
    assert [sum(query.kind == kind for query in made) for kind in KINDS] == [10] * 4
    (bought, *_) = customers_queries([TITLE, TITLE], [[0, 1]], 5, random.Random(5))
    assert (bought.row, bought.history) == (1, (0,))


def test_a_held_out_review_is_not_in_its_items_text() -> None:
    rows = [(7, f"Title {k}", f"What I say {k}. And more.", "Dresses") for k in range(6)] + [(8, "Alone", "Once.", "Pants")]
    reviews = pd.DataFrame(rows, columns=["Clothing ID", "Title", "Review Text", "Class Name"])
    texts, asked = reviewed_items(reviews, random.Random(6))
    assert len(texts) == 1
    assert texts[0].startswith("Dresses. Title")
    assert len(asked) == 2
    for query in asked:
        assert query.text not in texts[0]
        assert query.text.split(" What")[0] not in texts[0].split(". ")


def test_no_word_is_its_own_synonym() -> None:
    assert [word for word, other in SYNONYMS.items() if word in other.split()] == []


@pytest.mark.data
def test_a_part_of_the_real_sets_is_measured(data_folder: Path) -> None:
    result = run(data_folder, seed=0, items=60, queries=60, customers=5)
    test = result.details["test"]
    assert isinstance(test, dict)
    assert test["fused_ndcg_at_10"] > max(test["lexical_ndcg_at_10"], test["semantic_ndcg_at_10"]) - 0.05
    assert test["titles_lexical_recall_at_10"] > 0.7
    assert test["reviews_semantic_recall_at_10"] > 0.1


def test_a_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"womens_clothing_reviews\.parquet is not in"):
        run(tmp_path, seed=0)
