"""The run for C6: processes and stores are killed, wiped and filled under writers that send again what nobody acknowledged."""

import asyncio
import contextlib
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psycopg
from psycopg import sql

from features.materialize import rebuild_users
from tests.guarantees.answers import Progress
from tests.guarantees.crowd import CHANNELS, Crowd, Question, crowd
from tests.guarantees.ground import Ground, disk, scalar, start
from tests.guarantees.history import History, load
from tests.guarantees.rules import Finding
from tests.guarantees.stored import codec_of, read_online, read_stored, same_bytes

FAULTS = ("replica killed", "postgres killed", "redis killed", "redis wiped", "redis full", "disk full")
_ATTEMPTS = 40


@dataclass(frozen=True)
class Survival:
    """What a run of losses left: its history, what was done, what was left out and why, and how long catching up took."""

    history: History
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    caught_up_seconds: float
    lag_seconds: float


async def survive(
    ground: Ground,
    *,
    folder: Path,
    faults: Sequence[str] = FAULTS,
    seed: int = 1,
    writers: int = 6,
    users: int = 20,
    pause: float = 1.0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Survival:
    """Does the faults in turn under load, each for a seeded time, then waits until everybody has caught up."""
    path = folder / f"losses-{seed}.jsonl"
    dice = random.Random(seed)
    done: list[str] = []
    skipped: list[str] = []
    over = asyncio.Event()
    async with crowd("writer", ground.addresses, path, dsn=ground.settings.postgres_dsn, users=users, seed=seed) as people:
        people.within = 1.5
        tasks = [asyncio.create_task(_writing(people, over.is_set)) for _ in range(writers)]
        tasks.append(asyncio.create_task(_reading(people, over.is_set)))
        try:
            for number, what in enumerate(faults):
                progress("C6 faults", number, len(faults))
                await asyncio.sleep(dice.uniform(0.5, 1.0) * pause)
                with people.fault(what):
                    reason = await _ACTS[what](ground, dice, pause)
                done.append(what) if not reason else skipped.append(f"{what}: {reason}")
                await asyncio.sleep(pause)
            progress("C6 faults", len(faults), len(faults))
        finally:
            over.set()
            await asyncio.gather(*tasks)
    seconds = await _settled(ground)
    lag = max(await asyncio.to_thread(lambda: [replica.metric("concord_online_lag_seconds") for replica in ground.replicas]))
    return Survival(load([path]), tuple(done), tuple(skipped), seconds, lag)


async def _writing(people: Crowd, over: Callable[[], bool]) -> None:
    """Sends events, each again under its id until it is acknowledged, as a channel backend should."""
    while not over():
        event_id = str(UUID(int=people.dice.getrandbits(128), version=4))
        user, text = people.dice.choice(people.users), "x" * 1500 if people.dice.random() < 0.5 else ""
        item = people.dice.choice(sorted(people.items))
        for _ in range(_ATTEMPTS):
            write = await people.record(user, event_id=event_id, text=text, item_id=item)
            if write.status == "OK":
                if people.dice.random() < 0.2:  # a retry after a lost answer looks like this
                    await people.record(user, event_id=event_id, text=text, item_id=item)
                break
            await asyncio.sleep(0.05)
            if over():
                break


async def _reading(people: Crowd, over: Callable[[], bool]) -> None:
    while not over():
        user = people.dice.choice(people.users)
        await people.ask(Question(user, people.dice.choice(CHANNELS)), token=people.tokens.get(user))
        await asyncio.sleep(0.02)


async def _replica_killed(ground: Ground, dice: random.Random, pause: float) -> str:
    replica = dice.choice(ground.replicas)
    await asyncio.to_thread(replica.stop)
    await asyncio.sleep(dice.uniform(0, 0.5) * pause)
    await asyncio.to_thread(start, [replica])
    return ""


async def _postgres_killed(ground: Ground, dice: random.Random, pause: float) -> str:
    await asyncio.to_thread(ground.postgres.kill)
    await asyncio.sleep(dice.uniform(0, 0.5) * pause)
    await asyncio.to_thread(ground.postgres.start)
    return ""


async def _redis_killed(ground: Ground, dice: random.Random, pause: float) -> str:
    await asyncio.to_thread(ground.redis.kill)
    await asyncio.sleep(dice.uniform(0.2, 1.0) * pause)
    await asyncio.to_thread(ground.redis.start)
    return ""


async def _redis_wiped(ground: Ground, _dice: random.Random, _pause: float) -> str:
    await asyncio.to_thread(ground.redis.command, "FLUSHALL")
    return ""


async def _redis_full(ground: Ground, dice: random.Random, pause: float) -> str:
    """Out of memory: writes are refused, reads are not."""
    await asyncio.to_thread(ground.redis.command, "CONFIG", "SET", "maxmemory", "1")
    await asyncio.sleep(dice.uniform(0.5, 1.0) * pause)
    await asyncio.to_thread(ground.redis.command, "CONFIG", "SET", "maxmemory", "0")
    return ""


async def _disk_full(ground: Ground, _dice: random.Random, pause: float) -> str:
    """Moves the events to a small disk, fills it, frees it, restarts PostgreSQL, and moves the events back."""
    dsn = ground.settings.postgres_dsn
    with contextlib.ExitStack() as stack:
        try:
            # Beside PostgreSQL's own folder: where that lies, its user may enter.
            place = stack.enter_context(disk(ground.postgres.folder.parent / "small-disk", 32))
        except PermissionError as error:
            return str(error)
        await asyncio.to_thread(_own_like, ground.postgres.folder, place)
        await asyncio.to_thread(_move_events, dsn, "small", place)
        filler = place / "filler"
        try:
            await asyncio.to_thread(_fill, filler)
            await asyncio.sleep(2 * pause)
        finally:
            filler.unlink(missing_ok=True)
        await asyncio.to_thread(ground.postgres.kill)  # what was written before and around the full disk must survive this, too
        await asyncio.to_thread(ground.postgres.start)
        await asyncio.to_thread(_move_events, dsn, "pg_default", None)
    return ""


def _own_like(example: Path, place: Path) -> None:
    owner = example.stat()
    data = place / "data"
    data.mkdir()
    subprocess.run(["chown", f"{owner.st_uid}:{owner.st_gid}", str(place), str(data)], check=True)


def _fill(path: Path) -> None:
    """Writes until nothing fits any more."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 * 1024))


def _move_events(dsn: str, tablespace: str, place: Path | None) -> None:
    """Moves the partitions of the events; each waits for its writers and makes new ones wait."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        if place is not None:
            connection.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(str(place / "data")))
        for part in range(8):
            connection.execute(
                sql.SQL("ALTER TABLE {} SET TABLESPACE {}").format(sql.Identifier(f"events_{part}"), sql.Identifier(tablespace))
            )
        if place is None:
            connection.execute("DROP TABLESPACE small")


async def rebuild_twice(ground: Ground, *, folder: Path) -> tuple[Finding, Finding]:
    """Wipes Redis and rebuilds it, once by ``concord rebuild``, once lazily by reading customer after customer."""
    settings = ground.settings
    codec = await asyncio.to_thread(codec_of, settings)
    stored = await asyncio.to_thread(read_stored, settings.postgres_dsn)
    users = sorted(stored.versions)
    await asyncio.to_thread(lambda: rebuild_users(settings))
    before = await asyncio.to_thread(read_online, settings, codec, users)
    await asyncio.to_thread(ground.redis.command, "FLUSHALL")
    await asyncio.to_thread(ground.run, "rebuild")
    by_command = same_bytes(before, await asyncio.to_thread(read_online, settings, codec, users))
    await asyncio.to_thread(ground.redis.command, "FLUSHALL")
    async with crowd(
        "rebuilder", ground.addresses, folder / "rebuild.jsonl", dsn=settings.postgres_dsn, users=len(users), seed=1
    ) as people:
        for user in people.users:
            await people.ask(Question(user, "web"))
    known = {user: before[user] for user in people.users}
    lazily = same_bytes(known, await asyncio.to_thread(read_online, settings, codec, people.users))
    by_command.rule, lazily.rule = "C6 concord rebuild gives the same bytes", "C6 lazy rebuilding gives the same bytes"
    return by_command, lazily


async def _settled(ground: Ground, *, seconds: float = 40.0) -> float:
    """Waits until the outbox is empty; returns how long that took.

    Raises:
        TimeoutError: somebody still waits.
    """
    started = time.monotonic()
    async with asyncio.timeout(seconds):
        while await asyncio.to_thread(scalar, ground.settings.postgres_dsn, "SELECT count(*) FROM online_outbox"):
            await asyncio.sleep(0.2)
    await asyncio.sleep(1.0)  # one more look of every recovery loop, so that the metric says it too
    return time.monotonic() - started


_ACTS = {
    "replica killed": _replica_killed,
    "postgres killed": _postgres_killed,
    "redis killed": _redis_killed,
    "redis wiped": _redis_wiped,
    "redis full": _redis_full,
    "disk full": _disk_full,
}
