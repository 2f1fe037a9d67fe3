"""Seeded faults between a server and its stores, operation by operation, for running the functional suite a second time.

A share of what the server sends to PostgreSQL and Redis is not delivered, or is slow, or (the case that finds most) is done while
the caller sees a lost connection or a timeout. With ``INJECT_FAULTS`` set to a seed, ``tests.integration.serving.served`` puts this
between: ``INJECT_FAULTS=7 python -m pytest tests/integration/test_promise.py``. Clients retry as they always do; the outcomes that
the tests assert must be the same.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from server.settings import ServerSettings
from tests.faults.proxy import DOWN, UP, Link, Proxy


@dataclass(frozen=True)
class Shares:
    """Which share of the operations meets which fault.

    Attributes:
        before: the connection is lost before the operation is done.
        after: it is done, and the connection is lost before the caller learns.
        timeout: it is done, and the caller hears nothing for ``hang`` seconds (longer than the Redis timeout) and then loses the line.
        slow: it takes ``delay`` seconds more.
    """

    before: float = 0.003
    after: float = 0.003
    timeout: float = 0.001
    slow: float = 0.02
    hang: float = 0.7
    delay: float = 0.03


class Injector:
    """A tap that throws a seeded die for each chunk towards a store once it is ``armed``; ``done`` counts what was injected.

    A client writes an operation as one chunk, so a chunk is an operation. The first ones of a connection (greeting, login) are
    spared: a store that cannot be reached at all is another row of the table.
    """

    _SPARED = 4

    def __init__(self, seed: str, shares: Shares) -> None:
        self._dice = random.Random(seed)
        self._shares = shares
        self._hanging: set[Link] = set()
        self.done: Counter[str] = Counter()
        self.armed = False

    async def __call__(self, link: Link, direction: str, _data: bytes) -> bool:
        """Decides on a chunk; False drops it and ends the connection."""
        if direction == DOWN:
            return await self._answer(link)
        if not self.armed or direction != UP or link.chunks_up <= self._SPARED or link.swallow:
            return True
        chance, shares = self._dice.random(), self._shares
        for kind, share in (("before", shares.before), ("after", shares.after), ("timeout", shares.timeout), ("slow", shares.slow)):
            if chance < share:
                self.done[kind] += 1
                return await self._inject(kind, link)
            chance -= share
        return True

    async def _inject(self, kind: str, link: Link) -> bool:
        if kind == "before":
            return False
        if kind == "slow":
            await asyncio.sleep(self._shares.delay)
            return True
        link.swallow = True
        if kind == "timeout":
            self._hanging.add(link)
        return True

    async def _answer(self, link: Link) -> bool:
        """An answer proves that the operation is done; the caller does not get it."""
        if not link.swallow:
            return True
        if link in self._hanging:
            self._hanging.discard(link)
            await asyncio.sleep(self._shares.hang)
        return False


@dataclass(frozen=True)
class Faulty:
    """Settings that reach both stores through the injectors; faults begin with ``arm``, when the server is up."""

    settings: ServerSettings
    injectors: tuple[Injector, ...]

    def arm(self) -> None:
        """Lets faults begin."""
        for injector in self.injectors:
            injector.armed = True

    @property
    def done(self) -> Counter[str]:
        """What was injected so far, by kind."""
        return sum((injector.done for injector in self.injectors), Counter())


@contextlib.asynccontextmanager
async def injected(settings: ServerSettings, *, seed: str, shares: Shares | None = None) -> AsyncIterator[Faulty]:
    """Puts seeded faults between whoever uses the yielded settings and the stores of ``settings``."""
    postgres, redis = (Injector(f"{seed}/{store}", shares or Shares()) for store in ("postgres", "redis"))
    parts = conninfo_to_dict(settings.postgres_dsn)
    host, port = str(parts.get("host", "127.0.0.1")), str(parts.get("port", 5432))
    target: int | str = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else int(port)
    url = urlsplit(settings.redis_url)
    async with Proxy(target, tap=postgres) as to_postgres, Proxy(url.port or 6379, tap=redis) as to_redis:
        dsn = make_conninfo(settings.postgres_dsn, host="127.0.0.1", port=to_postgres.port)
        reached = url._replace(netloc=f"127.0.0.1:{to_redis.port}").geturl()
        yield Faulty(settings.model_copy(update={"postgres_dsn": dsn, "redis_url": reached}), (postgres, redis))
