"""Features of (customer, item) pairs of a shop as it stood at a cut: signals, popularity and trend, and how item and customer match."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.item_table import FloatArray, IntArray
from training import basket_signals
from training.basket_log import Past
from training.basket_signals import Block, by_row, strongest

GROUPS = frozenset({"text", "sequence", "collaborative", "recency"})
_BUYER_WINDOWS = (7.0, 14.0, 28.0, 56.0, 90.0)
_NEW_WINDOWS = (7.0, 14.0, 28.0)
_TRENDS = ((7.0, 28.0), (14.0, 56.0), (28.0, 90.0))
# Codes this far apart count e⁻¹ of a neighbour: the shop numbers the colours and sizes of a series one after another.
_CODE_REACH = 10.0


@dataclass(frozen=True)
class BasketFeatures:
    """Everything the ranker reads of one cut.

    Attributes:
        names: of the f features.
        context: float32[users, c], what describes a customer alone.
        blocks: where the features come from.
        item_count: items known at the cut.
    """

    names: tuple[str, ...]
    context: FloatArray
    blocks: tuple[Block, ...]
    item_count: int

    def of(self, users: IntArray) -> FloatArray:
        """Returns float32[u, items, f]; memory is 4 · u · items · f bytes."""
        result = np.empty((len(users), self.item_count, len(self.names)), np.float32)
        columns = (column for block in self.blocks for column in block.score(users))
        for place, column in enumerate(columns):
            result[:, :, place] = column
        return result


def basket_features(known: Past, titles: FloatArray, *, without: frozenset[str] = frozenset()) -> BasketFeatures:
    """Prepares the features of a cut.

    Args:
        known: the shop at the cut; nothing else is read.
        titles: float32[m, d], unit vectors of the titles of at least the known items, by number.
        without: groups of ``GROUPS`` to leave out.
    """
    recency = "recency" not in without
    blocks = [attributes(known)]
    if recency:
        blocks.append(popularity(known))
    if "collaborative" not in without:
        blocks.append(basket_signals.collaborative(known, decayed=recency))
    if "sequence" not in without:
        blocks.append(basket_signals.sequence(known))
    if "text" not in without:
        trending = np.log1p(buyers(known, 14.0, new=True)) if recency else None
        blocks.append(basket_signals.text(known, titles, trending=trending))
    names = tuple(name for block in blocks for name in block.names)
    return BasketFeatures(names, context(known, recency=recency), tuple(blocks), known.shape[1])


def standard(values: npt.NDArray[np.generic]) -> FloatArray:
    """Returns float32[n] of mean 0 and deviation 1: the shop's growth from cut to cut must not show in a feature of items."""
    numbers = values.astype(np.float64)
    return np.asarray((numbers - numbers.mean()) / max(numbers.std(), 1e-9), np.float32)


def buyers(known: Past, days: float, *, new: bool) -> FloatArray:
    """Returns float32[items]: customers who bought an item in the last ``days``; with ``new`` those who then did for the first time."""
    rows = known.first if new else known.last
    recent = known.age[rows] <= days
    return np.bincount(known.item[recent], minlength=known.shape[1]).astype(np.float32)


def popularity(known: Past) -> Block:
    """Buyers and new buyers of several windows, their trends (a window's rate over a longer one's), first and last day sold."""
    counts = {days: buyers(known, days, new=False) for days in _BUYER_WINDOWS}
    values = {f"buyers_{days:.0f}": np.log1p(count) for days, count in counts.items()}
    values |= {f"new_{days:.0f}": np.log1p(buyers(known, days, new=True)) for days in _NEW_WINDOWS}
    for short, long in _TRENDS:
        values[f"trend_{short:.0f}_{long:.0f}"] = np.log((counts[short] + 1.0) / (counts[long] * short / long + 1.0))
    oldest, newest = np.zeros((2, known.shape[1]), np.float32)
    newest[known.log.item] = known.age  # rows ascend in time: the last one stays
    oldest[known.log.item[::-1]] = known.age[::-1]
    values |= {"first_sold": np.log1p(oldest), "last_sold": np.log1p(newest)}
    return shared(values)


def shared(values: dict[str, npt.NDArray[np.generic]]) -> Block:
    """A block of features that all customers share, each standardised over the items."""
    columns = tuple(standard(value) for value in values.values())
    return Block(tuple(values), lambda _users: columns)


def means(values: npt.NDArray[np.generic], groups: IntArray, count: int) -> FloatArray:
    """Returns float32[count]: the mean of ``values`` in each group, 0 in an empty one."""
    totals = np.bincount(groups, weights=values.astype(np.float64), minlength=count)
    return np.asarray(totals / np.maximum(np.bincount(groups, minlength=count), 1), np.float32)


def attributes(known: Past) -> Block:
    """All-time buyers; an item's price, quantity, basket size and destination and how they match the customer's; closeness of codes."""
    log, (users_n, items_n) = known.log, known.shape
    sizes = np.bincount(log.basket, minlength=int(log.basket.max()) + 1)
    measures = {"price": np.log(log.price), "quantity": np.log(log.quantity), "basket_size": np.log(sizes[log.basket])}
    of_item = {name: means(values, log.item, items_n) for name, values in measures.items()}
    of_user = {name: means(values, log.user, users_n) for name, values in measures.items()}
    sold = np.bincount(log.item, minlength=items_n)
    total = buyers(known, np.inf, new=False)
    abroad, destination = means(log.abroad, log.user, users_n), standard(np.sqrt(means(log.abroad, log.item, items_n)))
    plain = shared({"buyers_all": np.log1p(total), "repeats": np.log(sold / total), **of_item})
    matches = tuple(f"{name}_match" for name in measures)
    codes = code_block(known)

    def score(users: IntArray) -> tuple[FloatArray, ...]:
        gaps = (-np.abs(of_item[name] - of_user[name][users, None]) for name in measures)
        return *plain.score(users), destination, abroad[users, None] * destination, *gaps, *codes.score(users)

    return Block((*plain.names, "abroad", "abroad_match", *matches, *codes.names), score)


def item_numbers(items: Sequence[str]) -> npt.NDArray[np.int64]:
    """Returns the leading number of each item code; codes without one get numbers far from all others and from each other."""
    found = [re.match(r"\d{1,12}", item) for item in items]
    return np.array([int(match[0]) if match else -(10**6) * (place + 1) for place, match in enumerate(found)], np.int64)


def code_block(known: Past) -> Block:
    """The share of a customer's items in the item's family (codes equal but for the last two digits), and the closest code among them."""
    numbers = item_numbers(known.log.items)
    families = np.unique(numbers // 100, return_inverse=True)[1]
    same = (families[:, None] == families[None, :]).astype(np.float32)
    close = np.exp(-np.abs(numbers[:, None] - numbers[None, :]) / _CODE_REACH).astype(np.float32)
    bought = known.matrix()
    history = by_row(bought)

    def score(users: IntArray) -> tuple[FloatArray, ...]:
        return np.sqrt(history[users] @ same), strongest(close, bought[users])

    return Block(("family_share", "code_closest"), score)


def context(known: Past, *, recency: bool) -> FloatArray:
    """Returns float32[users, c]: log of baskets and items, mean log quantity and price, abroad; with ``recency`` the age of the last."""
    log, count = known.log, known.shape[0]
    first_rows = np.unique(log.basket, return_index=True)[1]
    newest = np.zeros(count, np.float32)
    newest[log.user] = known.age
    columns = [
        np.log1p(np.bincount(log.user[first_rows], minlength=count)),
        np.log1p(np.bincount(known.user, minlength=count)),
        means(np.log(log.quantity), log.user, count),
        means(np.log(log.price), log.user, count),
        means(log.abroad, log.user, count),
    ]
    return np.stack([*columns, np.log1p(newest)] if recency else columns, 1).astype(np.float32)
