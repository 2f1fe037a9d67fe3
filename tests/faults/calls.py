"""Rows 16 to 18, 20 and 36: callers that cancel, hurry, wait for ever or all try again, and a server told to stop under load."""

import asyncio
import contextlib
import signal
import time

import grpc
import psycopg
from grpc_health.v1 import health_pb2, health_pb2_grpc

from concord import Concord, user
from concord.v1 import profile_pb2, recommendation_pb2
from concord.v1.common_pb2 import Subject
from tests.faults.caller import Caller, Reply, codes, event, timed
from tests.faults.processes import Server
from tests.faults.proxy import DOWN, Proxy
from tests.faults.rows import Checks, Seen, row
from tests.faults.world import World


@row(16, "RPC cancelled during a call to Redis, 10,000 times", "CANCELLED; never the answer of another request (CVE-2023-28858/9)")
async def cancelled(world: World) -> Seen:
    checks = Checks()
    users = world.several(30)
    count, ended = world.scaled(10_000), 0
    async with (
        Proxy(world.redis.port) as proxy,
        world.serve(world.settings(), redis=proxy) as server,
        # A connection of its own: gRPC refuses streams (REFUSED_STREAM, nothing was done) of one that resets so many.
        Caller(server.address) as hasty,
        Caller(server.address) as caller,
    ):
        whose = {whom: (await caller.recommend(whom, timeout=10)).answer for whom in users}
        proxy.delay[DOWN] = 0.004  # most cancellations meet a reply that is still on its way

        async def cancel_one() -> None:
            nonlocal ended
            call = _recommend(hasty, world.rng.choice(users))
            await asyncio.sleep(world.rng.uniform(0, 0.008))
            call.cancel()
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await call
            ended += call.cancelled()

        replies: list[tuple[str, Reply]] = []

        async def verify(stop: asyncio.Event) -> None:
            while not stop.is_set():
                whom = world.rng.choice(users)
                replies.append((whom, await caller.recommend(whom, timeout=5)))

        stop = asyncio.Event()
        verifiers = [asyncio.create_task(verify(stop)) for _ in range(4)]
        for done in range(0, count, 50):
            await asyncio.gather(*(cancel_one() for _ in range(min(50, count - done))))
        stop.set()
        await asyncio.gather(*verifiers)
        replies += [(whom, await caller.recommend(whom, timeout=5)) for whom in users]
        await _nothing_left(server, world, checks)
    answered = [(whom, reply.answer) for whom, reply in replies if reply.ok]
    foreign = sum(answer.user_id != whom or answer.slate_id != whose[whom].slate_id for whom, answer in answered)
    checks.expect(foreign == 0, f"{foreign} answers were another request's")
    # Above all no answer is another's; a few may fail when cancellations take connections with them.
    checks.expect(len(answered) > 0.99 * len(replies), f"others: {codes(reply for _, reply in replies)}")
    checks.expect(ended > count / 3, f"only {ended} of {count} ended as CANCELLED")
    checks.tell(
        f"{count} calls cancelled, {ended} of them before the answer; {len(answered)} answers of other calls meanwhile "
        "and afterwards, none of them another's"
    )
    return checks.seen()


@row(17, "deadline storm (1 ms deadlines)", "DEADLINE_EXCEEDED, handler cancelled; no task or connection left, memory flat", fast=True)
async def deadline_storm(world: World) -> Seen:
    checks = Checks()
    async with world.caller() as (server, caller):
        users = world.several(20)

        async def storm(count: int) -> list[Reply]:
            """Several clients in turn, for gRPC slows down a single one that resets so many streams."""
            replies: list[Reply] = []
            while len(replies) < count:
                async with Caller(server.address, timeout=0.001) as hasty:
                    await hasty.recommend(users[0], timeout=5)
                    reads = (hasty.recommend(world.rng.choice(users), surface="cart") for _ in range(60))
                    profiles = (hasty.profile(world.rng.choice(users)) for _ in range(40))
                    replies += await asyncio.gather(*reads, *profiles)
            return replies

        await storm(max(500, world.scaled(2_000)))  # what the process needs once is no leak
        before = server.rss_mb()
        replies = await storm(world.scaled(6_000))
        await _nothing_left(server, world, checks)
        grown = server.rss_mb() - before
        ok = await caller.recommend(users[0])
        # gRPC itself refuses some streams of a client that resets so many (REFUSED_STREAM, code 7): nothing was done, retryable.
        ours = [reply for reply in replies if "RST_STREAM" not in reply.details]
        checks.expect({reply.code for reply in ours} <= {"DEADLINE_EXCEEDED", "OK", "CANCELLED", "RESOURCE_EXHAUSTED"}, codes(ours))
        checks.expect(sum(not reply.ok for reply in replies) > len(replies) / 2, "most of them late")
        checks.expect(grown < 40, f"memory grew {grown:.0f} MB")
        checks.expect(ok.ok and ok.seconds < 1, f"afterwards {ok.code} in {ok.seconds:.2f} s")
    checks.tell(f"{codes(replies)}; in flight 0, connections within the pools, memory {grown:+.0f} MB")
    return checks.seen()


@row(18, "no deadline from the client; a server that stands still", "the server imposes one; the client library always has one", fast=True)
async def no_deadline(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    async with world.serve(settings, CONCORD_DEFAULT_DEADLINE_SECONDS="1") as server, Caller(server.address) as caller:
        whom = world.customer()
        checks.expect((await caller.profile(whom)).ok, "before")
        with psycopg.connect(settings.postgres_dsn) as blocker:
            blocker.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")  # the call waits, and nothing breaks
            async with asyncio.timeout(15):
                reply = await timed(caller.profiles.GetProfile(profile_pb2.GetProfileRequest(subject=Subject(user_id=whom))))
        checks.expect(reply.code == "DEADLINE_EXCEEDED", f"without deadline: {reply.code}")
        checks.expect(reply.seconds < 2, f"imposed after {reply.seconds:.2f} s")
        async with Concord(server.address, channel="web", timeout=1.0) as library:
            await library.recommend(user(whom), surface="home", timeout=5.0)
            server.signal(signal.SIGSTOP)
            started = time.monotonic()
            stopped = await timed(library.recommend(user(whom), surface="home"))
            waited = time.monotonic() - started
            server.signal(signal.SIGCONT)
        checks.expect(stopped.code == "DEADLINE_EXCEEDED" and waited < 2, f"stopped server: {stopped.code} after {waited:.1f} s")
    checks.tell(f"no deadline: {reply.code} after {reply.seconds:.2f} s (default 1 s); stopped server: {stopped.code} after {waited:.2f} s")
    return checks.seen()


@row(20, "retry storm: every client tries again", "retries throttled (retryThrottling in the service config): load ≤ 1.1x", fast=True)
async def retry_storm(world: World) -> Seen:
    checks = Checks()
    calls = max(800, world.scaled(2_000))  # the first 50 failures may be retried, whatever the number of calls
    async with Proxy(world.postgres.port) as proxy, world.serve(world.settings(), postgres=proxy) as server:
        proxy.accepting = False  # PostgreSQL is gone: everything that needs it is UNAVAILABLE
        proxy.cut()
        async with Concord(server.address, channel="web", timeout=10.0) as library:
            before = await server.metric("concord_rpc_total")
            replies = []
            for start in range(0, calls, 40):
                replies += await asyncio.gather(*(timed(library.resolve(f"storm-{start + k}")) for k in range(40)))
            attempts = await server.metric("concord_rpc_total") - before
    checks.expect({reply.code for reply in replies} == {"UNAVAILABLE"}, f"clients saw {codes(replies)}")
    checks.expect(attempts >= calls, f"the server saw only {attempts:.0f}")
    checks.expect(attempts / calls <= 1.1, f"load {attempts / calls:.2f}x")
    checks.tell(f"{calls} calls {codes(replies)}; the server saw {attempts:.0f} attempts: {attempts / calls:.2f}x")
    return checks.seen()


@row(36, "SIGTERM under load", "in flight OK, new UNAVAILABLE, exit 0; health NOT_SERVING first; past the grace UNAVAILABLE", fast=True)
async def terminated(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    async with world.serve(settings) as server, Caller(server.address) as caller:
        users = world.several(8)
        replies: list[tuple[float, Reply]] = []

        async def load(whom: str) -> None:
            while True:
                started = time.monotonic()
                reply = await caller.record(event(whom, item="until-the-end"))
                replies.append((started, reply))
                if not reply.ok:
                    return

        tasks = [asyncio.create_task(load(whom)) for whom in users]
        watch = asyncio.create_task(_not_serving(caller))
        await asyncio.sleep(0.5)
        told = time.monotonic()
        server.signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
        status = await server.gone()
        first_refusal = min(started for started, reply in replies if not reply.ok)
        not_serving = await watch
    failed = [reply for _, reply in replies if not reply.ok]
    in_flight = [reply for started, reply in replies if started < told and started + reply.seconds > told]
    checks.expect(bool(in_flight) and all(reply.ok for reply in in_flight), f"in flight: {codes(in_flight)}")
    checks.expect({reply.code for reply in failed} == {"UNAVAILABLE"}, f"new calls: {codes(failed)}")
    checks.expect(status == 0, f"exit status {status}")
    checks.expect(not_serving < first_refusal, "NOT_SERVING before the first refusal")
    stored = world.postgres.execute(
        "SELECT count(*) FROM events WHERE item_id = 'until-the-end'", database=settings.postgres_dsn.rpartition("/")[2]
    )
    acknowledged = len(replies) - len(failed)
    checks.expect(int(str(stored[0][0])) >= acknowledged, f"{stored} stored of {acknowledged}")
    checks.tell(
        f"{len(in_flight)} in flight at SIGTERM: {codes(in_flight)}; then {codes(failed)}; exit {status}; NOT_SERVING "
        f"{(first_refusal - not_serving) * 1000:.0f} ms before the first refusal; {acknowledged} acknowledged, all stored"
    )
    late, seconds = await _past_the_grace(world, checks)
    checks.tell(f"a call that outlives a grace of 0.5 s: {late.code} {late.details!r} after {seconds:.1f} s")
    return checks.seen()


async def _past_the_grace(world: World, checks: Checks) -> tuple[Reply, float]:
    """A call hangs on PostgreSQL longer than the grace."""
    async with (
        Proxy(world.postgres.port) as proxy,
        world.serve(world.settings(), postgres=proxy, CONCORD_DRAIN_SECONDS="0.5", CONCORD_POSTGRES_TIMEOUT_SECONDS="30") as server,
        Caller(server.address, timeout=20) as caller,
    ):
        whom = world.customer()
        await caller.profile(whom)
        proxy.delay[DOWN] = 3.0
        call = asyncio.create_task(caller.record(event(whom)))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        reply = await call
        seconds = time.monotonic() - started
        proxy.delay[DOWN] = 0.0
        status = await server.gone(30)
    checks.expect(reply.code in {"UNAVAILABLE", "CANCELLED"}, f"past the grace: {reply.code}")
    checks.expect(seconds < 3 and status == 0, f"past the grace: ended after {seconds:.1f} s, exit {status}")
    return reply, seconds


async def _not_serving(caller: Caller) -> float:
    """Watches health; returns when it first said NOT_SERVING."""
    watch = health_pb2_grpc.HealthStub(caller.wire).Watch(health_pb2.HealthCheckRequest())
    async for answer in watch:
        if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
            return time.monotonic()
    raise AssertionError("the watch ended without NOT_SERVING")


def _recommend(caller: Caller, whom: str) -> "grpc.aio.UnaryUnaryCall":
    request = recommendation_pb2.RecommendRequest(
        subject=Subject(user_id=whom), channel="web", surface="home", limit=10, skip_exposure_logging=True
    )
    return caller.recommendations.Recommend(request, timeout=5)


async def _nothing_left(server: Server, world: World, checks: Checks) -> None:
    """Waits until no call is in flight, and counts what the server holds open."""
    for _ in range(50):
        in_flight = await server.metric("concord_rpc_in_flight")
        if in_flight == 0:
            break
        await asyncio.sleep(0.1)
    clients = world.redis.client().info("clients")["connected_clients"]
    connections = world.postgres.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = 'shop'")[0][0]
    checks.expect(in_flight == 0, f"{in_flight:.0f} calls in flight")
    checks.expect(clients <= 70, f"{clients} Redis connections")
    checks.expect(int(str(connections)) <= 24, f"{connections} PostgreSQL connections")
