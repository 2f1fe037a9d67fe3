"""Signals that score items for a customer from what others bought (collaborative), when and together (sequence), and titles (text)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from features.item_table import FloatArray, IntArray
from training.basket_log import Past, binary
from training.collaborative import co_visitation, ease

EASE_HALF_LIFE_DAYS = 60.0
_EASE_LAMBDA_DECAYED, _EASE_LAMBDA = 100.0, 300.0
_NEIGHBOURS = 100
_RECENT_DAYS = 28.0
_BASKET_HALF_LIFE_DAYS = 30.0
# Damps rates of rare items and pairs, in customers or baskets; as in ``co_visitation``.
_DAMPING = 20.0


@dataclass(frozen=True)
class Block:
    """Features that are computed together.

    Attributes:
        names: of the features.
        score: from customers int32[u] to one array a name: float32[items] where all customers share it, else float32[u, items].
    """

    names: tuple[str, ...]
    score: Callable[[IntArray], tuple[FloatArray, ...]]


def relative(scores: FloatArray) -> FloatArray:
    """Returns log(1 + s / m) of the positive part of scores [u, n], m its mean over a customer's items: how far above their average."""
    positive = np.maximum(scores, 0.0)
    mean = positive.mean(1, keepdims=True)
    return np.asarray(np.log1p(positive / np.where(mean > 0.0, mean, 1.0)), np.float32)


def by_row(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Returns the matrix with each row divided by its sum; empty rows stay empty."""
    totals = np.asarray(matrix.sum(1)).ravel()
    return sp.csr_matrix(sp.diags_array(np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)) @ matrix, dtype=np.float32)


def strongest(weights: FloatArray, rows: sp.csr_matrix) -> FloatArray:
    """Returns float32[u, n]: for each row the largest weight [m, n] of its items; every row must have one."""
    return np.stack([weights[items].max(0) for items in np.split(rows.indices, rows.indptr[1:-1])])


def collaborative(known: Past, *, decayed: bool) -> Block:
    """EASE, cosine of items and nearest customers; with ``decayed`` also EASE of decayed purchases and what neighbours took up lately."""
    bought = known.matrix()
    weights, cosine = ease(bought, _EASE_LAMBDA), co_visitation(bought).toarray()
    near = Neighbours(bought)
    names = ["ease", "ease_relative", "cosine_relative", "neighbours_relative"]
    if decayed:
        faded = known.decayed(EASE_HALF_LIFE_DAYS)
        faded_weights = ease(faded, _EASE_LAMBDA_DECAYED)
        lately = known.matrix(known.age[known.first] <= _RECENT_DAYS)
        names += ["ease_decayed", "ease_decayed_relative", "neighbours_lately_relative"]

    def score(users: IntArray) -> tuple[FloatArray, ...]:
        plain = bought[users] @ weights
        closest = near.of(users)
        result = [plain, relative(plain), relative(bought[users] @ cosine), relative((closest @ bought).toarray())]
        if decayed:
            fading = faded[users] @ faded_weights
            result += [fading, relative(fading), relative((closest @ lately).toarray())]
        return tuple(result)

    return Block(tuple(names), score)


class Neighbours:
    """The nearest customers by cosine of their items, rare items weighing more (log of customers per buyer)."""

    def __init__(self, bought: sp.csr_matrix) -> None:
        buyers = np.maximum(np.asarray(bought.sum(0)).ravel(), 1.0)
        weighted = sp.csr_matrix(bought.multiply(np.log(1.0 + bought.shape[0] / buyers)))
        lengths = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).ravel())
        self._unit = sp.csr_matrix(sp.diags_array(1.0 / np.maximum(lengths, 1e-9)) @ weighted, dtype=np.float32)

    def of(self, users: IntArray) -> sp.csr_matrix:
        """Returns sparse float32[u, customers]: the similarity of each customer's nearest hundred, themselves left out."""
        similar = (self._unit[users] @ self._unit.T).toarray()
        similar[np.arange(len(users)), users] = 0.0
        count = min(_NEIGHBOURS, similar.shape[1])
        best = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        rows = np.repeat(np.arange(len(users)), count)
        return sp.csr_matrix((similar[rows, best.ravel()], (rows, best.ravel())), similar.shape)


def sequence(known: Past) -> Block:
    """What is bought together with the last basket or the late history, and what newly follows the last basket."""
    log = known.log
    together = co_visitation(binary(log.basket, log.item, (int(log.basket.max()) + 1, len(log.items)))).toarray()
    follows = follow_up(known)
    last, late = by_row(known.last_baskets()), by_row(known.decayed(_BASKET_HALF_LIFE_DAYS))

    def score(users: IntArray) -> tuple[FloatArray, ...]:
        return relative(last[users] @ together), relative(late[users] @ together), relative(last[users] @ follows)

    return Block(("together_last_relative", "together_late_relative", "follow_relative"), score)


def follow_up(known: Past) -> FloatArray:
    """Returns float32[items, items]: how often the second is new in the basket after one with the first, as a damped cosine."""
    log = known.log
    count = int(log.basket.max()) + 1
    everything = binary(log.basket, log.item, (count, len(log.items)))
    new = binary(log.basket[known.first], log.item[known.first], (count, len(log.items)))
    earlier, later = consecutive_baskets(known)
    before, after = everything[earlier], new[later]
    before_count, after_count = (np.sqrt(np.asarray(part.sum(0)).ravel()) for part in (before, after))
    return np.asarray((before.T @ after).toarray() / (np.outer(before_count, after_count) + _DAMPING), np.float32)


def consecutive_baskets(known: Past) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the numbers of the baskets that follow one another at a customer, as (earlier, later); baskets are numbered by time."""
    baskets, row = np.unique(known.log.basket, return_index=True)
    owner = known.log.user[row]
    order = np.lexsort((baskets, owner))
    same = np.flatnonzero(owner[order][1:] == owner[order][:-1])
    return baskets[order[same]].astype(np.int64), baskets[order[same + 1]].astype(np.int64)


def text(known: Past, titles: FloatArray, *, trending: FloatArray | None) -> Block:
    """Closeness of titles to the customer's: all on average, the closest, the last basket's; and how titles of this kind sell lately.

    Args:
        known: the shop at the cut.
        titles: float32[m, d], unit vectors of the titles of at least the known items, by number.
        trending: float32[items], how well each item sells lately, to be averaged over the closest titles; None leaves that feature out.
    """
    unit = titles[: known.shape[1]]
    similar = np.asarray(unit @ unit.T, np.float32)
    bought, last = known.matrix(), by_row(known.last_baskets())
    history = by_row(bought)
    names = ("text_mean", "text_closest", "text_last")
    trend = () if trending is None else (kindred(similar, trending),)

    def score(users: IntArray) -> tuple[FloatArray, ...]:
        return history[users] @ similar, strongest(similar, bought[users]), last[users] @ similar, *trend

    return Block((*names, "text_trend") if trend else names, score)


def kindred(similar: FloatArray, values: FloatArray, sharpness: float = 20.0) -> FloatArray:
    """Returns float32[n]: each item's mean of ``values`` over the other items, weighted by exp(sharpness · similarity)."""
    weights = np.exp(sharpness * (similar - 1.0))
    np.fill_diagonal(weights, 0.0)
    return np.asarray(weights @ values / np.maximum(weights.sum(1), 1e-12), np.float32)
