"""Evaluation on the holdout: the whole candidate and ranker pipeline beside the baselines it has to beat."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from features.candidates import popularity_score
from features.item_table import POPULARITY, FloatArray
from training.metrics import Tally, best_rows
from training.ranker import Ranker
from training.scoring import Query

_RANKING_LENGTH = 100


def metrics_of(queries: Sequence[Query], ranker: Ranker) -> dict[str, float]:
    """Returns NDCG@10, HR@10 and Recall@20 of the pipeline and its baselines, coverage, and the candidates' recall.

    Customers without a wanted item that was on sale before the cut are not measured. ``popularity_*`` ranks by purchases
    ever, ``recent_popularity_*`` by the order the server shows to a new customer, ``tower_*`` by the user vector alone,
    ``collaborative_*`` by the item-to-item weights alone; all over the same items as the pipeline.
    """
    tallies = {name: Tally() for name in ("", "popularity_", "recent_popularity_", "tower_", "collaborative_")}
    found: list[float] = []
    for query in queries:
        wanted = {row for row in query.label.items if query.allowed[row]}
        if not wanted:
            continue
        tallies[""].add(ranker.order(query), wanted)
        for name, scores in baselines(query).items():
            tallies[name].add(best_rows(scores, query.allowed, 20), wanted)
        found.append(len(wanted & set(query.candidates.rows.tolist())) / len(wanted))
    metrics = {key: value for name, tally in tallies.items() for key, value in tally.means(name).items()}
    on_sale = int(queries[0].allowed.size) if queries else 0
    metrics["coverage"] = len(tallies[""].shown) / on_sale if on_sale else 0.0
    metrics["candidate_recall"] = float(np.mean(found)) if found else 0.0
    metrics["evaluated_users"] = float(len(found))
    return metrics


def baselines(query: Query) -> dict[str, FloatArray]:
    """Returns the scores, float32[n], of the simple rankings the pipeline is compared with, by metric prefix."""
    return {
        "popularity_": query.table.popularity[:, POPULARITY.index("purchases_total")],
        "recent_popularity_": popularity_score(query.table),
        "tower_": query.signals.vector,
        "collaborative_": query.signals.collaborative,
    }


def write_rankings(queries: Sequence[Query], ranker: Ranker, path: Path) -> None:
    """Writes one JSON line ``{"user": id, "items": [best, second, ...]}`` per customer, own purchases excluded."""
    with path.open("w") as lines:
        for query in queries:
            ids = query.table.ids
            items = [ids[row] for row in ranker.order(query)[:_RANKING_LENGTH]]
            lines.write(json.dumps({"user": query.label.user_id, "items": items}) + "\n")
