"""Made-up purchase logs for the tests of the basket ranker."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd

from features.behaviour import MICROS_PER_DAY
from training.basket_log import PurchaseLog, purchase_log

START = datetime(2011, 1, 1, tzinfo=UTC)
_START_MICROS = int(START.timestamp()) * 1_000_000


def day(number: float) -> int:
    """Microseconds of Unix time at a day of the log."""
    return _START_MICROS + round(number * MICROS_PER_DAY)


def frame(rows: Iterable[tuple[str, str, float]], **columns: object) -> pd.DataFrame:
    """Purchases (customer, item, day); one basket a customer and day; one piece at 1.00, sold at home, unless columns say otherwise."""
    users, items, days = zip(*rows, strict=True)
    values = {
        "user": users,
        "item": items,
        "title": [f"title {item}" for item in items],
        "basket": [f"{user}@{when}" for user, when in zip(users, days, strict=True)],
        "time": [(START + timedelta(days=when)).replace(tzinfo=None) for when in days],
        "quantity": np.ones(len(users)),
        "price": np.ones(len(users)),
        "abroad": np.zeros(len(users), bool),
    }
    return pd.DataFrame(values | columns)


def log_of(rows: Iterable[tuple[str, str, float]], **columns: object) -> PurchaseLog:
    """The log of ``frame``."""
    return purchase_log(frame(rows, **columns))


def random_frame(*, customers: int = 40, items: int = 30, days: int = 100, seed: int = 0) -> pd.DataFrame:
    """Customers who buy a few of the items on a few days, at random."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"{20_000 + 7 * item}A", float(when))
        for user in range(customers)
        for when in np.unique(rng.integers(0, days, 5))
        for item in np.unique(rng.zipf(1.3, 4) % items)
    ]
    count = len(rows)
    return frame(rows, quantity=rng.integers(1, 9, count), price=rng.integers(1, 20, count) / 2.0, abroad=rng.random(count) < 0.2)


def chain_frame(*, customers: int = 120, items: int = 40, seed: int = 1) -> pd.DataFrame:
    """Customers who buy along a chain of items, two at a time, every ten days from a day of their own."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(customers):
        place, begin = int(rng.integers(items)), float(rng.integers(0, 10))
        for visit in range(12):
            rows += [(f"u{user}", f"{100 * ((place + 2 * visit + k) % items)}", begin + 10.0 * visit) for k in range(2)]
    return frame(rows)
