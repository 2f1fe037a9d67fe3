"""The command that writes training sets for outside use."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.context import pair, shop
from features.settings import Settings

_out = Console()


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command(epilog="Example: concord dataset --out .data/set --set cut=2011-11-01")(dataset)


def dataset(
    out: Annotated[Path, typer.Option(help="Folder for the shards; a killed run goes on there.")] = Path(".data/set"),
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the training configuration, name=value; repeatable.")
    ] = None,
) -> None:
    """Writes every label of this shop with what was known just before it, as Parquet: for models made elsewhere.

    The rows name customers and hold what they did: forgetting a customer does not reach the copy.
    """
    from training.config import TrainConfig
    from training.dataset import TrainingDataError
    from training.sets import write_set

    try:
        config = TrainConfig().with_values(dict(pair(text) for text in assign or []))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
    with shop(Settings) as settings:
        try:
            report = write_set(settings, config, out)
        except TrainingDataError as error:
            raise typer.BadParameter(f"this shop has no training set: {error}") from None
    table = Table("column", "type", "meaning")
    for column in report.columns:
        table.add_row(*column)
    _out.print(table)
    _out.print(f"{report.row_count} rows in {report.shard_count} shards in {out}; schema.json describes them")
