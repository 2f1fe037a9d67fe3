"""What a monthly `concord train --since-last` is worth, on UCI Online Retail: the first model frozen, updated, and trained anew.

The rows of each month are imported as the month ends, into an embedded PostgreSQL. A first model is trained, published and
activated after the first months. Then, at each month's end, the active model is updated by the code behind the command, and
activated only if it wins. Everything is measured on the month that follows, which nothing has seen: each customer's first basket
in it, ranked from what was known at its start.

    python bench/monthly_update.py --data ../shared/data --out build/monthly_update.svg          # about 25 minutes on two cores

Compared are the first bundle as it was published ("frozen"), its tower and ranker with item-to-item weights fitted anew each month
("weights refitted"), whatever bundle is active ("updated"), and a model trained from scratch each month with the first one's budget
("from scratch"). Prints a table and a last line of JSON; writes the same figures as a plot.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import psycopg
from rich.console import Console
from rich.table import Table

from cli.data import Part, run_import
from cli.stack import running_stack
from features.bundle import COLLABORATIVE, ITEMS
from features.catalogue import publish_epoch
from features.importers import load_mapping
from features.models import activate, publish
from features.schema import migrate
from features.settings import Settings, load_settings
from features.signals import CollaborativeWeights
from features.store import apply_repository
from training import checkpoint
from training.checkpoint import Trained
from training.comparison import Contender, Gain, measure, paired_bootstrap
from training.config import TrainConfig
from training.dataset import Shop, open_shop
from training.events import to_micros
from training.labels import holdout_labels
from training.progress import quiet
from training.run import export, train
from training.text import base_path
from training.update import Plan, UpdatePolicy, prepare, update

FROZEN, REFITTED, UPDATED, SCRATCH = "frozen", "weights refitted", "updated", "from scratch"
# Okabe and Ito's colours, told apart by everybody.
_COLOURS = {FROZEN: "#000000", REFITTED: "#E69F00", UPDATED: "#0072B2", SCRATCH: "#009E73"}
_out = Console()


@dataclass(frozen=True)
class Month:
    """One evaluated month. ``scores`` are NDCG@10 by contender, ``gain`` that of the updated over the frozen model."""

    start: str
    customers: int
    scores: Mapping[str, float]
    gain: Gain
    activated: bool


@dataclass(frozen=True)
class Served:
    """A published model: its run folder and its bundle, weights included, as they were exported."""

    version: str
    run_dir: Path


def months(first: str, last: str) -> list[pd.Timestamp]:
    """Returns the starts of the months from ``first`` to ``last``, both included."""
    return list(pd.date_range(first, last, freq="MS"))


def split_rows(frame: pd.DataFrame, starts: Sequence[pd.Timestamp]) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Yields, up to each start and then up to the end of the last month, all rows so far and those that are new since the time before."""
    moments = pd.to_datetime(frame["InvoiceDate"], format="%m/%d/%Y %H:%M")
    before = moments.min()
    for edge in [*starts, starts[-1] + pd.offsets.MonthBegin(1)]:
        yield frame[moments < edge], frame[(moments >= before) & (moments < edge)]
        before = edge


def sample(frame: pd.DataFrame, *, share: float, items: int, seed: int) -> pd.DataFrame:
    """Returns the rows of known customers, of a random ``share`` of them, and of the ``items`` articles on most invoices (0: all)."""
    frame = frame[frame["CustomerID"].notna()]
    customers = np.sort(frame["CustomerID"].unique())
    chosen = np.random.default_rng(seed).choice(customers, round(len(customers) * share), replace=False)
    often = frame.groupby("StockCode")["InvoiceNo"].nunique().sort_values(ascending=False, kind="stable")
    return frame[frame["CustomerID"].isin(chosen) & frame["StockCode"].isin(often.index[: items or len(often)])]


def shallow_base(folder: Path, layers: int) -> Path:
    """Writes the packaged MiniLM's embeddings and first layers as a base model of their own; three times as fast with 2 of 6."""
    from transformers import AutoModel

    source = Path(base_path(""))
    with quiet():
        AutoModel.from_pretrained(source, num_hidden_layers=layers).save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    return folder


def draw(rows: Sequence[Month], out: Path, *, title: str) -> None:
    """Writes the figures as a plot; the band is the interval of the updated model's gain, around the frozen model's figure."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "monthly_update", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = [row.start[:7] for row in rows]
    for name, colour in _COLOURS.items():
        values = [row.scores.get(name, np.nan) for row in rows]
        if not np.isnan(values).all():
            axes.plot(names, values, "o-", label=name, color=colour, linewidth=2.5 if name == UPDATED else 1.5)
    low = [row.scores[FROZEN] + row.gain.low for row in rows]
    high = [row.scores[FROZEN] + row.gain.high for row in rows]
    axes.fill_between(names, low, high, color=_COLOURS[UPDATED], alpha=0.15, label="95 % interval of updated − frozen", linewidth=0)
    axes.set(title=title, xlabel="evaluated month, ranked from what was known at its start", ylabel="NDCG@10", ylim=(0, None))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


class Bench:
    """The shop month by month, and the models in it."""

    def __init__(self, settings: Settings, config: TrainConfig, *, update_steps: int, customers: int) -> None:
        self.settings, self.config, self.update_steps, self.customers = settings, config, update_steps, customers
        self.mapping = load_mapping("online_retail")

    def arrive(self, everything: pd.DataFrame, new: pd.DataFrame) -> None:
        """Imports a month: its events, and the catalogue as all rows so far describe it, published as an epoch."""
        folder = self.settings.data_dir
        for part, rows in ((Part.items, everything), (Part.events, new)):
            path = folder / f"{part.value}.parquet"
            rows.to_parquet(path)
            run_import(self.settings, path, self.mapping, part=part, rejects=folder, progress=lambda *_: None)
        with psycopg.connect(self.settings.postgres_dsn) as connection:
            publish_epoch(connection)

    def first(self) -> Served:
        """Trains, publishes and activates the first model."""
        run_dir = train(self.settings, self.config).run_dir
        with tempfile.TemporaryDirectory() as folder, psycopg.connect(self.settings.postgres_dsn) as connection:
            export(self.settings, run_dir, Path(folder))
            version = publish(connection, Path(folder), self.settings.models_base).model_version
            activate(connection, version)
        return Served(version, run_dir)

    def update(self, active: Served) -> tuple[Served, bool]:
        """Updates the active model; returns what is active then, and whether that is the challenger."""
        plan = prepare(self.settings, UpdatePolicy(), values={"max_steps": str(self.update_steps)})
        if not isinstance(plan, Plan):
            raise RuntimeError(plan.reason)
        report = update(self.settings, plan)
        if report is None or not report.verdict.wins:
            return active, False
        with psycopg.connect(self.settings.postgres_dsn) as connection:
            activate(connection, report.challenger)
        return Served(report.challenger, report.run_dir), True

    def scratch(self) -> Trained:
        """Trains a model from the pretrained one on all there is, with the first one's budget."""
        return checkpoint.load(train(self.settings, self.config).run_dir)[0]

    def evaluate(self, start: pd.Timestamp, frozen: Served, active: Served, scratch: Trained | None, *, activated: bool) -> Month:
        """Measures all models on the month that has just been imported."""
        shop, cut = open_shop(self.settings), to_micros(start.to_pydatetime())
        labels = [label for label in holdout_labels(shop.log, ("purchase",), cut=cut) if label.items]
        chosen = np.sort(np.random.default_rng(self.config.seed).permutation(len(labels))[: self.customers])
        first = checkpoint.load(frozen.run_dir)[0]
        contenders = {FROZEN: self._as_published(frozen, shop), REFITTED: Contender(first)}
        if active != frozen:
            contenders[UPDATED] = self._as_published(active, shop)
        if scratch is not None:
            contenders[SCRATCH] = Contender(scratch)
        tallies = dict(zip(contenders, measure(shop, list(contenders.values()), [labels[k] for k in chosen], cut=cut), strict=True))
        tallies.setdefault(UPDATED, tallies[FROZEN])
        pair = ([ndcg for ndcg, _, _ in tallies[name].scores] for name in (FROZEN, UPDATED))
        gain = paired_bootstrap(*pair, confidence=0.95, seed=self.config.seed)
        scores = {name: tally.means()["ndcg_at_10"] for name, tally in tallies.items()}
        return Month(f"{start:%Y-%m-%d}", len(tallies[FROZEN].scores), scores, gain, activated)

    def _as_published(self, model: Served, shop: Shop) -> Contender:
        """Returns a model with the item-to-item weights of its bundle, over the items there are now, as a server would load it."""
        folder = Path(self.settings.models_base.removeprefix("file:")) / model.version
        with np.load(folder / ITEMS) as items, np.load(folder / COLLABORATIVE) as arrays:
            rows = {str(item): row for row, item in enumerate(items["item_ids"])}
            weights = CollaborativeWeights(arrays["indptr"], arrays["indices"], arrays["weights"])
        return Contender(checkpoint.load(model.run_dir)[0], weights.remapped(rows, shop.table))


def configuration(base: Path, *, steps: int, threads: int, customers: int) -> TrainConfig:
    """Returns the full preset cut down to what a month may cost here; steps instead of seconds, so that it is reproducible."""
    return replace(
        TrainConfig.full(),
        base_model=str(base),
        threads=threads,
        user_tokens=32,
        item_tokens=16,
        time_budget_s=0.0,
        max_steps=steps,
        tower_labels=32 * steps,
        ranker_folds=1,
        ranker_labels=2 * customers,
        validation_labels=customers // 2,
        evaluation_users=customers,
    )


def run(arguments: argparse.Namespace, settings: Settings) -> list[Month]:
    """Plays the months and prints each as it is measured."""
    frame = pd.read_parquet(arguments.data / "online_retail.parquet")
    starts = months(arguments.first, arguments.last)
    base = shallow_base(settings.data_dir / "base", arguments.layers)
    config = configuration(base, steps=arguments.steps, threads=arguments.threads, customers=arguments.customers)
    frame = sample(frame, share=arguments.share, items=arguments.items, seed=config.seed)
    bench = Bench(settings, config, update_steps=arguments.update_steps, customers=arguments.customers)
    parts = split_rows(frame, starts)
    bench.arrive(*next(parts))
    frozen = active = bench.first()
    rows: list[Month] = []
    for start in starts:
        activated, scratch = False, None
        if rows:  # the first month is that of the first model, which is its own update
            active, activated = bench.update(active)
            scratch = bench.scratch() if arguments.scratch else None
        bench.arrive(*next(parts))
        rows.append(bench.evaluate(start, frozen, active, scratch, activated=activated))
        _out.print(f"{datetime.now():%H:%M:%S}  {rows[-1]}", highlight=False)  # noqa: DTZ005 - for who watches
    return rows


def show(rows: Sequence[Month]) -> None:
    """Prints the figures as a table."""
    table = Table("month", "customers", *_COLOURS, "updated − frozen", "95 % interval", "activated", title="NDCG@10")
    for row in rows:
        values = [f"{row.scores[name]:.4f}" if name in row.scores else "" for name in _COLOURS]
        interval = f"{row.gain.low:+.4f} to {row.gain.high:+.4f}"
        table.add_row(row.start[:7], str(row.customers), *values, f"{row.gain.mean:+.4f}", interval, "yes" if row.activated else "no")
    _out.print(table)


def means(rows: Sequence[Month]) -> dict[str, float]:
    """Returns each contender's mean over the months after the first, where there is something to compare."""
    later = rows[1:]
    return {name: round(float(np.mean([row.scores[name] for row in later])), 4) for name in _COLOURS if later and name in later[0].scores}


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("CONCORD_TEST_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of online_retail.parquet")
    parser.add_argument("--out", type=Path, default=Path("build/monthly_update.svg"), help="the plot, SVG or PNG")
    parser.add_argument("--first", default="2011-07-01", help="first evaluated month; the first model trains on all before")
    parser.add_argument("--last", default="2011-11-01", help="last evaluated month")
    parser.add_argument("--layers", type=int, default=2, help="MiniLM layers of the base model, of 6")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a model from scratch, 32 visits each")
    parser.add_argument("--update-steps", type=int, default=60, help="optimizer steps of an update")
    parser.add_argument("--customers", type=int, default=400, help="customers compared and evaluated a month at the most")
    parser.add_argument("--share", type=float, default=1.0, help="share of the customers that the shop consists of")
    parser.add_argument("--items", type=int, default=0, help="articles of the shop, those on most invoices; 0: all")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: one per core")
    parser.add_argument("--no-scratch", dest="scratch", action="store_false", help="leave out the models from scratch")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="concord-bench-", ignore_cleanup_errors=True) as folder:
        os.environ["CONCORD_DATA_DIR"] = folder
        with running_stack(Path(folder)):
            settings = load_settings(Settings)
            migrate(settings.postgres_dsn)
            apply_repository(settings)
            rows = run(arguments, settings)
    show(rows)
    draw(rows, arguments.out, title="Online Retail: what a monthly update is worth")
    wins = sum(row.activated for row in rows)
    figures = {"bench": "monthly_update", "months": len(rows), "activated": wins, "ndcg_at_10": means(rows)}
    months_of = [{"month": row.start[:7], "customers": row.customers, "scores": dict(row.scores), "gain": vars(row.gain)} for row in rows]
    print(json.dumps(figures | {"seconds": round(time.monotonic() - started), "by_month": months_of}))


if __name__ == "__main__":
    main()
