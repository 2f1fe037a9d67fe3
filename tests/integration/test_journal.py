"""The journal on a real PostgreSQL: what it writes, what it may lose, and whom it must not remember."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from prometheus_client import CollectorRegistry

from server.database import Pool, postgres_breaker, postgres_pool
from server.domain import ItemFilter, RecommendQuery, Subject
from server.journal.exposures import Journal
from server.metrics import Metrics
from server.recommend.shelf import page_token
from server.settings import ServerSettings
from tests.fakes import ANSWER, NOW
from tests.integration.fixtures import NewShop

QUERY = RecommendQuery(Subject(user_id="u1"), "app", "home", 2, context_item_ids=("c1", "c2"))


@dataclass
class Desk:
    """A journal over a shop with the customers u1 to u9."""

    settings: ServerSettings
    pool: Pool
    journal: Journal
    registry: CollectorRegistry

    def count(self, result: str) -> float:
        return self.registry.get_sample_value("concord_journal_total", {"result": result}) or 0.0

    def rows(self, columns: str = "user_id") -> list[Any]:
        with psycopg.connect(self.settings.postgres_dsn) as connection:
            return connection.execute(f"SELECT {columns} FROM exposures ORDER BY user_id".encode()).fetchall()


@pytest.fixture
async def desk(new_shop: NewShop) -> AsyncIterator[Desk]:
    settings = new_shop()
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute("INSERT INTO users (user_id) SELECT 'u' || k FROM generate_series(1, 9) k")
    registry = CollectorRegistry()
    async with postgres_pool(settings, postgres_breaker(settings, lambda _open: None)) as pool:
        journal = Journal(pool, Metrics(registry), bound=5, pause_seconds=0.01, new_id=uuid.uuid4)
        yield Desk(settings, pool, journal, registry)


async def test_everything_a_replay_needs_is_written(desk: Desk) -> None:
    query = replace(QUERY, page_token=page_token("s1", 7), filters=ItemFilter(in_stock_only=True))
    desk.journal.log(ANSWER, query, answered_at=NOW)
    await desk.journal.flush()
    assert desk.rows(
        "user_id, slate_id, channel, surface, context_item_ids, user_version, model_version, index_version, offer_version, as_of, "
        "page_start, page_limit, filtered, item_ids, positions, scores, prices_micros, currencies, in_stock, degraded, stale, "
        "degraded_reasons, answered_at"
    ) == [
        (
            *("u1", "s1", "app", "home", ["c1", "c2"], 7, "m1", 3, 5, NOW, 7, 2, True),
            *(["i1", "i2"], [0, 1], [1.0, 0.875], [19_990_000] * 2, ["EUR"] * 2, [True] * 2),
            *(True, False, ["NO_ACTIVE_MODEL"], NOW),
        )
    ]
    assert desk.count("written") == 1


async def test_a_full_queue_drops_and_counts(desk: Desk) -> None:
    for _ in range(8):
        desk.journal.log(ANSWER, QUERY, answered_at=NOW)
    await desk.journal.flush()
    assert len(desk.rows()) == 5
    assert (desk.count("written"), desk.count("dropped")) == (5, 3)


async def test_a_customer_forgotten_meanwhile_leaves_no_exposure(desk: Desk) -> None:
    for user_id in ("u1", "u2", ""):
        desk.journal.log(replace(ANSWER, user_id=user_id), QUERY, answered_at=NOW)
    with psycopg.connect(desk.settings.postgres_dsn) as connection:
        connection.execute("DELETE FROM users WHERE user_id = 'u2'")
    await desk.journal.flush()
    assert desk.rows() == [("",), ("u1",)]
    assert (desk.count("written"), desk.count("forgotten")) == (2, 1)


async def test_the_persona_that_asked_is_kept_and_one_forgotten_meanwhile_leaves_no_exposure(desk: Desk) -> None:
    for persona_id in ("u1", "u2", "u3", ""):
        desk.journal.log(ANSWER, QUERY, persona_id=persona_id, answered_at=NOW)
    with psycopg.connect(desk.settings.postgres_dsn) as connection:
        connection.execute("DELETE FROM users WHERE user_id = 'u2'")
    await desk.journal.flush()
    assert sorted(desk.rows("user_id, coalesce(origin_id, '')")) == [("u1", ""), ("u1", ""), ("u1", "u3")]


async def test_a_customer_being_forgotten_is_waited_for(desk: Desk) -> None:
    desk.journal.log(ANSWER, QUERY, answered_at=datetime.now(UTC))
    with psycopg.connect(desk.settings.postgres_dsn) as connection:
        connection.execute("SELECT 1 FROM users WHERE user_id = 'u1' FOR UPDATE")
        writing = asyncio.create_task(desk.journal.flush())
        done, _ = await asyncio.wait([writing], timeout=0.5)
        assert not done
        connection.execute("DELETE FROM exposures WHERE user_id = 'u1'")
        connection.execute("DELETE FROM users WHERE user_id = 'u1'")
        connection.commit()
        await writing
    assert desk.rows() == []


async def test_what_cannot_be_written_stays_queued(desk: Desk) -> None:
    desk.journal.log(ANSWER, QUERY, answered_at=NOW)
    with psycopg.connect(desk.settings.postgres_dsn) as connection:
        connection.execute("ALTER TABLE exposures RENAME TO away")
    with pytest.raises(psycopg.Error):
        await desk.journal.flush()
    with psycopg.connect(desk.settings.postgres_dsn) as connection:
        connection.execute("ALTER TABLE away RENAME TO exposures")
    await desk.journal.flush()
    assert desk.rows() == [("u1",)]


async def test_what_an_attempt_whose_answer_was_lost_has_stored_is_not_stored_twice(desk: Desk) -> None:
    """After such an attempt everything stays queued; rows that stand already must neither double nor hold up the others."""
    same = uuid.uuid4()
    desk.journal._new_id = lambda: same
    desk.journal.log(ANSWER, QUERY, answered_at=NOW)
    await desk.journal.flush()
    desk.journal.log(ANSWER, QUERY, answered_at=NOW)
    desk.journal.log(replace(ANSWER, user_id="u2"), QUERY, answered_at=NOW)
    await desk.journal.flush()
    assert desk.rows() == [("u1",), ("u2",)]
    assert (desk.count("written"), desk.count("forgotten"), desk.journal.queued) == (3, 0, 0)


async def test_texts_that_arrays_could_take_for_something_else_are_written_as_they_are(desk: Desk) -> None:
    odd = ("", "NULL", "a,b", "{c}", 'd"e', "f\\g", "h\ti", "j\nk", "\\N", "店", " l ")
    cards = [replace(ANSWER.items[0].card, item_id=text, currency=text, price_micros=None) for text in odd]
    items = tuple(ANSWER.items[0]._replace(card=card, score=0.1 + 0.2) for card in cards)
    desk.journal.log(replace(ANSWER, items=items, degraded_reasons=odd), replace(QUERY, context_item_ids=odd), answered_at=NOW)
    desk.journal.log(replace(ANSWER, items=(), user_id="u2"), replace(QUERY, context_item_ids=()), answered_at=NOW)
    await desk.journal.flush()
    full, empty = desk.rows("item_ids, currencies, context_item_ids, degraded_reasons, prices_micros, scores, in_stock")
    assert full[:4] == (list(odd),) * 4
    assert full[4:] == ([None] * len(odd), [pytest.approx(0.3)] * len(odd), [True] * len(odd))
    assert empty == ([], [], [], list(ANSWER.degraded_reasons), [], [], [])
