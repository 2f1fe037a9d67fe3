"""What a search finds: words and meaning in one order, the customer's taste, and the customer as they were before it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from features.behaviour import Activity, Behaviour
from features.candidates import Source
from features.item_table import FloatArray
from features.ranking import Profile
from features.retrieval import VectorIndex
from features.search import SEARCH_SIZE, Matches, SearchWeights, before_search, find_matches, normalized_query
from features.signals import CollaborativeWeights
from server.inference.model import load_model
from server.recommend.compute import Policy, Ranked, compute_slate
from server.recommend.searching import compute_place, compute_search
from server.recommend.slate import Place, SlateFlag
from server.recommend.snapshot import Snapshot
from tests.unit.bundles import write_bundle
from tests.unit.tables import activity, table

WEIGHTS = SearchWeights(meaning=0.5, personal=0.25, least_relevance=0.1, least_similarity=0.6)
AXES = np.eye(4, dtype=np.float32)  # four items, each with a direction of its own
POLICY = Policy(slate_size=20, exclude_purchased=True, max_per_category=4, search=replace(WEIGHTS, least_similarity=1.0))
SOMEBODY = activity(("i003", "view", 0), ("i007", "add_to_cart", 1))


def relevance(*values: float) -> FloatArray:
    return np.array(values, np.float32)


def common(one: Matches, other: Matches) -> int:
    """Checks that what both found has one score, and returns how much that is."""
    scores = dict(zip(one.rows.tolist(), one.scores.tolist(), strict=True))
    both = [(row, score) for row, score in zip(other.rows.tolist(), other.scores.tolist(), strict=True) if row in scores]
    assert [scores[row] for row, _ in both] == [score for _, score in both]
    return len(both)


def test_words_and_meaning_add_up_and_say_which_spoke() -> None:
    found = find_matches(relevance(0.8, 0.0, 0.4, 0.05), AXES, query=AXES[1], customer=None, index=None, weights=WEIGHTS)
    assert found.rows.tolist() == [0, 1, 2]  # the last has too little of either
    assert found.scores.tolist() == pytest.approx([0.8, 0.5, 0.4])
    assert [Source(int(s)) for s in found.sources] == [Source.LEXICAL, Source.SEMANTIC, Source.LEXICAL]


def test_what_is_near_in_meaning_counts_where_the_words_are_too() -> None:
    query = (AXES[0] + AXES[2]) / np.float32(np.sqrt(2))
    found = find_matches(relevance(0.5, 0.5, 0.5, 0.0), AXES, query=query, customer=None, index=None, weights=WEIGHTS)
    assert found.rows.tolist() == [0, 2, 1]
    assert found.sources[0] == Source.LEXICAL | Source.SEMANTIC


def test_taste_moves_what_was_found_and_finds_nothing_by_itself() -> None:
    found = find_matches(relevance(0.5, 0.45, 0.0, 0.0), AXES, query=None, customer=AXES[1], index=None, weights=WEIGHTS)
    assert found.rows.tolist() == [1, 0]
    assert found.sources.tolist() == [int(Source.LEXICAL | Source.VECTOR), int(Source.LEXICAL)]
    nobody = find_matches(
        relevance(0.5, 0.45, 0.0, 0.0), AXES, query=None, customer=AXES[1], index=None, weights=replace(WEIGHTS, personal=0.0)
    )
    assert nobody.rows.tolist() == [0, 1]
    assert not any(s & Source.VECTOR for s in nobody.sources)


def test_an_items_score_does_not_hang_on_what_else_is_found() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((600, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    given = rng.random(600).astype(np.float32)
    arguments = {"query": vectors[5], "customer": vectors[9], "index": None, "weights": WEIGHTS}
    whole = find_matches(given, vectors, **arguments)
    fewer = find_matches(given[:300], vectors[:300], **arguments)
    assert len(whole.rows) == SEARCH_SIZE
    assert common(whole, fewer) > 50


def test_ties_go_by_row() -> None:
    found = find_matches(relevance(0.5, 0.5, 0.5, 0.5), AXES, query=None, customer=None, index=None, weights=WEIGHTS)
    assert found.rows.tolist() == [0, 1, 2, 3]


def test_nothing_found_is_no_error() -> None:
    for size in (0, 4):
        found = find_matches(np.zeros(size, np.float32), AXES[:size], query=AXES[3] * 0.1, customer=AXES[0], index=None, weights=WEIGHTS)
        assert not len(found.rows)


def test_an_index_changes_no_score() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((3_000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    given = np.where(rng.random(3_000) < 0.02, 0.5, 0.0).astype(np.float32)
    arguments = {"query": vectors[5], "customer": vectors[9], "weights": WEIGHTS}
    exact = find_matches(given, vectors, index=None, **arguments)
    indexed = find_matches(given, vectors, index=VectorIndex(vectors), **arguments)
    assert {5} < set(indexed.rows.tolist()) & set(exact.rows.tolist())
    assert common(exact, indexed) > 50


@pytest.mark.parametrize(
    ("typed", "normalized"),
    [
        (" Enamel  MUG\n", "enamel mug"),
        ("ｅｎａｍｅｌ mug", "enamel mug"),
        ("a\x01b\x7fc", "a b c"),
        ("🎁", "🎁"),
        (" \t\x00", ""),
        ("Straße", "strasse"),
        ("' OR 1=1 --", "' or 1=1 --"),
    ],
)
def test_queries_that_differ_in_nothing_that_matters_are_one(typed: str, normalized: str) -> None:
    assert normalized_query(typed) == normalized
    assert normalized_query(normalized) == normalized


def searched(*texts: str, views: int = 3) -> Activity:
    """An activity that ends with searches, the newest first."""
    searches = tuple(Behaviour("", "search", "web", 100 + views - k, text) for k, text in enumerate(texts))
    return Activity(len(texts) + views, searches + tuple(Behaviour(f"i{k:03d}", "view", "web", 50 - k) for k in range(views)))


def test_a_searchs_own_event_makes_no_difference_to_its_answer() -> None:
    plain = before_search(searched(), "enamel mug")
    assert before_search(searched("Enamel mug"), "enamel mug").behaviours == plain.behaviours
    assert before_search(searched("enamel  mug", "ENAMEL MUG"), "enamel mug").behaviours == plain.behaviours
    assert before_search(searched("towel", "enamel mug"), "enamel mug").behaviours == searched("towel", "enamel mug").behaviours
    full = searched(views=50)
    assert before_search(replace(full, behaviours=searched("mug").behaviours[:1] + full.behaviours[:49]), "mug").behaviours == (
        before_search(full, "mug").behaviours
    )


@pytest.fixture(scope="module")
def shot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A real bundle over a table."""
    folder: Path = tmp_path_factory.mktemp("bundle")
    items = table(60)
    write_bundle(folder, items)
    model = load_model(folder, provider="cpu", threads=2)
    return Snapshot(model, items, model.item_vectors, model.collaborative.remapped(model.item_rows, items))


def bits(ranked: Ranked) -> tuple[bytes, bytes, bytes, int]:
    return ranked.rows.tobytes(), ranked.scores.tobytes(), ranked.sources.tobytes(), int(ranked.flags)


def test_a_search_of_real_graphs_gives_the_same_bits_with_and_without_its_event(shot: Snapshot) -> None:
    one = compute_search(shot, SOMEBODY, Profile(), "title i010", POLICY)
    own = replace(SOMEBODY, behaviours=(Behaviour("", "search", "web", SOMEBODY.newest + 1, "Title I010"), *SOMEBODY.behaviours))
    assert bits(one) == bits(compute_search(shot, own, Profile(), "title i010", POLICY))
    assert shot.table.ids[one.rows[0]] == "i010"
    assert one.flags == SlateFlag(0)
    assert set(one.stages) == {"words", "query_vector", "user_vector", "matching"}


def test_taste_depends_on_the_customer_and_on_nothing_for_somebody_new(shot: Snapshot) -> None:
    known, new = (compute_search(shot, who, Profile(), "title", POLICY) for who in (SOMEBODY, Activity(0)))
    assert sorted(known.rows.tolist()) == sorted(new.rows.tolist())
    assert known.scores.tobytes() != new.scores.tobytes()
    assert not any(s & Source.VECTOR for s in new.sources)


def test_what_finds_nothing_is_answered_by_recommendations_and_says_so(shot: Snapshot) -> None:
    for query in ("qqq zzz", "🎁"):
        found = compute_search(shot, SOMEBODY, Profile(), query, POLICY)
        instead = compute_slate(shot, SOMEBODY, Profile(), POLICY)
        assert found.flags == instead.flags | SlateFlag.RECOMMENDED_INSTEAD
        assert (found.rows.tolist(), found.scores.tolist()) == (instead.rows.tolist(), instead.scores.tolist())


def test_meaning_finds_what_words_do_not(shot: Snapshot) -> None:
    near = replace(POLICY, search=replace(WEIGHTS, least_similarity=-1.0))
    found = compute_search(shot, Activity(0), Profile(), "qqq zzz", near)
    assert SlateFlag.RECOMMENDED_INSTEAD not in found.flags
    assert {Source(int(s)) for s in found.sources} == {Source.SEMANTIC}


def test_without_a_model_words_alone_decide() -> None:
    items = table(10)
    bare = Snapshot(None, items, np.zeros((10, 0), np.float32), CollaborativeWeights.empty(10))
    found = compute_search(bare, SOMEBODY, Profile(), "title i004", POLICY)
    assert items.ids[found.rows[0]] == "i004"
    assert found.flags == SlateFlag.NO_MODEL


def test_a_place_with_a_query_is_a_search_and_one_without_a_slate(shot: Snapshot) -> None:
    search = compute_place(shot, SOMEBODY, Profile(), Place("search", (), "title"), POLICY)
    slate = compute_place(shot, SOMEBODY, Profile(), Place("search"), POLICY)
    assert bits(search) == bits(compute_search(shot, SOMEBODY, Profile(), "title", POLICY))
    assert bits(slate) == bits(compute_slate(shot, SOMEBODY, Profile(), POLICY))


def test_no_query_shares_a_slot_with_another_or_with_a_context() -> None:
    slots = [Place("search", (), "a"), Place("search", (), "b"), Place("search"), Place("search", ("a",)), Place("home")]
    assert len({place.slot("m", 1) for place in slots}) == len(slots)
