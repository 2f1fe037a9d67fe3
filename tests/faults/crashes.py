"""Rows 1 to 5: processes killed and restarted under writers, and a commit whose acknowledgement is lost."""

import asyncio
import contextlib
import os
import signal
import time

import psycopg

from cli.stack import free_port
from tests.faults.caller import Caller, Reply, codes, event
from tests.faults.proxy import LostCommits, Proxy
from tests.faults.rows import Checks, Seen, row
from tests.faults.world import World
from tests.faults.writing import event_ids, judge, send, unacknowledged, writers
from tests.guarantees.history import History
from tests.guarantees.stored import read_stored

_WRITERS = 4
_PUSHBACK = 0.5  # seconds the server asks a caller to wait while a store is away
_MAY_RETRY = {"UNAVAILABLE", "DEADLINE_EXCEEDED"}


@row(1, "kill -9 our server mid-ingest, 4 writers", "client UNAVAILABLE, retry of the same key OK; acked ⊆ stored, each key once")
async def server_killed(world: World) -> Seen:
    checks, history = Checks(), History()
    settings, port = world.copy(), str(free_port())
    before = event_ids(read_stored(settings.postgres_dsn))
    users = world.several(_WRITERS)
    failures: list[Reply] = []
    rounds = world.scaled(3)
    for _ in range(rounds):
        async with world.serve(settings, CONCORD_PORT=port) as server:
            async with writers(server.address, users, history, world=world) as running:
                await asyncio.sleep(world.rng.uniform(0.3, 1.0))
                server.signal(signal.SIGKILL)
                await server.gone()
            failures += running.failures
    checks.expect({reply.code for reply in failures} == {"UNAVAILABLE"}, f"clients saw {codes(failures)}")
    unfinished = unacknowledged(history)
    async with world.serve(settings, CONCORD_PORT=port) as server, Caller(server.address) as caller:
        again = [await send(caller, write.user, write.event_id, history) for write in unfinished]
    checks.expect(len(again) > 0 and all(reply.ok for reply in again), f"retry of the same key: {codes(again)}")
    world.postgres.await_ready()
    judge(history, settings, before=before, checks=checks)
    checks.tell(f"{rounds} kills; clients saw {codes(failures)}; {len(again)} unanswered keys sent again: {codes(again)}")
    return checks.seen()


@row(2, "kill -9 postmaster and backends under load", "UNAVAILABLE with pushback, recovers by itself; no acknowledged write lost")
async def postgres_killed(world: World) -> Seen:
    checks, history = Checks(), History()
    settings = world.copy()
    before = event_ids(read_stored(settings.postgres_dsn))
    async with world.serve(settings) as server:
        # Callers with a deadline above the server's own timeout are told; those with a shorter one see that pass.
        async with writers(server.address, world.several(_WRITERS), history, world=world, within=5) as running:
            await asyncio.sleep(world.rng.uniform(0.5, 1.5))
            await asyncio.to_thread(world.postgres.kill)
            await asyncio.sleep(4.0)
            attempts = await asyncio.to_thread(world.postgres.start)
            recovered = await running.next_acknowledged(20)
            await asyncio.sleep(0.5)
        told = [reply for reply in running.failures if reply.code == "UNAVAILABLE"]
        checks.expect(bool(told) and all(reply.pushback_ms is not None for reply in told), "UNAVAILABLE with pushback")
        checks.expect({reply.code for reply in running.failures} <= _MAY_RETRY, f"callers saw {codes(running.failures)}")
        checks.expect(recovered < 10 and server.alive, f"recovered {recovered:.1f} s after the start, by itself")
    world.postgres.await_ready()
    judge(history, settings, before=before, checks=checks)
    checks.tell(
        f"callers saw {codes(running.failures)}, UNAVAILABLE with pushback; started at attempt {attempts}, writes {recovered:.1f} s later"
    )
    return checks.seen()


@row(3, "commit done, its acknowledgement lost (proxy)", "UNAVAILABLE; the retry returns the stored answer, one effect", fast=True)
async def acknowledgement_lost(world: World) -> Seen:
    checks = Checks()
    settings = world.settings()
    async with Proxy(world.postgres.port) as proxy, world.serve(settings, postgres=proxy) as server, Caller(server.address) as caller:
        for turn in range(max(3, world.scaled(10))):
            whom, item = world.customer(), f"lost-{turn}-{world.rng.getrandbits(32)}"
            before = await caller.profile(whom)
            sent = event(whom, item=item)
            proxy.tap = tap = LostCommits(item.encode())
            first = await caller.record(sent)
            checks.expect(tap.lost == 1, "a commit was lost")
            second = await caller.record(sent)
            third = await caller.record(sent)
            rows = world.postgres.execute("SELECT count(*) FROM events WHERE item_id = %s", database="shop", parameters=[item])
            checks.expect(rows == [(1,)], f"one effect: {rows}")
            # A server that tries again by itself may have learned the outcome; then the first answer is the stored one already.
            checks.expect(first.ok or (first.code == "UNAVAILABLE" and first.pushback_ms is not None), f"first: {first.code}")
            checks.expect(second.ok and third.ok, f"retry: {second.code}, {third.code}")
            if second.ok and third.ok and before.ok:
                checks.expect(second.answer == third.answer and second.answer.results[0].status == 2, "the retry returns the stored answer")
                versions = second.answer.tokens[0].user_version - before.answer.user_version
                checks.expect(versions == 1, f"version moved by {versions}")
                token = second.answer.tokens[0].consistency_token
                seen = await caller.profile(whom, token=token)
                checks.expect(seen.ok and seen.answer.recent_behaviours[0].item_id == item, "the token shows the event")
    checks.tell(
        f"{turn + 1} commits lost: first answer {first.code} (pushback {first.pushback_ms} ms), retry DUPLICATE with the token, 1 row each"
    )
    return checks.seen()


@row(4, "SIGKILL of one backend", "at most 1 retry, then OK; committed yes, in progress no")
async def backend_killed(world: World) -> Seen:
    checks, history = Checks(), History()
    settings = world.copy()
    database = settings.postgres_dsn.rpartition("/")[2]
    before = event_ids(read_stored(settings.postgres_dsn))
    retries: list[int] = []
    allowed: list[int] = []
    seen: list[Reply] = []
    async with world.serve(settings) as server:
        for turn in range(world.scaled(3)):
            world.postgres.await_ready()
            with contextlib.closing(psycopg.connect(settings.postgres_dsn)) as own:
                own.execute("INSERT INTO users (user_id) VALUES (%s)", [f"in-progress-{turn}"])
                async with writers(server.address, world.several(_WRITERS), history, world=world, within=5) as running:
                    await asyncio.sleep(0.4)
                    pids = world.postgres.execute(
                        "SELECT pid FROM pg_stat_activity WHERE datname = %s AND pid <> %s AND backend_type = 'client backend'",
                        parameters=[database, own.info.backend_pid],
                    )
                    os.kill(int(str(world.rng.choice(pids)[0])), signal.SIGKILL)
                    killed = time.monotonic()
                    await asyncio.to_thread(world.postgres.await_ready)
                    allowed.append(1 + int((time.monotonic() - killed) / _PUSHBACK))  # one more for each pause it recovers through
                    await running.next_acknowledged(20)
                    await asyncio.sleep(1.5)
                retries.append(running.most_attempts - 1)
                seen += running.failures
        left = world.postgres.execute("SELECT count(*) FROM users WHERE user_id LIKE 'in-progress-%'", database=database)
        checks.expect(left == [(0,)], f"in progress: gone ({left})")
        checks.expect(server.alive, "no restart of the server")
    within = all(count <= most for count, most in zip(retries, allowed, strict=True))
    checks.expect(within and max(retries) > 0, f"retries {retries}, allowed {allowed}")
    world.postgres.await_ready()
    judge(history, settings, before=before, checks=checks)
    checks.tell(f"most retries of one event, per kill: {retries} ({codes(seen)}); the open transaction is gone")
    return checks.seen()


@row(5, "PostgreSQL restarted (fast) under load", "UNAVAILABLE; the pool heals without a restart of the server")
async def postgres_restarted(world: World) -> Seen:
    checks, history = Checks(), History()
    settings = world.copy()
    before = event_ids(read_stored(settings.postgres_dsn))
    failures: list[Reply] = []
    waits: list[float] = []
    async with world.serve(settings) as server:
        for _ in range(world.scaled(3)):
            async with writers(server.address, world.several(_WRITERS), history, world=world) as running:
                await asyncio.sleep(world.rng.uniform(0.3, 0.8))
                await asyncio.to_thread(world.postgres.restart)
                waits.append(await running.next_acknowledged(20))
                await asyncio.sleep(0.3)
            failures += running.failures
        checks.expect({reply.code for reply in failures} <= _MAY_RETRY, f"callers saw {codes(failures)}")
        checks.expect(max(waits) < 5 and server.alive, f"healed after {max(waits):.1f} s")
    world.postgres.await_ready()
    judge(history, settings, before=before, checks=checks)
    checks.tell(
        f"{len(waits)} restarts; callers saw {codes(failures) or 'no failure'}; writes again at most {max(waits):.1f} s after a restart"
    )
    return checks.seen()
