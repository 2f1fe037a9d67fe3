"""Rows 10 to 15: a Redis that dies, stands still, forgets, is full or slow, and events that arrive in any order."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from server.settings import ServerSettings
from tests.faults.caller import Caller, Reply, codes, event, percentile
from tests.faults.proxy import DOWN, UP, Proxy
from tests.faults.rows import Checks, Seen, row
from tests.faults.world import World
from tests.guarantees.stored import codec_of, read_online, read_stored, same_bytes

_BUDGET = 1.0  # seconds, the callers' deadline
_DATABASE = "shop"


@row(10, "kill -9 Redis", "reads degrade, flagged, OK; writes OK and queue in the outbox; rebuilt when Redis is back")
async def redis_killed(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    users = world.several(8)
    async with world.serve(settings) as server, Caller(server.address, timeout=_BUDGET) as caller:
        for whom in users:
            await caller.recommend(whom, timeout=5)
        world.redis.kill()
        reads, writes = await _reads_and_writes(caller, users, seconds=world.scaled(4))
        _degraded(reads, writes, checks)
        waiting = len(read_stored(settings.postgres_dsn).outbox)
        checks.expect(waiting > 0, "writes queue in the outbox")
        world.redis.start()
        seconds = await _caught_up(settings, checks)
        after = [await caller.recommend(whom, timeout=5) for whom in users]
        checks.expect(all(reply.ok and not reply.answer.degraded for reply in after), f"afterwards: {codes(after)}, not degraded")
        _versions_stored(settings, users, after, checks)
    checks.tell(
        f"reads {codes(reads)}; writes {codes(writes)}; {waiting} customers waited in the outbox, none {seconds:.1f} s after the start"
    )
    return checks.seen()


@row(11, "SIGSTOP Redis", "OK and degraded within the budget (not 5.7 s); p99 ≤ deadline")
async def redis_paused(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    users = world.several(8)
    async with world.serve(settings) as server, Caller(server.address, timeout=_BUDGET) as caller:
        for whom in users:
            await caller.recommend(whom, timeout=5)
        with world.redis.paused():
            reads, writes = await _reads_and_writes(caller, users, seconds=world.scaled(6))
        _degraded(reads, writes, checks)
        checks.expect(percentile(reads, 0.99) <= _BUDGET * 1000, f"p99 {percentile(reads, 0.99):.0f} ms")
        seconds = await _caught_up(settings, checks)
        after = [await caller.recommend(whom, timeout=5) for whom in users]
        checks.expect(all(reply.ok and not reply.answer.degraded for reply in after), f"afterwards: {codes(after)}, not degraded")
        _versions_stored(settings, users, after, checks)
    checks.tell(
        f"reads {codes(reads)}, p50 {percentile(reads, 0.5):.0f} ms, p99 {percentile(reads, 0.99):.0f} ms; writes {codes(writes)}; "
        f"caught up {seconds:.1f} s after CONT"
    )
    return checks.seen()


@row(12, "Redis FLUSHALL", "rebuilt from PostgreSQL; rebuilt bytes = old bytes", fast=True)
async def flushed(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    users = list(world.customers)
    codec = codec_of(settings)
    async with world.serve(settings) as server, Caller(server.address, timeout=5) as caller:
        answers = [await caller.recommend(whom) for whom in users]
        before = read_online(settings, codec, users)
        world.redis.client().flushall()
        again = [reply for k in range(0, len(users), 10) for reply in await asyncio.gather(*map(caller.recommend, users[k : k + 10]))]
        after = read_online(settings, codec, users)
    finding = same_bytes(before, after)
    checks.expect(len(before) == len(users) == finding.checked and not finding.violations, f"bytes: {finding.excerpts[:2]}")
    checks.expect(all(reply.ok for reply in [*answers, *again]), f"{codes(answers)}, {codes(again)}")
    different = sum(a.answer.items != b.answer.items for a, b in zip(answers, again, strict=True) if a.ok and b.ok)
    checks.expect(different == 0, f"{different} answers differ")
    checks.tell(f"{len(users)} customers: the same bytes and the same answers as before")
    return checks.seen()


@row(13, "Redis at maxmemory", "writes OK with the outbox row pending (OutOfMemoryError inside); reads OK")
async def redis_full(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    users = world.several(8)
    async with world.serve(settings) as server, Caller(server.address, timeout=2.0) as caller:
        standing = [await caller.recommend(whom, timeout=5) for whom in users]
        with world.redis.client() as redis:
            redis.config_set("maxmemory", "1mb")
            try:
                reads = [await caller.recommend(whom) for whom in users]
                fresh = [await caller.recommend(whom, surface="cart") for whom in users]
                writes = [await caller.record(event(whom, item="full")) for whom in users]
                later = [
                    await caller.recommend(reply.answer.tokens[0].user_id, token=reply.answer.tokens[0].consistency_token)
                    for reply in writes
                    if reply.ok
                ]
                await asyncio.sleep(3)  # recovery must not give up the rows either
                waiting = len(read_stored(settings.postgres_dsn).outbox)
            finally:
                redis.config_set("maxmemory", "0")
        checks.expect(all(reply.ok for reply in reads), f"standing slates: {codes(reads)}")
        same = sum(a.ok and b.ok and a.answer.items == b.answer.items for a, b in zip(standing, reads, strict=True))
        checks.expect(same == len(users), f"{same} of {len(users)} standing slates served")
        checks.expect(all(reply.ok and not reply.answer.online for reply in writes), f"writes: {codes(writes)}, not online")
        checks.expect(waiting >= len(users), f"outbox rows pending: {waiting}")
        for name, replies in (("new slates", fresh), ("reads with the token of the write", later)):
            checks.expect({reply.code for reply in replies} <= {"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED"}, f"{name}: {codes(replies)}")
        checks.expect(
            all(
                reply.answer.versions.user_version >= a.answer.tokens[0].user_version
                for reply, a in zip(later, writes, strict=False)
                if reply.ok
            ),
            "tokens honoured",
        )
        seconds = await _caught_up(settings, checks)
        after = [await caller.recommend(whom, timeout=5) for whom in users]
        _versions_stored(settings, users, after, checks)
    checks.tell(
        f"standing slates {codes(reads)}; new slates {codes(fresh)}; writes {codes(writes)}, {waiting} outbox rows pending; reads with "
        f"their tokens {codes(later)}; caught up {seconds:.1f} s after there was memory again"
    )
    return checks.seen()


@row(14, "two writers, the older event arrives last (1,000 interleavings)", "the newer value is kept: the latest event time wins")
async def any_order(world: World) -> Seen:
    checks = Checks()
    start = datetime(2026, 6, 1, tzinfo=UTC)
    settings = world.copy()
    rounds, wrong = world.scaled(1_000), 0
    users = world.several(50)
    newest = dict.fromkeys(users, start)
    async with world.serve(settings) as one, world.serve(settings) as two, Caller(one.address) as first, Caller(two.address) as second:

        async def interleaved(whom: str, dice: random.Random) -> bool:
            older = newest[whom] + timedelta(seconds=dice.randint(1, 100))
            newer = newest[whom] = older + timedelta(seconds=dice.randint(1, 100))
            events = [(newer, first), (older, second)] if dice.random() < 0.5 else [(older, first), (newer, second)]
            calls = []
            for moment, caller in events:
                stamp = Timestamp()
                stamp.FromDatetime(moment)
                calls.append(asyncio.create_task(caller.record(event(whom, item=f"at-{moment:%j%H%M%S}", occurred_at=stamp))))
                await asyncio.sleep(dice.choice([0, 0, 0.001, 0.003]))
            done = await asyncio.gather(*calls)
            token = max(done, key=lambda reply: reply.answer.tokens[0].user_version).answer.tokens[0].consistency_token
            seen = await dice.choice([first, second]).profile(whom, token=token)
            recent = [behaviour.item_id for behaviour in seen.answer.recent_behaviours[:2]]
            return recent == [f"at-{newer:%j%H%M%S}", f"at-{older:%j%H%M%S}"]

        for begin in range(0, rounds, 20):
            batch = [users[(begin + k) % len(users)] for k in range(min(20, rounds - begin))]
            kept = await asyncio.gather(*(interleaved(whom, random.Random(world.rng.random())) for whom in batch))
            wrong += kept.count(False)
    checks.expect(wrong == 0, f"{wrong} of {rounds} kept the older one")
    checks.tell(f"{rounds} interleavings of two writers on two replicas: the newest event was first in all, the older one second")
    return checks.seen()


@row(15, "slow Redis (+200 ms, then +800 ms, by proxy)", "breaker opens; no call beyond its budget; other RPCs unaffected")
async def redis_slow(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    users = world.several(8)
    told = []
    async with Proxy(world.redis.port) as proxy, world.serve(settings, redis=proxy) as server, Caller(server.address) as caller:
        for whom in users:
            await caller.recommend(whom, timeout=5)
        for delay in (0.2, 0.8):
            proxy.delay[DOWN], proxy.delay[UP] = delay, 0.0
            replies, others = await asyncio.gather(
                _read_for(caller, users, seconds=world.scaled(4), timeout=_BUDGET), _others_for(caller, seconds=world.scaled(4))
            )
            proxy.delay[DOWN] = 0.0
            late = max(reply.seconds for reply in replies)
            checks.expect({reply.code for reply in replies} <= {"OK", "DEADLINE_EXCEEDED", "UNAVAILABLE"}, f"+{delay} s: {codes(replies)}")
            answered = sum(reply.ok for reply in replies) / len(replies)
            checks.expect(answered > 0.8, f"+{delay} s: {answered:.0%} answered")
            checks.expect(late < _BUDGET + 0.2, f"+{delay} s: longest {late:.2f} s")
            checks.expect(
                all(reply.ok for reply in others) and percentile(others, 0.95) < 100,
                f"others: {codes(others)}, p95 {percentile(others, 0.95):.0f} ms",
            )
            told.append(
                f"+{delay * 1000:.0f} ms: reads {codes(replies)}, p50 {percentile(replies, 0.5):.0f} ms, longest {late:.2f} s; "
                f"catalogue calls {codes(others)}, p95 {percentile(others, 0.95):.0f} ms"
            )
        await asyncio.sleep(3)
        after = [await caller.recommend(whom, timeout=5) for whom in users]
        checks.expect(all(reply.ok and not reply.answer.degraded for reply in after), f"afterwards: {codes(after)}, not degraded")
    checks.tell("; ".join(told))
    return checks.seen()


async def _reads_and_writes(caller: Caller, users: list[str], *, seconds: float) -> tuple[list[Reply], list[Reply]]:
    """Reads and writes for a while; a write takes longer than a read, so there are fewer of them."""
    reads: list[Reply] = []
    writes: list[Reply] = []
    until = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < until:
        writes.append(await caller.record(event(users[len(writes) % len(users)], item="while-away"), timeout=2.0))
        reads += await asyncio.gather(*(caller.recommend(whom) for whom in users))
        await asyncio.sleep(0.05)
    return reads, writes


def _degraded(reads: list[Reply], writes: list[Reply], checks: Checks) -> None:
    checks.expect(len(reads) > 20 and all(reply.ok for reply in reads), f"reads: {codes(reads)}")
    unflagged = sum(reply.ok and not (reply.answer.degraded or reply.answer.stale) for reply in reads)
    checks.expect(unflagged == 0, f"{unflagged} answers not flagged")
    checks.expect(all(reply.ok and not reply.answer.online for reply in writes), f"writes: {codes(writes)}, not online")


async def _read_for(caller: Caller, users: list[str], *, seconds: float, timeout: float) -> list[Reply]:  # noqa: ASYNC109
    replies: list[Reply] = []
    until = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < until:
        replies += await asyncio.gather(*(caller.recommend(whom, timeout=timeout) for whom in users))
        await asyncio.sleep(0.02)
    return replies


async def _others_for(caller: Caller, *, seconds: float) -> list[Reply]:
    """Calls that need PostgreSQL only."""
    replies: list[Reply] = []
    until = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < until:
        replies.append(await caller.raw("/concord.v1.CatalogService/ListItems", b"\x08\x01", timeout=_BUDGET))
        await asyncio.sleep(0.02)
    return replies


async def _caught_up(settings: ServerSettings, checks: Checks) -> float:
    """Waits up to 15 s until nobody is in the outbox; returns how long that took."""
    started = asyncio.get_running_loop().time()
    while read_stored(settings.postgres_dsn).outbox:
        if asyncio.get_running_loop().time() - started > 15:
            checks.expect(False, "the outbox is emptied within 15 s")
            break
        await asyncio.sleep(0.1)
    return asyncio.get_running_loop().time() - started


def _versions_stored(settings: ServerSettings, users: list[str], after: list[Reply], checks: Checks) -> None:
    """Each answer must reflect what PostgreSQL holds."""
    versions = read_stored(settings.postgres_dsn).versions
    seen = {whom: reply.answer.versions.user_version for whom, reply in zip(users, after, strict=True) if reply.ok}
    checks.expect(seen == {whom: versions[whom] for whom in users}, "answers at the versions PostgreSQL holds")
