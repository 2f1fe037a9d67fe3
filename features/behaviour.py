"""What a customer did, as values: behaviours, the activity they add up to, and the text the encoder reads of them."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

# In the order of the enum Action of protos/concord/v1/common.proto, which begins at 1.
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
# By number: what the enum does not have is 0 in a state, as it is in the enum.
_ACTION_OF_CODE = ("unspecified", *ACTIONS)

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

# Ratings from here on count as interest in the item, those below do not: 1 and 2 of 5 say that it was a mistake.
LIKED_FROM = 3.0
OPINIONS = ("rate", "review")
# Actions whose words say more than the item they are about.
WRITTEN = (*OPINIONS, "message")
# Of such words in the behaviour text: some 15 tokens of the 64 or 96 that are read, as much as one more item takes.
_SAID_CHARS = 60
# As the SQL function user_activity_at writes it.
_RATED = re.compile(r"\A([1-5](?:\.[0-9])?) of 5(?:: |\Z)")

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
    """One thing a customer did.

    Attributes:
        item_id: empty for searches and messages.
        action: one of ``ACTIONS``.
        channel: where.
        occurred_at: microseconds of Unix time.
        text: what was searched or written, at most 160 characters; a rating comes first: "4 of 5", "4 of 5: soft but small".
    """

    item_id: str
    action: str
    channel: str
    occurred_at: int
    text: str = ""

    @property
    def rating(self) -> float | None:
        """How the item was rated, 1 to 5; None where that is not known, or nothing was rated."""
        rated = _RATED.match(self.text) if self.action in OPINIONS else None
        return float(rated[1]) if rated else None

    @property
    def words(self) -> str:
        """What the customer wrote, without the rating."""
        return _RATED.sub("", self.text) if self.action in OPINIONS else self.text

    @property
    def interest(self) -> float:
        """Its weight among ``ACTION_WEIGHT``; a rating below ``LIKED_FROM`` shows none."""
        rating = self.rating
        return 0.0 if rating is not None and rating < LIKED_FROM else ACTION_WEIGHT.get(self.action, 0.0)


# Columns of the ``user_activity`` view that make up behaviours, in the order of ``behaviours_of``.
BEHAVIOUR_COLUMNS = ("recent_items", "recent_action_codes", "recent_channels", "recent_times", "recent_texts")


def behaviours_of(
    items: Iterable[str], action_codes: Iterable[int], channels: Iterable[str], times: Iterable[int], texts: Iterable[str]
) -> tuple[Behaviour, ...]:
    """Returns the behaviours of columns of equal length, ``BEHAVIOUR_COLUMNS``.

    Raises:
        ValueError: the columns differ in length.
        IndexError: a number is of no action that this release knows.
    """
    actions = map(_ACTION_OF_CODE.__getitem__, action_codes)
    return tuple(Behaviour(*row) for row in zip(items, actions, channels, times, texts, strict=True))


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
    purchase): on 64 tokens that doubles the number of distinct items seen. What the customer said of the item last follows it,
    "bought red mug: 2 of 5: chipped". Items ``describe`` does not know are left out.

    Args:
        activity: the customer's behaviours.
        describe: item id to its title, None for an unknown item.
        limit: how many phrases at the most.
    """
    phrases: list[str] = []
    said: dict[str, str] = {}
    for behaviour in activity.behaviours:
        if behaviour.item_id and behaviour.action in WRITTEN and behaviour.text:
            said.setdefault(behaviour.item_id, f": {behaviour.text[:_SAID_CHARS]}")
    for behaviour in _strongest(activity.behaviours):
        subject = describe(behaviour.item_id) if behaviour.item_id else behaviour.text
        if subject:
            phrases.append(f"{_VERB[behaviour.action]} {subject}{said.get(behaviour.item_id, '')}")
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
