"""A shop's purchases as columns, what was known of them at a cut, and the new baskets that came next."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from features.behaviour import MICROS_PER_DAY
from features.item_table import FloatArray, IntArray
from training.events import Micros


@dataclass(frozen=True)
class PurchaseLog:
    """Purchases, n rows in the order of time.

    Customers, items and baskets are numbered by their first row, so that those known before any cut are a prefix of them all.

    Attributes:
        users, items: ids by number.
        titles: of the items, as their first row gives them: a title never changes by what comes later.
        user, item, basket: int32[n], numbers of the customer, the item and the invoice.
        time: int64[n], microseconds of Unix time, ascending.
        quantity: float32[n], pieces, above 0.
        price: float32[n], of one piece, above 0.
        abroad: bool[n], whether it was sold to a customer abroad.
    """

    users: tuple[str, ...]
    items: tuple[str, ...]
    titles: tuple[str, ...]
    user: IntArray
    item: IntArray
    basket: IntArray
    time: npt.NDArray[np.int64]
    quantity: FloatArray
    price: FloatArray
    abroad: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.user)

    def before(self, cut: Micros) -> "PurchaseLog":
        """Returns the purchases strictly before ``cut`` and the customers and items that they name.

        Raises:
            ValueError: there are none.
        """
        n = int(np.searchsorted(self.time, cut))
        if not n:
            raise ValueError("there are no purchases before the cut")
        users, items = int(self.user[:n].max()) + 1, int(self.item[:n].max()) + 1
        columns = {name: getattr(self, name)[:n] for name in ("user", "item", "basket", "time", "quantity", "price", "abroad")}
        return PurchaseLog(users=self.users[:users], items=self.items[:items], titles=self.titles[:items], **columns)


def purchase_log(frame: pd.DataFrame) -> PurchaseLog:
    """Returns the log of a frame with the columns user, item, title, basket, time, quantity, price and abroad, in any order of time."""
    frame = frame.sort_values("time", kind="stable")
    user, users = pd.factorize(frame["user"])
    item, items = pd.factorize(frame["item"])
    first = np.unique(item, return_index=True)[1]
    return PurchaseLog(
        users=tuple(map(str, users)),
        items=tuple(map(str, items)),
        titles=tuple(map(str, frame["title"].to_numpy()[first])),
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        basket=pd.factorize(frame["basket"])[0].astype(np.int32),
        time=frame["time"].to_numpy().astype("datetime64[us]").astype(np.int64),
        quantity=frame["quantity"].to_numpy(np.float32),
        price=frame["price"].to_numpy(np.float32),
        abroad=frame["abroad"].to_numpy(np.bool_),
    )


@dataclass(frozen=True)
class Past:
    """What is known at a cut: the purchases before it, and its p different pairs of customer and item, ordered by customer and item.

    Attributes:
        log: the purchases before the cut.
        age: float32[n], days from each purchase to the cut.
        user, item: int32[p], the pairs.
        first, last: int64[p], rows of a pair's first and last purchase.
    """

    log: PurchaseLog
    age: FloatArray
    user: IntArray
    item: IntArray
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """Customers and items."""
        return len(self.log.users), len(self.log.items)

    def matrix(self, values: npt.NDArray[np.generic] | None = None) -> sp.csr_matrix:
        """Returns sparse float32[users, items] with one value a pair, 1 unless given; zeros are not stored."""
        data = np.ones(len(self.user), np.float32) if values is None else values.astype(np.float32)
        matrix = sp.csr_matrix((data, (self.user, self.item)), self.shape)
        matrix.eliminate_zeros()
        return matrix

    def decayed(self, half_life_days: float) -> sp.csr_matrix:
        """Returns sparse float32[users, items]: 1 for a pair just bought, halved with every half-life since its last purchase."""
        return self.matrix(0.5 ** (self.age[self.last] / half_life_days))

    def last_baskets(self) -> sp.csr_matrix:
        """Returns sparse float32[users, items]: 1 for the items of each customer's last basket."""
        newest = np.zeros(self.shape[0], np.int32)
        newest[self.log.user] = self.log.basket
        rows = self.log.basket == newest[self.log.user]
        return binary(self.log.user[rows], self.log.item[rows], self.shape)


def past(log: PurchaseLog, cut: Micros) -> Past:
    """Returns what is known at ``cut``.

    Raises:
        ValueError: nothing is.
    """
    known = log.before(cut)
    keys = known.user.astype(np.int64) * len(known.items) + known.item
    pairs, first = np.unique(keys, return_index=True)
    last = len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1]
    age = ((cut - known.time) / MICROS_PER_DAY).astype(np.float32)
    user, item = np.divmod(pairs, len(known.items))
    return Past(known, age, user.astype(np.int32), item.astype(np.int32), first, last)


def binary(rows: IntArray, columns: IntArray, shape: tuple[int, int]) -> sp.csr_matrix:
    """Returns sparse float32 of a shape with 1 in the given places, however often they are given."""
    matrix = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)
    matrix.data[:] = 1.0
    return matrix


@dataclass(frozen=True)
class NewBaskets:
    """The labels of l customers.

    Attributes:
        user: int32[l], customers known at the cut.
        time: int64[l], when the basket was bought.
        wanted: sparse float32[l, items], 1 for what was new to the customer in it.
    """

    user: IntArray
    time: npt.NDArray[np.int64]
    wanted: sp.csr_matrix


def next_new_baskets(log: PurchaseLog, known: Past, *, cut: Micros, until: Micros) -> NewBaskets:
    """Returns what known customers newly bought with their first invoice in [cut, until): items sold before, never to this customer.

    Customers whose first invoice holds nothing of the kind are left out.
    """
    start, end = np.searchsorted(log.time, [cut, until])
    user, item, basket = (column[start:end] for column in (log.user, log.item, log.basket))
    customers, first = np.unique(user, return_index=True)
    in_first = basket == basket[first][np.searchsorted(customers, user)]
    old = in_first & (user < known.shape[0]) & (item < known.shape[1])
    wanted = binary(user[old], item[old], known.shape)
    wanted = sp.csr_matrix(wanted - wanted.multiply(known.matrix()))
    wanted.eliminate_zeros()
    rows = np.flatnonzero(np.diff(wanted.indptr))
    times = log.time[start:end][first]
    return NewBaskets(rows.astype(np.int32), times[np.searchsorted(customers, rows)], wanted[rows])
