"""Rows 6 to 9: a PostgreSQL that stands still, is full, has no connection left, or breaks off what deadlocks."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg

from tests.faults.caller import Caller, Reply, codes, event, percentile
from tests.faults.rows import Checks, NotRunError, Seen, row
from tests.faults.world import World
from tests.faults.writing import event_ids
from tests.guarantees.stored import nothing_twice, read_stored


@row(6, "SIGSTOP PostgreSQL 10 s", "the caller's deadline holds; reads from Redis OK; no pool starvation after CONT")
async def postgres_paused(world: World) -> Seen:
    checks = Checks()
    seconds = world.scaled(10)
    readers, writer = world.several(5), world.customer()
    async with world.serve(world.settings()) as server, Caller(server.address) as caller:
        for whom in readers:
            await caller.recommend(whom)
        await caller.record(event(writer))
        with world.postgres.paused():
            reads: list[Reply] = []
            writes = [asyncio.create_task(caller.record(event(writer), timeout=1.0)) for _ in range(20)]
            until = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < until:
                reads += [await caller.recommend(whom, timeout=1.0) for whom in readers]
                await asyncio.sleep(0.1)
            late = [await caller.record(event(writer), timeout=0.5) for _ in range(2)]
            refused = [*await asyncio.gather(*writes), *late]
        started = asyncio.get_running_loop().time()
        while not (first := await caller.record(event(writer), timeout=5.0)).ok and asyncio.get_running_loop().time() - started < 10:
            await asyncio.sleep((first.pushback_ms or 0) / 1000)  # as the server asks of a caller
        recovered = asyncio.get_running_loop().time() - started
        again = [first]
        for _ in range(4):  # more calls at a time than a connection may have streams are refused whatever PostgreSQL does
            again += await asyncio.gather(*(caller.record(event(whom), timeout=5.0) for whom in world.several(10)))
            again += await asyncio.gather(*(caller.profile(whom, timeout=5.0) for whom in world.several(10)))
        checks.expect({reply.code for reply in refused} <= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}, f"writes meanwhile: {codes(refused)}")
        longest = max(reply.seconds for reply in refused)
        checks.expect(longest < 1.5, f"deadlines of 1 s held: {longest:.2f} s")
        checks.expect(len(reads) > 20 and all(reply.ok for reply in reads), f"reads from Redis: {codes(reads)}")
        checks.expect(percentile(reads, 0.99) < 500, f"reads p99 {percentile(reads, 0.99):.0f} ms")
        checks.expect(recovered < 3, f"writes again {recovered:.1f} s after CONT")
        checks.expect(all(reply.ok for reply in again), f"after CONT: {codes(again)}, {_words(again)}")
    checks.tell(
        f"{seconds} s: writes {codes(refused)}, none longer than {longest:.2f} s; reads {codes(reads)}, p99 "
        f"{percentile(reads, 0.99):.0f} ms; {recovered:.1f} s after CONT: {codes(again)}"
    )
    return checks.seen()


def _words(replies: Sequence[Reply]) -> list[str]:
    return sorted({f"{reply.reason} {reply.details}" for reply in replies if not reply.ok})[:3]


@contextlib.contextmanager
def small_disk(world: World) -> Iterator[Path]:
    """Mounts a file system of 48 MB that PostgreSQL may use.

    Raises:
        NotRunError: we may not mount.
    """
    if os.geteuid() != 0:
        raise NotRunError("a full disk needs a small file system, and only root may mount one")
    folder = world.folder / "small-disk"
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise NotRunError(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        inner = folder / "data"
        inner.mkdir()
        world.postgres.own(inner)
        yield inner
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@row(7, "PostgreSQL's disk is full", "RESOURCE_EXHAUSTED, pushback that forbids a retry; earlier rows intact, connection usable", fast=True)
async def disk_full(world: World) -> Seen:
    checks = Checks()
    with small_disk(world) as disk:
        settings = world.copy()
        database = settings.postgres_dsn.rpartition("/")[2]
        world.postgres.execute(f"CREATE TABLESPACE small_disk LOCATION '{disk}'")
        for part in range(8):
            world.postgres.execute(f"ALTER TABLE events_{part} SET TABLESPACE small_disk", database=database)
            world.postgres.execute(f"ALTER INDEX events_{part}_pkey SET TABLESPACE small_disk", database=database)
        async with world.serve(settings) as server, Caller(server.address) as caller:
            whom = world.customer()
            first = await caller.record(event(whom, item="before"))
            before = event_ids(read_stored(settings.postgres_dsn))
            ballast = disk.parent / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                while True:
                    file.write(b"\0" * 65_536)
                    file.flush()
            replies: list[Reply] = []
            for _ in range(100):  # pages already allocated take some more
                replies.append(await caller.record(*(event(whom, text="x" * 1_900) for _ in range(100))))
                if not replies[-1].ok:
                    break
            refused = replies[-1]
            checks.expect(refused.code == "RESOURCE_EXHAUSTED", f"full: {refused.code} {refused.reason}")
            checks.expect(refused.pushback_ms is not None and refused.pushback_ms < 0, f"pushback {refused.pushback_ms}")
            checks.expect((await caller.profile(whom)).ok and (await caller.recommend(whom)).ok, "reads go on")
            checks.expect(before <= event_ids(read_stored(settings.postgres_dsn)), "earlier rows intact")
            ballast.unlink()
            again = await caller.record(event(whom, item="after"))
            checks.expect(first.ok and again.ok, f"with space again: {again.code}")
        world.postgres.execute(f"DROP DATABASE {database} WITH (FORCE)")
        world.postgres.execute("DROP TABLESPACE small_disk")
    checks.tell(f"{codes(replies)}, {refused.reason}, pushback {refused.pushback_ms} ms; reads OK meanwhile; with space again {again.code}")
    return checks.seen()


@row(8, "no connection left: max_connections, pool empty", "RESOURCE_EXHAUSTED with pushback in < 50 ms; no hang", fast=True)
async def connections_exhausted(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    database = settings.postgres_dsn.rpartition("/")[2]
    limited = settings.model_copy(update={"postgres_dsn": settings.postgres_dsn.replace("postgres@", "limited@")})
    _allow(world, database)
    async with (
        world.serve(limited, CONCORD_POSTGRES_POOL_SIZE="4", CONCORD_POSTGRES_WAITING="16") as server,
        Caller(server.address, timeout=10.0) as caller,
    ):
        whom = world.customer()
        await caller.record(event(whom))
        with psycopg.connect(settings.postgres_dsn) as blocker:
            blocker.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")  # whoever reads a customer now holds its connection
            waiting = [asyncio.create_task(caller.profile(other)) for other in world.several(40)]
            await asyncio.sleep(0.5)
            beyond = [await caller.profile(whom) for _ in range(10)]
            blocker.rollback()
        held = await asyncio.gather(*waiting)
        slowest, longest = (max(reply.seconds for reply in replies) for replies in (beyond, held))
        checks.expect({reply.code for reply in beyond} == {"RESOURCE_EXHAUSTED"}, f"pool empty: {codes(beyond)}")
        checks.expect(slowest < 0.05, f"refused after {slowest * 1000:.0f} ms")
        # A stream beyond the connection's limit gRPC's core refuses itself (REFUSED_STREAM): clients that retry send it again.
        refused = [reply for reply in [*held, *beyond] if not reply.ok and "RST_STREAM" not in reply.details]
        mute = [f"{reply.code} {reply.details}" for reply in refused if not reply.pushback_ms]
        checks.expect(not mute, f"all with pushback: {mute[:3]}")
        checks.expect(longest < 5, f"nobody waits longer than {longest:.1f} s")
        checks.expect(all(reply.ok for reply in [await caller.profile(whom) for _ in range(5)]), "afterwards OK")
        checks.tell(
            f"40 calls on 4 blocked connections with 16 places to wait: {codes(held)}; 10 more: {codes(beyond)} "
            f"within {slowest * 1000:.0f} ms"
        )
        await _without_slots(world, caller, whom, checks=checks)
    return checks.seen()


def _allow(world: World, database: str) -> None:
    """Makes a role that PostgreSQL gives no more connections than it is told (a superuser is never refused)."""
    if not world.postgres.execute("SELECT 1 FROM pg_roles WHERE rolname = 'limited'"):
        world.postgres.execute("CREATE ROLE limited LOGIN")
    world.postgres.execute("ALTER ROLE limited CONNECTION LIMIT -1")
    world.postgres.execute("GRANT pg_read_all_data, pg_write_all_data TO limited")
    world.postgres.execute("GRANT ALL ON SCHEMA public TO limited", database=database)


async def _without_slots(world: World, caller: Caller, whom: str, *, checks: Checks) -> None:
    """PostgreSQL itself has no connection left for us (53300), and the pool has lost its own."""
    world.postgres.execute("ALTER ROLE limited CONNECTION LIMIT 0")
    world.postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'limited'")
    calls = await asyncio.gather(*(caller.profile(whom) for _ in range(30)))
    later = [await caller.profile(whom) for _ in range(20)]
    await asyncio.sleep(world.scaled(15))  # a pool that pauses longer and longer between attempts would show it now
    world.postgres.execute("ALTER ROLE limited CONNECTION LIMIT -1")
    longest = max(reply.seconds for reply in calls)
    checks.expect(
        {reply.code for reply in [*calls, *later]} <= {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}, f"no slots: {codes([*calls, *later])}"
    )
    checks.expect(all(reply.pushback_ms is not None for reply in calls if "RST_STREAM" not in reply.details), "no slots: pushback")
    checks.expect(longest < 5, f"no slots: {longest:.1f} s")
    checks.expect(percentile(later, 0.5) < 50, f"no slots, later: {percentile(later, 0.5):.0f} ms")
    await asyncio.sleep(2)
    again = await asyncio.gather(*(caller.profile(whom) for _ in range(10)))
    checks.expect(all(reply.ok for reply in again), f"slots again: {codes(again)}")
    checks.tell(
        f"no slot left in PostgreSQL: {codes(calls)}, longest {longest:.1f} s, then {codes(later)} in {percentile(later, 0.5):.0f} ms "
        f"at the median; slots again: {codes(again)}"
    )


@row(9, "deadlock and serialization failure", "retried inside; else ABORTED; counters exact", fast=True)
async def deadlock(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    database = settings.postgres_dsn.rpartition("/")[2]
    world.postgres.execute(f"ALTER DATABASE {database} SET deadlock_timeout = '200ms'")
    sent = 0
    replies: list[Reply] = []
    async with world.serve(settings) as server, Caller(server.address) as caller:
        for _ in range(max(3, world.scaled(10))):
            first, second = sorted(world.several(2))
            with psycopg.connect(settings.postgres_dsn) as own:
                own.execute("SET deadlock_timeout = '30s'")  # so that the server's transaction is the one broken off
                own.execute("SELECT 1 FROM users WHERE user_id = %s FOR UPDATE", [second])
                batch = [event(first, item="deadlock"), event(second, item="deadlock")]
                call = asyncio.create_task(caller.record(*batch))
                await _waits_for_a_lock(world, database)  # it holds the first row and waits for the second
                lock = asyncio.to_thread(own.execute, "SELECT 1 FROM users WHERE user_id = %s FOR UPDATE", [first])
                await lock
                own.rollback()
            reply = await call
            replies.append(reply)
            while not reply.ok:
                checks.expect(reply.code == "ABORTED", f"deadlock: {reply.code}")
                reply = await caller.record(*batch)
            sent += 2
    deadlocks = world.postgres.log.read_text(errors="replace").count("deadlock detected")
    stored = read_stored(settings.postgres_dsn)
    counted = world.postgres.execute("SELECT count(*) FROM events WHERE item_id = 'deadlock'", database=database)
    checks.expect(deadlocks >= len(replies), f"deadlocks happened: {deadlocks}")
    checks.expect(counted == [(sent,)], f"counters exact: {counted} of {sent}")
    checks.expect(not nothing_twice(stored).violations, f"versions: {nothing_twice(stored).excerpts[:1]}")
    checks.tell(
        f"{len(replies)} deadlocks, the server's transaction broken off each time: {codes(replies)}; {sent} events stored once each"
    )
    return checks.seen()


async def _waits_for_a_lock(world: World, database: str) -> None:
    """Waits until a backend of the database waits for another's lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    async with asyncio.timeout(10):
        while world.postgres.execute(query, parameters=[database]) == [(0,)]:
            await asyncio.sleep(0.01)
