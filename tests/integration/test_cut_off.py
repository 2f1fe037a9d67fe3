"""C3 while replicas lose Redis one by one or together: no answer that says it is current is older than one before it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import psycopg
import pytest

from cli.stack import embedded_redis
from concord import Concord, user
from concord.v1 import common_pb2, features_pb2, features_pb2_grpc
from concord.v1.recommendation_pb2 import RecommendResponse
from features.replicas import list_replicas
from server.settings import ServerSettings
from tests.faults.proxy import DOWN, UP, Proxy
from tests.integration.serving import served_directly


@dataclass
class Replica:
    """One server, the only way from it to Redis, and a client without a memory."""

    address: str
    redis: Proxy
    client: Concord

    def cut_off(self) -> None:
        self.redis.accepting = False
        self.redis.cut()

    def mend(self) -> None:
        self.redis.accepting = True
        self.redis.flow()


@dataclass
class Shop:
    """The replicas, and the newest version that anybody was shown of each customer."""

    settings: ServerSettings
    replicas: list[Replica]
    customers: list[str]
    newest: dict[str, int] = field(default_factory=dict)
    refusals: int = 0

    async def ask(self, customer: str, replica: int, **more: Any) -> RecommendResponse:
        """Asks once, and checks the answer against every one before it."""
        known = self.newest.get(customer, 0)
        answer = await self.replicas[replica].client.recommend(user(customer), surface="home", limit=20, **more)
        version = answer.versions.user_version
        assert answer.stale or version >= known, f"replica {replica} went back from {known} to {version}: {answer.degraded_reasons}"
        self.newest[customer] = max(known, version)
        return answer

    async def patiently(self, customer: str, replica: int, **more: Any) -> RecommendResponse:
        """Asks until there is an answer."""
        async with asyncio.timeout(10):
            while True:
                try:
                    return await self.ask(customer, replica, **more)
                except grpc.aio.AioRpcError:
                    self.refusals += 1
                    await asyncio.sleep(0.01)

    async def write(self, customer: str, replica: int, item: str) -> tuple[int, str]:
        """Records a view; returns the version and the token."""
        client = self.replicas[replica].client
        token = (await client.record(client.event(user(customer), "view", item_id=item))).tokens[0]
        return token.user_version, token.consistency_token

    async def settled(self) -> None:
        """Waits until every replica answers from Redis again."""
        for k in range(len(self.replicas)):
            async with asyncio.timeout(15):
                while (await self.patiently(self.customers[-1], k)).degraded:
                    await asyncio.sleep(0.02)


@asynccontextmanager
async def shop_of(live: ServerSettings, tmp_path: Path, count: int, **more: Any) -> AsyncIterator[Shop]:
    async with AsyncExitStack() as stack:
        url = stack.enter_context(embedded_redis(tmp_path))
        settings = live.model_copy(update={"redis_url": url, **more})
        port = urlsplit(url).port
        assert port is not None
        replicas = []
        for _ in range(count):
            proxy = await stack.enter_async_context(Proxy(port))
            its_own = settings.model_copy(update={"redis_url": url.replace(f":{port}", f":{proxy.port}")})
            address = await stack.enter_async_context(served_directly(its_own))
            client = await stack.enter_async_context(Concord(address, channel="web", timeout=3.0, remembered_customers=0))
            replicas.append(Replica(address, proxy, client))
        with psycopg.connect(settings.postgres_dsn) as connection:
            found = connection.execute("SELECT user_id FROM users WHERE version > 20 ORDER BY user_id").fetchall()
        shop = Shop(settings, replicas, [row[0] for row in found])
        await shop.settled()
        yield shop


def away(settings: ServerSettings) -> Sequence[bool]:
    with psycopg.connect(settings.postgres_dsn) as connection:
        return [replica.online_away for replica in list_replicas(connection) if replica.live]


async def test_what_a_replica_without_redis_shows_the_others_show_too(live: ServerSettings, tmp_path: Path) -> None:
    async with shop_of(live, tmp_path, 2) as shop:
        some = shop.customers[:4]
        for customer in some:
            for replica in (0, 1):
                await shop.ask(customer, replica)
        shop.replicas[0].cut_off()
        seconds = []
        for number in range(40):
            customer = some[number % len(some)]
            version, token = await shop.write(customer, 0, f"cut-off-{number}")
            started = time.monotonic()
            mine = await shop.patiently(customer, 0, consistency_token=token if number % 2 else "")
            seconds.append(time.monotonic() - started)
            assert mine.stale or mine.versions.user_version == version
            other = await shop.ask(customer, 1)
            assert not other.stale
            profile = await shop.replicas[1].client.profile(user(customer))
            assert profile.user_version >= mine.versions.user_version
        assert sorted(away(shop.settings)) == [False, True]
        assert sorted(seconds)[20] < 0.3
        print(f"cut off: median {1e3 * sorted(seconds)[20]:.0f} ms, longest {1e3 * max(seconds):.0f} ms, {shop.refusals} refusals")
        # Coming back, while events go on: nothing unflagged is older than what was shown meanwhile.
        for customer in some:
            await shop.write(customer, 0, f"last-{customer}")
            await shop.patiently(customer, 0)
        shop.replicas[0].mend()
        async with asyncio.timeout(15):
            while True:
                answers = [await shop.patiently(customer, 0) for customer in some]
                if not any(answer.degraded for answer in answers):
                    break
        await shop.settled()
        assert away(shop.settings) == [False, False]


@pytest.mark.parametrize("hangs", [False, True])
async def test_when_redis_is_away_from_all_answers_go_on_after_a_moment(live: ServerSettings, tmp_path: Path, hangs: bool) -> None:
    async with shop_of(live, tmp_path, 3) as shop:
        customer = shop.customers[0]
        for replica in range(3):
            await shop.ask(customer, replica)
        for replica in shop.replicas:
            if hangs:
                replica.redis.stall(UP, DOWN)
            else:
                replica.cut_off()
        started = time.monotonic()
        version, token = await shop.write(customer, 0, f"all-{hangs}")
        first = await shop.patiently(customer, 0, consistency_token=token)
        window = time.monotonic() - started
        print(f"hangs {hangs}: answered {window:.3f} s after the outage began, {shop.refusals} refusals")
        assert (first.versions.user_version, first.stale) == (version, False)
        assert window < (2.5 if hangs else 1.0)
        for number in range(6):
            version, token = await shop.write(customer, number % 3, f"all-{hangs}-{number}")
            started = time.monotonic()
            answer = await shop.ask(customer, (number + 1) % 3, consistency_token=token if number % 2 else "")
            assert (answer.versions.user_version, answer.stale) == (version, False)
            assert list(answer.degraded_reasons) == ["ONLINE_STORE_UNAVAILABLE"]
            assert (await shop.replicas[number % 3].client.profile(user(customer))).user_version == version
            assert time.monotonic() - started < 1.0
        assert away(shop.settings) == [True] * 3
        for replica in shop.replicas:  # one after the other, so that one reads Redis while the others do not
            replica.mend()
            for number in range(30):
                await shop.patiently(customer, number % 3)
        await shop.settled()
        assert (await shop.ask(customer, 0)).versions.user_version == version


async def test_a_replica_alone_waits_for_nobody(live: ServerSettings, tmp_path: Path) -> None:
    async with shop_of(live, tmp_path, 1) as shop:
        customer = shop.customers[1]
        await shop.ask(customer, 0)
        shop.replicas[0].cut_off()
        version, token = await shop.write(customer, 0, "alone")
        started = time.monotonic()
        answer = await shop.ask(customer, 0, consistency_token=token)
        assert time.monotonic() - started < 0.5
        assert (answer.versions.user_version, answer.stale, answer.degraded) == (version, False, True)
        assert (await shop.ask(customer, 0)).versions.user_version == version
        assert shop.refusals == 0


async def test_a_replica_nobody_has_heard_of_says_that_its_answers_may_be_old(live: ServerSettings, tmp_path: Path) -> None:
    postgres = psycopg.conninfo.conninfo_to_dict(live.postgres_dsn)
    async with shop_of(live, tmp_path, 1) as shop, AsyncExitStack() as stack:
        customer = shop.customers[2]
        target = (
            f"{postgres['host']}/.s.PGSQL.{postgres.get('port', 5432)}"
            if str(postgres["host"]).startswith("/")
            else int(str(postgres["port"]))
        )
        proxy = await stack.enter_async_context(Proxy(target))
        dsn = psycopg.conninfo.make_conninfo(live.postgres_dsn, host="127.0.0.1", port=proxy.port)
        address = await stack.enter_async_context(served_directly(shop.settings.model_copy(update={"postgres_dsn": dsn})))
        client = await stack.enter_async_context(Concord(address, channel="web", timeout=3.0, remembered_customers=0))
        shop.replicas.append(Replica(address, shop.replicas[0].redis, client))
        await shop.settled()
        await shop.ask(customer, 1)
        proxy.accepting = False
        proxy.cut()
        assert not (await shop.ask(customer, 1)).stale  # for a moment the other one still counts on it
        async with asyncio.timeout(6):
            while not (answer := await shop.ask(customer, 1)).stale:
                await asyncio.sleep(0.05)
        assert list(answer.degraded_reasons) == ["RECORD_STORE_UNAVAILABLE"]
        async with grpc.aio.insecure_channel(address) as channel:
            request = features_pb2.GetOnlineFeaturesRequest(
                features=features_pb2.FeatureList(feature_refs=["user_activity:version"]),
                entities=[features_pb2.EntityRow(user_id=customer)],
            )
            read = await features_pb2_grpc.FeatureServiceStub(channel).GetOnlineFeatures(request, timeout=3.0)
        assert read.rows[0].results[0].status == common_pb2.FEATURE_STATUS_STALE
        # The first replica loses Redis too, and shows what no other may read there: this one would now be the older one.
        async with asyncio.timeout(6):
            while len(away(shop.settings)) > 1:
                await asyncio.sleep(0.05)
        shop.replicas[0].cut_off()
        version, token = await shop.write(customer, 0, "unheard")
        assert (await shop.patiently(customer, 0, consistency_token=token)).versions.user_version == version
        proxy.accepting = True
        shop.replicas[0].mend()
        await shop.settled()
        assert (await shop.ask(customer, 1)).versions.user_version == version
