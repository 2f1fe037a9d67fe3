"""One visit of a customer to a channel: a session whose events follow each other in time."""

from datetime import datetime, timedelta
from uuid import UUID

from features.sample_shop.catalogue import ShelfItem
from features.sample_shop.dice import Dice
from features.sample_shop.shop import Event, Identity

_MICROS = 1_000_000
_VALUED = ("add_to_cart", "remove_from_cart", "purchase", "return")


class Visit:
    """Writes down what happens in a session; every event takes place some seconds after the one before."""

    def __init__(self, dice: Dice, identity: Identity, session_id: str, when: datetime) -> None:
        self._dice = dice
        self.identity, self.session_id, self.when = identity, session_id, when
        self.events: list[Event] = []

    def act(self, action: str, entry: ShelfItem | None = None, *, quantity: int | None = None, text: str | None = None) -> None:
        """Adds an event; cart, purchase and return carry the line's amount."""
        value = None
        if action in _VALUED and entry is not None and entry.item.price_micros is not None:
            value = entry.item.price_micros * (quantity or 1) / _MICROS
        self._add(action, entry, text=text, value=value, quantity=None if quantity is None else float(quantity))

    def rate(self, entry: ShelfItem, stars: int, review: str | None) -> None:
        """Adds a rating from 1 to 5, and the review when there is one."""
        self._add("rate", entry, text=None, value=float(stars), quantity=None)
        if review is not None:
            self._add("review", entry, text=review, value=float(stars), quantity=None)

    def later(self, days: float) -> "Visit":
        """Returns a session in the same channel some days on."""
        when = self.when + timedelta(seconds=round(days * 86_400))
        return Visit(self._dice, self.identity, f"{self.session_id}-after", when)

    def _add(self, action: str, entry: ShelfItem | None, *, text: str | None, value: float | None, quantity: float | None) -> None:
        self.when += timedelta(milliseconds=int(self._dice.between(4_000, 120_000)))
        self.events.append(
            Event(
                event_id=str(UUID(bytes=self._dice.rng.bytes(16), version=4)),
                user_id=self.identity.user_id,
                channel=self.identity.channel,
                channel_user_id=self.identity.channel_user_id,
                action=action,
                item_id=entry.item.item_id if entry else None,
                text=text,
                value=value,
                quantity=quantity,
                session_id=self.session_id,
                occurred_at=self.when,
            )
        )
