"""A run's labels made ready for the ranker: customers, items, weights and vectors as of strictly before each label."""

from collections.abc import Callable, Sequence

from features.item_table import FloatArray, ItemTable
from features.retrieval import indexed, stored_type
from features.signals import CollaborativeWeights, SignalConfig
from training import collaborative
from training.checkpoint import Trained
from training.config import TrainConfig
from training.dataset import Customers, Shop, Snapshots
from training.evaluate import Visits
from training.events import Micros
from training.labels import Label, folds, keys_of
from training.scoring import Model, Query, make_queries
from training.segments import visits_of

Vectors = Callable[[ItemTable], FloatArray]


def holdout_queries(
    shop: Shop, labels: Sequence[Label], customers: Customers, *, snapshots: Snapshots, trained: Trained, vectors: Vectors
) -> list[Query]:
    """Prepares the holdout: all at the cut, or each session at its own time."""
    parts = folds(labels, trained.config.session_folds if trained.config.split == "session" else 1)
    return [
        query
        for until, part in parts
        for query in queries_of(shop, part, customers, snapshots=snapshots, trained=trained, vectors=vectors, until=until)
    ]


def vectors_by(trained: Trained) -> Vectors:
    """Returns a function from a table to its items' vectors that encodes the same texts once."""
    known: dict[tuple[str, ...], FloatArray] = {}

    def vectors(table: ItemTable) -> FloatArray:
        if table.texts not in known:
            known[table.texts] = trained.item_vectors(table)
        return known[table.texts]

    return vectors


def visits_of_holdout(shop: Shop, labels: Sequence[Label], customers: Customers, *, config: TrainConfig) -> Visits:
    """Looks up what reports tell the holdout's customers apart by."""
    histories = {user: [b.channel for b in customers[user, time].activity.behaviours] for user, time in keys_of(labels)}
    return visits_of(shop.dsn, labels, histories, items=shop.table.ids, actions=config.actions(config.target_actions))


def queries_of(
    shop: Shop,
    labels: Sequence[Label],
    customers: Customers,
    *,
    snapshots: Snapshots,
    trained: Trained,
    vectors: Vectors,
    until: Micros,
    weights: CollaborativeWeights | None = None,
) -> list[Query]:
    """Prepares labels from ``until`` on, with descriptions and by default collaborative weights of strictly before it."""
    if not labels:
        return []
    config, table = trained.config, shop.descriptions.before(until)
    known = [customers[key] for key in keys_of(labels)]
    users = trained.user_vectors([customer.activity for customer in known], table, vectors(table))
    weights = weights or collaborative.fit(shop.log, len(shop.table), until=until, config=config)
    kept = vectors(table).astype(stored_type(len(table)), copy=False)
    model = Model(kept, weights, SignalConfig(config.half_life_days), indexed(kept))
    return make_queries(labels, known, users, model=model, snapshots=snapshots)
