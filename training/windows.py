"""What the sequence tower learns from: stretches of a customer's activity, and which items each step of one should foresee."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.behaviour import ACTIVITY_LENGTH
from features.sequence import BehaviourSequence
from training.events import EventLog, Micros
from training.labels import Label
from training.sequence import Rows
from training.sequence_fit import Steps


@dataclass(frozen=True)
class Window:
    """The newest behaviours of a customer as of a time, as the online feature held them then.

    Attributes:
        user_id: the customer.
        time: what happened strictly before it is in the window, microseconds of Unix time.
        foreseen: for each event of the window, oldest first, the new items of the next visit that has some; empty for none.
    """

    user_id: str
    time: Micros
    foreseen: tuple[tuple[int, ...], ...]


def training_windows(log: EventLog, labels: Sequence[Label], *, until: Micros, read: int) -> list[Window]:
    """Returns windows that cover every customer's events before ``until``, in order of time.

    Every step of a visit foresees the items of the next one that is a label, as the tower will be asked to in service; what
    else the visit itself turned to is left out, for most of it is the same item looked at, put into the cart and bought.

    Args:
        log: the shop's events.
        labels: visits before ``until``, of ``training.labels.visit_labels``.
        until: nothing from then on is in a window.
        read: events of a window that the tower reads at the most, the newest; windows are half as far apart.
    """
    visits: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        visits[label.user_id].append(label)
    edges = np.flatnonzero(np.diff(log.user, prepend=-1, append=-1))
    windows: list[Window] = []
    for begin, end in itertools.pairwise(edges.tolist()):
        user = log.users[log.user[begin]]
        if user in visits:
            times = log.time[begin:end]
            foreseen = _foreseen(times, log.visit[begin:end], visits[user])
            windows += _cut(user, times[times < until], foreseen, read=read)
    windows.sort(key=lambda window: (window.time, window.user_id))
    return windows


def _foreseen(times: npt.NDArray[np.int64], visit: npt.NDArray[np.int32], labels: Sequence[Label]) -> list[tuple[int, ...]]:
    """Returns for each event the items of the first labelled visit that begins after the event's own."""
    first = np.flatnonzero(np.diff(visit, prepend=-1))
    began = np.repeat(times[first], np.diff(np.append(first, len(visit))))
    items = [*(label.items for label in labels), ()]
    return [items[place] for place in np.searchsorted([label.time for label in labels], began, side="right")]


def _cut(user: str, times: npt.NDArray[np.int64], foreseen: Sequence[tuple[int, ...]], *, read: int) -> list[Window]:
    """Cuts windows from the newest event backwards; events of one moment are in a window together or not at all, as in the feature."""
    windows, end = list[Window](), len(times)
    while end > 0:
        time = int(times[end - 1]) + 1
        whole = int(np.searchsorted(times, time))
        steps = tuple(foreseen[max(whole - ACTIVITY_LENGTH, 0) : whole])
        if any(steps) and not (windows and windows[-1].time == time):
            windows.append(Window(user, time, steps))
        if whole <= read:
            break
        end -= max(read // 2, 1)
    return windows


class WindowSet:
    """Windows as steps of the sequence tower; every epoch draws one of the items that each step should foresee."""

    def __init__(self, windows: Sequence[Window], sequences: Sequence[BehaviourSequence], *, queries: Mapping[str, int]) -> None:
        """Takes the windows' behaviours, as joined for them, and the row of each text, after those of the items."""
        self._rows: list[Rows] = []
        self._contexts: list[Rows] = []
        choices: list[tuple[int, ...]] = []
        for window, sequence in zip(windows, sequences, strict=True):
            newest_first = window.foreseen[::-1]
            steps = [newest_first[place] for place in sequence.places.tolist()]
            if any(steps):
                self._rows.append(rows_of(sequence, queries))
                self._contexts.append(context_of(sequence))
                choices += steps
        self._counts = np.array([len(items) for items in choices], np.int64)
        self._offsets = np.cumsum(self._counts) - self._counts
        self._items = np.array([row for items in choices for row in items], np.int64)
        self._ends = np.cumsum([len(sequence) for sequence in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def known(self, item_count: int) -> Tensor:
        """Returns float32[n]: 1 for items that some step should foresee; of the others there is nothing but their text to learn."""
        known = torch.zeros(item_count)
        known[np.unique(self._items)] = 1.0
        return known

    def draw(self, rng: np.random.Generator) -> list[Steps]:
        """Returns the steps of one epoch."""
        chosen = self._offsets + (rng.random(len(self._counts)) * self._counts).astype(np.int64)
        targets = np.where(self._counts > 0, self._items[np.minimum(chosen, len(self._items) - 1)], -1)
        parts = np.split(targets, self._ends[:-1])
        return [Steps(*columns) for columns in zip(self._rows, parts, self._contexts, strict=True)]


def rows_of(sequence: BehaviourSequence, queries: Mapping[str, int]) -> Rows:
    """Returns int64[n]: the row of each step's item, or of its text."""
    return np.array([queries[text] if row < 0 else row for row, text in zip(sequence.rows.tolist(), sequence.texts, strict=True)], np.int64)


def context_of(sequence: BehaviourSequence) -> Rows:
    """Returns int64[n, 3]: action, channel and gap of each step, in the order of the tower's ``contexts``."""
    return np.stack([sequence.actions, sequence.channels, sequence.gaps], axis=1)
