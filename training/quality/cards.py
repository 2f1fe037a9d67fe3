"""The model card of a next-item model: metrics on the last items with intervals, by segment, calibration, popularity."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch

from features.item_table import FloatArray
from training.card import Calibration, Curve, Metric, ModelCard, Popularity, Segment
from training.estimates import bootstrap
from training.metrics import hit_rate, ndcg, recall
from training.sequence import Rows
from training.text import base_name

_METRICS = ("ndcg_at_10", "hr_at_10", "recall_at_20")
_SHOWN = 10
_SHORT, _LONG = 6, 12  # thirds of Amazon Beauty's histories, about
_RARE = 10


@dataclass(frozen=True)
class Ranked:
    """Finished rankings of a set.

    Attributes:
        rows: each user's item rows in order of time; the last one is what the ranking is measured on.
        titles: of the items.
        ranked: int64[u, c], each user's best items, best first.
        probability: float32[u, c], of each of them.
    """

    rows: Sequence[Rows]
    titles: Sequence[str]
    ranked: Rows
    probability: FloatArray


def next_item_card(
    found: Ranked,
    *,
    counts: FloatArray,
    curves: Sequence[Sequence[float]],
    details: Mapping[str, object],
    seconds: float,
    seed: int,
) -> ModelCard:
    """Returns the card of a finished model.

    Args:
        found: its rankings.
        counts: float32[n], training interactions of each item.
        curves: validation NDCG@10 by epoch, of each tower.
        details: of the run.
        seconds: it took.
        seed: of the run, and of the bootstrap.
    """
    targets = np.array([rows[-1] for rows in found.rows])
    values = np.array(
        [
            [measure(line, {target}) for line, target in zip(found.ranked.tolist(), targets.tolist(), strict=True)]
            for measure in (ndcg, hit_rate, recall)
        ]
    )
    shown = found.ranked[:, :_SHOWN]
    lengths, seen = np.array([len(rows) - 1 for rows in found.rows]), counts[targets]
    segments = {
        "history": {
            f"up to {_SHORT - 1} items": lengths < _SHORT,
            f"{_SHORT} to {_LONG - 1} items": (lengths >= _SHORT) & (lengths < _LONG),
            f"{_LONG} items and more": lengths >= _LONG,
        },
        "wanted item": {
            "never seen in training": seen == 0,
            f"seen up to {_RARE - 1} times": (seen > 0) & (seen < _RARE),
            f"seen {_RARE} times and more": seen >= _RARE,
        },
    }
    return ModelCard(
        name="next item, Amazon Beauty",
        metrics=_metrics(values, seed),
        description="A sequence tower, item neighbours and text, blended and re-ranked over the full catalogue for a customer's last item.",
        created_at=datetime.now(UTC),
        base_model=base_name(""),
        base_licence="Apache-2.0",
        limitations=(
            "The set has neither times nor prices nor channels: nothing is known of season, price band or channel.",
            "Customers and items with fewer than five interactions are not in the set: newcomers will be served worse.",
        ),
        data={
            "customers": len(found.rows),
            "items": len(found.titles),
            "interactions fitted on": int(counts.sum()),
            "protocol": "leave-one-out: fitted without the last two items, tuned on the second to last, measured on the last",
        },
        configuration=details,
        training={
            "seconds": round(seconds),
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count() or 1,
            "machine": platform.machine(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
        },
        curves=[Curve(f"tower {k + 1}: validation NDCG@10 by epoch", range(1, len(curve) + 1), curve) for k, curve in enumerate(curves)],
        calibration=Calibration(
            found.probability[:, :_SHOWN].ravel(),
            (shown == targets[:, None]).ravel(),
            note="Each of the ten items shown to a customer: the softmax's probability against the share that were the next item.",
        ),
        segments=[
            Segment(dimension, name, int(part.sum()), _metrics(values[:, part], seed))
            for dimension, parts in segments.items()
            for name, part in parts.items()
            if part.any()
        ],
        popularity=Popularity(
            purchases=counts,
            shown=np.bincount(shown.ravel(), minlength=len(counts)),
            taken=np.bincount(targets, minlength=len(counts)),
            titles=found.titles,
        ),
    )


def _metrics(values: FloatArray, seed: int) -> list[Metric]:
    return [Metric(name, each.value, each.low, each.high) for name, each in zip(_METRICS, bootstrap(values, seed=seed), strict=True)]
