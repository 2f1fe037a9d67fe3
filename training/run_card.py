"""The model card of a run, from what its folder holds; and its place in a bundle."""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np

from features.bundle import CARD_HTML, CARD_MARKDOWN, Classifier, Manifest, checksum, write_manifest
from training import checkpoint
from training.card import Calibration, Curve, Metric, ModelCard, Popularity, render_html, render_markdown
from training.checkpoint import RunRecord
from training.facts import Facts
from training.results import PIPELINE, Evaluation
from training.segments import all_segments, metrics_with_intervals
from training.tracking import HISTORY, read_history, without_secrets

T = TypeVar("T")

_DESCRIPTION = (
    "Recommends items of one shop: a BERT text encoder for items and behaviours, item-to-item weights of customers' histories, "
    "and a ranker over their candidates. Measured on each customer's first purchase visit after the cut, of which it saw nothing."
)
_CALIBRATION = (
    "Softmax of the ranker's scores over a customer's candidates, for the ten items shown first, against the share of what the "
    "customer then took: each of m items taken counts 1/m."
)
_LIMITATIONS = (
    "Customers whose visit held no item that had been sold before the cut are not measured.",
    "What was shown at the time shaped what customers took; the figures compare rankings offline and promise no uplift.",
    "Items without earlier purchases are ranked by the server from their text alone, and stand outside these figures.",
)
_SHOWN = 10


def card_of_run(run_dir: Path, manifest: Manifest | None = None) -> ModelCard:
    """Returns the card of a finished run, under the name of the bundle it was exported as, when it was.

    A run of a release that kept less gives a card with fewer sections.

    Raises:
        FileNotFoundError: ``run_dir`` is not a finished run.
    """
    record, config = checkpoint.load_record(run_dir), checkpoint.load_config(run_dir)
    facts, evaluation = _if_kept(Facts.load, run_dir), _if_kept(Evaluation.load, run_dir)
    return ModelCard(
        name=manifest.model_version if manifest else run_dir.name,
        metrics=_metrics(record, evaluation, config.seed),
        description=_DESCRIPTION,
        created_at=manifest.created_at if manifest else None,
        base_model=facts.base_model if facts else "",
        base_licence=facts.base_licence if facts else "",
        limitations=_LIMITATIONS,
        data=_data(facts, manifest),
        configuration=without_secrets(config.record()),
        training=_training(record, facts, manifest),
        curves=[Curve(name, *zip(*points, strict=True)) for name, points in read_history(run_dir / HISTORY).items() if len(points) > 1],
        calibration=_calibration(evaluation) if evaluation else None,
        segments=all_segments(evaluation, seed=config.seed) if evaluation else (),
        popularity=_popularity(evaluation) if evaluation else None,
        classifiers={name: _classifier(one) for name, one in manifest.classifiers.items()} if manifest else {},
    )


def add_card(bundle: Path, manifest: Manifest, run_dir: Path) -> Manifest:
    """Writes the run's card into the bundle and names its files in the manifest, which is written anew.

    The bundle's version is that of the model alone: a card can be drawn again without a new one.
    """
    card = card_of_run(run_dir, manifest)
    (bundle / CARD_HTML).write_text(render_html(card))
    (bundle / CARD_MARKDOWN).write_text(render_markdown(card))
    files = {name: checksum(bundle / name) for name in (CARD_HTML, CARD_MARKDOWN)}
    complete = manifest.model_copy(update={"files": dict(sorted({**manifest.files, **files}.items()))})
    write_manifest(bundle, complete)
    return complete


def _metrics(record: RunRecord, evaluation: Evaluation | None, seed: int) -> Sequence[Metric]:
    """Returns the evaluation's metrics with intervals; whatever else the run measured comes last."""
    known = metrics_with_intervals(evaluation, seed=seed) if evaluation else []
    names = {metric.name for metric in known}
    return [*known, *(Metric(name, value) for name, value in record.metrics.items() if name not in names)]


def _data(facts: Facts | None, manifest: Manifest | None) -> dict[str, object]:
    if facts is None:
        return {}
    values: dict[str, object] = {
        "events from": _moment(facts.first_event),
        "events until": _moment(facts.last_event),
        "tower trained on visits until": _moment(facts.ranker_start),
        "ranker trained on visits until (the cut)": _moment(facts.cut),
    }
    if manifest:
        values["item-to-item weights refitted on events until"] = f"{manifest.data_until:%Y-%m-%d %H:%M} UTC"
    return values | facts.counts


def _training(record: RunRecord, facts: Facts | None, manifest: Manifest | None) -> dict[str, object]:
    values: dict[str, object] = {"time of the whole run": f"{record.seconds:,.0f} s", "optimizer steps of the tower": record.steps}
    values |= facts.hardware if facts else {}
    parity = manifest.parity if manifest else {}
    return values | {f"largest difference of ONNX from PyTorch: {name}": difference for name, difference in parity.items()}


def _classifier(one: Classifier) -> dict[str, object]:
    values: dict[str, object] = {"base model": one.base_model, "labels": len(one.labels), "temperature": one.temperature}
    return values | {"out of scope below": one.threshold} | dict(one.metrics)


def _calibration(evaluation: Evaluation) -> Calibration:
    said = [p for user in evaluation.users for p in user.probabilities]
    took = [
        float(row in user.wanted) / len(user.wanted)
        for user in evaluation.users
        for row in user.rankings[PIPELINE][: len(user.probabilities)]
    ]
    return Calibration(np.array(said), np.array(took), _CALIBRATION)


def _popularity(evaluation: Evaluation) -> Popularity:
    items = range(len(evaluation.catalogue.ids))
    shown = Counter(row for user in evaluation.users for row in user.rankings[PIPELINE][:_SHOWN])
    taken = Counter(row for user in evaluation.users for row in user.wanted)
    return Popularity(
        purchases=np.array(evaluation.catalogue.purchases),
        shown=np.array([shown[row] for row in items]),
        taken=np.array([taken[row] for row in items]),
        titles=evaluation.catalogue.titles,
    )


def _if_kept(load: Callable[[Path], T], run_dir: Path) -> T | None:
    try:
        return load(run_dir)
    except FileNotFoundError:
        return None


def _moment(time: int) -> str:
    return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time):%Y-%m-%d %H:%M} UTC"
