"""The sample shop: a whole shop, with customers whose next purchase can be told from their own past but not from what sells best."""

from datetime import datetime, timedelta
from typing import Literal

import numpy as np

from features.sample_shop.catalogue import HISTORY_DAYS, relate, stock_shelves
from features.sample_shop.customers import make_customer
from features.sample_shop.sessions import Life, Shelves
from features.sample_shop.shop import Event, Identity, Shop
from features.sample_shop.utterances import utterances

SESSIONS_PER_USER = 9.0
_CATALOGUE, _CUSTOMERS = 0, 1  # streams of randomness


def generate(seed: int, *, end: datetime, language: Literal["en", "zh"] = "en", users: int = 1500, items: int = 648) -> Shop:
    """Makes a shop; the same arguments always make the same one, on any machine.

    Args:
        seed: a shop's number, at least 0.
        end: the history covers the 90 days before the midnight (UTC) that ``end`` falls on, and is the same but for that shift.
        language: of titles, brands, categories, searches, reviews and messages; it decides the currency too (USD or CNY).
        users: customers.
        items: items, at most 5,184.

    Raises:
        ValueError: ``end`` has no time zone, or there are too many items.
    """
    if end.tzinfo is None:
        raise ValueError("end needs a time zone")
    start = end.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=HISTORY_DAYS)
    entries = stock_shelves(np.random.default_rng([seed, _CATALOGUE]), items, start=start, language=language)
    shelves = Shelves(entries)
    identities: list[Identity] = []
    events: list[Event] = []
    for number in range(1, users + 1):
        rng = np.random.default_rng([seed, _CUSTOMERS, number])
        customer = make_customer(rng, number, sessions=SESSIONS_PER_USER)
        identities.extend(customer.identities)
        events.extend(Life(rng, customer, shelves, start=start, language=language).events())
    events.sort(key=lambda event: (event.occurred_at, event.event_id))
    stocked = tuple(entry.item for entry in entries)
    said = utterances(stocked, seed, language=language) if stocked else ()
    return Shop(stocked, tuple(relate(entries)), tuple(identities), tuple(events), said)
