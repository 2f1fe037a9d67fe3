"""The index of a large catalogue: nearly all of the nearest, exact scores, and the same to the bit wherever it is built."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from features.candidates import Source
from features.item_table import FloatArray
from features.ranking import Profile
from features.retrieval import INDEXED_FROM, SHORTLIST, VectorArray, VectorIndex, all_scores, indexed, stored_type, vector_scores
from features.signals import CollaborativeWeights
from server.inference.model import load_model
from server.recommend.compute import Policy, Ranked, compute_slate, score_items, similar_items
from server.recommend.snapshot import Snapshot, SnapshotBuilder
from server.understand.names import NO_NAMES
from tests.unit.bundles import write_bundle
from tests.unit.tables import activity, table

COUNT, SIZE = INDEXED_FROM, 48
POLICY = Policy(slate_size=100, exclude_purchased=True, max_per_category=4)


def unit(vectors: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> FloatArray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def clustered() -> tuple[VectorArray, FloatArray]:
    """Families of like items of very different sizes, as titles have them, and customers who like two families at a time."""
    rng = np.random.default_rng(3)
    families = rng.standard_normal((400, SIZE))
    member = (400 * rng.random(COUNT) ** 2).astype(np.int64)
    vectors = unit(families[member] + 0.6 * rng.standard_normal((COUNT, SIZE)))
    queries = unit(families[rng.integers(0, 400, 40)] + 0.6 * families[rng.integers(0, 400, 40)])
    return vectors.astype(np.float16), queries


def test_nearly_all_of_the_nearest_hundred_are_found(clustered: tuple[VectorArray, FloatArray]) -> None:
    vectors, queries = clustered
    index = VectorIndex(vectors)
    found = []
    for query in queries:
        nearest = np.lexsort((np.arange(COUNT), -all_scores(vectors, query).values))[:100]
        found.append(len(np.intersect1d(nearest, index.shortlist(query))) / 100)
    assert np.mean(found) >= 0.95


def test_scores_of_the_shortlist_are_the_exact_ones_to_the_bit(clustered: tuple[VectorArray, FloatArray]) -> None:
    vectors, queries = clustered
    index = VectorIndex(vectors)
    for query in queries[:5]:
        scores = vector_scores(vectors, query, index)
        assert len(scores.rows) == SHORTLIST
        assert (np.diff(scores.rows) > 0).all()
        exact = np.einsum("nd,d->n", vectors.astype(np.float32), query)
        assert scores.values.tobytes() == exact[scores.rows].tobytes()
        assert all_scores(vectors, query).values.tobytes() == exact.tobytes()


def test_every_half_precision_number_counts_as_what_it_is() -> None:
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = numbers[np.isfinite(numbers)]
    assert np.array_equal(all_scores(finite[:, np.newaxis], np.ones(1, np.float32)).values, finite.astype(np.float32))


def test_an_index_built_elsewhere_finds_the_same(clustered: tuple[VectorArray, FloatArray]) -> None:
    import faiss

    vectors, queries = clustered
    one, other = VectorIndex(vectors), VectorIndex(vectors.copy())
    bytes_of = [faiss.serialize_index(index._lists).tobytes() for index in (one, other)]
    assert bytes_of[0] == bytes_of[1]
    assert all(one.shortlist(query).tolist() == other.shortlist(query).tolist() for query in queries)


def test_who_lies_in_which_list_is_whole_numbers_and_so_independent_of_the_processor(clustered: tuple[VectorArray, FloatArray]) -> None:
    """Every sum of k-means must stay exact in float32: only then no order of adding, no FMA and no BLAS can change it."""
    vectors, _ = clustered
    lists = VectorIndex(vectors)._lists
    centroids = lists.quantizer.reconstruct_n(0, lists.nlist)
    assert (centroids == np.rint(centroids)).all()
    whole = np.rint(vectors.astype(np.float64) * 2_000)
    largest = (whole**2).sum(1).max() + (centroids.astype(np.float64) ** 2).sum(1).max()
    assert 2 * largest < 2**24  # |x|² + |c|² + 2|x||c| at the most


def test_only_a_large_catalogue_is_indexed_and_kept_in_half_precision() -> None:
    assert (stored_type(INDEXED_FROM - 1), stored_type(INDEXED_FROM)) == (np.float32, np.float16)
    vectors = unit(np.random.default_rng(0).standard_normal((INDEXED_FROM, 8)))
    assert indexed(vectors[:-1]) is None
    assert indexed(vectors) is not None


async def test_a_snapshot_of_a_large_catalogue_is_built_with_an_index() -> None:
    items = table(INDEXED_FROM)
    model = SimpleNamespace(
        manifest=SimpleNamespace(vector_size=8),
        item_rows=items.rows,
        item_hashes=items.content_hashes,
        item_vectors=unit(np.random.default_rng(0).standard_normal((INDEXED_FROM, 8))),
        collaborative=CollaborativeWeights.empty(INDEXED_FROM),
    )
    builder = SnapshotBuilder(cast("Any", None), dsn="")
    builder._tables |= {1: (items, NO_NAMES), 2: (table(INDEXED_FROM - 1), NO_NAMES)}  # as if read
    large, small = [await builder.build(cast("Any", model), version) for version in (1, 2)]
    assert (large.vectors.dtype, small.vectors.dtype) == (np.float16, np.float32)
    assert large.vectors.tobytes() == model.item_vectors.astype(np.float16).tobytes()
    assert large.index is not None
    assert large.index.shortlist(model.item_vectors[7]).tolist() == VectorIndex(large.vectors).shortlist(model.item_vectors[7]).tolist()
    assert small.index is None


def shop(folder: Path, count: int) -> Snapshot:
    items = table(count)
    write_bundle(folder, items)
    model = load_model(folder, provider="cpu", threads=1)
    return Snapshot(model, items, model.item_vectors, model.collaborative.remapped(model.item_rows, items))


CUSTOMERS = [activity((f"i{k:03d}", "view", 0), (f"i{k + 40:03d}", "purchase", 3)) for k in range(0, 400, 40)]


def bits(ranked: Ranked) -> tuple[bytes, bytes, bytes]:
    return ranked.rows.tobytes(), ranked.scores.tobytes(), ranked.sources.tobytes()


def test_an_index_that_finds_everything_changes_no_bit_of_a_slate(tmp_path: Path) -> None:
    exact = shop(tmp_path, SHORTLIST)
    index = replace(exact, index=VectorIndex(exact.vectors))
    given = np.arange(0, SHORTLIST, 3, dtype=np.int32)
    for who in CUSTOMERS:
        assert bits(compute_slate(index, who, Profile(), POLICY)) == bits(compute_slate(exact, who, Profile(), POLICY))
        assert bits(score_items(index, who, Profile(), given)) == bits(score_items(exact, who, Profile(), given))
    assert bits(similar_items(index, 7, exhaustive=False)) == bits(similar_items(exact, 7, exhaustive=False))


def test_replicas_that_build_their_own_index_give_the_same_slates(tmp_path: Path) -> None:
    large = shop(tmp_path, 3 * SHORTLIST)
    half, whole = large.vectors.astype(np.float16), replace(POLICY, slate_size=256)
    one, other = (replace(large, vectors=half.copy(), index=VectorIndex(half)) for _ in range(2))
    for who in CUSTOMERS:
        slate = compute_slate(one, who, Profile(), whole)
        assert bits(slate) == bits(compute_slate(other, who, Profile(), whole))
        assert Source.VECTOR in Source(int(np.bitwise_or.reduce(slate.sources)))


def test_similar_items_of_a_shortlist_are_the_best_of_all(tmp_path: Path) -> None:
    """What customers went on to is ranked too, however far its vector is."""
    exact = shop(tmp_path, 3 * SHORTLIST)
    far = int(np.argmin(all_scores(exact.vectors, exact.vectors[7]).values))
    indptr = np.zeros(3 * SHORTLIST + 1, np.int64)
    indptr[8:] = 1
    weights = CollaborativeWeights(indptr, np.array([far], np.int32), np.array([2.0], np.float32))
    shot = replace(exact, collaborative=weights, index=VectorIndex(exact.vectors))
    nearest, everything = (similar_items(shot, 7, exhaustive=exhaustive) for exhaustive in (False, True))
    assert (len(nearest.rows), len(everything.rows)) == (SHORTLIST, 3 * SHORTLIST - 1)
    assert nearest.rows[:50].tolist() == everything.rows[:50].tolist()
    assert nearest.scores[:50].tobytes() == everything.scores[:50].tobytes()
    assert far in nearest.rows
    assert 7 not in everything.rows
