"""Ranker input of a label: made of what was there, whatever the catalogue has gained since."""

import dataclasses

import numpy as np

from features.behaviour import Activity, Behaviour
from features.item_table import FloatArray, ItemTable
from features.ranking import Profile
from features.retrieval import VectorIndex
from features.signals import CollaborativeWeights, SignalConfig
from tests.unit.training_shop import DAY, START, item_table
from training.dataset import Customer
from training.labels import Label
from training.scoring import Model, Query, make_query

CUSTOMER = Customer(
    Activity(2, (Behaviour("i03", "view", "web", START), Behaviour("i01", "purchase", "web", START - DAY)), ("i01",)), Profile()
)


def query(table: ItemTable, vectors: FloatArray, index: VectorIndex | None = None) -> Query:
    customer = dataclasses.replace(CUSTOMER, activity=dataclasses.replace(CUSTOMER.activity, purchased_days=(START // DAY - 1,)))
    model = Model(vectors, CollaborativeWeights.empty(len(table)), SignalConfig(), index)
    return make_query(Label("a", START + DAY, (5,), frozenset({1})), customer, vectors[4], model=model, table=table)


def test_an_item_of_the_future_changes_no_rank() -> None:
    vectors = np.random.default_rng(0).normal(size=(13, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[12] = vectors[4]  # nearer to the customer than anything that was there
    table = item_table(13)
    popularity, age = table.popularity.copy(), table.age_days.copy()
    popularity[12], age[12] = 0, 0
    before, after = query(item_table(12), vectors[:12]), query(dataclasses.replace(table, popularity=popularity, age_days=age), vectors)
    assert 12 not in after.candidates.rows
    assert after.candidates.rows.tolist() == before.candidates.rows.tolist()
    columns = [k for k in range(before.features.shape[1]) if k not in (6, 7, 8)]  # the made-up popularity counts down from the last item
    assert after.features[:, columns].tobytes() == before.features[:, columns].tobytes()


def test_what_was_bought_or_never_sold_is_no_candidate() -> None:
    table = item_table(12)
    popularity = table.popularity.copy()
    popularity[7] = 0
    made = query(dataclasses.replace(table, popularity=popularity), np.eye(12, dtype=np.float32))
    assert set(made.candidates.rows.tolist()) == set(range(12)) - {1, 7}


def test_an_index_takes_no_item_of_the_future_either() -> None:
    """Forty items fit in any shortlist: with an index the ranker's input keeps every bit."""
    vectors = np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[30] = vectors[4]
    table = item_table(40)
    popularity, age = table.popularity.copy(), table.age_days.copy()
    popularity[30], age[30] = 0, 0
    unsold = dataclasses.replace(table, popularity=popularity, age_days=age)
    exact, indexed = query(unsold, vectors), query(unsold, vectors, VectorIndex(vectors))
    assert 30 not in indexed.signals.vector.rows
    assert indexed.candidates.rows.tolist() == exact.candidates.rows.tolist()
    assert indexed.features.tobytes() == exact.features.tobytes()
