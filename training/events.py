"""The event log as columns: who did what with which item, when, and on which visit."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
from psycopg import Connection
from psycopg.rows import TupleRow

from features.behaviour import ACTIONS, LIKED_FROM, MICROS_PER_DAY
from features.item_table import IntArray, ItemTable

Micros = int
"""Microseconds of Unix time."""

_ACTION_CODE = {action: code for code, action in enumerate(ACTIONS)}
# A low rating shows no interest in the item: it is none of what a label, or what similar customers did, is made of.
_EVENTS = """
SELECT user_id, CASE WHEN action IN ('rate', 'review') AND value < %(liked)s THEN NULL ELSE item_id END, action,
       (extract(epoch FROM occurred_at) * 1000000)::bigint, session_id
FROM events ORDER BY user_id, occurred_at, event_id
"""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_micros(moment: datetime) -> Micros:
    """Returns a time in microseconds of Unix time, exactly; a time without an offset is UTC."""
    delta = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_micros(time: Micros) -> datetime:
    """Returns the time (UTC) of what ``to_micros`` gave."""
    return _EPOCH + timedelta(microseconds=time)


@dataclass(frozen=True)
class EventLog:
    """All events of n rows, ordered by customer and then by time.

    Attributes:
        users: customer ids by code.
        user: int32[n], the customer's code.
        item: int32[n], row in the item table, -1 for events without a known item, and for ratings and reviews below ``LIKED_FROM``.
        action: int8[n], position in ``features.behaviour.ACTIONS``.
        time: int64[n], microseconds of Unix time.
        visit: int32[n], number of the visit: one session of one customer, or one day where events carry no session.
    """

    users: tuple[str, ...]
    user: IntArray
    item: IntArray
    action: npt.NDArray[np.int8]
    time: npt.NDArray[np.int64]
    visit: IntArray

    def __len__(self) -> int:
        return len(self.user)

    def has_action(self, actions: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Returns bool[n]: the events of these actions on a known item."""
        return np.isin(self.action, [_ACTION_CODE[action] for action in actions]) & (self.item >= 0)

    def window(self) -> tuple[Micros, Micros]:
        """Returns the times of the first and the last event.

        Raises:
            ValueError: there are no events.
        """
        if not len(self):
            raise ValueError("there are no events to train on")
        return int(self.time.min()), int(self.time.max())


def read_events(connection: Connection[TupleRow], table: ItemTable) -> EventLog:
    """Reads the event log into columns, 21 bytes an event; items the table does not hold become -1."""
    return _joined(list(stream_events(connection, table)))


def stream_events(connection: Connection[TupleRow], table: ItemTable, *, rows: int = 100_000) -> Iterator[EventLog]:
    """Yields the event log in pieces of whole customers with at least ``rows`` events each (the last excepted)."""
    piece = _Piece()
    with connection.cursor(name="training_events") as cursor:
        cursor.itersize = 20_000
        for user_id, item_id, action, time, session_id in cursor.execute(_EVENTS, {"liked": LIKED_FROM}):
            if len(piece.time) >= rows and user_id != piece.users[-1]:
                yield piece.log()
                piece = _Piece()
            piece.add(user_id, table.rows.get(item_id, -1), _ACTION_CODE[action], time=time, session_id=session_id)
    if piece.time:
        yield piece.log()


class _Piece:
    """Columns in the making."""

    def __init__(self) -> None:
        self.users: list[str] = []
        self.user, self.item, self.visit = array("i"), array("i"), array("i")
        self.action, self.time = array("b"), array("q")
        self._visits: dict[str | int, int] = {}
        self._visit_count = 0

    def add(self, user_id: str, item: int, action: int, *, time: Micros, session_id: str | None) -> None:
        if not self.users or user_id != self.users[-1]:
            self.users.append(user_id)
            self._visits = {}
        visit = self._visits.setdefault(session_id or time // MICROS_PER_DAY, self._visit_count)
        self._visit_count = max(self._visit_count, visit + 1)
        for column, value in ((self.user, len(self.users) - 1), (self.item, item), (self.visit, visit)):
            column.append(value)
        self.action.append(action)
        self.time.append(time)

    def log(self) -> EventLog:
        numbers = [np.array(column, np.int32) for column in (self.user, self.item, self.visit)]
        return EventLog(
            tuple(self.users), numbers[0], numbers[1], np.array(self.action, np.int8), np.array(self.time, np.int64), numbers[2]
        )


def _joined(pieces: list[EventLog]) -> EventLog:
    """Puts pieces together; customers and visits are numbered through."""
    users, visits = 0, 0
    user, visit = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for piece in pieces:
        user.append(piece.user + np.int32(users))
        visit.append(piece.visit + np.int32(visits))
        users, visits = users + len(piece.users), visits + int(piece.visit.max()) + 1
    return EventLog(
        tuple(name for piece in pieces for name in piece.users),
        np.concatenate(user),
        np.concatenate([np.zeros(0, np.int32), *(piece.item for piece in pieces)]),
        np.concatenate([np.zeros(0, np.int8), *(piece.action for piece in pieces)]),
        np.concatenate([np.zeros(0, np.int64), *(piece.time for piece in pieces)]),
        np.concatenate(visit),
    )
