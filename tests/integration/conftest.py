"""Real servers for the integration tests: one PostgreSQL and one Redis a session, a database of each per shop."""

import itertools
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import redis
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cli.stack import Stack, running_stack
from features.schema import migrate
from features.store import apply_repository
from server.settings import ServerSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
NewShop = Callable[[], ServerSettings]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Embedded servers, or those the environment names."""
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture(scope="session")
def new_shop(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewShop]:
    """Makes empty shops: a migrated database, an emptied Redis database, an applied Feast repository."""
    numbers = itertools.count(1)
    made: list[str] = []

    def make() -> ServerSettings:
        name = f"t_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(stack.postgres_dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        made.append(name)
        url = f"{stack.redis_url.rpartition('/')[0]}/{next(numbers) % 16}"
        redis.Redis.from_url(url).flushdb()
        folder = tmp_path_factory.mktemp("shop")
        dsn = make_conninfo(stack.postgres_dsn, dbname=name)
        settings = ServerSettings(
            postgres_dsn=dsn, redis_url=url, port=0, metrics_port=-1, data_dir=folder, models_url=f"file:{folder / 'models'}"
        )
        migrate(dsn)
        apply_repository(settings)
        return settings

    yield make
    with psycopg.connect(stack.postgres_dsn, autocommit=True) as connection:
        for name in made:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def shop(new_shop: NewShop) -> ServerSettings:
    """An empty shop for the module."""
    return new_shop()


def add_events(dsn: str, rows: list[tuple[str, str, str, str | None, int]]) -> None:
    """Stores events (user, action, channel, item, minutes after START), as an import would."""
    with psycopg.connect(dsn) as connection:
        for user, action, channel, item, minutes in rows:
            connection.execute("INSERT INTO users (user_id) VALUES (%s) ON CONFLICT DO NOTHING", [user])
            connection.execute(
                "INSERT INTO events (user_id, event_id, channel, action, item_id, value, quantity, occurred_at) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                [user, uuid.uuid4(), channel, action, item, 12.0, 1, START + timedelta(minutes=minutes)],
            )
            connection.execute("UPDATE users SET version = version + 1 WHERE user_id = %s", [user])
