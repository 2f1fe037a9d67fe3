"""Item-to-item weights, "what similar customers did": EASE, or co-visitation where the catalogue is too large for it."""

import numpy as np
import scipy.sparse as sp
import torch

from features.behaviour import ACTION_WEIGHT, ACTIONS, MICROS_PER_DAY
from features.item_table import FloatArray
from features.signals import CollaborativeWeights
from training.config import TrainConfig
from training.events import EventLog, Micros

_STRENGTH = np.array([ACTION_WEIGHT[action] for action in ACTIONS], np.float64)


def fit(log: EventLog, item_count: int, *, until: Micros, config: TrainConfig) -> CollaborativeWeights:
    """Fits the weights on the events strictly before ``until``."""
    x = history_matrix(log, item_count, until=until, half_life_days=config.ease_half_life_days)
    weights = ease(x, config.ease_lambda) if item_count <= config.ease_max_items else co_visitation(x)
    return prune(weights, config.collaborative_top_k)


def history_matrix(log: EventLog, item_count: int, *, until: Micros, half_life_days: float) -> sp.csr_matrix:
    """Returns sparse [users, items]: each item's largest action weight, halved every ``half_life_days`` before the newest event."""
    strength = _STRENGTH[log.action]
    kept = (log.time < until) & (log.item >= 0) & (strength > 0)
    user, item, time = log.user[kept], log.item[kept], log.time[kept]
    newest = np.zeros(len(log.users), np.int64)
    np.maximum.at(newest, user, time)
    value = strength[kept] * 0.5 ** ((newest[user] - time) / MICROS_PER_DAY / half_life_days)
    order = np.lexsort((-value, item, user))
    first = np.ones(len(order), np.bool_)
    first[1:] = (np.diff(user[order]) != 0) | (np.diff(item[order]) != 0)
    chosen = order[first]
    return sp.csr_matrix((value[chosen], (user[chosen], item[chosen])), (len(log.users), item_count))


def ease(x: sp.csr_matrix, regularisation: float) -> FloatArray:
    """Returns float32[n, n], row i what item i says of the others (Steck, "Embarrassingly Shallow Autoencoders", WWW 2019)."""
    gram = (x.T @ x).toarray()
    gram[np.diag_indices_from(gram)] += regularisation
    # The matrix is symmetric and positive definite, so Cholesky gives its inverse in half the work of a general one.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(gram))).numpy()
    weights = np.asarray(inverse / -np.diag(inverse), np.float32)
    np.fill_diagonal(weights, 0)
    return weights


def co_visitation(x: sp.csr_matrix) -> sp.csr_matrix:
    """Returns sparse [n, n]: cosine of the items' customers, damped for rare items by 20 customers' worth."""
    gram = sp.coo_matrix(x.T @ x)
    norm = np.sqrt(np.asarray(x.multiply(x).sum(0)).ravel())
    values = gram.data / (norm[gram.row] * norm[gram.col] + 20.0)
    off = gram.row != gram.col
    return sp.csr_matrix((values[off].astype(np.float32), (gram.row[off], gram.col[off])), gram.shape)


def prune(weights: "FloatArray | sp.csr_matrix", top_k: int) -> CollaborativeWeights:
    """Keeps each item's ``top_k`` weights of largest magnitude."""
    indptr, columns, values = [0], [], []
    for row in range(weights.shape[0]):
        line = weights[row].toarray().ravel() if sp.issparse(weights) else weights[row]
        found = np.flatnonzero(line)
        if len(found) > top_k:
            found = found[np.argpartition(-np.abs(line[found]), top_k - 1)[:top_k]]
            found.sort()
        columns.append(found.astype(np.int32))
        values.append(line[found].astype(np.float32))
        indptr.append(indptr[-1] + len(found))
    return CollaborativeWeights(np.array(indptr, np.int64), np.concatenate(columns), np.concatenate(values))
