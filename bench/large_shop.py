"""Shops of any size for benchmarks of size: a generated catalogue, and the sample shop's model widened to carry it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psycopg
import redis
from psycopg import sql
from psycopg.conninfo import make_conninfo

from features.bundle import COLLABORATIVE, ITEMS, checksums, read_bundle, write_manifest
from features.catalogue import Item, publish_epoch, upsert_items
from features.item_table import ItemTable, load_item_table
from features.models import activate, list_models, publish
from features.registry import is_applied, load_registry
from features.schema import current_revision, head_revision, migrate
from features.settings import Settings
from features.store import apply_repository
from harness import WORK

_CATEGORIES, _BRANDS, _BATCH = 40, 200, 10_000
_EMPTY = "empty"


def numbered_item(number: int) -> Item:
    """Returns an item that differs from the others by its number."""
    return Item(
        f"sku-{number:07d}",
        f"thing number {number}",
        category=f"category {number % _CATEGORIES}",
        brand=f"brand {number % _BRANDS}",
        price_micros=(1 + number % 500) * 1_000_000,
        currency="EUR",
        stock=100,
        listed_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


@contextmanager
def large_shop(
    sample: Settings, item_count: int, *, redis_database: int, name: str = "", item: Callable[[int], Item] = numbered_item
) -> Iterator[Settings]:
    """Yields a shop of ``item_count`` items beside the sample shop, with the sample shop's model over all of them.

    Its database ``name`` is made the first time (some seconds for 10,000 items) and stays; its Redis database is emptied.
    """
    name = name or f"items_{item_count}"
    url = f"{sample.redis_url.rpartition('/')[0]}/{redis_database}"
    redis.Redis.from_url(url).flushdb()
    folder = WORK / name
    dsn = make_conninfo(sample.postgres_dsn, dbname=name)
    settings = sample.model_copy(update={"postgres_dsn": dsn, "redis_url": url, "data_dir": folder})
    done = folder / "prepared"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        empty_shop(sample)
        with psycopg.connect(sample.postgres_dsn, autocommit=True) as connection:
            # Feast keeps a connection to whatever it was applied to, and no database in use can be copied.
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [_EMPTY])
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(_EMPTY)))
        _prepare(sample, settings, item_count, item)
        done.touch()
    yield settings


def empty_shop(sample: Settings) -> Settings:
    """Returns a shop beside the sample shop without items, customers or a model; made the first time."""
    url = f"{sample.redis_url.rpartition('/')[0]}/15"
    settings = sample.model_copy(update={"postgres_dsn": make_conninfo(sample.postgres_dsn, dbname=_EMPTY), "redis_url": url})
    with psycopg.connect(sample.postgres_dsn, autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_EMPTY]).fetchone():
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_EMPTY)))
    if current_revision(settings.postgres_dsn) != head_revision():
        migrate(settings.postgres_dsn)
    if not is_applied(load_registry(settings)):
        apply_repository(settings)
    return settings


def _prepare(sample: Settings, settings: Settings, item_count: int, item: Callable[[int], Item]) -> None:
    with psycopg.connect(settings.postgres_dsn) as connection:
        for start in range(0, item_count, _BATCH):
            upsert_items(connection, [item(number) for number in range(start, min(start + _BATCH, item_count))])
        publish_epoch(connection)
        table = load_item_table(connection)
    with psycopg.connect(sample.postgres_dsn) as connection:
        active = next(model for model in list_models(connection) if model.active)
    widened = widen(Path(active.uri.removeprefix("file://")), settings.data_dir / "widened", table)
    with psycopg.connect(settings.postgres_dsn) as connection:
        activate(connection, publish(connection, widened, settings.models_base).model_version)
    shutil.rmtree(widened)


def widen(bundle: Path, folder: Path, table: ItemTable) -> Path:
    """Writes ``bundle`` again into ``folder`` with random unit vectors for the items of ``table``, as an export over them would.

    What a model knows of items decides its size and its time, not the values: encoding 10,000 titles would take a minute.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bundle, folder)
    manifest = read_bundle(folder)
    vectors = np.random.default_rng(0).standard_normal((len(table), manifest.vector_size), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.savez(folder / ITEMS, item_ids=np.array(table.ids), content_hashes=np.array(table.content_hashes), vectors=vectors)
    # 50 neighbours an item, as collaborative weights of a real shop have in the order of.
    indices = np.random.default_rng(1).integers(0, len(table), (len(table), 50), np.int32)
    np.savez(
        folder / COLLABORATIVE,
        indptr=np.arange(len(table) + 1, dtype=np.int64) * 50,
        indices=np.sort(indices, axis=1).ravel(),
        weights=np.full(indices.size, 0.1, np.float32),
    )
    name = f"{manifest.model_version[:40]}-{len(table)}"
    write_manifest(folder, manifest.model_copy(update={"model_version": name, "files": dict(checksums(folder))}))
    return folder
