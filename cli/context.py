"""What every command shares: settings, the stack it runs on, progress on the terminal, and errors without tracebacks."""

import getpass
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import cli.credentials  # noqa: F401 - as below
import server.settings  # noqa: F401 - one environment serves every command, so each must know the server's settings too
from cli.stack import running_stack
from features.settings import Settings, load_settings
from server.security.audit import AuditEntry, note_command

S = TypeVar("S", bound=Settings)

console = Console(stderr=True)
"""Progress and notes go to standard error, results to standard output."""


@contextmanager
def shop(kind: type[S]) -> Iterator[S]:
    """Yields settings of ``kind`` with a PostgreSQL and a Redis behind them, embedded where the environment names none.

    Raises:
        SettingsError: a setting is unknown or invalid.
    """
    with running_stack(load_settings(Settings).data_dir):
        yield load_settings(kind)


def note(connection: psycopg.Connection, command: str, *, target: str) -> None:
    """Notes in the audit log that whoever runs this command has done it, in the transaction that does it."""
    try:
        who = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        who = "unknown"
    note_command(connection, AuditEntry(f"command:{who}", command, "OK", target=target))


def pair(text: str) -> tuple[str, str]:
    """Splits an argument of --set; without an equals sign it is refused."""
    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not name=value", param_hint="--set")
    return name, value


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function (stage, done, in all) that keeps one bar per stage on the terminal."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
