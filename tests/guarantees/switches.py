"""Every mechanism behind a guarantee, and how to switch it off in replicas of this process, to see that the checker notices.

A trial runs twice under the same fault (a late write, a lost one, replicas whose arithmetic differs): with the mechanism
nothing may be found, without it something must.
"""

import asyncio
import contextlib
import itertools
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis.exceptions

from features.activity import WRITE_STATE, UserState, UserStateCodec
from features.settings import DEFAULT_SURFACES
from server.catalog.offers import Offers
from server.ingest.identities import Identities
from server.ingest.recorder import EventRecorder
from server.online.store import OnlineStore
from server.recommend import recommender as recommender_module
from server.recommend.compute import Ranked
from server.settings import ServerSettings
from tests.guarantees import profiles, rules, stored
from tests.guarantees.answers import ask_while_everything_moves
from tests.guarantees.crowd import CHANNELS, Question, crowd
from tests.guarantees.history import History, Recorder, load
from tests.guarantees.rules import Finding
from tests.integration.serving import served

Patch = Callable[[pytest.MonkeyPatch], None]
Trial = Callable[[ServerSettings, Path], Awaitable[Finding]]

_store: Any = __import__("server.online.store", fromlist=["store"])
_writer: Any = __import__("server.ingest.writer", fromlist=["writer"])


# Events of two trials in one shop must not carry the same ids: those of the second would be duplicates and change nothing.
_SEEDS = itertools.count(1_000)


@dataclass(frozen=True)
class Switch:
    """One mechanism.

    Attributes:
        guarantee: what breaks without it.
        off: takes it away.
        trial: runs a load and returns the finding of the rule that must notice.
        fault: what happens with and without it, so that it matters.
    """

    name: str
    guarantee: str
    off: Patch
    trial: Trial
    fault: Patch = lambda _: None


async def tried(switch: Switch, settings: ServerSettings, *, off: bool) -> Finding:
    """Runs a switch's trial with the mechanism on or off."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="concord-trial-") as folder:
        switch.fault(patch)
        if off:
            switch.off(patch)
        return await switch.trial(settings, Path(folder))


@contextlib.asynccontextmanager
async def replicas(settings: ServerSettings, count: int) -> AsyncIterator[list[str]]:
    """Serves a shop by several replicas of this process."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(served(settings)) for _ in range(count)]


# Trials ------------------------------------------------------------------------------------------


def _answers(rule: Callable[[History], Finding]) -> Trial:
    """Asks while events, prices and descriptions stream in."""

    async def trial(settings: ServerSettings, folder: Path) -> Finding:
        async with replicas(settings, 3) as addresses:
            history = await ask_while_everything_moves(
                addresses,
                dsn=settings.postgres_dsn,
                folder=folder,
                answers=400,
                seconds=10,
                users=6,
                seed=next(_SEEDS),
                events_per_second=30,
                offers_per_second=20,
            )
        return rule(history)

    return trial


def _written_and_read(rule: Callable[[History], Finding]) -> Trial:
    """Writes through one replica, reads with the token through the other, and a little later without a token."""

    async def trial(settings: ServerSettings, folder: Path) -> Finding:
        recorder = Recorder(folder / "trial.jsonl")
        async with (
            replicas(settings, 2) as addresses,
            crowd("trial", addresses, recorder, dsn=settings.postgres_dsn, users=1, seed=next(_SEEDS)) as people,
        ):
            (user,) = people.users
            for number in range(40):
                await people.record(user, replica=0)
                await people.ask(Question(user, CHANNELS[number % 7]), replica=1, token=people.tokens[user])
                await asyncio.sleep(0.015)
                # On another surface: where a newer slate was committed, set-if-absent would hide that the state went back.
                await people.ask(Question(user, CHANNELS[number % 5], DEFAULT_SURFACES[1 + number % 7]), replica=0)
        recorder.close()
        return rule(load([folder / "trial.jsonl"]))

    return trial


async def _recorded(settings: ServerSettings, folder: Path) -> tuple[History, stored.Stored]:
    """Records events, every third one twice, and waits until the outbox has settled."""
    recorder = Recorder(folder / "trial.jsonl")
    async with (
        replicas(settings, 1) as addresses,
        crowd("trial", addresses, recorder, dsn=settings.postgres_dsn, users=4, seed=next(_SEEDS)) as people,
    ):
        for number in range(30):
            write = await people.record(people.users[number % len(people.users)])
            if number % 3 == 0:
                await people.record(write.user, event_id=write.event_id)
        await asyncio.sleep(2 * settings.recovery_seconds)
    recorder.close()
    return load([folder / "trial.jsonl"]), stored.read_stored(settings.postgres_dsn)


async def _counted(settings: ServerSettings, folder: Path) -> Finding:
    _, held = await _recorded(settings, folder)
    return stored.nothing_twice(held)


async def _caught_up(settings: ServerSettings, folder: Path) -> Finding:
    _, held = await _recorded(settings, folder)
    codec = stored.codec_of(settings)
    return stored.caught_up(held, stored.online_versions(codec, stored.read_online(settings, codec, list(held.versions))))


async def _rebuilt(settings: ServerSettings, _folder: Path) -> Finding:
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
    from concord import Concord, user

    async with replicas(settings, 1) as addresses, Concord(addresses[0], channel="web", timeout=10.0) as web:
        for name in users:
            await web.profile(user(name))


async def _torn(settings: ServerSettings, _folder: Path) -> Finding:
    return profiles.whole(await profiles.push_and_read(settings, reads=400))


async def _interleaved(settings: ServerSettings, _folder: Path) -> Finding:
    return await profiles.interleave(settings, rounds=40, seed=7)


# Faults ------------------------------------------------------------------------------------------


def _differing_arithmetic(patch: pytest.MonkeyPatch) -> None:
    """No two computations of a slate give the same bits, as on replicas with different processors."""
    compute, dice = recommender_module.compute_slate, np.random.default_rng(1)

    def noisy(*arguments: Any) -> Ranked:
        ranked = compute(*arguments)
        scores = (ranked.scores + dice.normal(0, 1e-3, len(ranked.scores))).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        return replace(ranked, rows=ranked.rows[order], scores=scores[order], sources=ranked.sources[order])

    patch.setattr(recommender_module, "compute_slate", noisy)


def _lost_writes(patch: pytest.MonkeyPatch) -> None:
    """Redis says it has written what it then forgets, as in a failover: every other write."""
    publish, count = EventRecorder._publish, iter(range(1_000_000))

    async def losing(self: EventRecorder, written: Any) -> bool:
        return True if next(count) % 2 else await publish(self, written)

    patch.setattr(EventRecorder, "_publish", losing)


def _missed_writes(patch: pytest.MonkeyPatch) -> None:
    """Redis is away whenever an event was committed."""

    async def missing(_self: EventRecorder, _written: Any) -> bool:
        return False

    patch.setattr(EventRecorder, "_publish", missing)


def _late_writes(patch: pytest.MonkeyPatch) -> None:
    """Every write to Redis arrives once more, later, as from a replica that stood still meanwhile."""
    write, dice = OnlineStore.write_users, random.Random(3)
    again: set[asyncio.Task[None]] = set()

    async def later(self: OnlineStore, states: Sequence[UserState]) -> None:
        await asyncio.sleep(dice.uniform(0.01, 0.08))
        with contextlib.suppress(redis.exceptions.RedisError):
            await write(self, states)

    async def repeating(self: OnlineStore, states: Sequence[UserState]) -> None:
        await write(self, states)
        again.add(task := asyncio.create_task(later(self, states)))
        task.add_done_callback(again.discard)

    patch.setattr(OnlineStore, "write_users", repeating)


# Mechanisms off ----------------------------------------------------------------------------------

_COMMIT_ALWAYS = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local slate = ARGV[2] .. ':' .. string.format('%.0f', now + tonumber(ARGV[3])) .. ':' .. ARGV[4]
redis.call('HSET', KEYS[1], ARGV[1], slate)
return slate
"""


def _commit_always(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_store, "_COMMIT", _COMMIT_ALWAYS)


def _first_offers_for_ever(patch: pytest.MonkeyPatch) -> None:
    at_least = Offers.at_least

    async def once(self: Offers, _offer_version: int) -> Any:
        return await at_least(self, 0)

    patch.setattr(Offers, "at_least", once)


def _tokens_ignored(patch: pytest.MonkeyPatch) -> None:
    async def nothing(_self: Identities, _user_id: str, _token: Any) -> int:
        return 0

    patch.setattr(Identities, "minimum_version", nothing)


def _write_always(patch: pytest.MonkeyPatch) -> None:
    assert "if current < offered then" in WRITE_STATE
    patch.setattr(_store, "WRITE_STATE", WRITE_STATE.replace("if current < offered then", "if true then"))


def _one_command_per_view(patch: pytest.MonkeyPatch) -> None:
    async def apart(self: OnlineStore, states: Sequence[UserState]) -> None:
        for state in states:
            cut = 3 + 2 * int(state.arguments[2])
            for fields in (state.arguments[3:cut], state.arguments[cut + 1 :]):
                await self._client.hset(state.key, items=list(fields))  # type: ignore[misc, arg-type]

    patch.setattr(OnlineStore, "write_users", apart)


def _one_read_per_view(patch: pytest.MonkeyPatch) -> None:
    async def apart(self: OnlineStore, user_id: str, now: datetime) -> Any:
        replies: list[bytes | None] = []
        for view in (self._codec.activity, self._codec.profile):
            replies += await self._client.hmget(self._codec.key(user_id), list(view.hash_fields))  # type: ignore[misc, arg-type]
        return self._codec.decode(replies, now)

    patch.setattr(OnlineStore, "user_features", apart)


def _every_attempt_counts(patch: pytest.MonkeyPatch) -> None:
    insert = _writer._insert

    async def counting(connection: Any, events: Any, owners: Any) -> list[tuple[str, str]]:
        await insert(connection, events, owners)
        return [(owners[event.subject], str(event.event_id)) for event in events if owners[event.subject]]

    patch.setattr(_writer, "_insert", counting)


def _no_outbox(patch: pytest.MonkeyPatch) -> None:
    assert "INSERT INTO online_outbox" in _writer._COUNT
    patch.setattr(_writer, "_COUNT", _writer._COUNT.replace("FROM moved\n", "FROM moved WHERE false\n"))


def _state_of_its_time(patch: pytest.MonkeyPatch) -> None:
    state = UserStateCodec.state

    def stamped(self: UserStateCodec, row: Any) -> UserState:
        return state(self, {**row, "event_timestamp": datetime.now(UTC)})

    patch.setattr(UserStateCodec, "state", stamped)


SWITCHES = (
    Switch("set-if-absent of slates", "C1", _commit_always, _answers(rules.same_ranking), _differing_arithmetic),
    Switch("offers brought up to the pointer", "C1", _first_offers_for_ever, _answers(rules.fresh_offers)),
    Switch("token compared with the state", "C2", _tokens_ignored, _written_and_read(rules.tokens_honoured), _lost_writes),
    Switch("compare-and-set on the version", "C3", _write_always, _written_and_read(rules.monotonic), _late_writes),
    Switch("compare-and-set, every interleaving", "whole profiles", _write_always, _interleaved),
    Switch("all views written by one script", "whole profiles", _one_command_per_view, _torn),
    Switch("all views read by one command", "whole profiles", _one_read_per_view, _torn),
    Switch("outbox of customers that lag", "C6", _no_outbox, _caught_up, _missed_writes),
    Switch("state a function of PostgreSQL alone", "C6", _state_of_its_time, _rebuilt),
    Switch("one count per event id", "C6", _every_attempt_counts, _counted),
)
