"""What a sample shop is made of."""

from dataclasses import dataclass
from datetime import datetime

from features.catalogue import Item, Relation


@dataclass(frozen=True)
class Identity:
    """A channel's own name for a customer."""

    channel: str
    channel_user_id: str
    user_id: str


@dataclass(frozen=True)
class Event:
    """One thing a customer did. ``value`` is the amount of the line in major units, or a rating from 1 to 5."""

    event_id: str
    user_id: str
    channel: str
    channel_user_id: str
    action: str
    item_id: str | None
    text: str | None
    value: float | None
    quantity: float | None
    session_id: str
    occurred_at: datetime


@dataclass(frozen=True)
class Shop:
    """A whole shop; events are ordered by time."""

    items: tuple[Item, ...]
    relations: tuple[Relation, ...]
    identities: tuple[Identity, ...]
    events: tuple[Event, ...]
