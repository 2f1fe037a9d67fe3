"""Forgetting on real stores: nothing is left, nothing comes back, and the receipt names nobody."""

import asyncio
import itertools
import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from prometheus_client import CollectorRegistry

from features.importers import import_events, import_identities, load_mapping
from server.domain import RecommendQuery, Stored, Subject
from server.errors import NotFoundError, PreconditionError
from server.ingest.oblivion import Oblivion
from server.journal.exposures import Journal
from server.metrics import Metrics
from server.recommend.known import KnownSlate, KnownSlates
from server.recommend.slate import Place
from server.settings import ServerSettings
from tests.fakes import ANSWER, NOW
from tests.integration.replicas import Names, Pair, app, assert_whole, query, web


async def test_a_forgotten_customer_leaves_no_trace_and_does_not_come_back(
    two: Pair, settings: ServerSettings, names: Names, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phone, card, other = app(names("phone")), web(names("card")), web(names("other"))
    tokens = [await two[0].record(phone, "gone-1"), await two[1].record(card, "gone-2", "gone-1")]
    kept = await two[0].record(other, "kept")
    await two[0].graph.link(phone, card)
    ids = [*(token.user_id for token in tokens), phone.channel_user_id, card.channel_user_id]
    for one, subject in itertools.product(two, (phone, card)):
        await one.read(subject)
    await two[0].online.commit(tokens[0].user_id, "home||m|1", user_version=3, payload=b"slate", ttl_seconds=60)
    late = await two[1].states_of(tokens[0].user_id)  # a replica has read the state and will write it too late
    assert [name for name in ids if not traces(settings, name)] == []

    receipt = await two[0].erasure.forget(card)
    assert (receipt.online_erased, receipt.counts["users"], receipt.counts["identities"], receipt.counts["links"]) == (True, 2, 2, 1)
    assert (receipt.counts["events"], receipt.counts["shadowed_events"]) == (2, 1)
    await two[1].online.write_users(late)
    with pytest.raises(NotFoundError):
        await two[1].online.commit(tokens[0].user_id, "home||m|1", user_version=3, payload=b"slate", ttl_seconds=60)
    client = redis.Redis.from_url(settings.redis_url)
    left = [key for name in ids for key in client.keys(f"*{name}*")]
    assert {tuple(client.hgetall(key)) for key in left} == {(b"_concord:forgotten",)}  # nothing but the refusal of late writes
    assert all(0 < client.ttl(key) <= 60 for key in left)
    for key in left:
        client.pexpire(key, 1)
    await asyncio.sleep(0.02)
    assert [name for name in ids if traces(settings, name)] == []
    written = capsys.readouterr()
    assert [name for name in ids if name in written.out + written.err] == []

    for one, subject in itertools.product(two, (phone, card)):
        assert await one.read(subject) == ("", 0, [])
        with pytest.raises(NotFoundError):
            await one.read(Subject(user_id=tokens[0].user_id))
    for subject in (phone, card, *(Subject(user_id=token.user_id) for token in tokens)):
        outcome = await two[1].outcome(subject, "again")
        assert (outcome.status, outcome.reason) == (Stored.REJECTED, "SUBJECT_FORGOTTEN")
        assert await two[1].erasure.forget(subject) == receipt  # a retry, by whatever name
    for call in (two[0].identities.resolve(phone, create=True), two[0].graph.link(phone, other), two[0].graph.link(other, card)):
        with pytest.raises(PreconditionError) as refused:
            await call
        assert refused.value.reason == "SUBJECT_FORGOTTEN"
    forgotten_rows = import_of(settings, tmp_path, [(phone, tokens[0].user_id), (card, "somebody-else"), (other, kept.user_id)])
    assert forgotten_rows == ({"customer was forgotten": 2}, {"customer was forgotten": 2})
    assert [name for name in ids if traces(settings, name)] == []
    assert (await two[1].read(other))[2] == ["kept"]
    with pytest.raises(NotFoundError):
        await two[0].erasure.forget(web(names("nobody")))


async def test_forgetting_while_redis_is_away_is_finished_later(two: Pair, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    phone = app(names("phone"))
    await two[0].record(phone, "a")

    async def away(_users: object) -> None:
        raise redis.ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(two[0].online, "erase_users", away)
        assert not (await two[0].erasure.forget(phone)).online_erased
    assert await two[1].erasure.finish() == 1
    assert (await two[0].erasure.forget(phone)).online_erased
    assert await two[1].read(phone) == ("", 0, [])


async def test_forgetting_wins_or_loses_against_ingest_but_leaves_nothing_behind(two: Pair, settings: ServerSettings, names: Names) -> None:
    for turn in range(10):
        phone = app(names(f"phone{turn}"))
        await two[0].record(phone, "first")
        writes = [two[k % 2].outcome(phone, f"race{k}") for k in range(6)]
        receipt, *outcomes = await asyncio.gather(two[0].erasure.forget(phone), *writes)
        assert {outcome.reason for outcome in outcomes} <= {"", "SUBJECT_FORGOTTEN"}
        assert receipt.counts["events"] == 1 + sum(outcome.status is Stored.STORED for outcome in outcomes)
        assert (await two[1].outcome(phone, "after")).reason == "SUBJECT_FORGOTTEN"
        assert await two[1].read(phone) == ("", 0, [])
    assert_whole(settings)


def import_of(settings: ServerSettings, folder: Path, rows: list[tuple[Subject, str]]) -> tuple[Any, Any]:
    """Imports one event and the identity of each, and returns what was rejected and why."""
    mapping, source = load_mapping("sample_shop"), folder / "rows.jsonl"
    lines = [
        {
            "channel": subject.channel,
            "channel_user_id": subject.channel_user_id,
            "user_id": user_id,
            "event_id": str(uuid.uuid4()),
            "action": "view",
            "item_id": "imported",
            "occurred_at": "2026-01-01T00:00:00Z",
        }
        for subject, user_id in rows
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    identities = import_identities(settings.postgres_dsn, source, mapping, rejects=folder / "r1")
    for line in lines[2:]:
        line["occurred_at"] = "2025-01-01T00:00:00Z"
    events = import_events(settings.postgres_dsn, source, mapping, rejects=folder / "r2")
    return identities.rejected, events.rejected


def traces(settings: ServerSettings, name: str) -> list[str]:
    """Every table and every key of Redis in which a name can be found."""
    found = []
    with psycopg.connect(settings.postgres_dsn) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        for (table,) in tables:
            where = psycopg.sql.SQL("SELECT 1 FROM {} t WHERE t::text LIKE %s LIMIT 1").format(psycopg.sql.Identifier(table))
            if connection.execute(where, [f"%{name}%"]).fetchone():
                found.append(table)
    client = redis.Redis.from_url(settings.redis_url)
    return found + [repr(key) for key in client.keys("*") if name.encode() in key or name.encode() in client.dump(key)]


async def test_replicas_drop_what_they_remember_when_a_customer_is_forgotten(two: Pair, names: Names) -> None:
    customer, slates = app(names("phone")), KnownSlates(10)
    token = await two[0].record(customer, "seen")
    await two[1].read(customer)
    slates.put(token.user_id, Place("home"), KnownSlate(1, "m", 1, b"1:2:x"))
    oblivion = Oblivion(two[1].pool, (two[1].identities.clear, slates.clear), pause_seconds=0.05)
    await oblivion.look()
    slates.put(token.user_id, Place("home"), KnownSlate(1, "m", 1, b"1:2:x"))
    await oblivion.look()  # nobody was forgotten since
    assert slates.get(token.user_id, Place("home")) is not None
    await two[1].read(customer)
    running = asyncio.create_task(oblivion.run())
    await two[0].erasure.forget(customer)
    async with asyncio.timeout(5):
        while slates.get(token.user_id, Place("home")) is not None or two[1].identities._cache:
            await asyncio.sleep(0.01)
    running.cancel()


async def test_a_persona_that_was_unlinked_takes_its_exposures_along(two: Pair, settings: ServerSettings, names: Names) -> None:
    """They are logged under the customer it was part of, which lives on."""
    phone, card = app(names("phone")), web(names("card"))
    stays = await two[0].record(phone, "a")
    await two[0].record(card, "b")
    await two[0].graph.link(phone, card)
    journal = Journal(two[0].pool, Metrics(CollectorRegistry()), bound=9, pause_seconds=1, new_id=uuid.uuid4)
    for subject in (phone, card):
        known = await two[0].identities.customer_of(subject)
        assert known.user_id == stays.user_id
        asked = RecommendQuery(subject, subject.channel, "home", 2)
        journal.log(replace(ANSWER, user_id=known.user_id), asked, persona_id=known.persona_id, answered_at=NOW)
    await journal.flush()
    await two[0].graph.unlink(card, None)
    receipt = await two[0].erasure.forget(card)
    assert receipt.counts["exposures"] == 1
    assert query(settings, "SELECT channel FROM exposures WHERE user_id = %s", stays.user_id) == [{"channel": "app"}]
