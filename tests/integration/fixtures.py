"""Real servers for the integration tests: one PostgreSQL and one Redis a session, a database of each per shop."""

import itertools
import os
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cli.stack import Stack, running_stack
from features.bundle import Manifest
from features.schema import migrate
from features.store import apply_repository
from server.settings import ServerSettings
from tests.integration import serving
from tests.integration.times import START
from tests.unit.bundles import write_classifier_folder

if TYPE_CHECKING:
    from training.run import TrainResult

NewShop = Callable[[], ServerSettings]
_EMBEDDED = "CONCORD_POSTGRES_DSN" not in os.environ  # read before the stack names its own


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Embedded servers, or those the environment names.

    Not under pytest's own folder: another pytest run on the machine takes away other users' right to enter that one, and as
    root the embedded PostgreSQL runs as another user.
    """
    folder = tempfile.mkdtemp(prefix="concord-test-")
    with running_stack(Path(folder)) as running:
        if _EMBEDDED:
            # Processes are killed here, never the machine, and what a killed process has written stays: waiting for the disk at
            # every commit, and for a checkpoint at every CREATE DATABASE, would prove nothing.
            with psycopg.connect(running.postgres_dsn, autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET fsync = off")
                connection.execute("ALTER SYSTEM SET full_page_writes = off")
                connection.execute("SELECT pg_reload_conf()")
        yield running
    # Some hundred shops of 300 files each: a slow disk takes a minute or two, and nobody has to wait for it.
    subprocess.run(["sh", "-c", 'rm -rf "$1" >/dev/null 2>&1 &', "sh", folder], start_new_session=True, check=True)


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
            postgres_dsn=dsn,
            redis_url=url,
            port=0,
            admin_port=-1,
            metrics_port=-1,
            data_dir=folder,
            models_url=f"file:{folder / 'models'}",
        )
        migrate(dsn)
        apply_repository(settings)
        return settings

    yield make
    if _EMBEDDED:
        return  # they go with its folder; a DROP takes a checkpoint of a second or two for each of some hundred shops
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


@pytest.fixture(scope="session")
def bundle(new_shop: NewShop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A really trained and exported bundle of the small sample shop, made once a session (about 20 s)."""
    settings = new_shop()
    serving.fill(settings, tmp_path_factory.mktemp("sample"))
    out = tmp_path_factory.mktemp("bundle")
    serving.train_tiny(settings, out)
    return out


@pytest.fixture(scope="session")
def trained(new_shop: NewShop, tmp_path_factory: pytest.TempPathFactory) -> "tuple[ServerSettings, TrainResult]":
    """A shop and a finished run of the tiny preset, measured on all its customers; made once a session, not to be changed."""
    from training.config import TrainConfig
    from training.run import train

    settings = new_shop()
    serving.fill(settings, tmp_path_factory.mktemp("sample"))
    return settings, train(settings, replace(TrainConfig.tiny(), evaluation_users=0))


@pytest.fixture(scope="session")
def bundled(trained: "tuple[ServerSettings, TrainResult]", tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The bundle that the run of ``trained`` was exported as, with a text classifier of random weights."""
    from training.run import export
    from training.text import load_tokenizer

    folder, classifier = tmp_path_factory.mktemp("bundled"), tmp_path_factory.mktemp("classifier")
    write_classifier_folder(classifier, "intent", ("ask", "buy", "complain"), load_tokenizer("tiny"))
    return folder, export(trained[0], trained[1].run_dir, folder, classifiers=[classifier])


@pytest.fixture(scope="module")
def live(new_shop: NewShop, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    """A shop with data, an active model and a materialized online store; not yet served."""
    settings = new_shop()
    serving.fill(settings, tmp_path_factory.mktemp("sample"))
    serving.deploy(settings, bundle)
    return settings
