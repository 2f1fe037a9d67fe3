"""Commands on models and the replicas that answer with them: train, export, publish, activate, list."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from cli import update
from cli.activation import move_pointer
from cli.context import pair, shop
from cli.reports import Run, newest_run, print_metrics
from features.models import OnUnready
from features.settings import Settings

if TYPE_CHECKING:
    from training.config import TrainConfig

_out = Console()
_UPDATE = "With --since-last"
_POLICY = ("replay_fraction", "holdout_fraction", "margin", "confidence", "certain", "min_customers")


class Tower(str, Enum):  # noqa: UP042 - as below
    """How a customer's behaviours become a vector."""

    text = "text"
    sequence = "sequence"


class Task(str, Enum):  # noqa: UP042 - typer shows the values of a str Enum
    """What to train."""

    recommend = "recommend"
    clicks = "clicks"
    rating = "rating"


class Track(str, Enum):  # noqa: UP042 - likewise
    """Who may follow a run."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


# What a run folder calls each task.
_TRAINED = {Task.recommend: "tower", Task.clicks: "classifier", Task.rating: "rating"}


trainings = typer.Typer()
"""`concord train`, which by itself trains the model that recommends; what trains a text classifier is a command of it."""


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    example = "Example: concord train --preset full --set cut=2011-11-01 or concord train --since-last --margin 0.002"
    trainings.callback(invoke_without_command=True, epilog=example)(train)
    app.add_typer(trainings, name="train")
    app.command(epilog="Example: concord export --out .data/bundle")(export)
    app.command(epilog="Example: concord publish .data/bundle")(publish)
    app.command(epilog="Example: concord activate 20260131-0123456789")(activate)
    app.command(epilog="Example: concord models")(models)
    app.command(epilog="Example: concord replicas")(replicas)


def train(
    context: typer.Context,
    task: Annotated[
        Task, typer.Option(help="recommend: tower, weights and ranker; clicks: the click classifier; rating: the rating regression.")
    ] = Task.recommend,
    preset: Annotated[str, typer.Option(help="demo (minutes), full (a real shop) or tiny (a random model, for tests).")] = "full",
    tower: Annotated[
        Tower | None, typer.Option(help="text (default): BERT over behaviours as text; sequence: a small transformer over vectors.")
    ] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="A configuration instead of a preset, such as best.json.")] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="A field of the configuration, name=value; repeatable.")] = None,
    ensemble: Annotated[int, typer.Option(min=1, help="Train this many towers, of seeds in a row, and average their scores.")] = 1,
    distil: Annotated[bool, typer.Option("--distil", help="Distil the ensemble into one tower, which is what is kept.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="A run folder that was broken off: goes on from its last checkpoint, as it was configured.")
    ] = None,
    track: Annotated[list[Track] | None, typer.Option(help="Who follows the run, repeatable; default: tensorboard.")] = None,
    since_last: Annotated[bool, typer.Option("--since-last", help="Update the active model with what has happened since it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.", rich_help_panel=_UPDATE)] = False,
    margin: Annotated[
        float, typer.Option(help="NDCG@10 by which the new model must be better to be activated.", rich_help_panel=_UPDATE)
    ] = 0.0,
    certain: Annotated[
        bool, typer.Option("--certain", help="The interval's lower end, not the mean, must be above it.", rich_help_panel=_UPDATE)
    ] = False,
    confidence: Annotated[float, typer.Option(help="Of the interval around the difference, in (0, 1).", rich_help_panel=_UPDATE)] = 0.95,
    replay_fraction: Annotated[
        float, typer.Option(help="Share of older visits among those trained on, in [0, 1).", rich_help_panel=_UPDATE)
    ] = 0.5,
    holdout_fraction: Annotated[
        float, typer.Option(help="Newest share of the time since the active model that is held out, in (0, 1).", rich_help_panel=_UPDATE)
    ] = 0.5,
    min_customers: Annotated[
        int, typer.Option(min=2, help="With fewer customers to compare on, nothing is done.", rich_help_panel=_UPDATE)
    ] = 30,
) -> None:
    """Trains the user tower on this shop's events, fits the collaborative weights and the ranker, and evaluates them.

    With --task clicks: fine-tunes the click classifier, BERT over (behaviours, candidate) with two logits, and measures it.
    With --task rating: the same with one output and mean squared error, on the ratings of rate and review events.

    Among the fields: regime=full|top_k|frozen|lora|adalora|adapter (what of BERT is fine-tuned), optimizer=adamw|sgd,
    schedule=linear|cosine|constant, label_smoothing, accumulation_steps, mixed_precision, device, checkpoint_steps, and
    warmup_objective=mlm|contrastive with warmup_steps (self-supervised, before the labels). All: docs/training.md.

    With --since-last: goes on from the active model's weights and configuration, on new visits and a replay of old ones; compares
    both on the newest holdout, publishes the new model, and activates it if it wins. Without new events it does nothing.
    """
    given = {name for name in context.params if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"}
    if context.invoked_subcommand:
        if given:
            raise typer.BadParameter(f"is no option of concord train {context.invoked_subcommand}", param_hint=f"--{min(given)}")
        return
    if since_last:
        if given & {"task", "preset", "resume"}:
            raise typer.BadParameter("an update keeps the active model's task and configuration; --set changes fields of it")
        values = dict(pair(text) for text in assign or [])
        policy = {name: value for name, value in context.params.items() if name in _POLICY}
        with shop(Settings) as settings:
            update.since_last(settings, policy, values=values, dry_run=dry_run)
        return
    if alone := sorted(given & {"dry_run", *_POLICY}):
        raise typer.BadParameter("only with --since-last", param_hint=", ".join(f"--{name.replace('_', '-')}" for name in alone))
    from training.classifier import Clicks
    from training.dataset import TrainingDataError
    from training.distill import TokenizerMismatchError
    from training.pairs import train_pairs
    from training.rating import Ratings
    from training.run import train as run
    from training.runs import Begun
    from training.tracking import TrackerMissingError

    if resume and (assign or config_file or ensemble > 1 or distil or tower):
        raise typer.BadParameter("a run that is resumed keeps the configuration it began with", param_hint="--resume")
    chosen = [*(assign or []), *([f"tower={tower.value}"] if tower else [])]
    configured = training_config(preset, config_file, chosen, ensemble=ensemble, distil=distil)
    begun = Begun.load(resume) if resume else Begun(_TRAINED[task], configured, 0)
    heads = {head.name: head for head in (Clicks(), Ratings())}
    if begun.task in heads and begun.config.ensemble > 1:
        raise typer.BadParameter(f"the {begun.task} is one model", param_hint="--ensemble")
    trackers = [each.value for each in track or (Track.tensorboard,)]
    with shop(Settings) as settings:
        try:
            if begun.task in heads:
                result = train_pairs(settings, heads[begun.task], begun.config, resume=resume, track=trackers)
            else:
                result = run(settings, begun.config, resume=resume, track=trackers)
        except TrackerMissingError as error:
            raise typer.BadParameter(str(error), param_hint="--track") from None
        except TrainingDataError as error:
            raise typer.BadParameter(f"this shop cannot be trained on: {error}") from None
        except TokenizerMismatchError as error:
            raise typer.BadParameter(str(error), param_hint="--set") from None
    print_metrics(result.metrics)
    _out.print(f"{result.steps} steps in {result.seconds:.0f} s; run folder {result.run_dir}")


def training_config(preset: str, config_file: Path | None, assign: list[str], *, ensemble: int = 1, distil: bool = False) -> "TrainConfig":
    """Returns the configuration that options name: a preset or a file, changed by ``--set``, ``--ensemble`` and ``--distil``."""
    from training.config import TrainConfig

    presets = {"demo": TrainConfig.demo, "full": TrainConfig.full, "tiny": TrainConfig.tiny}
    if preset not in presets:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(presets)}", param_hint="--preset")
    values = dict(pair(text) for text in assign)
    if ensemble > 1:
        values["ensemble"] = str(ensemble)
    try:
        config = (TrainConfig.load(config_file) if config_file else presets[preset]()).with_values(values)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
    if distil and config.ensemble == 1:
        raise typer.BadParameter("one tower has nothing to distil: give --ensemble", param_hint="--distil")
    return config.distilled() if distil else config


def export(
    run_dir: Run = None,
    out: Annotated[Path, typer.Option(help="Folder for the bundle; replaced.")] = Path(".data/bundle"),
    encoder: Annotated[str, typer.Option(help="Form of the encoder: fp32, fused, int8, int4 or static; see concord quantize.")] = "fp32",
    fp16: Annotated[bool, typer.Option("--fp16", help="Add the encoder in half precision, for CONCORD_ONNX_PRECISION=fp16.")] = False,
    classifier: Annotated[
        list[Path] | None, typer.Option(help="A run of `concord train intent` or the like, in place of the newest of its kind; repeatable.")
    ] = None,
    no_classifiers: Annotated[bool, typer.Option("--no-classifiers", help="Leave text classifiers out.")] = False,
) -> None:
    """Exports a run as an ONNX bundle and checks that it computes what PyTorch computed.

    The bundle carries the shop's text classifiers: the newest run of each, unless others are named.
    """
    from features.classifiers import newest_folders, read_folder
    from training.quantize import RefusedVariantError
    from training.run import export as run
    from training.variants import Variant

    if encoder not in list(Variant):
        raise typer.BadParameter(f"{encoder!r} is none of {', '.join(Variant)}", param_hint="--encoder")
    with shop(Settings) as settings:
        folders = {} if no_classifiers else newest_folders(settings.classifiers_dir)
        folders |= {read_folder(folder).name: folder for folder in classifier or ()}
        try:
            run_dir = run_dir or newest_run(settings)
            manifest = run(settings, run_dir, out, variant=Variant(encoder), fp16=fp16, classifiers=folders.values())
        except RefusedVariantError as error:
            raise typer.BadParameter(str(error), param_hint="--encoder") from None
    differences = ", ".join(f"{name} {value:.1e}" for name, value in manifest.parity.items())
    _out.print(f"model version {manifest.model_version} in {out}; largest differences from PyTorch: {differences}")
    for name, measured in manifest.invariance.items():
        told = ", ".join(f"{what} {'bit-equal' if one.bit_equal else f'{one.largest_difference:.1e}'}" for what, one in measured.items())
        _out.print(f"{name} by what the batch changes: {told}")
    for name, one in manifest.classifiers.items():
        _out.print(f"classifier {name}: {len(one.labels)} labels, largest difference from PyTorch {one.parity:.1e}")
    for name in ("encoder_validation_ndcg_loss", "encoder_fp16_validation_ndcg_loss"):
        if name in manifest.metrics:
            _out.print(f"{name} {manifest.metrics[name]:+.4f}")


def publish(bundle: Annotated[Path, typer.Argument(help="A bundle folder.")] = Path(".data/bundle")) -> None:
    """Verifies a bundle, copies it to CONCORD_MODELS_URL and registers it."""
    from features.models import publish as run

    with shop(Settings) as settings, psycopg.connect(settings.postgres_dsn) as connection:
        manifest = run(connection, bundle, settings.models_base)
    _out.print(f"published {manifest.model_version}")


def activate(
    model_version: Annotated[str, typer.Argument(help="A published version; see `concord models`.")],
    on_unready: Annotated[OnUnready, typer.Option(help="When a replica cannot load it: fail, or wait for its repair.")] = OnUnready.FAIL,
    wait: Annotated[float, typer.Option(min=0, max=3600, help="How long the replicas may take, in seconds.")] = 30.0,
) -> None:
    """Has every running server load a published model, then moves the fleet's pointer to it; an earlier one is the roll-back."""
    with shop(Settings) as settings:
        move_pointer(settings, model_version, on_unready=on_unready, wait_seconds=wait)


def models() -> None:
    """Lists published models, newest first."""
    from features.models import list_models

    with shop(Settings) as settings, psycopg.connect(settings.postgres_dsn) as connection:
        table = Table("version", "active", "published (UTC)", "base model", "NDCG@10", "popularity NDCG@10")
        for model in list_models(connection):
            metrics = model.manifest["metrics"]
            figures = [f"{metrics[name]:.4f}" if name in metrics else "" for name in ("ndcg_at_10", "popularity_ndcg_at_10")]
            active = "yes" if model.active else ""
            table.add_row(model.model_version, active, f"{model.published_at:%Y-%m-%d %H:%M}", model.manifest["base_model"], *figures)
    _out.print(table)


def replicas() -> None:
    """Lists the servers of this shop: what each answers with, could answer with, and could not load."""
    from features.replicas import list_replicas

    with shop(Settings) as settings, psycopg.connect(settings.postgres_dsn) as connection:
        found = list_replicas(connection)
    table = Table("address", "live", "model", "index", "ready for", "cannot load", "slate policy", "runs on", "Redis")
    for replica in found:
        ready = ", ".join(model or "none" for model in sorted(replica.ready))
        failed = "; ".join(f"{model}: {reason}" for model, reason in sorted(replica.failed.items()))
        waits = f"waits for {replica.waits_for}" if replica.waits_for else "no"
        live = "yes" if replica.live else f"{waits}, last seen {replica.seen_at:%H:%M:%S} UTC"
        online = "away or lagging" if replica.online_away else "read"
        names = (replica.model_version, str(replica.index_version), ready, failed, replica.config, replica.onnx_provider, online)
        table.add_row(replica.address, live, *names)
    _out.print(table)
    if any(replica.waits_for for replica in found):
        _out.print("Replicas wait, NOT_SERVING, until those with other settings that decide a slate have left: stop one kind or the other.")
    if len({replica.config for replica in found if replica.live}) > 1:
        _out.print("[red]The live replicas differ in the settings that decide a slate:[/red] they answer differently.")
