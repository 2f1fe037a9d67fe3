"""What a customer did, as values: behaviours, the activity they add up to, and the text the encoder reads of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

ACTIONS = (
    "view",
    "click",
    "search",
    "add_to_cart",
    "remove_from_cart",
    "purchase",
    "return",
    "rate",
    "review",
    "wishlist",
    "message",
)

# How strongly an action says "this interests me", relative to a purchase. A return or a removal says the opposite, once.
ACTION_WEIGHT = {
    "purchase": 1.0,
    "add_to_cart": 0.8,
    "wishlist": 0.7,
    "rate": 0.5,
    "review": 0.5,
    "click": 0.4,
    "view": 0.3,
    "remove_from_cart": 0.0,
    "return": 0.0,
    "search": 0.0,
    "message": 0.0,
}

_VERB = {
    "view": "viewed",
    "click": "viewed",
    "search": "searched",
    "add_to_cart": "added",
    "remove_from_cart": "removed",
    "purchase": "bought",
    "return": "returned",
    "rate": "rated",
    "review": "reviewed",
    "wishlist": "wished for",
    "message": "asked",
}

MICROS_PER_DAY = 86_400_000_000

# Behaviours that the ``user_activity`` view holds, online and offline; the SQL function user_activity_at says so too.
ACTIVITY_LENGTH = 50


@dataclass(frozen=True)
class Behaviour:
    """One thing a customer did. ``item_id`` is empty for searches and messages; ``occurred_at`` is in microseconds of Unix time."""

    item_id: str
    action: str
    channel: str
    occurred_at: int
    text: str = ""


@dataclass(frozen=True)
class Activity:
    """A customer's recent behaviours across all channels, as of one user_version.

    Attributes:
        version: the user_version this activity reflects.
        behaviours: at most ACTIVITY_LENGTH (50), newest first; ties in time are ordered by event id.
        purchased_items: distinct items ever bought, most recent first, at most 300.
        purchased_days: day (since 1970) of the last purchase of each of ``purchased_items``.
    """

    version: int
    behaviours: tuple[Behaviour, ...] = ()
    purchased_items: tuple[str, ...] = ()
    purchased_days: tuple[int, ...] = ()

    @property
    def newest(self) -> int:
        """Time of the newest behaviour in microseconds of Unix time, 0 when there is none."""
        return self.behaviours[0].occurred_at if self.behaviours else 0

    def with_context(self, item_ids: Sequence[str], channel: str) -> "Activity":
        """Returns this activity as if ``item_ids`` had just been viewed: what a product page or cart adds to the sequence."""
        viewed = tuple(Behaviour(item, "view", channel, self.newest) for item in item_ids)
        return Activity(self.version, viewed + self.behaviours, self.purchased_items, self.purchased_days)


def behaviour_text(activity: Activity, describe: Callable[[str], str | None], *, limit: int = 16) -> str:
    """Writes a behaviour sequence out as the text the user tower reads, newest first.

    Repeated behaviours on one item are written once, with the strongest verb (view, click, add, buy of one item is one
    purchase): on 64 tokens that doubles the number of distinct items seen. Items ``describe`` does not know are left out.

    Args:
        activity: the customer's behaviours.
        describe: item id to its title, None for an unknown item.
        limit: how many phrases at the most.
    """
    phrases: list[str] = []
    for behaviour in _strongest(activity.behaviours):
        subject = describe(behaviour.item_id) if behaviour.item_id else behaviour.text
        if subject:
            phrases.append(f"{_VERB[behaviour.action]} {subject}")
        if len(phrases) == limit:
            break
    return "; ".join(phrases)


def _strongest(behaviours: Sequence[Behaviour]) -> Iterator[Behaviour]:
    """Yields one behaviour per item (its strongest), and every search or message, in order of first appearance."""
    best: dict[str, Behaviour] = {}
    for position, behaviour in enumerate(behaviours):
        key = behaviour.item_id or f"\x00{position}"
        kept = best.get(key)
        if kept is None or ACTION_WEIGHT[behaviour.action] > ACTION_WEIGHT[kept.action]:
            best[key] = behaviour
    yield from best.values()
