"""Every mechanism behind a guarantee, and how to switch it off in replicas of this process, to see that the checker notices.

A trial runs twice under the same fault (a late write, a lost one, replicas whose arithmetic differs): with the mechanism
nothing may be found, without it something must.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from features import models
from features.activity import WRITE_STATE, UserState, UserStateCodec
from features.bundle import BundleError
from server.catalog.offers import Offers
from server.domain import EventOutcome, IncomingEvent, RecordOutcome, Stored, Token
from server.fleet import FleetWatch
from server.ingest import writer
from server.ingest.identities import Identities
from server.ingest.notices import Notices
from server.ingest.recorder import EventRecorder
from server.online import store
from server.online.states import UserStates
from server.online.store import Fleet, OnlineStore
from server.online.wire import Script
from server.recommend import slates
from server.recommend.compute import Ranked
from server.settings import ServerSettings
from tests.guarantees import rules, trials
from tests.guarantees.rules import Finding
from tests.guarantees.trials import Trial

Patch = Callable[[pytest.MonkeyPatch], None]


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


# Faults ------------------------------------------------------------------------------------------


def _differing_arithmetic(patch: pytest.MonkeyPatch) -> None:
    """No two computations of a slate give the same bits, as on replicas with different processors."""
    compute, dice = slates.compute_place, np.random.default_rng(1)

    def noisy(*arguments: Any) -> Ranked:
        ranked = compute(*arguments)
        scores = (ranked.scores + dice.normal(0, 1e-3, len(ranked.scores))).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        return replace(ranked, rows=ranked.rows[order], scores=scores[order], sources=ranked.sources[order])

    patch.setattr(slates, "compute_place", noisy)


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
    """After every write to Redis the one before it arrives once more, as from a replica that stood still meanwhile."""
    write, newest = OnlineStore.write_users, dict[bytes, UserState]()

    async def followed(self: OnlineStore, states: Sequence[UserState]) -> None:
        await write(self, states)
        late = [newest[state.key] for state in states if state.key in newest and newest[state.key].version < state.version]
        newest.update((state.key, state) for state in states if state.key not in newest or newest[state.key].version < state.version)
        await write(self, late)

    patch.setattr(OnlineStore, "write_users", followed)


def _slow_help(patch: pytest.MonkeyPatch) -> None:
    """A replica that is asked to write to Redis what another cannot takes its time: longer than two answers take on a busy machine."""
    help_others = Notices.help

    async def later(self: Notices) -> None:
        await asyncio.sleep(0.6)
        await help_others(self)

    patch.setattr(Notices, "help", later)


def _one_replica_cannot(patch: pytest.MonkeyPatch) -> None:
    """The second replica cannot open a model it does not answer with already."""
    load_model, opened = FleetWatch._model, list[FleetWatch]()

    async def failing(self: FleetWatch, model_version: str) -> Any:
        if self not in opened:
            opened.append(self)
        if opened.index(self) == 1 and self.current is not None and self.current.model_version != model_version:
            raise BundleError("the disk here is damaged")
        return await load_model(self, model_version)

    patch.setattr(FleetWatch, "_model", failing)


# Mechanisms off ----------------------------------------------------------------------------------

_COMMIT_ALWAYS = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local slate = ARGV[2] .. ':' .. string.format('%.0f', now + tonumber(ARGV[3])) .. ':' .. ARGV[4]
redis.call('HSET', KEYS[1], ARGV[1], slate)
return slate
"""


def _commit_always(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store, "_COMMIT", Script(_COMMIT_ALWAYS))


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
    patch.setattr(store, "_WRITE", Script(WRITE_STATE.replace("if current < offered then", "if true then")))


def _shown_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UserStates, "_require_shared", lambda _self, _shared: None)


def _one_command_per_view(patch: pytest.MonkeyPatch) -> None:
    async def apart(self: OnlineStore, states: Sequence[UserState]) -> None:
        for state in states:
            cut = 5 + 2 * int(state.arguments[4])  # see WRITE_STATE: five arguments, then pairs, a number, and pairs again
            for fields in (state.arguments[5:cut], state.arguments[cut + 1 :]):
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
    insert = writer._insert

    async def counting(connection: Any, events: Any, owners: Any) -> list[tuple[str, str]]:
        await insert(connection, events, owners)
        return [(owners[event.subject].user_id, str(event.event_id)) for event in events]

    patch.setattr(writer, "_insert", counting)


def _no_outbox(patch: pytest.MonkeyPatch) -> None:
    assert "INSERT INTO online_outbox" in writer._COUNT
    patch.setattr(writer, "_COUNT", writer._COUNT.replace("FROM moved\n", "FROM moved WHERE false\n"))


def _state_of_its_time(patch: pytest.MonkeyPatch) -> None:
    state = UserStateCodec.state

    def stamped(self: UserStateCodec, row: Any) -> UserState:
        return state(self, {**row, "event_timestamp": datetime.now(UTC)})

    patch.setattr(UserStateCodec, "state", stamped)


def _every_replica_follows_by_itself(patch: pytest.MonkeyPatch) -> None:
    """Each replica answers with the model it saw in PostgreSQL last, when it last looked, instead of the one pointer."""
    turn, read, seen = FleetWatch._turn, OnlineStore.read, dict[OnlineStore, Fleet]()

    async def looking(self: FleetWatch) -> str:
        problem = await turn(self)
        seen[self._online] = self.newest
        return problem

    async def following(self: OnlineStore, user_id: str, slot: str) -> Any:
        standing = await read(self, user_id, slot)
        return standing._replace(fleet=seen.get(self, standing.fleet))

    patch.setattr(FleetWatch, "_turn", looking)
    patch.setattr(OnlineStore, "read", following)


def _nobody_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    assert "live_replicas" in models._UNREADY
    patch.setattr(models, "_UNREADY", models._UNREADY + " LIMIT 0")


def _acknowledged_before_commit(patch: pytest.MonkeyPatch) -> None:
    record, under_way = EventRecorder.record, set[asyncio.Task[None]]()

    async def later(self: EventRecorder, events: Sequence[IncomingEvent]) -> None:
        await asyncio.sleep(1.0)  # longer than a replica takes to stop on a busy machine, or nothing would be lost
        with contextlib.suppress(psycopg.Error, TimeoutError):
            await asyncio.wait_for(record(self, events), 1.0)

    async def at_once(self: EventRecorder, events: Sequence[IncomingEvent]) -> RecordOutcome:
        under_way.add(task := asyncio.create_task(later(self, events)))
        task.add_done_callback(under_way.discard)
        users = [event.subject.user_id for event in events]
        outcomes = tuple(EventOutcome(Stored.STORED, user) for user in users)
        return RecordOutcome(outcomes, tuple(Token(user, 1) for user in users), online=False)

    patch.setattr(EventRecorder, "record", at_once)


SWITCHES = (
    Switch("set-if-absent of slates", "C1", _commit_always, trials.answers(rules.same_ranking), _differing_arithmetic),
    Switch("offers brought up to the pointer", "C1", _first_offers_for_ever, trials.answers(rules.fresh_offers)),
    Switch("token compared with the state", "C2", _tokens_ignored, trials.written_and_read(rules.tokens_honoured), _lost_writes),
    Switch("compare-and-set on the version", "C3", _write_always, trials.written_and_read(rules.monotonic), _late_writes),
    Switch("nothing shown that another replica lacks", "C3", _shown_at_once, trials.cut_off(rules.monotonic), _slow_help),
    Switch("compare-and-set, every interleaving", "whole profiles", _write_always, trials.interleaved),
    Switch("all views written by one script", "whole profiles", _one_command_per_view, trials.torn),
    Switch("all views read by one command", "whole profiles", _one_read_per_view, trials.torn),
    Switch("one pointer for all replicas", "C4", _every_replica_follows_by_itself, trials.models_switched(rules.one_model)),
    Switch(
        "every replica ready before the pointer moves",
        "C4",
        _nobody_is_waited_for,
        trials.models_switched(rules.none_failed),
        _one_replica_cannot,
    ),
    Switch("commit before acknowledgement", "C6", _acknowledged_before_commit, trials.stopped),
    Switch("outbox of customers that lag", "C6", _no_outbox, trials.caught_up, _missed_writes),
    Switch("state a function of PostgreSQL alone", "C6", _state_of_its_time, trials.rebuilt),
    Switch("one count per event id", "C6", _every_attempt_counts, trials.counted),
)
