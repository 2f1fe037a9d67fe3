"""Commands on sentiment: train a classifier on reviews, ask a running server, and judge the reviews and messages of a history."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from cli.calls import connected
from cli.context import shop
from cli.models import trainings
from features.settings import Settings
from server.loop import finished
from server.settings import ServerSettings

if TYPE_CHECKING:
    from concord.v1.understanding_pb2 import AnalyzeSentimentResponse

_out = Console()


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    trainings.command("sentiment", epilog="Example: concord train sentiment --data reviews.csv")(train)
    app.command(epilog='Example: concord sentiment "Lovely colour, but it runs small." --channel store')(sentiment)
    app.command(epilog="Example: concord judge && concord materialize")(judge)


def train(
    data: Annotated[
        Path,
        typer.Option(help="A file of reviews (Parquet, CSV, JSON lines), or a folder with the public sets of docs/sentiment.md."),
    ] = Path("../shared/data"),
    base: Annotated[
        str, typer.Option(help="A pretrained BERT to fine-tune, by folder or hub name, of whatever language; default: the small net.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of every random choice of the run.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the reviews.")] = None,
    max_steps: Annotated[int, typer.Option(min=0, help="Batches at the most; 0 means no bound.")] = 0,
) -> None:
    """Trains a sentiment classifier on reviews with ratings or labels, calibrates it, and measures it beside TF-IDF.

    The language is told by the texts, English or Chinese; `concord export` puts the newest classifier of each into the next bundle.
    """
    from training.reviews import ReviewDataError
    from training.sentiment import SentimentConfig
    from training.sentiment_run import review_files, run

    config = (SentimentConfig.pretrained(base) if base else SentimentConfig()).seeded(seed)
    config = replace(config, loop=replace(config.loop, epochs=epochs or config.loop.epochs, max_steps=max_steps))
    with shop(Settings) as settings:
        for path in review_files(data):
            try:
                done = run(path, config, settings.classifiers_dir)
            except ReviewDataError as error:
                raise typer.BadParameter(str(error), param_hint="--data") from None
            table = Table("on held-out reviews", done.name, "TF-IDF", title=path.name)
            metrics = done.classifier.metrics
            for name in (name for name in metrics if not name.startswith("tfidf_")):
                beside = metrics.get(f"tfidf_{name}")
                table.add_row(name, f"{metrics[name]:.4f}", "" if beside is None else f"{beside:.4f}")
            _out.print(table)
            _out.print(f"{done.name} in {done.folder}; largest difference from PyTorch {done.classifier.parity:.1e}")


def sentiment(
    texts: Annotated[list[str], typer.Argument(help="Reviews or messages.")],
    channel: Annotated[str, typer.Option(help="Channel the call comes from.")] = "web",
    server: Annotated[str, typer.Option(help="Address of a running server.")] = "127.0.0.1:50051",
) -> None:
    """Says how positive texts are, and what they say of which aspects."""

    async def call() -> "AnalyzeSentimentResponse":
        async with connected(server, channel) as client:
            return await client.sentiment(*texts)

    answer = finished(call())
    table = Table("text", "language", "label", "score", "confidence", "aspects")
    for text, one in zip(texts, answer.sentiments, strict=True):
        aspects = ", ".join(f"{aspect.aspect} {aspect.score:+.2f}" for aspect in one.aspects)
        table.add_row(text, one.language, _label(one.label), f"{one.score:+.2f}", f"{one.confidence:.2f}", aspects)
    _out.print(table)
    _out.print(f"model {answer.model_version}", highlight=False)


def _label(number: int) -> str:
    from concord.v1.understanding_pb2 import SentimentLabel

    return SentimentLabel.Name(number).removeprefix("SENTIMENT_LABEL_").lower()


def judge(
    again: Annotated[bool, typer.Option("--again", help="Also judge anew what another model than the active one has judged.")] = False,
) -> None:
    """Judges the reviews and messages that no model has judged yet, with the active model: after an import of a history.

    A running server does this by itself, from the newest look on within a second and for a whole history over time. The features
    that are made of it are those of the next `concord materialize`.
    """
    with shop(ServerSettings) as settings:
        count, model_version = finished(_judge(settings, again=again))
    _out.print(f"{count} reviews and messages judged by {model_version}")


async def _judge(settings: ServerSettings, *, again: bool) -> tuple[int, str]:
    from features.models import UnknownModelError, list_models
    from server.database import connector, postgres_breaker, postgres_pool
    from server.inference.model import LoadedModel
    from server.metrics import Metrics
    from server.models import BundleLoader
    from server.recommend.computing import Computing
    from server.understand.judging import START, Judge
    from server.understand.sentiment import Sentiments
    from server.understand.text_runs import TextRuns

    with connector(settings)() as connection:
        version = next((model.model_version for model in list_models(connection) if model.active), "")
    if not version:
        raise UnknownModelError("no model is active; see `concord models`")
    loader = BundleLoader(settings, provider=settings.onnx_provider, threads=settings.onnx_threads, precision=settings.onnx_precision)
    model = await loader(version)

    async def answering() -> LoadedModel:
        return model

    metrics, count = Metrics(CollectorRegistry()), 0
    computing = Computing(threads=settings.compute_threads, waiting=settings.compute_waiting)
    runs = TextRuns(computing, batches=settings.compute_threads, waiting=settings.encode_waiting, metrics=metrics)
    async with postgres_pool(settings, postgres_breaker(settings, lambda _: None)) as pool:
        one = Judge(pool, Sentiments(answering, runs), metrics, pause_seconds=settings.judge_seconds)
        if again:
            await one.discard(version)
        step = await one.step(START, wait=True)
        while step is not None:
            count += step.judged
            if not step.more:
                break
            step = await one.step(step.place, wait=True)
    return count, version
