"""API keys as a server checks them: known ones in memory, read again every few seconds and at a key it has not met."""

import asyncio
import hmac
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog

from server.database import Pool
from server.errors import UnauthenticatedError, UnavailableError
from server.security.key_store import SELECT_USABLE, ApiKey, digest_of, parts_of, read_row
from server.security.principals import Principal, principal

_log = structlog.get_logger(__name__)
_NOBODY = digest_of("")
# Keys nobody has would otherwise be a way to make the server ask PostgreSQL at every call.
_MISS_PAUSE = timedelta(seconds=1)


class ApiKeys:
    """Checks keys in constant time.

    A revoked key is refused at most ``refresh_seconds`` later; a new one is accepted at once, or within a second where others
    missed just before. While PostgreSQL is away the keys read last stay good for ``stale_seconds``; then calls are UNAVAILABLE.
    """

    def __init__(self, pool: Pool, *, refresh_seconds: float, stale_seconds: float, now: Callable[[], datetime]) -> None:
        self._pool = pool
        self._refresh_seconds = refresh_seconds
        self._stale = timedelta(seconds=stale_seconds)
        self._now = now
        self._keys: dict[str, tuple[ApiKey, Principal]] = {}
        self._read_at: datetime | None = None
        self._reading = asyncio.Lock()

    async def authenticate(self, bearer: str) -> Principal:
        """Returns who holds a key.

        Raises:
            UnauthenticatedError: it is no valid key.
            UnavailableError: PostgreSQL has not answered for too long to know.
        """
        key_id, secret = parts_of(bearer)
        if key_id and key_id not in self._keys:
            await self._read_again()
        if self._read_at is None or self._now() - self._read_at > self._stale:
            raise UnavailableError("keys cannot be checked now", reason="STORE_UNAVAILABLE")
        key, holder = self._keys.get(key_id, (None, None))
        matches = hmac.compare_digest(digest_of(secret), key.digest if key else _NOBODY)
        if key is None or holder is None or not matches:
            raise UnauthenticatedError("this is no key of this shop", reason="CREDENTIALS_INVALID")
        if not key.valid(self._now()):
            raise UnauthenticatedError("this key has expired", reason="CREDENTIALS_EXPIRED")
        return holder

    async def run(self) -> None:
        """Reads the keys again and again until cancelled; a failure is logged and tried again."""
        while True:
            try:
                await self._read()
            except Exception as error:  # noqa: BLE001 - whatever the store has, the keys read last go on until they are stale
                _log.warning("API keys could not be read", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._refresh_seconds)

    async def _read_again(self) -> None:
        async with self._reading:
            if self._read_at is not None and self._now() - self._read_at < _MISS_PAUSE:
                return
            await self._read()

    async def _read(self) -> None:
        started = self._now()
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(SELECT_USABLE)).fetchall()
        keys = [read_row(row) for row in rows]
        self._keys = {key.key_id: (key, principal(f"key:{key.holder}/{key.key_id}", key.channels, key.scopes)) for key in keys}
        self._read_at = started
