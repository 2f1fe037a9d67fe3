"""From a customer's state to ranked items: the miss path as pure functions of snapshot, activity and profile."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

from features.behaviour import Activity
from features.candidates import Candidates, Signals, Source, generate
from features.item_table import FloatArray, IntArray
from features.ranking import Profile, ranking_matrix
from features.retrieval import all_scores, exact_scores, vector_scores
from features.scores import Scores
from features.search import SearchWeights
from features.signals import History, history, relation_scores
from server.assistant.rules import AssistantRules
from server.recommend.policy import already_bought, diversify
from server.recommend.slate import SlateFlag
from server.recommend.snapshot import Snapshot
from server.tracing import span


@dataclass(frozen=True)
class Policy:
    """The shop's rules for slates and answers; see ServerSettings for each."""

    slate_size: int
    exclude_purchased: bool
    max_per_category: int
    search: SearchWeights = field(default_factory=SearchWeights)
    assistant: AssistantRules = field(default_factory=AssistantRules)


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
    """Computes history and scores: one run of the user tower, one pass over the vectors or, of a large catalogue, over its index."""
    table = snapshot.table
    past = history(activity, table, snapshot.signals)
    vector = snapshot.model.user_vector(activity, table, snapshot.vectors) if snapshot.model and len(table) else None
    scores = Scores.none(len(table)) if vector is None else vector_scores(snapshot.vectors, vector, snapshot.index)
    collaborative = snapshot.collaborative.scores(past.rows, past.weights)
    return Understood(past, Signals(scores, collaborative, relation_scores(past, table)))


def score(snapshot: Snapshot, understood: Understood, candidates: Candidates, profile: Profile) -> FloatArray:
    """Returns float32[c]: the ranker's score of each candidate, or its popularity while no model is active."""
    if snapshot.model is None:
        return snapshot.table.popularity_score[candidates.rows]
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


def score_items(snapshot: Snapshot, activity: Activity, profile: Profile, rows: IntArray) -> Ranked:
    """Ranks given items for a customer with the same scores a slate would give them."""
    understood = understand(snapshot, activity)
    given = Candidates(rows, _sources(understood.signals, rows))
    scores = score(snapshot, understood, given, profile)
    order = np.lexsort((rows, -scores))
    flags = SlateFlag(0) if snapshot.model else SlateFlag.NO_MODEL
    return Ranked(rows[order], scores[order], given.sources[order], flags, {})


def similar_items(snapshot: Snapshot, row: int, *, exhaustive: bool) -> Ranked:
    """Ranks items like one item: half the cosine of their vectors, half what customers of it went on to (scaled to 1).

    Args:
        snapshot: the items, of which a model is active.
        row: the item, which is not among those ranked.
        exhaustive: ranks all items; otherwise those nearest by an index, where there is one, and all that customers went on to.
    """
    vectors, given = snapshot.vectors, snapshot.vectors[row]
    cosine = all_scores(vectors, given) if exhaustive else vector_scores(vectors, given, snapshot.index)
    together = snapshot.collaborative.scores(np.array([row], np.int32), np.ones(1, np.float32))
    rows = np.union1d(cosine.rows, together.rows).astype(np.int32)
    rows = rows[rows != row]
    cosines, far = cosine.at(rows), np.flatnonzero(~np.isin(rows, cosine.rows, assume_unique=True))
    cosines[far] = exact_scores(vectors, rows[far], given)
    likely = np.maximum(together.at(rows), 0)
    scale = max(float(together.values.max(initial=0.0)), 1e-9)
    scores = (0.5 * cosines + 0.5 * likely / scale).astype(np.float32)
    order = np.lexsort((rows, -scores))
    sources = np.where(likely > 0, int(Source.VECTOR | Source.COLLABORATIVE), int(Source.VECTOR)).astype(np.uint8)
    return Ranked(rows[order], scores[order], sources[order], SlateFlag(0), {})


def _sources(signals: Signals, rows: IntArray) -> npt.NDArray[np.uint8]:
    """Says which signals speak for each given item."""
    marks = np.zeros(len(rows), np.uint8)
    for source, values in ((Source.COLLABORATIVE, signals.collaborative), (Source.RELATION, signals.relation)):
        marks[values.at(rows) > 0] |= int(source)
    if signals.vector.values.any():
        # A place among the hundred nearest is what candidate generation would call similar.
        nearest = min(100, len(signals.vector.values))
        threshold = np.partition(signals.vector.values, -nearest)[-nearest]
        marks[signals.vector.at(rows) >= threshold] |= int(Source.VECTOR)
    return marks
