"""What a slate costs as the catalogue grows: everything between a customer's features and the ranked slate, but for the ONNX graphs.

    CONCORD_TEST_DATA=../shared/data python bench/miss_path.py --items 10000 100000 1000000

The vectors are those of bench/candidates.py, the rest of the shop is made up: 20 collaborative weights and one relation an item,
customers with 20 views and 5 purchases. User tower and ranker, whose cost no catalogue changes, are a look-up and a product here.
Beside it the same shop without an index: a pass over all fp32 vectors. All sizes take turns. The limit is the smallest catalogue:
a cost that does not grow at all.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from rich.table import Table

from candidates import encoded, grown, titles
from features.behaviour import MICROS_PER_DAY, Activity, Behaviour
from features.item_table import POPULARITY, FloatArray, ItemTable
from features.ranking import RANKING_FEATURES, Profile
from features.retrieval import indexed, stored_type
from features.signals import CollaborativeWeights, SignalConfig
from harness import Verdict, console, in_turn, percentile
from server.recommend.compute import Policy, compute_slate
from server.recommend.snapshot import Snapshot

_POLICY = Policy(slate_size=100, exclude_purchased=True, max_per_category=4)
_CUSTOMERS, _NEIGHBOURS, _TODAY = 100, 20, 20_000


def items_of(number: int) -> ItemTable:
    """Returns a made-up catalogue: few popular items and many that hardly anybody buys, one in thirty of them new."""
    rng = np.random.default_rng(4)
    ids = tuple(f"i{k:07d}" for k in range(number))
    return ItemTable(
        index_version=1,
        ids=ids,
        titles=ids,
        texts=ids,
        content_hashes=ids,
        category_names=("c",) * number,
        brand_names=("b",) * number,
        categories=rng.integers(1, 200, number, np.int32),
        brands=rng.integers(1, 500, number, np.int32),
        log_price=rng.normal(3, 1, number).astype(np.float32),
        popularity=rng.pareto(1.2, (number, len(POPULARITY))).astype(np.float32).round(),
        age_days=rng.uniform(0, 840, number).astype(np.float32),
        relation_from=np.arange(number, dtype=np.int32),
        relation_to=rng.integers(0, number, number, np.int32),
        relation_weight=rng.random(number, np.float32),
        listed_days=np.zeros(number),
    )


def snapshots(vectors: FloatArray, queries: FloatArray) -> tuple[Snapshot, Snapshot]:
    """Returns the shop over some vectors as it is served, and without an index."""
    number, rng = len(vectors), np.random.default_rng(5)
    mixer = rng.standard_normal(len(RANKING_FEATURES)).astype(np.float32)
    model = SimpleNamespace(
        model_version="m",
        signals=SignalConfig(),
        user_vector=lambda seen, *_: queries[seen.version % len(queries)],
        rank=lambda matrix: np.einsum("cf,f->c", matrix, mixer),
    )
    indices = rng.integers(0, number, number * _NEIGHBOURS, np.int32)
    weights = CollaborativeWeights(np.arange(number + 1) * _NEIGHBOURS, indices, rng.random(len(indices), np.float32))
    kept = vectors.astype(stored_type(number), copy=False)
    served = Snapshot(cast("Any", model), items_of(number), kept, weights, indexed(kept))
    return served, replace(served, vectors=vectors, index=None)


def customers_of(table: ItemTable) -> list[Activity]:
    """Returns customers who looked at some items and bought others."""
    rng = np.random.default_rng(6)
    customers = []
    for version in range(_CUSTOMERS):
        seen, bought = rng.integers(0, len(table), 20), tuple({table.ids[row] for row in rng.integers(0, len(table), 5)})
        views = tuple(Behaviour(table.ids[row], "view", "web", _TODAY * MICROS_PER_DAY - k) for k, row in enumerate(seen))
        customers.append(Activity(version, views, bought, tuple(_TODAY - 10 for _ in bought)))
    return customers


def question(shot: Snapshot, customers: list[Activity]) -> Callable[[], object]:
    """Returns how to compute the slate of the next customer."""
    compute_slate(shot, customers[0], Profile(), _POLICY)  # sorts what is sorted once for all customers, as a rehearsal does
    turn = count()
    return lambda: compute_slate(shot, customers[next(turn) % len(customers)], Profile(), _POLICY)


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="catalogue sizes, ascending")
    parser.add_argument("--data", default=os.environ.get("CONCORD_TEST_DATA"), help="folder of the real data sets")
    options = parser.parse_args()
    base, queries = encoded(titles(options.data))
    questions: dict[str, Callable[[], object]] = {}
    for number in options.items:
        served, bare = snapshots(grown(base, number), queries)
        customers = customers_of(served.table)
        questions[f"{number:,}"] = question(served, customers)
        if served.index is not None:
            questions[f"{number:,} without index"] = question(bare, customers)
    seconds = in_turn(questions, rounds=2 * _CUSTOMERS, warm_up=len(questions))
    table = Table("items", "p50 ms", "p99 ms")
    p50 = {name: percentile(taken, 0.5) * 1e3 for name, taken in seconds.items()}
    for name, taken in seconds.items():
        table.add_row(name, f"{p50[name]:.2f}", f"{percentile(taken, 0.99) * 1e3:.2f}")
    console.print(table)
    smallest, largest = (f"{number:,}" for number in (options.items[0], options.items[-1]))
    peer = p50.get(f"{largest} without index")
    verdict = Verdict("miss_path", p50[largest], peer, p50[smallest], "ms", met=p50[largest] <= 2 * p50[smallest])
    print(verdict.line(**{f"p50_ms_{name.replace(',', '').replace(' ', '_')}": value for name, value in p50.items()}))


if __name__ == "__main__":
    main()
