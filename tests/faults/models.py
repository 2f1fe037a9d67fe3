"""Rows 33 to 35: damaged model bundles, and the model changed again and again under load."""

import asyncio
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import psycopg

from concord.v1 import models_pb2
from features.bundle import ENCODER, RANKER, read_bundle, write_manifest
from features.models import publish
from server.settings import ServerSettings
from tests.faults.caller import Caller, Reply, codes, percentile, timed
from tests.faults.rows import Checks, Seen, row
from tests.faults.world import World


def _published(world: World, settings: ServerSettings, version: str) -> Path:
    """Publishes a copy of the shop's bundle under another name; returns its folder in the store of bundles."""
    folder = world.folder / "bundles" / f"{settings.postgres_dsn.rpartition('/')[2]}-{version}"
    shutil.copytree(world.bundle, folder)
    write_manifest(folder, read_bundle(folder).model_copy(update={"model_version": version}))
    with psycopg.connect(settings.postgres_dsn) as connection:
        publish(connection, folder, settings.models_base)
    return Path(settings.models_base.removeprefix("file://").removeprefix("file:")) / version


async def _activate(admin: Caller, version: str, *, timeout: float = 30) -> Reply:  # noqa: ASYNC109 - it becomes the call's deadline
    return await timed(admin.models.ActivateModel(models_pb2.ActivateModelRequest(model_version=version), timeout=timeout))


class _Load:
    """Readers at work: every reply, with the customer it was for."""

    def __init__(self, address: str, users: list[str]) -> None:
        self._address, self._users = address, users
        self.replies: list[tuple[float, str, Reply]] = []

    async def __aenter__(self) -> "_Load":
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read(k)) for k in range(4)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _read(self, number: int) -> None:
        async with Caller(self._address) as caller:
            turn = number
            while not self._stop.is_set():
                whom = self._users[turn % len(self._users)]
                turn += 1
                started = time.monotonic()
                self.replies.append((started, whom, await caller.recommend(whom, limit=20)))
                await asyncio.sleep(0.002)


async def _refused(world: World, damages: dict[str, Callable[[Path], None]], *, bit_equal: bool) -> Seen:
    """Publishes bundles, damages each in the store, and asks to activate it under load."""
    checks = Checks()
    settings = world.copy()
    users = world.several(6)
    answers = []
    async with world.serve(settings) as server, Caller(server.admin_address) as admin, Caller(server.address) as caller:
        before = {whom: (await caller.recommend(whom, limit=20)).answer for whom in users}
        async with _Load(server.address, users) as load:
            for name, damage in damages.items():
                damage(_published(world, settings, f"damaged-{world.rng.getrandbits(48):x}-{name.replace(' ', '-')}"))
                version = world.postgres.execute(
                    "SELECT model_version FROM model_versions ORDER BY published_at DESC LIMIT 1",
                    database=settings.postgres_dsn.rpartition("/")[2],
                )[0][0]
                reply = await _activate(admin, str(version))
                answers.append(reply)
                checks.expect(reply.code == "FAILED_PRECONDITION", f"{name}: {reply.code} {reply.reason}")
        replies = [reply for _, _, reply in load.replies]
        checks.expect(len(replies) > 20 and all(reply.ok for reply in replies), f"meanwhile: {codes(replies)}")
        wrong = sum(
            reply.answer.items != before[whom].items or reply.answer.slate_id != before[whom].slate_id
            for _, whom, reply in load.replies
            if reply.ok
        )
        checks.expect(wrong == 0, f"{wrong} answers differ from those before")
        if bit_equal:
            world.redis.client(int(settings.redis_url.rpartition("/")[2])).flushdb()  # computed again, by the old model
            again = {whom: await caller.recommend(whom, limit=20) for whom in users}
            same = all(reply.ok and reply.answer.items == before[whom].items for whom, reply in again.items())
            checks.expect(same, "old answers bit-equal when computed again")
    reasons = sorted({reply.reason for reply in answers})
    checks.tell(f"{', '.join(damages)}: {codes(answers)} ({', '.join(reasons)}); {len(replies)} answers meanwhile, 0 failed, 0 different")
    return checks.seen()


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


@row(33, "model truncated, empty, text, missing", "refused, the old model serves; zero failed requests", fast=True)
async def model_damaged(world: World) -> Seen:
    damages = {
        "truncated": _rewrite(ENCODER, lambda content: content[: len(content) // 2]),
        "empty": _rewrite(ENCODER, lambda _content: b""),
        "text": _rewrite(RANKER, lambda _content: b"this is text"),
        "missing": lambda folder: (folder / ENCODER).unlink(),
    }
    return await _refused(world, damages, bit_equal=False)


@row(
    34,
    "one bit of the model flipped",
    "refused with FAILED_PRECONDITION (ONNX Runtime alone would load it); old answers bit-equal",
    fast=True,
)
async def model_bit_flipped(world: World) -> Seen:
    def flip(content: bytes) -> bytes:
        place = world.rng.randrange(len(content) // 3, len(content) // 3 * 2)  # among the weights
        return content[:place] + bytes((content[place] ^ 1 << world.rng.randrange(8),)) + content[place + 1 :]

    damages = {f"bit flip {number}": _rewrite(ENCODER, flip) for number in range(max(2, world.scaled(5)))}
    return await _refused(world, damages, bit_equal=True)


@row(35, "hot reload 50 times under load", "all OK, each reply names its model version; no mixed answer; memory flat")
async def reloaded(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    users = world.several(6)
    moves = max(4, world.scaled(50))
    async with world.serve(settings) as server, Caller(server.admin_address) as admin:
        first = (await timed(admin.models.GetActiveModel(models_pb2.GetActiveModelRequest(), timeout=5))).answer.model.model_version
        second = f"second-{world.rng.getrandbits(48):x}"
        _published(world, settings, second)
        acknowledged: list[tuple[float, float, str]] = []
        async with _Load(server.address, users) as load:
            await asyncio.sleep(0.5)
            settled = 0.0
            for turn in range(moves):
                version = second if turn % 2 == 0 else first
                started = time.monotonic()
                reply = await _activate(admin, version)
                checks.expect(reply.ok, f"move {turn}: {reply.code} {reply.reason}")
                acknowledged.append((started, time.monotonic(), version))
                await asyncio.sleep(0.05)
                if turn == max(2, moves // 3):
                    settled = server.rss_mb()
            grown = server.rss_mb() - settled
    replies = [reply for _, _, reply in load.replies]
    checks.expect(all(reply.ok for reply in replies), f"meanwhile: {codes(replies)}")
    slates: dict[tuple[str, str, int, int], set[bytes]] = defaultdict(set)
    between = wrong = 0
    for started, whom, reply in load.replies:
        if not reply.ok:
            continue
        versions = reply.answer.versions
        content = b"".join(item.SerializeToString(deterministic=True) for item in reply.answer.items)
        slates[whom, versions.model_version, versions.user_version, versions.index_version].add(content)
        ended = started + reply.seconds
        for number, (_, done, version) in enumerate(acknowledged):
            until = acknowledged[number + 1][0] if number + 1 < len(acknowledged) else float("inf")
            if started > done and ended < until:
                between += 1
                wrong += versions.model_version != version
    mixed = sum(len(contents) > 1 for contents in slates.values())
    checks.expect({key[1] for key in slates} == {first, second}, "both models answered, and were named")
    checks.expect(between > 20 and wrong == 0, f"{wrong} of {between} answers were of a model that was not the active one")
    checks.expect(mixed == 0, f"{mixed} mixed answers")
    checks.expect(grown < 60, f"memory grew {grown:.0f} MB")
    checks.tell(
        f"{moves} moves, {len(replies)} answers: {codes(replies)}, p99 {percentile(replies, 0.99):.0f} ms; {between} between two moves, "
        f"0 of the other model; 0 mixed; memory {grown:+.0f} MB over the last two thirds"
    )
    return checks.seen()
