"""Short runs on replicas of this process, each ending in the finding of one rule: what is tried with a mechanism on and off."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from concord import Concord
from concord import user as known_as
from features import models
from features.bundle import fetch
from features.settings import DEFAULT_SURFACES
from server.settings import ServerSettings
from tests.faults.proxy import Proxy
from tests.guarantees import profiles, stored
from tests.guarantees.answers import ask_while_everything_moves
from tests.guarantees.crowd import CHANNELS, Question, crowd
from tests.guarantees.history import History, load
from tests.guarantees.rules import Finding
from tests.integration.serving import served
from tests.unit.bundles import vary_bundle

Trial = Callable[[ServerSettings, Path], Awaitable[Finding]]

# Events of two trials in one shop must not carry the same ids: those of the second would be duplicates and change nothing.
_SEEDS = itertools.count(1_000)


@contextlib.asynccontextmanager
async def replicas(settings: ServerSettings, count: int) -> AsyncIterator[list[str]]:
    """Serves a shop by several replicas of this process."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(served(settings)) for _ in range(count)]


def answers(rule: Callable[[History], Finding]) -> Trial:
    """Asks while events, prices and descriptions stream in."""

    async def trial(settings: ServerSettings, folder: Path) -> Finding:
        async with replicas(settings, 3) as addresses:
            history = await ask_while_everything_moves(
                addresses,
                dsn=settings.postgres_dsn,
                folder=folder,
                answers=250,
                seconds=10,
                users=6,
                seed=next(_SEEDS),
                events_per_second=30,
                offers_per_second=20,
            )
        return rule(history)

    return trial


def written_and_read(rule: Callable[[History], Finding]) -> Trial:
    """Writes through one replica, reads without a token, and with it through the other replica."""

    async def trial(settings: ServerSettings, folder: Path) -> Finding:
        async with (
            replicas(settings, 2) as addresses,
            crowd("trial", addresses, folder / "trial.jsonl", dsn=settings.postgres_dsn, users=1, seed=next(_SEEDS)) as people,
        ):
            (user,) = people.users
            for number in range(30):
                await people.record(user, replica=0)
                # On another surface: where a newer slate was committed, set-if-absent would hide that the state went back.
                await people.ask(Question(user, CHANNELS[number % 5], DEFAULT_SURFACES[1 + number % 7]), replica=0)
                await people.ask(Question(user, CHANNELS[number % 7]), replica=1, token=people.tokens[user])
        return rule(load([folder / "trial.jsonl"]))

    return trial


def cut_off(rule: Callable[[History], Finding]) -> Trial:
    """Writes through a replica that alone cannot reach Redis, reads there, and then without a token through one that can."""

    async def trial(settings: ServerSettings, folder: Path) -> Finding:
        port = urlsplit(settings.redis_url).port
        assert port is not None
        async with Proxy(port) as proxy:
            through = settings.model_copy(update={"redis_url": settings.redis_url.replace(f":{port}", f":{proxy.port}")})
            async with (
                served(through) as cut,
                served(settings) as whole,
                crowd("trial", [cut, whole], folder / "trial.jsonl", dsn=settings.postgres_dsn, users=3, seed=next(_SEEDS)) as people,
            ):
                for user in people.users:
                    for replica in (0, 1):
                        await people.ask(Question(user, CHANNELS[0]), replica=replica)
                proxy.accepting = False
                proxy.cut()
                for number in range(30):
                    user = people.users[number % len(people.users)]
                    await people.record(user, replica=0)
                    await people.ask(Question(user, CHANNELS[number % 7]), replica=0)
                    await people.ask(Question(user, CHANNELS[number % 5]), replica=1)
        return rule(load([folder / "trial.jsonl"]))

    return trial


async def _recorded(settings: ServerSettings, folder: Path) -> tuple[History, stored.Stored]:
    """Records events, every third one twice, and waits until the outbox has settled."""
    async with (
        replicas(settings, 1) as addresses,
        crowd("trial", addresses, folder / "trial.jsonl", dsn=settings.postgres_dsn, users=4, seed=next(_SEEDS)) as people,
    ):
        for number in range(30):
            write = await people.record(people.users[number % len(people.users)])
            if number % 3 == 0:
                await people.record(write.user, event_id=write.event_id)
        await asyncio.sleep(2 * settings.recovery_seconds)
    return load([folder / "trial.jsonl"]), stored.read_stored(settings.postgres_dsn)


async def counted(settings: ServerSettings, folder: Path) -> Finding:
    """Counts stored events and versions."""
    before = stored.regroupings_of(stored.read_stored(settings.postgres_dsn))
    _, held = await _recorded(settings, folder)
    return stored.nothing_twice(held, regroupings=before)


async def caught_up(settings: ServerSettings, folder: Path) -> Finding:
    """Looks who lags once recovery had its time."""
    _, held = await _recorded(settings, folder)
    codec = stored.codec_of(settings)
    return stored.caught_up(held, stored.online_versions(codec, stored.read_online(settings, codec, list(held.versions))))


async def stopped(settings: ServerSettings, folder: Path) -> Finding:
    """Stops the replica the moment it has acknowledged the last event."""
    before = frozenset(event_id for _, event_id in stored.read_stored(settings.postgres_dsn).events)
    async with (
        replicas(settings, 1) as addresses,
        crowd("trial", addresses, folder / "trial.jsonl", dsn=settings.postgres_dsn, users=4, seed=next(_SEEDS)) as people,
    ):
        for number in range(20):
            await people.record(people.users[number % len(people.users)])
    return stored.nothing_lost(load([folder / "trial.jsonl"]), stored.read_stored(settings.postgres_dsn), before=before)


async def rebuilt(settings: ServerSettings, _folder: Path) -> Finding:
    """Loses some customers and reads them again."""
    codec = stored.codec_of(settings)
    users = sorted(stored.read_stored(settings.postgres_dsn).versions)[:5]
    async with profiles.server_path(settings) as path:
        hashes = []
        for _ in range(2):
            for user in users:
                await path.lose(user)
            await _read_all(settings, users)
            hashes.append(stored.read_online(settings, codec, users))
    return stored.same_bytes(*hashes)


async def _read_all(settings: ServerSettings, users: Sequence[str]) -> None:
    async with replicas(settings, 1) as addresses, Concord(addresses[0], channel="web", timeout=10.0) as web:
        for name in users:
            await web.profile(known_as(name))


async def torn(settings: ServerSettings, _folder: Path) -> Finding:
    """Reads whole profiles while one writer pushes."""
    return profiles.whole(await profiles.push_and_read(settings, reads=400))


async def interleaved(settings: ServerSettings, _folder: Path) -> Finding:
    """Lets writers interleave."""
    return await profiles.interleave(settings, rounds=40, seed=7)


def models_switched(rule: Callable[[History], Finding]) -> Trial:
    """Switches to a second model and back while both replicas are asked."""

    async def trial(settings: ServerSettings, folder: Path) -> Finding:
        first, second = two_models(settings, folder)
        over = asyncio.Event()
        async with (
            replicas(settings, 2) as addresses,
            crowd("trial", addresses, folder / "trial.jsonl", dsn=settings.postgres_dsn, users=3, seed=next(_SEEDS)) as people,
        ):

            async def ask(replica: int) -> None:
                while not over.is_set():
                    await people.ask(Question(people.dice.choice(people.users), "web"), replica=replica)
                    await asyncio.sleep(0.005)

            asking = [asyncio.create_task(ask(replica)) for replica in (0, 1)]
            for version in (second, first, second):
                await people.activate(version)
                await asyncio.sleep(0.3)
            over.set()
            await asyncio.gather(*asking)
        _activate(settings, first)
        return rule(load([folder / "trial.jsonl"]))

    return trial


def two_models(settings: ServerSettings, folder: Path) -> tuple[str, str]:
    """Publishes a second model made from the active one; returns the names of both."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        active = next(model for model in models.list_models(connection) if model.active)
        fetch(active.uri, folder / "active")
        number = next(_SEEDS)
        second = vary_bundle(folder / "active", folder / "second", f"{active.model_version}-{number}", seed=number)
        models.publish(connection, folder / "second", settings.models_base)
    return active.model_version, second.model_version


def _activate(settings: ServerSettings, model_version: str) -> None:
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute("UPDATE fleet_state SET model_version = %s, activation = activation + 1", [model_version])
