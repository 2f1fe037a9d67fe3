"""Reads events: a malformed batch is refused as a whole, an event that breaks a rule of its own is rejected alone."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from concord.v1 import common_pb2, events_pb2
from server.domain import EventOutcome, IncomingEvent, Stored, Subject
from server.errors import InvalidRequestError
from server.rpc import rules
from server.rpc.translate import ACTION_NAMES
from server.rpc.validation import Validator

_UUID = re.compile(r"^([0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})\Z", re.IGNORECASE)
_ABOUT_NO_ITEM = {"search", "message"}
_RATINGS = {"rate", "review"}
_AMOUNTS = {"add_to_cart", "remove_from_cart", "purchase", "return"}


@dataclass(frozen=True)
class EventValidator:
    """Rules for events; ``now`` gives the time of receipt and ``new_event_id`` ids for events that bring none."""

    validator: Validator
    now: Callable[[], datetime]
    new_event_id: Callable[[], UUID]

    def events(self, events: Sequence[events_pb2.Event]) -> list[IncomingEvent | EventOutcome]:
        """Reads a batch: for each event, in order, the event itself or why it is rejected.

        Raises:
            InvalidRequestError: the batch is empty or too large, or an event has no subject.
        """
        rules.count(events, "events", most=rules.EVENTS, least=1)
        for index, event in enumerate(events):
            _has_subject(event.subject, f"events[{index}].subject")
        received_at = self.now()
        return [self._event(event, f"events[{index}]", received_at) for index, event in enumerate(events)]

    def _event(self, event: events_pb2.Event, field: str, received_at: datetime) -> IncomingEvent | EventOutcome:
        try:
            return self._read(event, field, received_at)
        except InvalidRequestError as error:
            return EventOutcome(Stored.REJECTED, reason=error.reason, field=error.field, message=error.rule)

    def _read(self, event: events_pb2.Event, field: str, received_at: datetime) -> IncomingEvent:
        subject = self.validator.subject(event.subject, f"{field}.subject")
        action = _action(event, f"{field}.action")
        return IncomingEvent(
            subject=subject,
            event_id=_event_id(event.event_id, f"{field}.event_id") if event.event_id else self.new_event_id(),
            channel=self._channel(event.channel, subject, f"{field}.channel"),
            action=action,
            occurred_at=_occurred_at(event, f"{field}.occurred_at", received_at),
            item_id=_item_id(event.item_id, action, f"{field}.item_id"),
            text=rules.text(event.text, f"{field}.text", most=rules.EVENT_TEXT_CHARS, too_long="TEXT_TOO_LONG") or None,
            value=_value(event, action, f"{field}.value"),
            quantity=_quantity(event, f"{field}.quantity"),
            session_id=rules.text(event.session_id, f"{field}.session_id", most=rules.ID_CHARS) or None,
            slate_id=rules.text(event.slate_id, f"{field}.slate_id", most=rules.ID_CHARS) or None,
        )

    def _channel(self, name: str, subject: Subject, field: str) -> str:
        """An event that names no channel happened in the one its subject was met in."""
        return self.validator.channel(name or subject.channel, field)


def canonical_id(text: str) -> str:
    """Returns an event id in canonical form; as it is when it is malformed."""
    return str(UUID(text)) if _UUID.match(text) else text


def _has_subject(subject: common_pb2.Subject, field: str) -> None:
    if not subject.user_id and not subject.identity.channel_user_id:
        raise InvalidRequestError(field, "is required: a user_id or an identity", reason="SUBJECT_REQUIRED")


def _event_id(text: str, field: str) -> UUID:
    if not _UUID.match(text):
        raise InvalidRequestError(field, "must be a UUID", reason="EVENT_ID_INVALID")
    return UUID(text)


def _action(event: events_pb2.Event, field: str) -> str:
    if event.action not in ACTION_NAMES:
        raise InvalidRequestError(field, "is required: a known action", reason="ACTION_UNSPECIFIED")
    return ACTION_NAMES[event.action]


def _item_id(item_id: str, action: str, field: str) -> str | None:
    if not item_id and action not in _ABOUT_NO_ITEM:
        raise InvalidRequestError(field, f"is required for {action}", reason="ITEM_ID_REQUIRED")
    return rules.text(item_id, field, most=rules.ID_CHARS) or None


def _value(event: events_pb2.Event, action: str, field: str) -> float | None:
    """Only amounts and ratings mean something to the features; a value sent with another action is checked but not kept."""
    if not event.HasField("value"):
        return None
    if action in _RATINGS:
        return rules.number(event.value, field, least=1, most=5, reason="VALUE_INVALID")
    value = rules.number(event.value, field, least=0, most=rules.EVENT_NUMBER, reason="VALUE_INVALID")
    return value if action in _AMOUNTS else None


def _quantity(event: events_pb2.Event, field: str) -> float | None:
    return (
        rules.number(event.quantity, field, least=0, most=rules.EVENT_NUMBER, reason="QUANTITY_INVALID")
        if event.HasField("quantity")
        else None
    )


def _occurred_at(event: events_pb2.Event, field: str, received_at: datetime) -> datetime:
    if not event.HasField("occurred_at"):
        return received_at
    moment = rules.moment(event.occurred_at, field, reason="OCCURRED_AT_INVALID")
    if moment > received_at + rules.FUTURE:
        raise InvalidRequestError(field, "must not be more than one hour in the future", reason="OCCURRED_AT_IN_FUTURE")
    return moment
