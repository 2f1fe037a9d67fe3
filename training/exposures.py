"""What customers were shown before a visit and did not take, from the journal of answers."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from psycopg import Connection
from psycopg.rows import TupleRow

from features.item_table import ItemTable
from training.events import EventLog, Micros
from training.labels import TAKEN, Label

# Shown most recently; a slate has at most some hundred items, and what was shown months ago says little.
_SHOWN_PER_LABEL = 64
# Exposures keep the customer and the persona of the time of the answer; since then personas may have been merged or parted.
_SHOWN = """
SELECT coalesce(u.merged_into, u.user_id) AS customer, (extract(epoch FROM e.answered_at) * 1000000)::bigint, e.item_ids
FROM exposures e JOIN users u ON u.user_id = coalesce(e.origin_id, e.user_id)
ORDER BY customer, e.answered_at, e.exposure_id
"""


def with_exposures(connection: Connection[TupleRow], labels: Sequence[Label], table: ItemTable, log: EventLog) -> list[Label]:
    """Returns the labels with what their customers were shown strictly before them and had not taken, newest first.

    The journal is streamed, one customer at a time. An item counts as taken by a purchase, an addition to a cart or a wish of the
    customer before the label or on its visit.
    """
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label.user_id, []).append(place)
    taken = _Taken(log)
    found = list(labels)
    for customer, answers in _answers(connection):
        for place in places.get(customer, ()):
            label = labels[place]
            gone = {*label.bought, *label.items, *label.taken, *taken.before(customer, label.time)}
            found[place] = replace(label, shown=_shown(answers, label.time, table, gone))
    return found


def _answers(connection: Connection[TupleRow]) -> Iterator[tuple[str, list[tuple[Micros, list[str]]]]]:
    """Yields each customer's answers, oldest first."""
    with connection.cursor(name="training_exposures") as cursor:
        cursor.itersize = 5_000
        for customer, rows in itertools.groupby(cursor.execute(_SHOWN), key=lambda row: str(row[0])):
            yield customer, [(row[1], row[2]) for row in rows]


def _shown(answers: Sequence[tuple[Micros, list[str]]], time: Micros, table: ItemTable, gone: set[int]) -> tuple[int, ...]:
    shown: dict[int, None] = {}
    for at, items in reversed(answers):
        if at < time:
            shown |= dict.fromkeys(row for item in items if (row := table.rows.get(item)) is not None and row not in gone)
        if len(shown) >= _SHOWN_PER_LABEL:
            break
    return tuple(shown)[:_SHOWN_PER_LABEL]


class _Taken:
    """Items that customers took, by time."""

    def __init__(self, log: EventLog) -> None:
        rows = np.flatnonzero(log.has_action(TAKEN))
        self._user, self._item, self._time = log.user[rows], log.item[rows], log.time[rows]
        self._code = {name: code for code, name in enumerate(log.users)}

    def before(self, customer: str, time: Micros) -> list[int]:
        begin, end = np.searchsorted(self._user, [self._code[customer], self._code[customer] + 1])
        last = begin + int(np.searchsorted(self._time[begin:end], time))
        return [int(row) for row in self._item[begin:last]]
