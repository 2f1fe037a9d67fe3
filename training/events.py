"""The event log as columns, and labels from it: what a customer turned to on a visit, given only what came before."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

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


@dataclass(frozen=True)
class Label:
    """What one customer turned to on one visit.

    Attributes:
        user_id: the customer.
        time: everything known of the customer and the shop must be from strictly before this, microseconds of Unix time.
        items: rows of the target items, none of them bought before.
        bought: rows of all items bought before ``time``.
    """

    user_id: str
    time: Micros
    items: tuple[int, ...]
    bought: frozenset[int]


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


def visit_labels(log: EventLog, actions: Sequence[str], *, start: Micros, end: Micros) -> list[Label]:
    """Returns one label per visit that began in [start, end) and turned to new items, in order of time.

    The label's time is the visit's first event, so nothing the customer did on the visit itself is known. A visit of a
    customer without earlier events is left out, and so are targets after ``end``.
    """
    wanted = log.has_action(actions)
    bought_now = log.has_action(("purchase",))
    labels: list[Label] = []
    for span in _customers(log):
        bought: set[int] = set()
        for visit in _visits(log, span):
            began = int(log.time[visit.start])
            if start <= began < end and visit.start > span.start:
                inside = np.flatnonzero(wanted[visit] & (log.time[visit] < end)) + visit.start
                items = tuple(dict.fromkeys(int(row) for row in log.item[inside] if int(row) not in bought))
                if items:
                    labels.append(Label(log.users[log.user[span.start]], began, items, frozenset(bought)))
            bought.update(log.item[visit][bought_now[visit]].tolist())
    labels.sort(key=lambda label: (label.time, label.user_id))
    return labels


def holdout_labels(log: EventLog, actions: Sequence[str], *, cut: Micros) -> list[Label]:
    """Returns for every customer with a past the first visit after the cut that holds one of ``actions``; time is the cut.

    ``items`` are its new items and may be empty: such a customer is ranked for but not measured. As in next-basket
    evaluation, only the customer's past before the cut is known, whatever happened between the cut and that visit.
    """
    wanted = log.has_action(actions) & (log.time >= cut)
    bought_before = log.has_action(("purchase",)) & (log.time < cut)
    labels: list[Label] = []
    for span in _customers(log):
        after = np.flatnonzero(wanted[span])
        if log.time[span.start] >= cut or not len(after):
            continue
        first = log.visit[span.start + after[0]]
        inside = span.start + after[log.visit[span.start + after] == first]
        bought = frozenset(log.item[span][bought_before[span]].tolist())
        items = tuple(dict.fromkeys(int(row) for row in log.item[inside] if int(row) not in bought))
        labels.append(Label(log.users[log.user[span.start]], cut, items, bought))
    return labels


def _customers(log: EventLog) -> list[slice]:
    edges = np.flatnonzero(np.diff(log.user)) + 1
    bounds = [0, *edges.tolist(), len(log)]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def _visits(log: EventLog, span: slice) -> list[slice]:
    edges = np.flatnonzero(np.diff(log.visit[span])) + 1 + span.start
    bounds = [span.start, *edges.tolist(), span.stop]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
