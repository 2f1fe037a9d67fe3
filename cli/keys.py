"""Commands on API keys: create, rotate, list, revoke. A secret is shown once, by the command that made it."""

from datetime import UTC, datetime
from typing import Annotated

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from cli.context import console, note, shop
from features.settings import Settings
from server.security import key_store
from server.security.key_store import ApiKey
from server.security.principals import EVERY_CHANNEL
from server.security.scopes import ALL_SCOPES, CHANNEL_SCOPES, SHOP_SCOPES, Scope

_out = Console()
_Holder = Annotated[str, typer.Argument(help="Who holds the key, such as the channel's name.")]
_keys = typer.Typer(no_args_is_help=True, help="Makes, rotates, lists and revokes API keys (CONCORD_AUTH=keys).")


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    _keys.command(epilog="Example: concord keys create web --days 365")(create)
    _keys.command(epilog="Example: concord keys rotate web --overlap-hours 48")(rotate)
    _keys.command("list", epilog="Example: concord keys list")(list_)
    _keys.command(epilog="Example: concord keys revoke 1f2e3d4c5b6a")(revoke)
    app.add_typer(_keys, name="keys", epilog="Example: concord keys create web")


def create(
    holder: _Holder,
    channel: Annotated[list[str] | None, typer.Option(help="A channel it speaks for, repeatable; * is every one. Default: HOLDER.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="A scope, repeatable. Default: what a channel's backend needs.")] = None,
    days: Annotated[float | None, typer.Option(help="Days until it expires. Default: never.")] = None,
) -> None:
    """Makes a key and prints it, once; a holder has at most two valid ones."""
    scopes = scope or sorted(CHANNEL_SCOPES)
    if unknown := sorted(set(scopes) - ALL_SCOPES):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(Scope)}", param_hint="--scope")
    with shop(Settings) as settings, psycopg.connect(settings.postgres_dsn) as connection, connection.transaction():
        channels = channel or [holder]
        if unknown := sorted(set(channels) - {EVERY_CHANNEL, *settings.channels}):
            raise typer.BadParameter(f"{unknown[0]!r} is no channel of CONCORD_CHANNELS", param_hint="--channel")
        if (whole := sorted(SHOP_SCOPES.intersection(scopes))) and EVERY_CHANNEL not in channels:
            raise typer.BadParameter(f"{whole[0]} is for the whole shop; add --channel '*'", param_hint="--scope")
        key, bearer = key_store.create(connection, holder, channels=channels, scopes=scopes, lifetime_days=days)
        note(connection, "keys create", target=f"key:{key.key_id}")
    _show(key, bearer)


def rotate(
    holder: _Holder,
    overlap_hours: Annotated[float, typer.Option(help="Hours the key in use stays valid beside the new one.")] = 24.0,
) -> None:
    """Makes a key like the holder's newest and prints it, once; that one expires after the overlap, any older one is revoked."""
    with shop(Settings) as settings, psycopg.connect(settings.postgres_dsn) as connection, connection.transaction():
        key, bearer = key_store.rotate(connection, holder, overlap_hours=overlap_hours)
        note(connection, "keys rotate", target=f"key:{key.key_id}")
    _show(key, bearer)


def list_() -> None:
    """Lists all keys with channels, scopes and state; never a secret."""
    now = datetime.now(UTC)
    with shop(Settings) as settings, psycopg.connect(settings.postgres_dsn) as connection:
        table = Table("holder", "id", "state", "created (UTC)", "expires (UTC)", "channels", "scopes")
        for key in key_store.list_keys(connection):
            state = "valid" if key.valid(now) else "revoked" if key.revoked_at else "expired"
            times = [f"{moment:%Y-%m-%d %H:%M}" if moment else "never" for moment in (key.created_at, key.expires_at)]
            table.add_row(key.holder, key.key_id, state, *times, " ".join(key.channels), " ".join(key.scopes))
    _out.print(table)


def revoke(key_id: Annotated[str, typer.Argument(help="The key's id; see `concord keys list`.")]) -> None:
    """Revokes a key; servers refuse it within CONCORD_KEY_REFRESH_SECONDS."""
    with shop(Settings) as settings, psycopg.connect(settings.postgres_dsn) as connection, connection.transaction():
        key_store.revoke(connection, key_id)
        note(connection, "keys revoke", target=f"key:{key_id}")
    _out.print(f"revoked {key_id}")


def _show(key: ApiKey, bearer: str) -> None:
    expires = f"{key.expires_at:%Y-%m-%d %H:%M} UTC" if key.expires_at else "never"
    console.print(f"key {key.key_id} of {key.holder}, expires {expires}; this is the only time it is shown:", highlight=False)
    print(bearer)  # noqa: T201 - for a pipe into a secret store: no wrapping, no colours
