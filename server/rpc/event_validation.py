"""Reads events: a malformed batch is refused as a whole, an event that breaks a rule of its own is rejected alone."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from concord.v1 import events_pb2, search_pb2
from server.domain import EventOutcome, IncomingEvent, SearchQuery, Stored
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
        received_at = self.now()
        return [self._event(event, index, received_at) for index, event in enumerate(events)]

    def search(self, request: search_pb2.SearchRequest) -> SearchQuery:
        """Reads a search and the event it is recorded as: none of a later page, nor where the caller skips it."""
        page = self.validator.search(request)
        if request.skip_recording or page.page_token:
            return SearchQuery(page, None)
        event = IncomingEvent(
            subject=page.subject,
            event_id=read_event_id(request.event_id) if request.event_id else self.new_event_id(),
            channel=page.channel,
            action="search",
            occurred_at=self.now(),
            text=request.query,
            session_id=rules.text(request.session_id, "session_id", most=rules.ID_CHARS) or None,
        )
        return SearchQuery(page, event)

    def _event(self, event: events_pb2.Event, index: int, received_at: datetime) -> IncomingEvent | EventOutcome:
        subject = event.subject
        if not subject.user_id and not subject.identity.channel_user_id:
            rule = "is required: a user_id or an identity"
            raise InvalidRequestError(f"events[{index}].subject", rule, reason="SUBJECT_REQUIRED")
        try:
            return self._read(event, received_at)
        except InvalidRequestError as error:
            return EventOutcome(Stored.REJECTED, reason=error.reason, field=f"events[{index}].{error.field}", message=error.rule)

    def _read(self, event: events_pb2.Event, received_at: datetime) -> IncomingEvent:
        """Reads one event; errors name the field in it."""
        subject = self.validator.subject(event.subject, "subject")
        action = _action(event)
        return IncomingEvent(
            subject=subject,
            event_id=read_event_id(event.event_id) if event.event_id else self.new_event_id(),
            # An event that names no channel happened in the one its subject was met in.
            channel=self.validator.channel(event.channel or subject.channel, "channel"),
            action=action,
            occurred_at=_occurred_at(event, received_at) if event.HasField("occurred_at") else received_at,
            item_id=_item_id(event.item_id, action),
            text=rules.text(event.text, "text", most=rules.EVENT_TEXT_CHARS, too_long="TEXT_TOO_LONG") if event.text else None,
            value=_value(event.value, action) if event.HasField("value") else None,
            quantity=_quantity(event.quantity) if event.HasField("quantity") else None,
            session_id=rules.text(event.session_id, "session_id", most=rules.ID_CHARS) if event.session_id else None,
            slate_id=rules.text(event.slate_id, "slate_id", most=rules.ID_CHARS) if event.slate_id else None,
        )


def canonical_id(text: str) -> str:
    """Returns an event id in canonical form; as it is when it is malformed."""
    return str(UUID(text)) if _UUID.match(text) else text


def read_event_id(text: str) -> UUID:
    """Reads an event id."""
    if not _UUID.match(text):
        raise InvalidRequestError("event_id", "must be a UUID", reason="EVENT_ID_INVALID")
    return UUID(text)


def _action(event: events_pb2.Event) -> str:
    if event.action not in ACTION_NAMES:
        raise InvalidRequestError("action", "is required: a known action", reason="ACTION_UNSPECIFIED")
    return ACTION_NAMES[event.action]


def _item_id(item_id: str, action: str) -> str | None:
    if not item_id and action not in _ABOUT_NO_ITEM:
        raise InvalidRequestError("item_id", f"is required for {action}", reason="ITEM_ID_REQUIRED")
    return rules.text(item_id, "item_id", most=rules.ID_CHARS) or None


def _value(value: float, action: str) -> float | None:
    """Only amounts and ratings mean something to the features; a value sent with another action is checked but not kept."""
    if action in _RATINGS:
        return rules.number(value, "value", least=1, most=5, reason="VALUE_INVALID")
    amount = rules.number(value, "value", least=0, most=rules.EVENT_NUMBER, reason="VALUE_INVALID")
    return amount if action in _AMOUNTS else None


def _quantity(quantity: float) -> float:
    return rules.number(quantity, "quantity", least=0, most=rules.EVENT_NUMBER, reason="QUANTITY_INVALID")


def _occurred_at(event: events_pb2.Event, received_at: datetime) -> datetime:
    moment = rules.moment(event.occurred_at, "occurred_at", reason="OCCURRED_AT_INVALID")
    if moment > received_at + rules.FUTURE:
        raise InvalidRequestError("occurred_at", "must not be more than one hour in the future", reason="OCCURRED_AT_IN_FUTURE")
    return moment
