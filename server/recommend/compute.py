"""From a customer's state to ranked items: the miss path as one pure function of snapshot, activity and profile."""

import hashlib
import json
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from features.behaviour import Activity
from features.candidates import Candidates, Signals, Source, generate, popularity_score
from features.item_table import FloatArray, IntArray
from features.ranking import Profile, ranking_matrix
from features.signals import History, history, relation_scores
from server.recommend.policy import already_bought, diversify
from server.recommend.slate import SlateFlag
from server.recommend.snapshot import Snapshot
from server.tracing import span


@dataclass(frozen=True)
class Policy:
    """The shop's rules for slates; see ServerSettings for each."""

    slate_size: int
    exclude_purchased: bool
    max_per_category: int


def policy_fingerprint(policy: Policy, *, hide_out_of_stock: bool, onnx_threads: int, onnx_precision: str) -> str:
    """Returns 12 hex digits that replicas of one fleet must share: with other rules, equal versions give other answers."""
    rules = {**asdict(policy), "hide_out_of_stock": hide_out_of_stock, "onnx_threads": onnx_threads, "onnx_precision": onnx_precision}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Ranked:
    """Ranked items: rows, scores and sources in order, flags, and seconds by stage."""

    rows: IntArray
    scores: FloatArray
    sources: npt.NDArray[np.uint8]
    flags: SlateFlag
    stages: dict[str, float]


@dataclass(frozen=True)
class Understood:
    """What the models say of a customer before any candidate is chosen."""

    past: History
    signals: Signals


def understand(snapshot: Snapshot, activity: Activity) -> Understood:
    """Computes history and scores of all items: one run of the user tower, one pass over the vectors."""
    table = snapshot.table
    past = history(activity, table, snapshot.signals)
    vector = snapshot.model.user_vector(activity, table, snapshot.vectors) if snapshot.model and len(table) else None
    # einsum, not BLAS: each row's sum by itself, so its bits depend neither on the catalogue's size nor on threads.
    scores = np.zeros(len(table), np.float32) if vector is None else np.einsum("nd,d->n", snapshot.vectors, vector)
    collaborative = snapshot.collaborative.scores(past.rows, past.weights)
    return Understood(past, Signals(scores, collaborative, relation_scores(past, table)))


def score(snapshot: Snapshot, understood: Understood, candidates: Candidates, profile: Profile) -> FloatArray:
    """Returns float32[c]: the ranker's score of each candidate, or its popularity while no model is active."""
    if snapshot.model is None:
        return popularity_score(snapshot.table)[candidates.rows]
    matrix = ranking_matrix(
        candidates, understood.signals, understood.past, table=snapshot.table, vectors=snapshot.vectors, profile=profile
    )
    return snapshot.model.rank(matrix)


def compute_slate(snapshot: Snapshot, activity: Activity, profile: Profile, policy: Policy) -> Ranked:
    """Computes a slate. Equal arguments give equal bits on the same processor type, in whatever company it runs."""
    table = snapshot.table
    flags = SlateFlag(0) if snapshot.model else SlateFlag.NO_MODEL
    marks = [perf_counter()]
    with span("user_vector"):
        understood = understand(snapshot, activity)
    marks.append(perf_counter())
    if not len(understood.past.rows):
        flags |= SlateFlag.NEWCOMER
    excluded = already_bought(understood.past, len(table)) if policy.exclude_purchased else np.zeros(len(table), np.bool_)
    with span("candidates"):
        candidates = generate(understood.signals, understood.past, table, excluded=excluded)
    marks.append(perf_counter())
    with span("ranking"):
        scores = score(snapshot, understood, candidates, profile)
    marks.append(perf_counter())
    with span("policy"):
        order = np.lexsort((candidates.rows, -scores))  # ties by item id: never by the order candidates were found in
        final = diversify(candidates.rows, order, table, size=policy.slate_size, max_per_category=policy.max_per_category).positions
    marks.append(perf_counter())
    stages = dict(zip(("user_vector", "candidates", "ranking", "policy"), np.diff(marks).tolist(), strict=True))
    return Ranked(candidates.rows[final], scores[final], candidates.sources[final], flags, stages)


def rehearse(snapshot: Snapshot, policy: Policy) -> None:
    """Computes a slate that nobody sees, of somebody who looked at the first item: every part runs once before it answers."""
    compute_slate(snapshot, Activity(0).with_context(snapshot.table.ids[:1], ""), Profile(), policy)


def score_items(snapshot: Snapshot, activity: Activity, profile: Profile, rows: IntArray) -> Ranked:
    """Ranks given items for a customer with the same scores a slate would give them."""
    understood = understand(snapshot, activity)
    given = Candidates(rows, _sources(understood.signals, rows))
    scores = score(snapshot, understood, given, profile)
    order = np.lexsort((rows, -scores))
    flags = SlateFlag(0) if snapshot.model else SlateFlag.NO_MODEL
    return Ranked(rows[order], scores[order], given.sources[order], flags, {})


def _sources(signals: Signals, rows: IntArray) -> npt.NDArray[np.uint8]:
    """Says which signals speak for each given item."""
    marks = np.zeros(len(rows), np.uint8)
    for source, values in ((Source.COLLABORATIVE, signals.collaborative), (Source.RELATION, signals.relation)):
        marks[values[rows] > 0] |= int(source)
    if signals.vector.any():
        # A place among the hundred nearest is what candidate generation would call similar.
        threshold = np.sort(signals.vector)[-min(100, len(signals.vector))]
        marks[signals.vector[rows] >= threshold] |= int(Source.VECTOR)
    return marks
