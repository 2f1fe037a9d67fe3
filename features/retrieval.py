"""The items nearest to a vector: exactly in a small catalogue, by an index and exact scores of its shortlist in a large one.

Shared by training and serving. The index only says who is worth scoring: every score is a dot product with the stored vector, summed
alike wherever it is computed, and ties are broken by row.
"""

from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from features.item_table import FloatArray, IntArray
from features.scores import Scores

VectorArray = npt.NDArray[np.floating[Any]]
"""Unit item vectors, float32[n, d] or, of a catalogue large enough for an index, float16[n, d]."""

# Exact scores of this many take 1.4 ms on one thread, a shortlist of as many 0.6 ms and of 200,000 1.6 ms. They break even at 10,000;
# a shop that gains so little keeps full precision and builds nothing.
INDEXED_FROM = 20_000
# Five times what any candidate source needs; to score them exactly takes 0.5 ms.
SHORTLIST = 500
# Items whose codes are compared with a query, at 8 ns each: of 1 M items those of 40 lists. There 98 % of the nearest hundred are
# among them, of 200,000 items 99.2 % (docs/LOG.md).
_LOOKED_AT = 40_000
# Vectors are clustered as whole numbers of this length: all sums k-means makes of them stay below 2^24, where float32 is exact. So
# who lies in which list is the same to the bit on any processor, with any BLAS and any number of threads.
_LENGTH = 2_000.0
_ROUNDS, _SEED, _SAMPLE_PER_LIST = 6, 20_261_130, 64
_SIGN_AND_NUMBER = np.array(0x8FFFE000, np.uint32).view(np.int32)[()]
_BIAS = np.float32(2.0 ** (127 - 15))
_BLOCK = 16_384  # rows turned into float32 at a time: 25 MB of 384 components


def stored_type(count: int) -> type[np.floating[Any]]:
    """Returns how the vectors of ``count`` items are kept: as float16 where they are indexed, 768 bytes an item of 384 components."""
    return np.float32 if count < INDEXED_FROM else np.float16


class VectorIndex:
    """Inverted lists of product-quantized codes (FAISS), 4 bits for 2 components: 104 bytes an item of 384 components.

    Equal vectors give equal shortlists, whichever replica builds the index. Safe to ask from many threads at a time.
    """

    def __init__(self, vectors: VectorArray) -> None:
        """Builds the index on one thread.

        Args:
            vectors: unit vectors of n items, of an even number of components.
        """
        import faiss  # here: 66 MB of libraries that a small shop never loads

        faiss.omp_set_num_threads(1)  # of this thread only: calls in flight keep their cores
        count, size = vectors.shape
        lists = isqrt(count)
        sample = _whole(vectors[np.linspace(0, count - 1, min(count, lists * _SAMPLE_PER_LIST)).astype(np.int64)])
        clusters = faiss.IndexFlatL2(size)
        clustering = faiss.Clustering(size, lists)
        clustering.niter, clustering.seed, clustering.int_centroids = _ROUNDS, _SEED, True
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, _SAMPLE_PER_LIST
        clustering.train(sample, clusters)
        self._lists: Any = faiss.IndexIVFPQFastScan(clusters, size, lists, size // 2, 4, faiss.METRIC_INNER_PRODUCT)
        self._lists.by_residual = False  # codes of the vectors themselves: one table of products serves all lists
        self._lists.pq.cp.seed, self._lists.pq.cp.int_centroids = _SEED, True
        self._lists.train(sample)
        self._lists.nprobe = min(lists, -(-_LOOKED_AT * lists // count))
        for begin in range(0, count, _BLOCK):
            self._lists.add(_whole(vectors[begin : begin + _BLOCK]))

    def shortlist(self, query: FloatArray) -> IntArray:
        """Returns int32[k], ascending: up to SHORTLIST rows, the nearest to ``query``, float32[d], nearly all among them."""
        rows = self._lists.search(_whole(query[np.newaxis]), SHORTLIST)[1][0]
        return np.sort(rows[rows >= 0]).astype(np.int32)


def indexed(vectors: VectorArray) -> VectorIndex | None:
    """Returns an index of the vectors of a large catalogue; None of a small one, where exact scores of all cost no more."""
    return VectorIndex(vectors) if len(vectors) >= INDEXED_FROM else None


def exact_scores(vectors: VectorArray, rows: IntArray, query: VectorArray) -> FloatArray:
    """Returns float32[c]: the dot products of ``query``, float[d], with the vectors of some rows."""
    return _products(vectors[rows], query.astype(np.float32, copy=False))


def all_scores(vectors: VectorArray, query: VectorArray) -> Scores:
    """Returns the dot products of ``query``, float[d], with all vectors: of 1 M items that takes most of a second."""
    wide = query.astype(np.float32, copy=False)
    if vectors.dtype == np.float32:
        return Scores.of_all(_products(vectors, wide))
    blocks = [_products(vectors[begin : begin + _BLOCK], wide) for begin in range(0, len(vectors), _BLOCK)]
    return Scores.of_all(np.concatenate(blocks))


def vector_scores(vectors: VectorArray, query: VectorArray, index: VectorIndex | None) -> Scores:
    """Returns the dot products of ``query``, float[d], with all vectors, or with an index those of the shortlist."""
    if index is None:
        return all_scores(vectors, query)
    rows = index.shortlist(query.astype(np.float32, copy=False))
    return Scores(len(vectors), rows, exact_scores(vectors, rows, query))


def _products(vectors: VectorArray, query: FloatArray) -> FloatArray:
    # einsum, not BLAS: each row's sum by itself, so its bits depend neither on the number of rows nor on threads.
    return np.asarray(np.einsum("nd,d->n", _widened(vectors), query), np.float32)


def _widened(vectors: VectorArray) -> FloatArray:
    """Returns finite numbers as float32, without rounding: shifted into place and the exponent's bias made good, 0.4 ns each.

    NumPy's own conversion takes 1.7, which was nine tenths of scoring a shortlist.
    """
    if vectors.dtype != np.float16:
        return vectors.astype(np.float32, copy=False)
    bits = vectors.view(np.int16).astype(np.int32)  # the sign in all upper bits
    bits <<= 13
    bits &= _SIGN_AND_NUMBER
    return np.multiply(bits.view(np.float32), _BIAS, out=bits.view(np.float32))


def _whole(vectors: VectorArray) -> FloatArray:
    return np.asarray(np.rint(_widened(vectors) * np.float32(_LENGTH)), np.float32)
