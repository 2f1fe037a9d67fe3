"""The dynamic update: the active model, trained on with what has happened since, has to beat itself to be replaced.

    begin ─────── ranker_start of the champion ───── ranker_start ───── cut ───── end
      replay: a sample        tower: all visits         ranker: visits    holdout: both models rank the same customers

The holdout begins after the champion's last event, so no model was fitted, stopped or chosen on it. Three are compared: the
champion as it is published; its tower and ranker with item-to-item weights fitted anew, up to the cut ("refreshed"); and those
trained on ("trained"), with the same weights. What was trained on has to beat what was only refreshed, and the better of the two has
to beat what answers now. On Online Retail most of a monthly update's gain is that of the weights (docs/QUALITY.md).
"""

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psycopg
from psycopg import Connection
from psycopg.rows import TupleRow

from features.bundle import COLLABORATIVE, ITEMS, TRAINING, Manifest, fetch_file, require_format
from features.classifiers import fetch_folders
from features.item_table import ItemTable
from features.models import ModelVersion, find_model, list_models, publish
from features.settings import Settings
from features.signals import CollaborativeWeights
from training import checkpoint
from training.checkpoint import RunRecord, Trained
from training.comparison import Contender, Gain, measure, paired_bootstrap
from training.config import TrainConfig
from training.dataset import Split, TrainingDataError, open_shop
from training.events import EventLog, Micros, to_micros
from training.labels import Labels
from training.metrics import Tally
from training.run import export, train
from training.warm_start import Origin, WarmStart, grown, load_origin

# Of the visits no weights have seen yet, the older half goes to the tower, the newer half to the ranker: after some monthly
# updates the tower is a month behind the cut. The 15 % of the whole history of a first training would be 7 weeks after a year.
_RANKER_SHARE = 0.5
_JSON, _MARKDOWN = "update.json", "update.md"
TRAINED, REFRESHED = "trained", "refreshed"


@dataclass(frozen=True)
class UpdatePolicy:
    """How an update divides the data, and when the challenger wins.

    Attributes:
        replay_fraction: share of older visits among those the tower trains on, against forgetting; in [0, 1).
        holdout_fraction: newest share of the time since the champion's last event that both are compared on; in (0, 1).
        margin: NDCG@10 by which the challenger must be better than the champion, and training on better than refreshing.
        confidence: of the interval around the difference, in (0, 1).
        certain: the lower end of that interval must be above the margin, not just the mean.
        min_customers: with fewer customers to compare on, nothing is trained.
    """

    replay_fraction: float = 0.5
    holdout_fraction: float = 0.5
    margin: float = 0.0
    confidence: float = 0.95
    certain: bool = False
    min_customers: int = 30

    def __post_init__(self) -> None:
        if not 0.0 <= self.replay_fraction < 1.0:
            raise ValueError("replay_fraction must be at least 0 and below 1")
        for name in ("holdout_fraction", "confidence"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be above 0 and below 1")
        if self.min_customers < 2:
            raise ValueError("min_customers must be at least 2")

    def wins(self, gain: Gain) -> bool:
        """Returns whether one model replaces another; a difference equal to the margin is not enough."""
        return (gain.low if self.certain else gain.mean) > self.margin


@dataclass(frozen=True)
class Idle:
    """There is nothing to do, and why."""

    reason: str


@dataclass(frozen=True)
class Counts:
    """Events since the champion's last one, and the visits of each kind the update uses; ``customers`` can be compared on."""

    new_events: int
    new_visits: int
    replayed_visits: int
    ranker_visits: int
    customers: int


@dataclass(frozen=True)
class Plan:
    """What an update will do; ``published`` are the item-to-item weights the champion answers with, over the shop's items."""

    champion: str
    published: CollaborativeWeights
    config: TrainConfig
    policy: UpdatePolicy
    warm: WarmStart
    counts: Counts


@dataclass(frozen=True)
class Verdict:
    """Which model challenges the champion, and with what success.

    Attributes:
        kept: TRAINED or REFRESHED.
        training_gain: of training on over refreshing.
        gain: of what was kept over the champion as it is published.
        wins: whether that is enough.
    """

    kept: str
    training_gain: Gain
    gain: Gain
    wins: bool


@dataclass(frozen=True)
class Report:
    """What an update did. The metrics are ``ndcg_at_10``, ``hr_at_10`` and ``recall_at_20`` on the holdout."""

    champion: str
    challenger: str
    cut: datetime
    counts: Counts
    champion_metrics: dict[str, float]
    refreshed_metrics: dict[str, float]
    trained_metrics: dict[str, float]
    verdict: Verdict
    policy: UpdatePolicy
    seconds: float
    run_dir: Path


def prepare(settings: Settings, policy: UpdatePolicy, *, values: Mapping[str, str] | None = None) -> Plan | Idle:
    """Finds the active model and what has happened since; trains and publishes nothing.

    Args:
        settings: the shop.
        policy: how to divide and decide.
        values: fields of the active model's training configuration to change, as text.

    Raises:
        TrainingDataError: no model is active, or it carries nothing to start from.
        BundleError: its bundle cannot be read.
        ValueError: a field is unknown or invalid or changes the network, or the cut lies in the period the active model was made in.
    """
    with psycopg.connect(settings.postgres_dsn) as connection:
        models = list_models(connection)
        champion = next((model for model in models if model.active), None)
        if champion is None:
            raise TrainingDataError("no model is active: train, publish and activate a first one")
        if idle := _nothing_new(connection, champion, models):
            return idle
    origin = _origin(champion)
    config = replace(origin.trained.config, cut="", split="time").with_values(values or {})
    if config.distil_weight:  # the active model is the student: it goes on by itself, its teachers are not trained again
        config = replace(config, ensemble=1, ensemble_models="", distil_weight=0.0)
    shop = open_shop(settings)
    since = to_micros(_window_end(champion))
    split = update_split(shop.log, origin, since=since, config=config, policy=policy)
    grown(origin.trained, shop.table.ids, config)  # refuses another network now, not when the data is prepared
    warm = WarmStart(champion.model_version, origin, split, policy.replay_fraction)
    try:
        labels = warm.labels(shop.log, config)
    except TrainingDataError as error:
        return Idle(f"too little has happened since {_text(since)}: {error}")
    counts = _counts(shop.log, labels, since=since, warm=warm)
    if counts.customers < policy.min_customers:
        return Idle(
            f"{counts.new_events} events since {_text(since)} leave {counts.customers} customers to compare on after "
            f"{_text(split.cut)}; {policy.min_customers} are needed"
        )
    if not counts.new_visits:
        return Idle(f"{counts.new_events} events since {_text(since)} hold no visit that the tower could learn from")
    return Plan(champion.model_version, _published_weights(champion, shop.table), config, policy, warm, counts)


def update(settings: Settings, plan: Plan, *, now: datetime | None = None) -> Report | None:
    """Trains the challenger, compares it with the champion, writes the report and publishes; activating is the caller's.

    Under ``torchrun`` only the first process gets a report, the others None.

    Raises:
        TrainingDataError: as ``training.run.train``.
        ParityError: as ``training.run.export``.
    """
    started = time.monotonic()
    result = train(settings, plan.config, now=now, warm=plan.warm)
    if int(os.environ.get("RANK", 0)):
        return None
    trained, record = checkpoint.load(result.run_dir)
    tallies = _compare(settings, plan, trained)
    champion, refreshed, challenger = (tally.means() for tally in tallies)
    verdict = judge(*([ndcg for ndcg, _, _ in tally.scores] for tally in tallies), policy=plan.policy, seed=plan.config.seed)
    if verdict.kept == REFRESHED:
        trained, record = _refreshed(settings, plan, record, refreshed)
        run_dir = result.run_dir.with_name(f"{result.run_dir.name}-{REFRESHED}")
        run_dir.mkdir()
        checkpoint.save(trained, record, run_dir)
    else:
        run_dir = result.run_dir
    checkpoint.save_record(replace(record, metrics=record.metrics | _told(champion, verdict)), run_dir)
    manifest = _publish(settings, run_dir, plan.champion, now=now)
    report = Report(
        champion=plan.champion,
        challenger=manifest.model_version,
        cut=moment(plan.warm.split.cut),
        counts=replace(plan.counts, customers=len(tallies[0].scores)),
        champion_metrics=champion,
        refreshed_metrics=refreshed,
        trained_metrics=challenger,
        verdict=verdict,
        policy=plan.policy,
        seconds=time.monotonic() - started,
        run_dir=run_dir,
    )
    (run_dir / _JSON).write_text(json.dumps(asdict(report), indent=2, default=str) + "\n")
    (run_dir / _MARKDOWN).write_text(markdown(report))
    return report


def judge(champion: Sequence[float], refreshed: Sequence[float], trained: Sequence[float], *, policy: UpdatePolicy, seed: int) -> Verdict:
    """Decides from scores of the same customers: what was trained on if it beats what was refreshed, and whether that wins."""
    training_gain = paired_bootstrap(refreshed, trained, confidence=policy.confidence, seed=seed)
    kept, scores = (TRAINED, trained) if policy.wins(training_gain) else (REFRESHED, refreshed)
    gain = paired_bootstrap(champion, scores, confidence=policy.confidence, seed=seed)
    return Verdict(kept, training_gain, gain, policy.wins(gain))


def update_split(log: EventLog, origin: Origin, *, since: Micros, config: TrainConfig, policy: UpdatePolicy) -> Split:
    """Returns the update's periods: the holdout inside the time after ``since``, the rest of the unseen time halved.

    Args:
        log: all events.
        origin: what the champion has learned from.
        since: the champion's last event.
        config: its ``cut``, if there is one, begins the holdout.
        policy: its ``holdout_fraction`` does otherwise.

    Raises:
        ValueError: the configured cut is not between ``since`` and the last event.
    """
    begin, last = log.window()
    end = last + 1
    cut = to_micros(datetime.fromisoformat(config.cut)) if config.cut else end - int((end - since) * policy.holdout_fraction)
    if not since < cut < end:
        raise ValueError(f"the cut must lie between the active model's last event, {_text(since)}, and the newest, {_text(last)}")
    seen = max(origin.ranker_start, begin)
    return Split(begin, cut - int((cut - seen) * _RANKER_SHARE), cut, end)


def markdown(report: Report) -> str:
    """Returns a report as a Markdown page."""
    counts, verdict = report.counts, report.verdict
    needed = f"{'lower end' if report.policy.certain else 'mean'} above {report.policy.margin:+.4f}"
    how = "trained on" if verdict.kept == TRAINED else "its item-to-item weights fitted anew, for training on gained too little"
    lines = [
        f"# Update of {report.champion}",
        "",
        f"Challenger `{report.challenger}` ({how}) **{'wins' if verdict.wins else 'does not win'}**: {told(verdict.gain, report.policy)}; "
        f"needed: {needed}.",
        "",
        f"Training on against fitting the weights anew: {told(verdict.training_gain, report.policy)}.",
        "",
        "| on the holdout | champion | refreshed | trained on |",
        "|---|---|---|---|",
        *(
            f"| {name} | {value:.4f} | {report.refreshed_metrics[name]:.4f} | {report.trained_metrics[name]:.4f} |"
            for name, value in report.champion_metrics.items()
        ),
        "",
        f"Holdout: {counts.customers} customers, each one's first purchase visit after {report.cut:%Y-%m-%d %H:%M} UTC, ranked by all "
        "models from what was known then.",
        "",
        f"Trained on {counts.new_visits} new visits and {counts.replayed_visits} replayed ones (tower) and {counts.ranker_visits} visits "
        f"(ranker), of {counts.new_events} new events; {report.seconds:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


def told(gain: Gain, policy: UpdatePolicy) -> str:
    """Returns a difference and its interval in words."""
    return f"NDCG@10 {gain.mean:+.4f} per customer, {policy.confidence:.0%} interval {gain.low:+.4f} to {gain.high:+.4f}"


def _nothing_new(connection: Connection[TupleRow], champion: ModelVersion, models: list[ModelVersion]) -> Idle | None:
    """Says so when no event is newer than what the champion, or the last challenger trained from it, knows."""
    tried = [model for model in models if model.manifest["settings"].get("warm_start") == champion.model_version]
    newest = max([champion, *tried], key=_window_end)
    row = connection.execute("SELECT count(*) FROM events WHERE occurred_at > %s", [_window_end(newest)]).fetchone()
    if row is None or row[0]:
        return None
    told = f"no events after {_window_end(newest):%Y-%m-%d %H:%M:%S} UTC, the last that {newest.model_version} was made from"
    if newest is champion:
        return Idle(told)
    gain = newest.manifest["metrics"].get("gain_ndcg_at_10", float("nan"))
    return Idle(f"{told}: it was compared with the active {champion.model_version} ({gain:+.4f} NDCG@10) and is not active")


def _window_end(model: ModelVersion) -> datetime:
    return datetime.fromisoformat(model.manifest["data_until"])


def _origin(champion: ModelVersion) -> Origin:
    """Fetches what the champion's bundle carries for an update."""
    require_format(champion.manifest, champion.model_version)
    expected = champion.manifest["files"].get(TRAINING)
    if expected is None:
        raise TrainingDataError(
            f"{champion.model_version} carries no {TRAINING}: its tower is a sequence tower, which is not updated yet, "
            "or an earlier release made it; then export, publish and activate it again with this one"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TRAINING
        fetch_file(champion.uri, TRAINING, path, expected=expected)
        return load_origin(path)


def _counts(log: EventLog, labels: Labels, *, since: Micros, warm: WarmStart) -> Counts:
    new = sum(label.time >= warm.origin.ranker_start for label in labels.tower)
    sold = set(log.item[log.has_action(("purchase",)) & (log.time < warm.split.cut)].tolist())
    return Counts(
        new_events=int(np.count_nonzero(log.time > since)),
        new_visits=new,
        replayed_visits=len(labels.tower) - new,
        ranker_visits=len(labels.ranker),
        customers=sum(not sold.isdisjoint(label.items) for label in labels.holdout),
    )


def _published_weights(champion: ModelVersion, table: ItemTable) -> CollaborativeWeights:
    """Fetches the item-to-item weights the champion answers with, and lays them over the items there are now."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in (ITEMS, COLLABORATIVE)}
        for name, path in paths.items():
            fetch_file(champion.uri, name, path, expected=champion.manifest["files"][name])
        with np.load(paths[ITEMS]) as items, np.load(paths[COLLABORATIVE]) as arrays:
            rows = {str(item): row for row, item in enumerate(items["item_ids"])}
            return CollaborativeWeights(arrays["indptr"], arrays["indices"], arrays["weights"]).remapped(rows, table)


def _compare(settings: Settings, plan: Plan, challenger: Trained) -> list[Tally]:
    """Measures the champion as published, refreshed, and what was trained from it, on the holdout."""
    shop = open_shop(settings)
    holdout = plan.warm.labels(shop.log, plan.config).holdout
    origin = plan.warm.origin.trained
    contenders = [Contender(origin, plan.published), Contender(origin), Contender(challenger)]
    return measure(shop, contenders, holdout, cut=plan.warm.split.cut)


def _refreshed(settings: Settings, plan: Plan, record: RunRecord, metrics: dict[str, float]) -> tuple[Trained, RunRecord]:
    """Returns the champion over today's catalogue, and what its own training saw; the export fits the weights anew."""
    origin, items = plan.warm.origin, open_shop(settings).table.ids
    known = replace(record, item_ids=items, cut=origin.cut, ranker_start=origin.ranker_start, metrics=metrics, steps=0)
    return grown(origin.trained, items, origin.trained.config), known


def _told(champion: dict[str, float], verdict: Verdict) -> dict[str, float]:
    """Returns the comparison as metrics of the run, so that the bundle's manifest and the registry hold it."""
    gain, metrics = verdict.gain, {f"champion_{name}": value for name, value in champion.items()}
    metrics |= {"gain_ndcg_at_10": gain.mean, "gain_ndcg_at_10_low": gain.low, "gain_ndcg_at_10_high": gain.high}
    return metrics | {"training_gain_ndcg_at_10": verdict.training_gain.mean}


def _publish(settings: Settings, run_dir: Path, champion: str, *, now: datetime | None) -> Manifest:
    """Publishes the challenger with the champion's text classifiers: an update has learned nothing about those."""
    with tempfile.TemporaryDirectory() as scratch, psycopg.connect(settings.postgres_dsn) as connection:
        model, bundle = find_model(connection, champion), Path(scratch) / "bundle"
        carried = fetch_folders(model.manifest, model.uri, Path(scratch) / "classifiers")
        export(settings, run_dir, bundle, classifiers=carried, now=now)
        return publish(connection, bundle, settings.models_base)


def moment(time: Micros) -> datetime:
    """Returns a time in UTC."""
    return datetime.fromtimestamp(time / 1e6, UTC)


def _text(time: Micros) -> str:
    return f"{moment(time):%Y-%m-%d %H:%M} UTC"
