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
class Utterance:
    """A message and what its writer wants; ``out_of_scope`` where it is nothing a shop could answer."""

    text: str
    intent: str


@dataclass(frozen=True)
class Shop:
    """A whole shop; events are ordered by time. The utterances are what `concord train intent` reads."""

    items: tuple[Item, ...]
    relations: tuple[Relation, ...]
    identities: tuple[Identity, ...]
    events: tuple[Event, ...]
    utterances: tuple[Utterance, ...] = ()
