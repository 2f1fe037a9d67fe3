"""Commands that say how good a model is: evaluate, by segment as well, and its model card."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.context import shop
from features.bundle import CARD_HTML, CARD_MARKDOWN, MANIFEST, BundleError, read_bundle
from features.settings import Settings, load_settings

if TYPE_CHECKING:
    from training.card import Metric, Segment

_out = Console()
Run = Annotated[Path | None, typer.Argument(help="A run folder; default: the newest one under the data folder.")]


class Dimension(str, Enum):  # noqa: UP042 - typer shows the values of a str Enum
    """What an evaluation can be divided by."""

    channel = "channel"
    category = "category"
    price_band = "price_band"
    customer = "customer"


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(epilog="Example: concord evaluate --by channel --json evaluation.json")(evaluate)
    app.command(epilog="Example: concord card .data/bundle --html card.html")(card)


def evaluate(
    run_dir: Run = None,
    by: Annotated[list[Dimension] | None, typer.Option(help="Also by these segments, repeatable; channel: of visit and history.")] = None,
    rankings: Annotated[Path | None, typer.Option(help="Write each customer's ranking as JSON lines: user, items.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics with intervals and all segments here.")] = None,
    cut: Annotated[str, typer.Option(help="End of the training period, ISO 8601; default: the run's own.")] = "",
) -> None:
    """Evaluates a run on the time split, beside popularity; by channel, category, price band or customer when asked."""
    from training.evaluate import metrics_of
    from training.run import evaluate as run
    from training.segments import DIMENSIONS, metrics_with_intervals, segments_by

    with shop(Settings) as settings:
        moment = datetime.fromisoformat(cut) if cut else None
        evaluation = run(settings, run_dir or newest_run(settings), rankings=rankings, cut=moment)
    print_metrics(metrics_of(evaluation))
    asked = [name for each in by or () for name in DIMENSIONS if name in (each.value, f"history_{each.value}")]
    for name in asked:
        _print_segments(DIMENSIONS[name], segments_by(evaluation, name))
    if json_file:
        segments = {name: [_plain(segment) for segment in segments_by(evaluation, name)] for name in DIMENSIONS}
        written = {"metrics": _named(metrics_with_intervals(evaluation)), "segments": segments}
        json_file.write_text(json.dumps(written, indent=2) + "\n")


def card(
    source: Annotated[Path | None, typer.Argument(help="A run or bundle folder; default: the newest run under the data folder.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the Markdown here; with neither option it is printed.")] = None,
) -> None:
    """Writes the model card of a run, or the one that a bundle carries."""
    folder = source or newest_run(load_settings(Settings))
    forms = _bundled(folder) if (folder / MANIFEST).is_file() else _drawn(folder)
    for path, form in zip((html, markdown), forms, strict=True):
        if path:
            path.write_text(form())
    if not html and not markdown:
        print(forms[1](), end="")  # noqa: T201 - Markdown as it is: no wrapping, no colours


def _bundled(folder: Path) -> tuple[Callable[[], str], Callable[[], str]]:
    """Returns what reads the page and the Markdown of a bundle, once its checksums are verified."""
    manifest = read_bundle(folder)
    if not {CARD_HTML, CARD_MARKDOWN} <= set(manifest.files):
        raise BundleError(f"{manifest.model_version} carries no model card: it was exported by an earlier release")
    return (folder / CARD_HTML).read_text, (folder / CARD_MARKDOWN).read_text


def _drawn(folder: Path) -> tuple[Callable[[], str], Callable[[], str]]:
    """Returns what draws the page and the Markdown of a run."""
    from training.card import render_html, render_markdown
    from training.run_card import card_of_run

    made = card_of_run(folder)
    return partial(render_html, made), partial(render_markdown, made)


def newest_run(settings: Settings, pattern: str = "*/config.json") -> Path:
    """Returns the newest run folder that holds a file of this pattern; by default those that recommend.

    Raises:
        FileNotFoundError: there is none.
    """
    runs = sorted((settings.data_dir / "runs").glob(pattern), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(f"no run under {settings.data_dir / 'runs'}; `concord train` makes one")
    return runs[-1].parent


def print_metrics(metrics: dict[str, float]) -> None:
    """Prints metrics as a table."""
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    _out.print(table)


def _print_segments(title: str, segments: "list[Segment]") -> None:
    names = [metric.name for metric in segments[0].metrics] if segments else []
    table = Table(title, "customers", *names)
    for segment in segments:
        table.add_row(escape(segment.name), str(segment.customers), *(_cell(metric) for metric in segment.metrics))
    _out.print(table)


def _cell(metric: "Metric") -> str:
    bounds = "" if metric.low is None else f"\n[dim]{metric.low:.4f} to {metric.high:.4f}[/dim]"
    return f"{metric.value:.4f}{bounds}"


def _plain(segment: "Segment") -> dict[str, Any]:
    return {"name": segment.name, "customers": segment.customers, "metrics": _named(segment.metrics)}


def _named(metrics: "Iterable[Metric]") -> dict[str, dict[str, float | None]]:
    return {metric.name: {key: value for key, value in asdict(metric).items() if key != "name"} for metric in metrics}
