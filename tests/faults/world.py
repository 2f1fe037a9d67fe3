"""What the rows act on: one PostgreSQL, one Redis and a served sample shop of our own, and copies of it for rows that do damage."""

import asyncio
import contextlib
import itertools
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psycopg

from features.schema import migrate
from features.store import apply_repository
from server.settings import ServerSettings
from tests.faults.caller import Caller
from tests.faults.processes import Postgres, RedisServer, Server, serve
from tests.faults.proxy import Proxy
from tests.integration import serving

SHOP = "shop"
TEMPLATE = "template_shop"
Say = Callable[[str], None]


class World:
    """The servers and the shop.

    Attributes:
        rng: seeded; ``perform`` of the runner seeds it anew for each row.
        scale: share of the work that long rows do, 1 in `make chaos`.
        server: the standing server, for rows that leave it as they found it.
    """

    def __init__(self, folder: Path, postgres: Postgres, redis: RedisServer, *, scale: float) -> None:
        self.folder = folder
        self.postgres = postgres
        self.redis = redis
        self.rng = random.Random(0)
        self.scale = scale
        self.bundle = folder / "bundle"
        self.customers: list[str] = []
        self._numbers = itertools.count(1)
        self._names = itertools.count(1)
        self._standing: contextlib.AsyncExitStack | None = None
        self._server: Server | None = None

    def settings(self, database: str = SHOP, number: int = 0) -> ServerSettings:
        """Returns the settings of a shop in a database of each store."""
        return ServerSettings(
            postgres_dsn=self.postgres.dsn(database),
            redis_url=self.redis.url(number),
            port=0,
            metrics_port=-1,
            data_dir=self.folder / "data",
            models_url=f"file:{self.folder / 'models'}",
        )

    def copy(self) -> ServerSettings:
        """Makes a copy of the shop for a row that damages it, with a Redis database of its own, empty."""
        name = f"copy_{next(self._names)}"
        self.postgres.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        number = next(self._numbers) % 15 + 1
        self.redis.client(number).flushdb()
        return self.settings(name, number)

    def scaled(self, count: int) -> int:
        """Returns how many of ``count`` operations to do."""
        return max(1, round(count * self.scale))

    def customer(self) -> str:
        """Returns a customer with history, another one each time."""
        self.customers.append(self.customers.pop(0))
        return self.customers[-1]

    def several(self, count: int) -> list[str]:
        """Returns several customers with history."""
        return [self.customer() for _ in range(count)]

    @contextlib.asynccontextmanager
    async def serve(
        self, settings: ServerSettings, *, postgres: Proxy | None = None, redis: Proxy | None = None, **more: str
    ) -> AsyncIterator[Server]:
        """Runs a server of a shop, through proxies where given; ``more`` are environment variables."""
        if postgres is not None:
            more["CONCORD_POSTGRES_DSN"] = settings.postgres_dsn.replace(f":{self.postgres.port}/", f":{postgres.port}/")
        if redis is not None:
            more["CONCORD_REDIS_URL"] = settings.redis_url.replace(f":{self.redis.port}/", f":{redis.port}/")
        async with serve(settings, self.folder / f"server-{next(self._names)}.log", **more) as server:
            yield server

    async def server(self) -> Server:
        """Returns the standing server of the shop, started when first asked for or after its end; one port serves every method."""
        if self._server is None or not self._server.alive:
            await self.dismiss()
            self._standing = contextlib.AsyncExitStack()
            self._server = await self._standing.enter_async_context(self.serve(self.settings(), CONCORD_ADMIN_PORT="-1"))
        return self._server

    async def dismiss(self) -> None:
        """Ends the standing server."""
        if self._standing is not None:
            await self._standing.aclose()
            self._standing = self._server = None

    @contextlib.asynccontextmanager
    async def caller(self) -> AsyncIterator[tuple[Server, Caller]]:
        """Yields the standing server and a connection to it."""
        server = await self.server()
        async with Caller(server.address) as caller:
            yield server, caller

    def heal(self) -> None:
        """Makes sure that both stores run, whatever the row before did to them."""
        if not self.postgres.processes():
            self.postgres.start()
        self.postgres.await_ready()
        try:
            self.redis.client().ping()
        except Exception:  # noqa: BLE001 - whatever is wrong with it, a new one is right
            self.redis.kill()
            self.redis.start()


@contextlib.asynccontextmanager
async def built(folder: Path, *, bundle: Path | None = None, scale: float = 1.0, say: Say = lambda _: None) -> AsyncIterator[World]:
    """Starts the stores and fills the shop: generated, imported, with a really trained model; ends everything at the end."""
    say("starting PostgreSQL and Redis")
    postgres = await asyncio.to_thread(Postgres, folder / "postgres", options="-c max_connections=60 -c log_min_messages=warning")
    redis = RedisServer(folder / "redis")
    world = World(folder, postgres, redis, scale=scale)
    try:
        postgres.start()
        redis.start()
        postgres.execute(f"CREATE DATABASE {TEMPLATE}")
        settings = world.settings(TEMPLATE)
        say("filling the shop")
        await asyncio.to_thread(_fill, world, settings, bundle, say)
        postgres.execute(f"CREATE DATABASE {SHOP} TEMPLATE {TEMPLATE}")
        world.customers = [
            str(row[0]) for row in postgres.execute("SELECT user_id FROM users WHERE version > 10 ORDER BY 1", database=SHOP)
        ]
        yield world
    finally:
        await world.dismiss()
        redis.kill()
        postgres.kill()


def _fill(world: World, settings: ServerSettings, bundle: Path | None, say: Say) -> None:
    migrate(settings.postgres_dsn)
    apply_repository(settings)
    serving.fill(settings, world.folder / "sample")
    if bundle is None:
        say("training a small model")
        serving.train_tiny(settings, world.bundle)
    else:
        shutil.copytree(bundle, world.bundle)
    say("publishing the model and materializing")
    serving.deploy(settings, world.bundle)
    # Feast keeps a pooled connection to the database, which would forbid copying it.
    with psycopg.connect(world.postgres.dsn(), autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [TEMPLATE])
