"""From a customer's past to ranker input, with the very functions the server runs; only the past is the training set's."""

from collections.abc import Sequence
from dataclasses import dataclass

from features.candidates import Candidates, Signals, generate
from features.item_table import FloatArray, ItemTable
from features.ranking import ranking_matrix
from features.retrieval import VectorArray, VectorIndex, vector_scores
from features.signals import CollaborativeWeights, SignalConfig, history, relation_scores
from training.dataset import Customer, Snapshots, listed_items, visible_items
from training.labels import Label
from training.metrics import BoolArray
from training.progress import bar


@dataclass(frozen=True)
class Model:
    """What candidates and features are computed with.

    Attributes:
        vectors: unit vectors of n items, as ``retrieval.stored`` keeps them.
        collaborative: item-to-item weights, fitted before the first label they are used on.
        config: constants of the signals.
        index: of a large catalogue's vectors.
    """

    vectors: VectorArray
    collaborative: CollaborativeWeights
    config: SignalConfig
    index: VectorIndex | None = None


@dataclass(frozen=True)
class Query:
    """One label made ready for the ranker.

    Attributes:
        label: the label.
        table: the items as of the newest snapshot before it.
        signals: scores of all items.
        allowed: bool[n], items sold by then that the customer has not bought.
        candidates: at most 256 items to rank.
        features: float32[c, 23], the ranker's input.
    """

    label: Label
    table: ItemTable
    signals: Signals
    allowed: BoolArray
    candidates: Candidates
    features: FloatArray


def make_queries(
    labels: Sequence[Label], customers: Sequence[Customer], user_vectors: FloatArray, *, model: Model, snapshots: Snapshots
) -> list[Query]:
    """Returns a query per label, from what was known strictly before it."""
    rows = zip(labels, customers, user_vectors, strict=True)
    return [
        make_query(label, customer, vector, model=model, table=snapshots.before(label.time))
        for label, customer, vector in bar(rows, "candidates and features", len(labels))
    ]


def make_query(label: Label, customer: Customer, user_vector: FloatArray, *, model: Model, table: ItemTable) -> Query:
    """Computes signals, candidates and ranking features of one label."""
    past = history(customer.activity, table, model.config)
    signals = Signals(
        # Where it was listed only, or an item of the future would take a place among the ranks.
        vector=vector_scores(model.vectors, user_vector, model.index).where(listed_items(table)),
        collaborative=model.collaborative.scores(past.rows, past.weights),
        relation=relation_scores(past, table),
    )
    allowed = visible_items(table)
    allowed[list(label.bought)] = False
    candidates = generate(signals, past, table, excluded=~allowed)
    features = ranking_matrix(candidates, signals, past, table=table, vectors=model.vectors, profile=customer.profile)
    return Query(label, table, signals, allowed, candidates, features)
