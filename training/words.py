"""Titles by their words: what a pretrained encoder blurs, such as a brand or a product line, their rare words tell."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from features.item_table import FloatArray

_WORDS = r"(?u)\b\w+\b"  # scikit-learn's own pattern drops words of one letter


def word_vectors(titles: Sequence[str]) -> sp.csr_matrix:
    """Returns sparse float32 [n, v], unit TF-IDF vectors over words and pairs of words that at least two titles hold."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=_WORDS)
    return sp.csr_matrix(vectorizer.fit_transform(titles), dtype=np.float32)


def word_similarity(vectors: sp.csr_matrix) -> sp.csr_matrix:
    """Returns sparse float32 [n, n], the cosines of ``word_vectors``."""
    return sp.csr_matrix(vectors @ vectors.T)


def word_components(vectors: sp.csr_matrix, size: int = 256) -> FloatArray:
    """Returns float32[n, k], latent semantic components of ``word_vectors``, k = ``size`` or as many as there are words for."""
    size = min(size, min(vectors.shape) - 1)
    return np.asarray(TruncatedSVD(size, random_state=0).fit_transform(vectors), np.float32)
