"""Commands around training: search hyper-parameters, measure variants of the encoder, choose what to label next."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.context import shop
from cli.models import newest_run, training_config
from features.settings import Settings

if TYPE_CHECKING:
    from training.quantize import Figures
    from training.tune import TuneResult

_out = Console()


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(epilog="Example: concord tune --trials 30 --timeout 3600 --space learning_rate=1e-5:1e-4:log")(tune)
    app.command(epilog="Example: concord quantize")(quantize)
    app.command("label-next", epilog="Example: concord label-next --pairs pairs.csv --count 100 --out next.jsonl")(label_next)


def tune(
    trials: Annotated[int, typer.Option(min=1, help="Trials the study shall have in all, earlier ones included.")] = 20,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds after which no further trial begins; 0: no bound.")] = 0.0,
    study: Annotated[str, typer.Option(help="Name of the study under <data_dir>/studies; one that exists goes on.")] = "default",
    space: Annotated[
        list[str] | None, typer.Option(help="field=low:high, field=low:high:log or field=a,b,c; repeatable. Default: a sensible one.")
    ] = None,
    pruner: Annotated[str, typer.Option(help="What ends a hopeless trial early: median, hyperband or none.")] = "median",
    preset: Annotated[str, typer.Option(help="Where the search starts: demo, full or tiny.")] = "full",
    assign: Annotated[list[str] | None, typer.Option("--set", help="A field that all trials share, name=value; repeatable.")] = None,
) -> None:
    """Searches the tower's hyper-parameters for the best NDCG@10 on validation labels; the holdout is never looked at.

    Interrupted, it goes on where it was. Train with what it found: concord train --config <data_dir>/studies/<study>/best.json
    """
    from training.dataset import TrainingDataError
    from training.space import Space
    from training.tune import DEFAULT_SPACE, PRUNERS, Search, StudyMismatchError
    from training.tune import tune as run

    if pruner not in PRUNERS:
        raise typer.BadParameter(f"{pruner!r} is none of {', '.join(PRUNERS)}", param_hint="--pruner")
    base = training_config(preset, None, [*_FOUR_VALIDATIONS, *(assign or [])])
    try:
        searched = Space.parse(space or DEFAULT_SPACE, base)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--space") from None
    with shop(Settings) as settings:
        try:
            result = run(settings, base, searched, Search(study, trials, timeout, pruner))
        except StudyMismatchError as error:
            raise typer.BadParameter(str(error), param_hint="--study") from None
        except TrainingDataError as error:
            raise typer.BadParameter(f"this shop cannot be trained on: {error}") from None
    _out.print(_trials(result))
    _out.print(f"best validation NDCG@10 {result.ndcg_at_10:.4f}; {result.folder / 'best.json'} and history.png beside it")


# A pruner needs something to judge a trial by before it ends.
_FOUR_VALIDATIONS = ("validations_per_epoch=4",)


def _trials(result: "TuneResult") -> Table:
    searched = sorted({name for trial in result.trials for name in trial.params})
    table = Table("trial", "state", "NDCG@10", "validations", "s", *searched, title="trials, best first")
    for trial in sorted(result.trials, key=lambda trial: -(trial.value or 0.0)):
        values = [_short(trial.params.get(name, "")) for name in searched]
        seconds = f"{trial.duration.total_seconds():.0f}" if trial.duration else ""
        score = "" if trial.value is None else f"{trial.value:.4f}"
        table.add_row(str(trial.number), trial.state.name.lower(), score, str(len(trial.intermediate_values)), seconds, *values)
    return table


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def quantize(
    run_dir: Annotated[Path | None, typer.Argument(help="A run folder; default: the newest one under the data folder.")] = None,
) -> None:
    """Measures every form of a run's encoder on the CPU: size, time, what the batch changes, loss in NDCG@10 on validation labels.

    Nothing is exported: concord export --encoder static takes one that may be served, and refuses the others.
    """
    from training.run import quantize as run

    with shop(Settings) as settings:
        folder = run_dir or newest_run(settings)
        figures = run(settings, folder)
    _out.print(_variants(figures))
    _out.print(f"figures in {folder / 'variants.json'}")


def _variants(figures: "list[Figures]") -> Table:
    from training.quantize import refusal
    from training.variants import Variant

    fp32 = next(one for one in figures if one.variant is Variant.FP32)
    table = Table("encoder", "MB", "ms", "off fp32 by", "batch size", "padding", "order", "NDCG@10", "loss", "verdict")
    for one in figures:
        changed = [
            "bit-equal" if one.invariance[name].bit_equal else f"{one.invariance[name].largest_difference:.1e}"
            for name in ("batch_size", "padding", "order")
        ]
        verdict = refusal(one, fp32) or ("for CUDA only" if one.variant is Variant.FP16 else "may be served")
        sizes = (f"{one.megabytes:.1f}", f"{one.milliseconds:.2f}", f"{one.difference:.1e}")
        table.add_row(one.variant.value, *sizes, *changed, f"{one.ndcg_at_10:.4f}", f"{one.ndcg_loss:+.4f}", verdict)
    return table


def label_next(
    pairs: Annotated[Path, typer.Option(help="Unlabelled pairs: Parquet, CSV or JSON lines with user_id and item_id.")],
    count: Annotated[int, typer.Option(min=1, help="How many labels can be paid for.")] = 100,
    run_dir: Annotated[Path | None, typer.Option(help="A run of train --task clicks; default: the newest.")] = None,
    strategy: Annotated[str, typer.Option(help="badge, cluster, entropy, margin, k_center or random.")] = "badge",
    labelled: Annotated[Path | None, typer.Option(help="Pairs that have a label already, in such a file; never proposed.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the proposals there as JSON lines.")] = None,
) -> None:
    """Chooses the (customer, item) pairs whose labels the click classifier would learn most from."""
    from training.active import Strategy
    from training.labelling import label_next as run
    from training.labelling import read_pairs

    try:
        chosen = Strategy(strategy)
        pool, done = read_pairs(pairs), read_pairs(labelled) if labelled else []
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with shop(Settings) as settings:
        folder = run_dir or newest_run(settings, "*-classifier/classifier.json")
        plan = run(settings, folder, pool, count=count, strategy=chosen, labelled=done)
    table = Table("customer", "item", "probability", "entropy (nats)", title=f"label next, {chosen.value}")
    for one in plan.proposals[:20]:
        table.add_row(one.user_id, one.item_id, f"{one.probability:.3f}", f"{one.entropy:.3f}")
    _out.print(table)
    if out:
        out.write_text("".join(json.dumps(asdict(one)) + "\n" for one in plan.proposals))
    where = f"; all in {out}" if out else ""
    _out.print(f"{len(plan.proposals)} of {plan.pool} pairs{where}; {plan.unreadable} more could not be read")
