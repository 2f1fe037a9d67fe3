"""Labels: what a customer turned to on a visit, to be predicted from what came before it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.config import TrainConfig
from training.dataset import Split, TrainingDataError
from training.events import EventLog, Micros


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


@dataclass(frozen=True)
class Labels:
    """The labels of a run by what they are for."""

    tower: Sequence[Label]
    validation: Sequence[Label]
    ranker: Sequence[Label]
    holdout: Sequence[Label]


def choose_labels(log: EventLog, split: Split, config: TrainConfig) -> Labels:
    """Returns the run's labels: each kind from its own period, cut down to the configured numbers.

    Raises:
        TrainingDataError: there is no label to train the tower or the ranker on.
    """
    rng = np.random.default_rng(config.seed)
    targets = config.actions(config.target_actions)
    tower = visit_labels(log, config.actions(config.tower_actions), start=split.begin, end=split.ranker_start)
    ranker = _sample(visit_labels(log, targets, start=split.ranker_start, end=split.cut), config.ranker_labels, rng)
    holdout = _sample(holdout_labels(log, targets, cut=split.cut), config.evaluation_users, rng)
    if not tower or not ranker:
        raise TrainingDataError(f"{len(tower)} visits to train the tower on and {len(ranker)} for the ranker: too few events")
    return Labels(tower[-config.tower_labels :], _sample(ranker, config.validation_labels, rng), ranker, holdout)


def _sample(labels: Sequence[Label], count: int, rng: np.random.Generator) -> Sequence[Label]:
    if not count or len(labels) <= count:
        return labels
    return [labels[row] for row in np.sort(rng.choice(len(labels), count, replace=False))]


def keys_of(labels: Sequence[Label]) -> list[tuple[str, Micros]]:
    """Returns the point-in-time keys of labels."""
    return [(label.user_id, label.time) for label in labels]


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
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]


def _visits(log: EventLog, span: slice) -> list[slice]:
    edges = np.flatnonzero(np.diff(log.visit[span])) + 1 + span.start
    bounds = [span.start, *edges.tolist(), span.stop]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]
