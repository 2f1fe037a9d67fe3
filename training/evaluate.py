"""Evaluation on the holdout, customer by customer: the whole candidate and ranker pipeline beside the baselines it has to beat."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from features.item_table import POPULARITY, FloatArray
from training.metrics import Tally, best_rows
from training.ranker import Ranker, ordered
from training.results import PIPELINE, Catalogue, Evaluation, UserResult
from training.scoring import Query

_RANKING_LENGTH = 100
_KEPT = 20  # no metric looks deeper
_SHOWN = 10
BASELINES = ("popularity_", "recent_popularity_", "tower_", "collaborative_")
"""Prefixes of the metrics of the simple rankings that the pipeline is compared with."""


@dataclass(frozen=True)
class Visit:
    """What reports tell customers apart by: the channel of the visit to be predicted, and the channels they came by before."""

    channel: str = ""
    history_channels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Visits:
    """The visits by customer; whom it does not know has no channels."""

    by_user: Mapping[str, Visit] = field(default_factory=dict)

    def of(self, user_id: str) -> Visit:
        """Returns a customer's visit."""
        return self.by_user.get(user_id, Visit())


def measure(queries: Sequence[Query], ranker: Ranker, visits: Visits | None = None) -> Evaluation:
    """Ranks for every customer and notes what came of it.

    Customers without a wanted item that was on sale before the cut are not measured.
    """
    visits = visits or Visits()
    users = [_result(query, ranker, visits.of(query.label.user_id)) for query in queries if query.allowed[list(query.label.items)].any()]
    return Evaluation(_catalogue(queries), tuple(users))


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """Returns NDCG@10, HR@10 and Recall@20 of the pipeline and its baselines, coverage, and the candidates' recall.

    ``popularity_*`` ranks by purchases ever, ``recent_popularity_*`` by the order the server shows to a new customer,
    ``tower_*`` by the user vector alone, ``collaborative_*`` by the item-to-item weights alone; all over the same items as
    the pipeline.
    """
    tallies = {name: Tally() for name in (PIPELINE, *BASELINES)}
    for user in evaluation.users:
        for name, tally in tallies.items():
            tally.add(user.rankings[name], user.wanted)
    metrics = {key: value for name, tally in tallies.items() for key, value in tally.means(name).items()}
    catalogue = len(evaluation.catalogue.ids)
    metrics["coverage"] = len(tallies[PIPELINE].shown) / catalogue if catalogue else 0.0
    metrics["candidate_recall"] = float(np.mean([user.candidate_recall for user in evaluation.users])) if evaluation.users else 0.0
    metrics["evaluated_users"] = float(len(evaluation.users))
    return metrics


def baselines(query: Query) -> dict[str, FloatArray]:
    """Returns the scores, float32[n], of the simple rankings the pipeline is compared with, by metric prefix."""
    scores = (
        query.table.popularity[:, POPULARITY.index("purchases_total")],
        query.table.popularity_score,
        query.signals.vector.everywhere(),
        query.signals.collaborative.everywhere(),
    )
    return dict(zip(BASELINES, scores, strict=True))


def write_rankings(queries: Sequence[Query], ranker: Ranker, path: Path) -> None:
    """Writes one JSON line ``{"user": id, "items": [best, second, ...]}`` per customer, own purchases excluded."""
    with path.open("w") as lines:
        for query in queries:
            ids = query.table.ids
            items = [ids[row] for row in ranker.order(query)[:_RANKING_LENGTH]]
            lines.write(json.dumps({"user": query.label.user_id, "items": items}) + "\n")


@torch.inference_mode()
def _result(query: Query, ranker: Ranker, visit: Visit) -> UserResult:
    wanted = tuple(row for row in query.label.items if query.allowed[row])
    scores = ranker(torch.from_numpy(query.features))
    rankings = {name: tuple(best_rows(values, query.allowed, _KEPT)) for name, values in baselines(query).items()}
    likely = torch.softmax(scores.double(), dim=-1).sort(descending=True).values[:_SHOWN]
    return UserResult(
        user_id=query.label.user_id,
        channel=visit.channel,
        history_channels=visit.history_channels,
        bought_count=len(query.label.bought),
        wanted=wanted,
        rankings={PIPELINE: tuple(ordered(query, scores.numpy())[:_KEPT]), **rankings},
        probabilities=tuple(likely.tolist()),
        candidate_recall=len(set(wanted) & set(query.candidates.rows.tolist())) / len(wanted),
    )


def _catalogue(queries: Sequence[Query]) -> Catalogue:
    """Describes the items as the first query saw them; all queries of a holdout see one table."""
    if not queries:
        return Catalogue((), (), (), (), ())
    table = queries[0].table
    purchases = table.popularity[:, POPULARITY.index("purchases_total")]
    prices = [None if np.isnan(value) else float(np.exp(value)) for value in table.log_price]
    return Catalogue(table.ids, table.titles, table.category_names, tuple(prices), tuple(int(count) for count in purchases))
