"""API keys in PostgreSQL: made, rotated, listed and revoked by an operator; the database holds digests, never a secret.

A key is ``concord_<id>_<secret>`` with 256 random bits of secret. Such a secret cannot be guessed or looked up in a table, so
one fast SHA-256 protects it as well as a slow password hash would, and does not give attackers a way to burn CPU.
"""

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

PREFIX = "concord_"
VALID_AT_A_TIME = 2

_HOLDER = re.compile(r"^[a-z][a-z0-9_.-]{0,63}\Z")
_COLUMNS = "key_id, holder, digest, channels, scopes, created_at, expires_at, revoked_at"
_VALID = "revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())"

_INSERT = f"""
INSERT INTO api_keys (key_id, holder, digest, channels, scopes, created_at, expires_at)
VALUES (%s, %s, %s, %s, %s, clock_timestamp(), clock_timestamp() + make_interval(secs => %s)) RETURNING {_COLUMNS}
"""  # noqa: S608 - constants only


class KeyRefusedError(Exception):
    """What was asked of the keys cannot be done; the message says why."""


@dataclass(frozen=True)
class ApiKey:
    """A key as it is stored."""

    key_id: str
    holder: str
    digest: bytes
    channels: tuple[str, ...]
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    def valid(self, now: datetime) -> bool:
        """True while it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def digest_of(secret: str) -> bytes:
    """Returns what is stored of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def parts_of(bearer: str) -> tuple[str, str]:
    """Returns id and secret of a key, both empty where ``bearer`` is none."""
    key_id, separator, secret = bearer.removeprefix(PREFIX).partition("_")
    return (key_id, secret) if separator and bearer.startswith(PREFIX) else ("", "")


def create(
    connection: psycopg.Connection, holder: str, *, channels: Sequence[str], scopes: Sequence[str], lifetime_days: float | None
) -> tuple[ApiKey, str]:
    """Makes a key for ``holder`` and returns it with its bearer text, which nothing can show again.

    Raises:
        KeyRefusedError: the name is malformed, or the holder has two valid keys already.
    """
    if not _HOLDER.match(holder):
        raise KeyRefusedError(f"{holder!r} is no name for a holder: lower-case letters, digits, '_', '.', '-', at most 64")
    with connection.transaction():
        _alone(connection)
        if len(_valid(connection, holder)) >= VALID_AT_A_TIME:
            raise KeyRefusedError(f"{holder} has {VALID_AT_A_TIME} valid keys; rotate or revoke one")
        return _insert(connection, holder, channels, scopes, lifetime_days)


def rotate(connection: psycopg.Connection, holder: str, *, overlap_hours: float) -> tuple[ApiKey, str]:
    """Makes a key like the holder's newest one, which stays valid for ``overlap_hours``; any older one is revoked.

    Raises:
        KeyRefusedError: the holder has no valid key.
    """
    with connection.transaction():
        _alone(connection)
        valid = _valid(connection, holder)
        if not valid:
            raise KeyRefusedError(f"{holder} has no valid key to rotate; create one")
        newest, older = valid[0], [key.key_id for key in valid[1:]]
        connection.execute("UPDATE api_keys SET revoked_at = clock_timestamp() WHERE key_id = ANY(%s)", [older])
        connection.execute(
            "UPDATE api_keys SET expires_at = LEAST(expires_at, clock_timestamp() + make_interval(secs => %s)) WHERE key_id = %s",
            [overlap_hours * 3600, newest.key_id],
        )
        lifetime = None if newest.expires_at is None else (newest.expires_at - newest.created_at).total_seconds() / 86_400
        return _insert(connection, holder, newest.channels, newest.scopes, lifetime)


def revoke(connection: psycopg.Connection, key_id: str) -> None:
    """Makes a key invalid, within ``key_refresh_seconds`` on every server.

    Raises:
        KeyRefusedError: there is no such valid key.
    """
    changed = connection.execute(f"UPDATE api_keys SET revoked_at = clock_timestamp() WHERE key_id = %s AND {_VALID}", [key_id])  # noqa: S608
    if not changed.rowcount:
        raise KeyRefusedError(f"no valid key has the id {key_id}")


def list_keys(connection: psycopg.Connection) -> list[ApiKey]:
    """Returns all keys, those of a holder together, newest first."""
    return _keys(connection, "true ORDER BY holder, created_at DESC, key_id")


def _alone(connection: psycopg.Connection) -> None:
    """Two operators at once must not give a holder three keys."""
    connection.execute("LOCK TABLE api_keys IN SHARE ROW EXCLUSIVE MODE")


def _valid(connection: psycopg.Connection, holder: str) -> list[ApiKey]:
    return _keys(connection, f"holder = %s AND {_VALID} ORDER BY created_at DESC, key_id", holder)


def _keys(connection: psycopg.Connection, condition: str, *values: object) -> list[ApiKey]:
    return [read_row(row) for row in connection.execute(f"SELECT {_COLUMNS} FROM api_keys WHERE {condition}", list(values))]  # noqa: S608


def _insert(
    connection: psycopg.Connection, holder: str, channels: Sequence[str], scopes: Sequence[str], lifetime_days: float | None
) -> tuple[ApiKey, str]:
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    row = connection.execute(
        _INSERT,
        [key_id, holder, digest_of(secret), list(channels), list(scopes), None if lifetime_days is None else lifetime_days * 86_400],
    ).fetchone()
    assert row is not None
    return read_row(row), f"{PREFIX}{key_id}_{secret}"


SELECT_USABLE = f"SELECT {_COLUMNS} FROM api_keys WHERE revoked_at IS NULL"  # noqa: S608 - constants only
"""What a server reads: expired keys as well, so that their holders learn that they expired."""


def read_row(row: Sequence[Any]) -> ApiKey:
    """Reads a row of ``_COLUMNS``."""
    key_id, holder, digest, channels, scopes, created_at, expires_at, revoked_at = row
    return ApiKey(key_id, holder, bytes(digest), tuple(channels), tuple(scopes), created_at, expires_at, revoked_at)
