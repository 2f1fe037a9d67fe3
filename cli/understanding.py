"""Commands on what texts mean: train the intent classifier, and ask a running server what a text is about."""

from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from cli.calls import connected
from cli.context import pair, shop
from cli.models import trainings
from cli.reports import print_metrics
from features.settings import Settings
from server.loop import finished

_out = Console()


def register(app: typer.Typer) -> None:
    """Adds this module's commands; the training is one of `concord train`."""
    trainings.command("intent", epilog="Example: concord train intent --data utterances.csv --out-of-scope reviews.csv")(train_intent)
    app.command(epilog='Example: concord understand "where is my order #A-1002?" --channel app')(understand)


def train_intent(
    data: Annotated[Path, typer.Option(help="Parquet, CSV or JSON lines with columns text and intent (out_of_scope is one).")],
    out_of_scope: Annotated[Path | None, typer.Option(help="A file with a column text: more texts that are out of scope.")] = None,
    base: Annotated[str, typer.Option(help="Pretrained BERT, a folder or hub name; default: the packaged all-MiniLM-L6-v2.")] = "",
    examples: Annotated[int, typer.Option(min=1, help="Utterances of an intent fine-tuned on at the most, the most different.")] = 100,
    int4: Annotated[
        bool, typer.Option("--int4", help="Keep the weights in 4 bits: a sixth of the memory; the arithmetic stays fp32.")
    ] = False,
    assign: Annotated[list[str] | None, typer.Option("--set", help="A field of the configuration, name=value; repeatable.")] = None,
) -> None:
    """Fine-tunes the shop's BERT on labelled utterances; `concord export` puts the classifier into the next bundle.

    One group of wordings of each intent is held out to calibrate the probabilities and to choose what is out of scope.
    """
    from training.config import TrainConfig
    from training.intent_run import train_intent as run
    from training.utterances import UtteranceError, read_texts, read_utterances

    try:
        utterances = read_utterances(data)
        strangers = read_texts(out_of_scope) if out_of_scope else []
        config = TrainConfig.intent().with_values({"base_model": base} | dict(pair(text) for text in assign or []))
    except (UtteranceError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    with shop(Settings) as settings:
        result = run(settings, utterances, strangers, config=config, examples=examples, int4=int4)
    made = result.classifier
    print_metrics(made.metrics)
    scope = "every text is in scope" if made.threshold is None else f"out of scope below {made.threshold:.3f}"
    _out.print(f"{len(made.labels)} intents, {scope}, temperature {made.temperature:.2f}, parity {made.parity:.1e}", highlight=False)
    _out.print(f"{result.seconds:.0f} s; {result.folder}; concord export puts it into the next bundle", highlight=False)


def understand(
    text: Annotated[str, typer.Argument(help="A message, search or question.")],
    channel: Annotated[str, typer.Option(help="Channel the call comes from.")] = "web",
    top: Annotated[int, typer.Option(min=1, max=100, help="How many intents.")] = 3,
    server: Annotated[str, typer.Option(help="Address of a running server.")] = "127.0.0.1:50051",
    json_output: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Says what the writer of a text wants, and which items, orders, prices and quantities it speaks of."""
    from concord.v1.understanding_pb2 import EntityKind

    async def call() -> Any:
        async with connected(server, channel) as client:
            return await client.intent(text, top_k=top)

    answer = finished(call())
    if json_output:
        _out.print_json(data=MessageToDict(answer, preserving_proto_field_name=True))
        return
    intents = Table("intent", "probability")
    for intent in answer.intents:
        intents.add_row(intent.name, f"{intent.probability:.3f}")
    _out.print(intents)
    _out.print("in scope" if answer.in_scope else "out of scope: these are guesses", highlight=False)
    entities = Table("where", "text", "is", "of the catalogue, or how much")
    for entity in answer.entities:
        entities.add_row(f"{entity.start}-{entity.end}", entity.text, EntityKind.Name(entity.kind)[12:].lower(), _meaning(entity))
    if answer.entities:
        _out.print(entities)
    _out.print(f"model {answer.model_version}, index {answer.index_version}", highlight=False)


def _meaning(entity: Any) -> str:
    if entity.HasField("price"):
        price = entity.price
        return f"{price.units + price.nanos / 1e9:.2f} {price.currency_code}".strip()
    return entity.value or str(entity.quantity)
