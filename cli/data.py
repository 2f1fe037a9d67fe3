"""Commands on data: the stack, the schema, imports, the Feast repository and materialization."""

import contextlib
import shlex
import signal
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.context import console, progress_bars, shop
from cli.credentials import CallSettings
from features.settings import Settings, load_settings

if TYPE_CHECKING:
    from features.importers import ImportReport, Mapping, Progress

_out = Console()


class Part(str, Enum):  # noqa: UP042 - typer shows the values of a str Enum
    """What to import from a file."""

    all = "all"
    items = "items"
    events = "events"
    identities = "identities"
    relations = "relations"


class Language(str, Enum):  # noqa: UP042 - as above
    """Languages of the sample shop."""

    en = "en"
    zh = "zh"


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(epilog="Example: concord up")(up)
    app.command(epilog="Example: concord migrate")(migrate)
    app.command("import", epilog="Example: concord import online_retail.parquet --mapping online_retail")(import_file)
    app.command(epilog="Example: concord generate --out .data/sample --seed 7 --language zh")(generate)
    app.command(epilog="Example: concord apply")(apply)
    app.command(epilog="Example: concord materialize --as-of 2011-12-09T12:50:00Z")(materialize)
    app.command(epilog="Example: concord rebuild")(rebuild)
    app.command(epilog='Example: eval "$(concord env)" && feast -c features feature-views list')(env)
    app.command(epilog="Example: concord settings")(settings)


def up() -> None:
    """Starts the embedded PostgreSQL and Redis, migrates, applies the Feast repository, and stays until interrupted."""
    from features.schema import migrate as migrate_schema
    from features.store import apply_repository

    with shop(Settings) as shop_settings:
        migrate_schema(shop_settings.postgres_dsn)
        apply_repository(shop_settings)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):  # SIGINT and SIGTERM both end it in good order
            _print_env(shop_settings)
            console.print("Up. Stop with Ctrl-C; data stays in", str(shop_settings.data_dir))
            signal.pause()


def migrate() -> None:
    """Brings the database schema to this release."""
    from features.schema import current_revision
    from features.schema import migrate as migrate_schema

    with shop(Settings) as shop_settings:
        migrate_schema(shop_settings.postgres_dsn)
        _out.print(f"schema at revision {current_revision(shop_settings.postgres_dsn)}")


def import_file(
    source: Annotated[Path, typer.Argument(help="A Parquet, CSV or JSON lines file, or a folder with items, events, ... files.")],
    mapping: Annotated[str, typer.Option(help="A mapping file (TOML) or the name of a ready one: online_retail, rees46, ...")],
    part: Annotated[Part, typer.Option(help="Which of the mapping's parts to import.")] = Part.all,
    rejects: Annotated[Path | None, typer.Option(help="Folder for rows not stored; default: rejects/ in the data folder.")] = None,
) -> None:
    """Imports items and events; running it again stores nothing twice. Rows not stored go to a rejects file with the reason."""
    from features.importers import load_mapping

    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    loaded = load_mapping(mapping)
    with shop(Settings) as shop_settings:
        folder = rejects or shop_settings.data_dir / "rejects"
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bars() as progress:
            reports = run_import(shop_settings, source, loaded, part=part, rejects=folder, progress=progress)
    for report in reports:
        _out.print(report_table(report, source.name))


def run_import(
    settings: Settings, source: Path, mapping: "Mapping", *, part: Part, rejects: Path, progress: "Progress"
) -> "list[ImportReport]":
    """Imports a folder, or the parts of one file that its mapping describes."""
    from features.importers import MappingError, import_events, import_folder, import_identities, import_items, import_relations

    dsn, channels = settings.postgres_dsn, settings.channels
    if source.is_dir():
        return list(import_folder(dsn, source, mapping, rejects=rejects, channels=channels, progress=progress).values())
    importers: dict[Part, Callable[..., ImportReport]] = {
        Part.items: partial(import_items, channels=channels),
        Part.relations: import_relations,
        Part.identities: partial(import_identities, channels=channels),
        Part.events: partial(import_events, channels=channels),
    }
    reports = []
    for name, run in importers.items():
        if part is name or (part is Part.all and getattr(mapping, name.value) is not None):
            out = rejects / f"{source.stem}.{name.value}.rejects.jsonl"
            reports.append(run(dsn, source, mapping, rejects=out, progress=progress))
    if not reports:
        raise MappingError(f"the mapping {mapping.dataset} describes none of {', '.join(kind.value for kind in importers)}")
    return reports


def report_table(report: "ImportReport", source: str) -> Table:
    """Returns an import's counts as a table."""
    table = Table(title=f"{report.what} of {source}", show_header=False)
    for label, value in report.table():
        table.add_row(label, value)
    return table


def generate(
    out: Annotated[Path, typer.Option(help="Folder to write the sample shop's files and their mapping to.")] = Path(".data/sample"),
    seed: Annotated[int, typer.Option(help="Equal seeds (and days) give equal shops.")] = 7,
    language: Annotated[Language, typer.Option(help="Language of titles, brands and searches.")] = Language.en,
) -> None:
    """Generates the sample shop: items, relations, customers and three months of events up to this midnight (UTC)."""
    from datetime import UTC, datetime

    from features.sample_shop import generate as generate_shop
    from features.sample_shop import write

    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    made = generate_shop(seed, end=end, language=language.value)
    write(made, out)
    _out.print(f"{len(made.items)} items, {len(made.events)} events in {out}")


def apply() -> None:
    """Registers entities, feature views and services with Feast."""
    from features.store import apply_repository, feature_store

    with shop(Settings) as shop_settings:
        apply_repository(shop_settings)
        store = feature_store(shop_settings)
        services = ", ".join(sorted(service.name for service in store.list_feature_services()))
        _out.print(f"applied project {shop_settings.project}: feature services {services}")


def materialize(
    as_of: Annotated[str, typer.Option(help="Snapshot time, ISO 8601; default: the newest event's.")] = "",
) -> None:
    """Takes a feature snapshot, publishes an index epoch, and writes all views to the online store."""
    from datetime import UTC, datetime

    from features.materialize import materialize as run

    at = datetime.fromisoformat(as_of) if as_of else None
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    with shop(Settings) as shop_settings, progress_bars() as progress:
        report = run(shop_settings, as_of=at, progress=progress)
    _out.print(
        f"snapshot of {report.snapshot.as_of:%Y-%m-%d %H:%M} UTC: {report.snapshot.user_count} customers, "
        f"{report.snapshot.item_count} items; index_version {report.index_version}; {report.users_online} customers online"
    )


def rebuild() -> None:
    """Rebuilds every customer's online state from PostgreSQL; what is already there and current is left as it is."""
    from features.materialize import rebuild_users

    with shop(Settings) as shop_settings, progress_bars() as progress:
        count = rebuild_users(shop_settings, progress=progress)
    _out.print(f"{count} customers looked at")


def env() -> None:
    """Prints the variables that plain Feast commands and channel backends need, for `eval`."""
    with shop(Settings) as shop_settings:
        _print_env(shop_settings)


def settings() -> None:
    """Lists every setting with its value in force, default and meaning."""
    from server.settings import ServerSettings

    table = Table("variable", "value", "meaning")
    for kind in (ServerSettings, CallSettings):
        current = load_settings(kind)
        for name, field in kind.model_fields.items():
            if kind is CallSettings and name in Settings.model_fields:
                continue
            value = "(hidden)" if not field.repr else getattr(current, name)
            text = ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
            table.add_row(f"CONCORD_{name.upper()}", text, field.description)
    _out.print(table)


def _print_env(shop_settings: Settings) -> None:
    names = {"CONCORD_POSTGRES_DSN": shop_settings.postgres_dsn, "CONCORD_REDIS_URL": shop_settings.redis_url}
    for name, value in (names | shop_settings.feast_environment()).items():
        print(f"export {name}={shlex.quote(value)}")  # noqa: T201 - meant for eval, so no wrapping or colours
