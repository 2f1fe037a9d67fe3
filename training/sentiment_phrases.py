"""Fits the weights of phrases: a logistic regression over counts of tokens and runs of tokens, each as rare as it counts much."""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from sklearn.linear_model import LogisticRegression

from training.sentiment_model import Phrases
from training.text import Tokens

# Inverse strengths of the penalty, of which the held-out texts choose.
_STRENGTHS = (0.1, 0.3, 1.0)
_ITERATIONS, _TOLERANCE = 200, 1e-3
_LEAST = 2  # texts that hold a phrase, or it says nothing


def fit_phrases(
    phrases: Phrases, tokens: Tokens, targets: npt.NDArray[np.int64], held: Tokens, held_targets: npt.NDArray[np.int64]
) -> None:
    """Fits on n texts and chooses the penalty by the likelihood of the held-out ones; every outcome must be among the n targets."""
    counts, held_counts = _counts(phrases, tokens), _counts(phrases, held)
    holding = np.bincount(counts.indices, minlength=phrases.buckets)
    rarity = np.where(holding >= _LEAST, 1 + np.log((1 + len(tokens)) / (1 + holding)), 0.0)  # as scikit-learn's TF-IDF
    scaled, held_scaled = counts @ sp.diags(rarity), held_counts @ sp.diags(rarity)
    fitted = [LogisticRegression(C=c, max_iter=_ITERATIONS, tol=_TOLERANCE).fit(scaled, targets) for c in _STRENGTHS]
    places = np.arange(len(held_targets)), held_targets
    best = max(fitted, key=lambda model: float(model.predict_log_proba(held_scaled)[places].mean()))
    weights, bias = best.coef_ * rarity, best.intercept_
    if len(weights) == 1:  # of two outcomes scikit-learn keeps one row, of the second against the first
        weights, bias = np.concatenate([np.zeros_like(weights), weights]), np.concatenate([np.zeros(1), bias])
    phrases.weights.copy_(torch.from_numpy(weights.T))
    phrases.bias.copy_(torch.from_numpy(bias))


def _counts(phrases: Phrases, tokens: Tokens) -> sp.csr_matrix:
    """Returns float64[n, buckets]: how often each phrase is in each text, over the square root of the number of its phrases."""
    places = [phrases.places(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0][0].numpy() for ids in tokens.ids]
    lengths = np.array([len(row) for row in places])
    edges = np.concatenate([[0], np.cumsum(lengths)])
    values = np.repeat(1.0 / np.sqrt(lengths), lengths)
    matrix = sp.csr_matrix((values, np.concatenate(places), edges), shape=(len(tokens), phrases.buckets))
    matrix.sum_duplicates()
    return matrix
