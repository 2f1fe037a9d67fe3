"""The training job: data set → tower → ranker → evaluation on the holdout → run folder; and evaluation and export of a run.

    torchrun --nproc-per-node 4 --no-python concord train      # several processes share the tower's epochs; one does the rest

Nothing reads the future: tower, ranker and collaborative weights of the evaluated model stop at the cut, and every row is
joined as of its label. Only an export refits the collaborative weights on everything, after the metrics were taken.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import torch

from features.bundle import Manifest
from features.item_table import FloatArray, ItemTable
from features.settings import Settings
from features.signals import SignalConfig
from features.store import contract_of
from training import checkpoint, collaborative
from training import evaluate as evaluation
from training.checkpoint import RunRecord, Trained
from training.config import TrainConfig
from training.dataset import (
    SERVICE,
    Customers,
    Shop,
    Snapshots,
    Split,
    behaviour_texts,
    join_customers,
    open_shop,
    split_of,
    take_snapshots,
)
from training.distributed import of_the_first, processes, rank_zero_first
from training.encode import user_vectors
from training.events import EventLog, Micros, to_micros
from training.export import BundleContext, write_bundle
from training.exposures import with_exposures
from training.labels import Label, Labels, all_labels, choose_labels, folds, holdout_labels, keys_of
from training.on_sale import read_on_sale
from training.ragged import Ragged
from training.ranker import Ranker, train_ranker
from training.scoring import Model, Query, make_queries
from training.shards import batches
from training.text import Tokens, load_tokenizer, tokenize
from training.train import TowerReport, TowerSet, Trainer

Vectors = Callable[[ItemTable], FloatArray]
_JOINED = "customers"
_LABELS_AT_ONCE = 4_096


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, holdout metrics, wall-clock seconds and the tower's optimizer steps."""

    run_dir: Path
    metrics: dict[str, float]
    seconds: float
    steps: int


def train(settings: Settings, config: TrainConfig, *, now: datetime | None = None) -> TrainResult:
    """Trains and evaluates a model; the run folder is ``<data_dir>/runs/<time>``.

    Raises:
        TrainingDataError: no items, no events, the Feast repository is not applied, or too few events before the cut.
    """
    started = time.monotonic()
    prepare_torch(config)
    run_dir = settings.data_dir / "runs" / f"{now or datetime.now(UTC):%Y%m%dT%H%M%S}"
    with processes() as rank:
        run_dir = Path(of_the_first(str(run_dir)))
        with rank_zero_first():
            shop = open_shop(settings)
            split = split_of(shop.log, config)
            # Before the customers are joined: their profiles are snapshots too, and a ranker that trained without them
            # meets them for the first time in production (Online Retail: NDCG@10 0.120 instead of 0.130 on the same run).
            start = split.begin if config.split == "session" else split.ranker_start
            snapshots = None if rank else take_snapshots(shop, start=start, cut=split.cut, every_days=config.snapshot_days)
            labels = choose_labels(shop.log, split, config)
            # The others find what the first has joined, and go on at once.
            keys = keys_of([*labels.tower, *labels.validation, *labels.ranker, *labels.holdout])
            customers = join_customers(shop.store, keys, run_dir / _JOINED)
        trained, report = _train_tower(shop, split, labels, customers, config=config, run_dir=run_dir)
    if snapshots is None:
        return TrainResult(run_dir, {}, time.monotonic() - started, report.steps)
    trained, holdout = _train_ranker(shop, labels, customers, snapshots=snapshots, trained=trained)
    shutil.rmtree(run_dir / _JOINED)  # it holds what customers did, which is to be forgotten with them
    metrics = evaluation.metrics_of(holdout, trained.ranker)
    metrics |= {"tower_validation_ndcg_at_10": report.ndcg_at_10, "untrained_tower_validation_ndcg_at_10": report.untrained_ndcg_at_10}
    seconds = time.monotonic() - started
    checkpoint.save(trained, RunRecord(shop.table.ids, split.cut, metrics, report.steps, seconds), run_dir)
    return TrainResult(run_dir, metrics, seconds, report.steps)


def evaluate(settings: Settings, run_dir: Path, *, rankings: Path | None = None, cut: datetime | None = None) -> dict[str, float]:
    """Measures a run on each customer's first purchase visit after ``cut`` (by default its own), all customers included.

    A run that was split by sessions is measured on the sessions it held out, and takes no other cut.

    Args:
        settings: the shop.
        run_dir: a finished run.
        rankings: also write each customer's ranking there, one JSON line ``{"user", "items"}`` each.
        cut: not before the run's own: the model has seen what came earlier.

    Raises:
        ValueError: ``cut`` lies before the run's own.
        FileNotFoundError: ``run_dir`` is not a finished run.
    """
    trained, record = checkpoint.load(run_dir)
    prepare_torch(trained.config)
    moment = record.cut if cut is None else to_micros(cut)
    if moment < record.cut:
        raise ValueError("the cut lies in the period this run was trained on")
    shop = open_shop(settings)
    labels = _held_out(shop.log, trained.config, moment, own_cut=record.cut)
    start = min((label.time for label in labels), default=moment)
    snapshots = take_snapshots(shop, start=start, cut=moment, every_days=trained.config.snapshot_days)
    customers = join_customers(shop.store, keys_of(labels))
    queries = _holdout_queries(shop, labels, customers, snapshots=snapshots, trained=trained, vectors=_vectors_by(trained))
    if rankings:
        evaluation.write_rankings(queries, trained.ranker, rankings)
    return evaluation.metrics_of(queries, trained.ranker)


def export(settings: Settings, run_dir: Path, out: Path, *, now: datetime | None = None) -> Manifest:
    """Writes a run as a bundle into the folder ``out``, its collaborative weights refitted on all events up to now.

    Raises:
        FileNotFoundError: ``run_dir`` is not a finished run.
        ParityError: ONNX Runtime does not reproduce the model.
    """
    trained, record = checkpoint.load(run_dir)
    prepare_torch(trained.config)
    shop = open_shop(settings)
    first, last = shop.log.window()
    weights = collaborative.fit(shop.log, len(shop.table), until=last + 1, config=trained.config)
    context = BundleContext(
        name=run_dir.name,
        created_at=now or datetime.now(UTC),
        contract=contract_of(shop.store, SERVICE),
        metrics=record.metrics,
        cut=record.cut,
        first_event=first,
        last_event=last,
    )
    return write_bundle(out, trained, table=shop.table, collaborative=weights, context=context)


def prepare_torch(config: TrainConfig) -> None:
    """Sets threads and seeds."""
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    torch.manual_seed(config.seed)


def _held_out(log: EventLog, config: TrainConfig, cut: Micros, *, own_cut: Micros) -> Sequence[Label]:
    if config.split != "session":
        return holdout_labels(log, config.actions(config.target_actions), cut=cut)
    if cut != own_cut:
        raise ValueError("a run split by sessions has no cut")
    known = log.before(own_cut)
    return all_labels(known, split_of(known, config), config)[2]


def _train_tower(
    shop: Shop, split: Split, labels: Labels, customers: Customers, *, config: TrainConfig, run_dir: Path
) -> tuple[Trained, TowerReport]:
    tower, tokenizer = checkpoint.new_tower(config, len(shop.table)), load_tokenizer(config.base_model)

    def readable(chosen: Sequence[Label]) -> TowerSet:
        kept, ids = [], []
        for part in batches(chosen, _LABELS_AT_ONCE):
            texts = list(behaviour_texts(shop, keys_of(part), customers, config.behaviour_limit))
            kept += [label for label, text in zip(part, texts, strict=True) if text]
            ids.append(Ragged(tokenize(tokenizer, filter(None, texts), config.user_tokens).ids))
        return TowerSet(kept, Tokens(Ragged.joined(ids)))

    # One text per item for all of the tower's labels: that of the end of its period, which no later label can see changed.
    items = tokenize(tokenizer, shop.descriptions.before(split.ranker_start).texts, config.item_tokens)
    chosen = labels.tower
    with psycopg.connect(shop.dsn) as connection:
        on_sale = read_on_sale(connection, shop.table, shop.log)
        if config.exposure_negatives:
            chosen = with_exposures(connection, chosen, shop.table, shop.log)
    trainer = Trainer(tower, items, train=readable(chosen), validation=readable(labels.validation), config=config, on_sale=on_sale)
    report = trainer.run(run_dir / "tensorboard")
    return Trained(config, tower, tokenizer, Ranker(config.ranker_hidden), shop.table.ids), report


def _train_ranker(
    shop: Shop, labels: Labels, customers: Customers, *, snapshots: Snapshots, trained: Trained
) -> tuple[Trained, list[Query]]:
    """Trains the ranker on labels that neither tower nor collaborative weights have seen; also returns the holdout's queries."""
    config, vectors = trained.config, _vectors_by(trained)
    queries: list[Query] = []
    for until, fold in folds(labels.ranker, config.ranker_folds):
        queries += _queries(shop, fold, customers, snapshots=snapshots, trained=trained, vectors=vectors, until=until)
    ranker = train_ranker(queries, config)
    holdout = _holdout_queries(shop, labels.holdout, customers, snapshots=snapshots, trained=trained, vectors=vectors)
    return Trained(config, trained.tower, trained.tokenizer, ranker, trained.item_ids), holdout


def _holdout_queries(
    shop: Shop, labels: Sequence[Label], customers: Customers, *, snapshots: Snapshots, trained: Trained, vectors: Vectors
) -> list[Query]:
    """Prepares the holdout: all at the cut, or each session at its own time."""
    parts = folds(labels, trained.config.session_folds if trained.config.split == "session" else 1)
    return [
        query
        for until, part in parts
        for query in _queries(shop, part, customers, snapshots=snapshots, trained=trained, vectors=vectors, until=until)
    ]


def _vectors_by(trained: Trained) -> Vectors:
    """Returns a function from a table to its items' vectors that encodes the same texts once."""
    known: dict[tuple[str, ...], FloatArray] = {}

    def vectors(table: ItemTable) -> FloatArray:
        if table.texts not in known:
            known[table.texts] = trained.item_vectors(table)
        return known[table.texts]

    return vectors


def _queries(
    shop: Shop,
    labels: Sequence[Label],
    customers: Customers,
    *,
    snapshots: Snapshots,
    trained: Trained,
    vectors: Vectors,
    until: Micros,
) -> list[Query]:
    """Prepares labels from ``until`` on, with descriptions and collaborative weights of strictly before it."""
    config, table = trained.config, shop.descriptions.before(until)
    known = [customers[key] for key in keys_of(labels)]
    users = user_vectors(trained.tower, trained.tokenizer, [customer.activity for customer in known], table=table, config=config)
    weights = collaborative.fit(shop.log, len(shop.table), until=until, config=config)
    model = Model(vectors(table), weights, SignalConfig(config.half_life_days))
    return make_queries(labels, known, users, model=model, snapshots=snapshots)
