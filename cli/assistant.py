"""Commands of customer service: ask a running server, import the articles it answers from."""

from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console

from cli.calls import connected
from cli.context import progress_bars, shop
from cli.data import report_table
from features.settings import Settings
from server.loop import finished

_out = Console()
_articles = typer.Typer(no_args_is_help=True, help="Imports the articles that questions are answered from.")


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(epilog='Example: concord ask alice "how long do I have to return something?" --channel app')(ask)
    _articles.command("import", epilog="Example: concord articles import help/")(import_articles)
    app.add_typer(_articles, name="articles", epilog="Example: concord articles import faq.csv --mapping faq")


def ask(
    customer: Annotated[str, typer.Argument(help="The customer's id in the channel.")],
    text: Annotated[str, typer.Argument(help="The message.")],
    channel: Annotated[str, typer.Option(help="Channel the message comes from.")] = "web",
    answer_format: Annotated[str, typer.Option("--format", help="plain, rich or voice.")] = "plain",
    full: Annotated[bool, typer.Option("--full", help="Print the whole answer as JSON: citations, confidence, versions.")] = False,
    server: Annotated[str, typer.Option(help="Address of a running server.")] = "127.0.0.1:50051",
) -> None:
    """Asks a question as a customer and prints the answer; the message is recorded like any other."""
    if answer_format not in ("plain", "rich", "voice"):
        raise typer.BadParameter(f"{answer_format!r} is none of plain, rich, voice", param_hint="--format")

    async def call() -> Any:
        async with connected(server, channel) as client:
            return await client.ask(customer, text, answer_format=answer_format, timeout=10.0)

    answer = finished(call())
    if full:
        _out.print_json(data=MessageToDict(answer, preserving_proto_field_name=True))
        return
    _out.print(answer.text, markup=False, highlight=False, soft_wrap=True)
    if answer.handed_over:
        _out.print("[dim]a person takes over[/dim]")


def import_articles(
    source: Annotated[Path, typer.Argument(help="A Parquet, CSV, JSON or JSON lines file, or a folder of Markdown files.")],
    mapping: Annotated[str, typer.Option(help="A mapping file (TOML) or a ready one: faq. Default: columns named as the fields.")] = "",
    rejects: Annotated[Path | None, typer.Option(help="Folder for rows not stored; default: rejects/ in the data folder.")] = None,
) -> None:
    """Imports articles; running it again changes nothing. Rows not stored go to a rejects file with the reason."""
    from features.importers import import_articles as run
    from features.importers import load_mapping

    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    loaded = load_mapping(mapping) if mapping else None
    with shop(Settings) as settings:
        folder = rejects or settings.data_dir / "rejects"
        out = folder / f"{source.stem}.articles.rejects.jsonl"
        with progress_bars() as progress:
            report = run(settings.postgres_dsn, source, loaded, rejects=out, channels=settings.channels, progress=progress)
    _out.print(report_table(report, source.name))
