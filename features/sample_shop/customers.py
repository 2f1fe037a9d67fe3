"""The sample shop's customers: what they like, how much they spend, which channels they use, and how that drifts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from features.sample_shop.shop import Identity
from features.sample_shop.vocabulary import DEPARTMENTS

# Share of customers' channel use; two to four channels a customer.
CHANNEL_SHARES = {"web": 0.26, "app": 0.24, "mini_program": 0.14, "social": 0.10, "messaging": 0.09, "call_centre": 0.06, "store": 0.11}
_SHELVES_PER_DEPARTMENT = 3


@dataclass(frozen=True)
class Taste:
    """A customer's taste.

    Attributes:
        shelves: liked sub-categories, the most liked first.
        weights: how much each is liked, adding up to 1.
        brands: preferred brand of each (0 cheap, 2 dear).
        loyalty: chance to stay with it.
    """

    shelves: tuple[int, ...]
    weights: tuple[float, ...]
    brands: tuple[int, ...]
    loyalty: float


@dataclass(frozen=True)
class Customer:
    """A customer and their ways.

    Attributes:
        tastes: before and after the drift.
        drift_day: day of the history on which the taste changes.
        session_count: sessions over the whole history.
        identities: channel to the name it has for the customer, in order of use.
        channel_weights: share of each of those channels.
        eagerness: chance that a session ends with a purchase.
    """

    user_id: str
    tastes: tuple[Taste, Taste]
    drift_day: float
    session_count: int
    identities: tuple[Identity, ...]
    channel_weights: tuple[float, ...]
    eagerness: float

    def taste(self, day: float) -> Taste:
        """Returns the taste on a day of the history."""
        return self.tastes[day >= self.drift_day]


def make_customer(rng: np.random.Generator, number: int, *, sessions: float) -> Customer:
    """Draws customer ``number``, who comes about ``sessions`` times."""
    user_id = f"u{number:05d}"
    before = _taste(rng)
    channels = _channels(rng)
    return Customer(
        user_id=user_id,
        tastes=(before, _drifted(rng, before)),
        drift_day=float(rng.uniform(25, 110)),  # one in four keeps the taste over the 90 days
        session_count=2 + int(rng.gamma(2.0, (sessions - 2) / 2.0)),
        identities=tuple(Identity(channel, _channel_user_id(rng, channel, number), user_id) for channel in channels),
        channel_weights=_normalised(rng.gamma(1.0, 1.0, len(channels)) + 0.05),
        eagerness=float(rng.beta(6, 4)),
    )


def _taste(rng: np.random.Generator) -> Taste:
    """Draws two to four shelves, neighbours in a department more often than not, with one price level throughout."""
    total = len(DEPARTMENTS) * _SHELVES_PER_DEPARTMENT
    shelves = [int(rng.integers(total))]
    while len(shelves) < 2 + int(rng.integers(3)):
        shelves.append(_another(rng, shelves, total))
    weights = _normalised(np.sort(rng.dirichlet(np.full(len(shelves), 2.0)))[::-1])
    level = int(rng.integers(3))
    brands = tuple(level if rng.random() < 0.8 else int(rng.integers(3)) for _ in shelves)
    return Taste(tuple(shelves), weights, brands, float(rng.uniform(0.65, 0.95)))


def _another(rng: np.random.Generator, known: Sequence[int], total: int) -> int:
    while True:
        department = known[0] // _SHELVES_PER_DEPARTMENT
        near = department * _SHELVES_PER_DEPARTMENT + int(rng.integers(_SHELVES_PER_DEPARTMENT))
        shelf = near if rng.random() < 0.5 else int(rng.integers(total))
        if shelf not in known:
            return shelf


def _drifted(rng: np.random.Generator, taste: Taste) -> Taste:
    """Returns the taste with its least liked shelf given up for a new one, which is now the second most liked."""
    kept = taste.shelves[:-1]
    new = _another(rng, taste.shelves, len(DEPARTMENTS) * _SHELVES_PER_DEPARTMENT)
    return Taste((kept[0], new, *kept[1:]), taste.weights, (taste.brands[0], taste.brands[0], *taste.brands[1:-1]), taste.loyalty)


def _channels(rng: np.random.Generator) -> list[str]:
    names = list(CHANNEL_SHARES)
    return [str(name) for name in rng.choice(names, size=2 + int(rng.integers(3)), replace=False, p=list(CHANNEL_SHARES.values()))]


def _channel_user_id(rng: np.random.Generator, channel: str, number: int) -> str:
    """Returns an id as such a channel makes them; the customer's number keeps it unique."""
    noise = rng.bytes(6).hex()
    return {
        "web": f"visitor-{noise}{number:05d}",
        "app": f"device-{noise[:8]}-{number:05d}",
        "mini_program": f"openid_{noise}{number:05d}",
        "social": f"@shopper{number:05d}",
        "messaging": f"chat-{number:05d}-{noise[:4]}",
        "call_centre": f"caller-{number:06d}",
        "store": f"card-{noise[:4]}-{number:06d}",
    }[channel]


def _normalised(weights: np.ndarray) -> tuple[float, ...]:
    return tuple(float(weight) for weight in weights / weights.sum())
