"""The event log as columns: who did what with which item, when, and on which visit."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
from psycopg import Connection
from psycopg.rows import TupleRow

from features.behaviour import ACTIONS, MICROS_PER_DAY
from features.item_table import IntArray, ItemTable

Micros = int
"""Microseconds of Unix time."""

_ACTION_CODE = {action: code for code, action in enumerate(ACTIONS)}
_EVENTS = """
SELECT user_id, item_id, action, (extract(epoch FROM occurred_at) * 1000000)::bigint, session_id
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
        item: int32[n], row in the item table, -1 for events without a known item.
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
    """Streams the event log into columns; items the table does not hold become -1."""
    users: dict[str, int] = {}
    visits: dict[tuple[int, str | int], int] = {}
    columns: tuple[list[int], ...] = ([], [], [], [], [])
    with connection.cursor(name="training_events") as cursor:
        cursor.itersize = 20_000
        for user_id, item_id, action, time, session_id in cursor.execute(_EVENTS):
            user = users.setdefault(user_id, len(users))
            visit = visits.setdefault((user, session_id or time // MICROS_PER_DAY), len(visits))
            for column, value in zip(columns, (user, table.rows.get(item_id, -1), _ACTION_CODE[action], time, visit), strict=True):
                column.append(value)
    user_c, item_c, action_c, time_c, visit_c = columns
    return EventLog(
        tuple(users),
        np.array(user_c, np.int32),
        np.array(item_c, np.int32),
        np.array(action_c, np.int8),
        np.array(time_c, np.int64),
        np.array(visit_c, np.int32),
    )
