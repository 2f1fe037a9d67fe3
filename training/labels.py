"""Labels: what a customer turned to on a visit, to be predicted from what came before it."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from training.config import TrainConfig
from training.dataset import Split, TrainingDataError
from training.events import EventLog, Micros

TAKEN = ("purchase", "add_to_cart", "wishlist")
"""Actions that take an item: what was taken is no negative."""


@dataclass(frozen=True)
class Label:
    """What one customer turned to on one visit.

    Attributes:
        user_id: the customer.
        time: everything known of the customer and the shop must be from strictly before this, microseconds of Unix time.
        items: rows of the target items, none of them bought before.
        bought: rows of all items bought before ``time``.
        taken: rows of all items taken on the visit, targets or not.
        shown: rows of items shown before ``time`` and not taken, last shown first; empty unless exposures were read.
    """

    user_id: str
    time: Micros
    items: tuple[int, ...]
    bought: frozenset[int]
    taken: frozenset[int] = frozenset()
    shown: tuple[int, ...] = ()


@dataclass(frozen=True)
class Labels:
    """The labels of a run by what they are for."""

    tower: Sequence[Label]
    validation: Sequence[Label]
    ranker: Sequence[Label]
    holdout: Sequence[Label]


def choose_labels(log: EventLog, split: Split, config: TrainConfig) -> Labels:
    """Returns the run's labels: each kind from its own part of the split, cut down to the configured numbers.

    Raises:
        TrainingDataError: there is no label to train the tower or the ranker on.
    """
    rng = np.random.default_rng(config.seed)
    tower, ranker, holdout = all_labels(log, split, config)
    ranker = _sample(ranker, config.ranker_labels, rng)
    holdout = _sample(holdout, config.evaluation_users, rng)
    if not tower or not ranker:
        raise TrainingDataError(f"{len(tower)} visits to train the tower on and {len(ranker)} for the ranker: too few events")
    return Labels(tower[-config.tower_labels :], _sample(ranker, config.validation_labels, rng), ranker, holdout)


def all_labels(log: EventLog, split: Split, config: TrainConfig) -> tuple[Sequence[Label], Sequence[Label], Sequence[Label]]:
    """Returns every label of a log for the tower, the ranker and the holdout; a customer's depend on that customer's events only."""
    targets, wider = config.actions(config.target_actions), config.actions(config.tower_actions)
    if config.split == "session":
        return session_labels(log, targets, wider, split=split)
    tower = visit_labels(log, wider, start=split.begin, end=split.ranker_start)
    return tower, visit_labels(log, targets, start=split.ranker_start, end=split.cut), holdout_labels(log, targets, cut=split.cut)


def _sample(labels: Sequence[Label], count: int, rng: np.random.Generator) -> Sequence[Label]:
    if not count or len(labels) <= count:
        return labels
    return [labels[row] for row in np.sort(rng.choice(len(labels), count, replace=False))]


def keys_of(labels: Sequence[Label]) -> list[tuple[str, Micros]]:
    """Returns the point-in-time keys of labels."""
    return [(label.user_id, label.time) for label in labels]


def folds(labels: Sequence[Label], count: int) -> list[tuple[Micros, Sequence[Label]]]:
    """Returns labels in ``count`` parts by time, each with the time that its first label must not see beyond.

    Collaborative weights and descriptions of a part are as of that time: a little old for its last labels, too new for none.
    """
    ordered = sorted(labels, key=lambda label: label.time)
    bounds = np.linspace(0, len(ordered), count + 1).astype(int).tolist()
    return [(ordered[a].time, ordered[a:b]) for a, b in itertools.pairwise(bounds) if b > a]


def visit_labels(log: EventLog, actions: Sequence[str], *, start: Micros, end: Micros) -> list[Label]:
    """Returns one label per visit that began in [start, end) and turned to new items, in order of time.

    The label's time is the visit's first event, so nothing the customer did on the visit itself is known. A visit of a
    customer without earlier events is left out, and so are targets after ``end``.
    """
    wanted = log.has_action(actions)
    bought_now, taken_now = log.has_action(("purchase",)), log.has_action(TAKEN) & (log.time < end)
    labels: list[Label] = []
    for span in _customers(log):
        bought: set[int] = set()
        known = span.start
        for visit in _visits(log, span):
            began = int(log.time[visit.start])
            # Another visit may have begun at the very same time, as invoices of one minute do: it is not known either.
            before = span.start + int(np.searchsorted(log.time[span], began))
            bought.update(log.item[known:before][bought_now[known:before]].tolist())
            known = before
            if start <= began < end and before > span.start:
                inside = np.flatnonzero(wanted[visit] & (log.time[visit] < end)) + visit.start
                items = tuple(dict.fromkeys(int(row) for row in log.item[inside] if int(row) not in bought))
                if items:
                    taken = frozenset(log.item[visit][taken_now[visit]].tolist())
                    labels.append(Label(log.users[log.user[span.start]], began, items, frozenset(bought), taken))
    return _by_time(labels)


def session_labels(
    log: EventLog, actions: Sequence[str], tower_actions: Sequence[str], *, split: Split
) -> tuple[Sequence[Label], Sequence[Label], Sequence[Label]]:
    """Returns the labels of a split by sessions: each customer's last visit is held out, the last but one trains the ranker.

    The tower learns from the visits before these. Every label keeps the time of its own visit.
    """
    own: dict[str, list[Label]] = {}
    for label in visit_labels(log, actions, start=split.begin, end=split.end):
        own.setdefault(label.user_id, []).append(label)
    ends = {user: labels[-2:][0].time for user, labels in own.items()}
    wider = visit_labels(log, tower_actions, start=split.begin, end=split.end)
    tower = [label for label in wider if label.time < ends.get(label.user_id, split.end)]
    return tower, _by_time(labels[-2] for labels in own.values() if len(labels) > 1), _by_time(labels[-1] for labels in own.values())


def _by_time(labels: Iterable[Label]) -> list[Label]:
    return sorted(labels, key=lambda label: (label.time, label.user_id))


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
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]


def _visits(log: EventLog, span: slice) -> list[slice]:
    edges = np.flatnonzero(np.diff(log.visit[span])) + 1 + span.start
    bounds = [span.start, *edges.tolist(), span.stop]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]
