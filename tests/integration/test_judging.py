"""Reviews and messages are judged after they are committed: each once, whoever dies, moves or is forgotten meanwhile."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import psycopg
import pytest
from prometheus_client import CollectorRegistry

from server.domain import Subject
from server.errors import PreconditionError
from server.ingest.writer import Written
from server.metrics import Metrics
from server.settings import ServerSettings
from server.understand import judging
from server.understand.judging import START, Judge, Place, Step
from server.understand.opinions import UNJUDGED, Analyzed, Judgement, Leaning, TextSentiment
from server.understand.sentiment import Sentiments
from tests.integration.fixtures import NewShop
from tests.integration.replicas import Names, Pair, Replica, app, query, replica, view, web
from tests.integration.sentiments import write_event
from tests.integration.times import NOW


class Says:
    """Judges every text by its length and remembers what it was asked; ``before`` happens while it judges."""

    def __init__(self, model_version: str = "m1") -> None:
        self.model_version = model_version
        self.asked: list[str] = []
        self.before: Callable[[], Awaitable[object]] | None = None
        self.error: Exception | None = None

    async def require_model(self) -> None:
        if self.error is not None:
            raise self.error

    async def judge(self, texts: Sequence[str]) -> Analyzed:
        if self.before is not None:
            before, self.before = self.before, None
            await before()
        self.asked += texts
        return Analyzed(tuple(map(self._said, texts)), self.model_version)

    def _said(self, text: str) -> TextSentiment:
        if text == "?":
            return TextSentiment(UNJUDGED, None)
        return TextSentiment(Judgement(Leaning.POSITIVE, len(text) / 1_000, 0.9), "en")


@pytest.fixture(scope="module")
async def one(new_shop: NewShop) -> AsyncIterator[tuple[ServerSettings, Replica]]:
    settings = new_shop().model_copy(update={"postgres_pool_size": 10})
    async with replica(settings) as made:
        yield settings, made


def judge_of(one: Replica, says: Says) -> Judge:
    return Judge(one.pool, cast("Sentiments", says), Metrics(CollectorRegistry()), pause_seconds=0.01)


async def walk(judge: Judge, after: Place = START) -> tuple[int, Place]:
    """Steps to the end; returns how many were judged and where it ended."""
    count = 0
    while True:
        step = await judge.step(after, wait=True)
        assert step is not None
        count, after = count + step.judged, step.place
        if not step.more:
            return count, after


def stored(settings: ServerSettings, *events: uuid.UUID) -> list[tuple[Any, ...]]:
    rows = query(settings, "SELECT event_id, user_id, score, model_version FROM event_sentiments WHERE event_id = ANY(%s)", list(events))
    return sorted((row["user_id"], row["score"], row["model_version"]) for row in rows)


@pytest.fixture(autouse=True)
async def _nothing_is_left(one: tuple[ServerSettings, Replica]) -> None:
    await walk(judge_of(one[1], Says("before")))


async def test_reviews_and_messages_are_judged_once(one: tuple[ServerSettings, Replica]) -> None:
    settings, made = one
    user, says = uuid.uuid4().hex, Says()
    events = [write_event(settings, user, NOW, text, action=action) for text, action in (("good", "review"), ("?", "message"))]
    for text, action in (("", "review"), ("boots", "search"), ("x", "view")):
        write_event(settings, user, NOW, text, action=action)
    assert (await walk(judge_of(made, says)))[0] == 2
    assert sorted(says.asked) == ["?", "good"]
    assert [stored(settings, event) for event in events] == [[(user, 0.004, "m1")], [(user, None, "m1")]]
    assert (await walk(judge_of(made, says)))[0] == 0


async def test_a_judgement_stands_when_the_model_changes_until_it_is_asked_anew(one: tuple[ServerSettings, Replica]) -> None:
    settings, made = one
    event = write_event(settings, user := uuid.uuid4().hex, NOW, "four")
    await walk(judge_of(made, Says("m1")))
    again = judge_of(made, Says("m2"))
    assert (await walk(again))[0] == 0
    assert stored(settings, event) == [(user, 0.004, "m1")]
    assert await again.discard("m2") > 0
    await walk(again)
    assert stored(settings, event) == [(user, 0.004, "m2")]
    assert await again.discard("m2") == 0


async def test_of_several_processes_one_judges(one: tuple[ServerSettings, Replica]) -> None:
    settings, made = one
    events = [write_event(settings, uuid.uuid4().hex, NOW, f"text {k}") for k in range(30)]
    says = [Says() for _ in range(4)]
    judges = [judge_of(made, each) for each in says]

    async def meanwhile() -> None:
        assert await judges[1].step(START) is None

    says[0].before = meanwhile
    first = await judges[0].step(START)
    assert isinstance(first, Step)
    assert first.judged == 30
    await asyncio.gather(*(judge.step(START) for judge in judges))
    assert sum(len(each.asked) for each in says) == len(events)


async def test_what_a_killed_process_had_not_stored_is_found_again(one: tuple[ServerSettings, Replica]) -> None:
    settings, made = one
    event = write_event(settings, user := uuid.uuid4().hex, NOW, "half")
    dying = Says()

    async def die() -> None:
        raise asyncio.CancelledError

    dying.before = die
    with pytest.raises(asyncio.CancelledError):
        await judge_of(made, dying).step(START)
    assert stored(settings, event) == []
    await walk(judge_of(made, Says()))
    assert stored(settings, event) == [(user, 0.004, "m1")]


async def test_pages_and_batches_leave_nothing_out(one: tuple[ServerSettings, Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one moment, as an import commits them."""
    settings, made = one
    monkeypatch.setattr(judging, "_PAGE", 5)
    monkeypatch.setattr(judging, "_BATCH", 3)
    events = [write_event(settings, uuid.uuid4().hex, NOW, f"text {k}") for k in range(23)]
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute("UPDATE events SET received_at = '2026-01-01' WHERE event_id = ANY(%s)", [events[:17]])
    says = Says()
    count, place = await walk(judge_of(made, says))
    assert (count, sorted(says.asked)) == (23, sorted(f"text {k}" for k in range(23)))
    assert len(stored(settings, *events)) == 23
    assert (await walk(judge_of(made, says), place)) == (0, place)


async def test_the_loop_finds_what_comes_and_what_was_committed_late(one: tuple[ServerSettings, Replica]) -> None:
    settings, made = one
    says = Says()
    running = asyncio.create_task(judge_of(made, says).run())

    async def judged(event: uuid.UUID) -> None:
        async with asyncio.timeout(20):
            while not stored(settings, event):
                await asyncio.sleep(0.01)

    try:
        await judged(write_event(settings, uuid.uuid4().hex, NOW, "now"))
        late = write_event(settings, uuid.uuid4().hex, NOW, "late")
        with psycopg.connect(settings.postgres_dsn) as connection:
            connection.execute("DELETE FROM event_sentiments WHERE event_id = %s", [late])
            connection.execute("UPDATE events SET received_at = received_at - interval '30 seconds' WHERE event_id = %s", [late])
        await judged(late)
        says.error = PreconditionError("none", reason="NO_SENTIMENT_MODEL")
        waiting = write_event(settings, uuid.uuid4().hex, NOW, "later")
        await asyncio.sleep(0.1)
        assert stored(settings, waiting) == []
        says.error = None
        await judged(waiting)
    finally:
        running.cancel()
        await asyncio.wait([running])


async def review(made: Replica, subject: Subject, name: str) -> Written:
    event = view(subject, name)._replace(action="review", text="fine", occurred_at=datetime.now(UTC) - timedelta(hours=1))
    (written,) = await made.writer.write([[event]])
    return written


async def test_a_customer_forgotten_while_being_judged_leaves_nothing(two: Pair, settings: ServerSettings, names: Names) -> None:
    phone, says = app(names("phone")), Says()
    written = await review(two[0], phone, "a")
    says.before = lambda: two[1].erasure.forget(phone)
    step = await judge_of(two[0], says).step(START)
    assert step is not None
    assert (step.judged, query(settings, "SELECT 1 FROM event_sentiments WHERE user_id = %s", written.tokens[0].user_id)) == (1, [])


async def test_customers_merged_while_being_judged_are_judged_as_what_they_are(two: Pair, settings: ServerSettings, names: Names) -> None:
    phone, card, says = app(names("phone")), web(names("card")), Says()
    users = [(await review(two[0], subject, name)).tokens[0].user_id for subject, name in ((phone, "a"), (card, "b"))]
    says.before = lambda: two[1].graph.link(phone, card)
    await judge_of(two[0], says).step(START)
    await walk(judge_of(two[0], Says()))
    rows = query(settings, "SELECT user_id, origin_id FROM event_sentiments WHERE origin_id = ANY(%s)", users)
    assert sorted((row["user_id"], row["origin_id"]) for row in rows) == sorted((users[0], each) for each in users)
