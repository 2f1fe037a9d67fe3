"""A PostgreSQL that takes connections and says nothing: what runs in threads gives up too, or a few calls would take all threads."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import psycopg
import pytest

from features.catalogue import Item
from server.catalog.service import Catalog
from server.database import connector
from server.models import BundleLoader
from server.recommend.snapshot import SnapshotBuilder

NONE: Any = None


@pytest.fixture
async def dsn() -> AsyncIterator[str]:
    open_ones: list[asyncio.StreamWriter] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.append(writer)
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        yield f"host=127.0.0.1 port={server.sockets[0].getsockname()[1]} user=nobody dbname=none"
        for writer in open_ones:  # whoever still waits for an answer ends now
            writer.close()


async def test_calls_that_ask_in_threads_end(dsn: str) -> None:
    settings: Any = SimpleNamespace(postgres_dsn=dsn, postgres_timeout_seconds=3.0)
    calls = (
        Catalog(NONE, NONE, connect=connector(settings), epoch_seconds=1.0).upsert([Item("i", "t")], []),
        SnapshotBuilder(NONE, dsn=dsn).build(None, 1),
        BundleLoader(settings, provider="cpu", threads=1)("m1"),
    )
    tasks = [asyncio.ensure_future(cast("Any", call)) for call in calls]
    done, _ = await asyncio.wait(tasks, timeout=8)
    assert len(done) == 3
    assert all(isinstance(task.exception(), psycopg.OperationalError) for task in tasks)
