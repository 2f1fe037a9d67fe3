"""Flows through a server whose stores fail at random, seeded: retried until done, they must end as if nothing had happened."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import psycopg
import pytest

from concord import Concord, user
from concord.v1.common_pb2 import ChannelIdentity, Subject
from server.settings import ServerSettings
from tests.faults.injection import Faulty, Shares, injected
from tests.integration.serving import served_directly

SEED = os.environ.get("INJECT_FAULTS", "11")
SHARES = Shares(before=0.01, after=0.02, timeout=0.002, slow=0.02)
MAY_RETRY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@pytest.fixture(scope="module")
async def faulty(live: ServerSettings) -> AsyncIterator[tuple[Faulty, Concord, Concord]]:
    """Two replicas and a channel's client at each, behind the same faults."""
    async with (
        injected(live, seed=SEED, shares=SHARES) as behind,
        served_directly(behind.settings) as one,
        served_directly(behind.settings) as two,
        Concord(one, channel="web", timeout=3.0) as web,
        Concord(two, channel="app", timeout=3.0) as app,
    ):
        behind.arm()
        yield behind, web, app
    done = behind.done
    assert all(done[kind] for kind in ("before", "after", "slow")), done


async def until_done(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeats a call as a careful backend does; what is not retryable is a failure of the test."""
    for _ in range(60):
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() not in MAY_RETRY:
                raise
            await asyncio.sleep(0.05)
    raise AssertionError("60 attempts did not bring it about")


async def test_every_acknowledged_event_is_stored_once(faulty: tuple[Faulty, Concord, Concord], live: ServerSettings) -> None:
    _, web, app = faulty
    whom = [f"injected-{k}" for k in range(8)]
    events = [web.event(whom[k % 8], "view", item_id=f"inj-{k}") for k in range(160)]

    async def record(position: int) -> None:
        client = (web, app)[position % 2]
        answer = await until_done(lambda: client.record(events[position]))
        assert answer.results[0].status in {1, 2}  # a duplicate where the first attempt was done and nobody was told
        assert answer.tokens[0].user_version >= 1

    await asyncio.gather(*(record(k) for k in range(len(events))))
    with psycopg.connect(live.postgres_dsn) as connection:
        stored = Counter(row[0] for row in connection.execute("SELECT item_id FROM events WHERE item_id LIKE 'inj-%'"))
        versions = connection.execute(
            "SELECT u.version, (SELECT count(*) FROM events e WHERE e.user_id = u.user_id) FROM users u JOIN identities i USING (user_id) "
            "WHERE i.channel_user_id LIKE 'injected-%'"
        ).fetchall()
    assert stored == Counter({f"inj-{k}": 1 for k in range(160)})
    assert versions == [(20, 20)] * 8


async def test_tokens_hold_and_answers_agree(faulty: tuple[Faulty, Concord, Concord]) -> None:
    _, web, app = faulty
    for turn in range(12):
        name = f"agreeing-{turn}"
        recorded = await until_done(lambda name=name: web.record(web.event(name, "view", item_id="KIT-1")))
        token = recorded.tokens[0]
        whom = user(token.user_id)

        async def answered(client: Concord, whom: Subject = whom, token: str = token.consistency_token) -> Any:
            """An answer that claims to be the one of its versions; degraded ones say that they are not."""
            for _ in range(60):
                answer = await until_done(lambda: client.recommend(whom, surface="home", limit=100, consistency_token=token))
                if not answer.degraded and not answer.stale:
                    return answer
                await asyncio.sleep(0.05)
            raise AssertionError("no whole answer in 60")

        first, second = await answered(web), await answered(app)
        assert first.versions.user_version >= token.user_version
        assert first.versions == second.versions
        both = {item.item_id for item in first.items} & {item.item_id for item in second.items}
        shown = [[(item.item_id, item.score, item.price) for item in answer.items if item.item_id in both] for answer in (first, second)]
        assert shown[0] == shown[1]
        assert first.slate_id == second.slate_id


async def test_links_end_as_if_nothing_had_failed(faulty: tuple[Faulty, Concord, Concord]) -> None:
    _, web, app = faulty
    for turn in range(6):
        cookie, account = f"cookie-{turn}", f"account-{turn}"
        await until_done(lambda cookie=cookie: web.record(web.event(cookie, "view", item_id="a")))
        await until_done(lambda account=account: app.record(app.event(account, "view", item_id="b")))
        other = Subject(identity=ChannelIdentity(channel="web", channel_user_id=cookie))
        linked = await until_done(lambda account=account, other=other: app.link(account, other))
        for client, name in ((web, cookie), (app, account)):
            # With the link's token: where Redis missed the link, a reader without it may see the state before for a moment.
            token = linked.consistency_token
            profile = await until_done(lambda client=client, name=name, token=token: client.profile(name, consistency_token=token))
            assert profile.user_id == linked.user_id
            assert {behaviour.item_id for behaviour in profile.recent_behaviours} == {"a", "b"}
