"""Writers under a fault: each sends an event until it is acknowledged, all is written down, and the offline checker judges it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from uuid import UUID

from server.settings import ServerSettings
from tests.faults.caller import Caller, Reply, event
from tests.faults.rows import Checks
from tests.faults.world import World
from tests.guarantees.history import History, Write
from tests.guarantees.stored import Stored, nothing_lost, nothing_twice, read_stored

_PAUSE = 0.05


class Writing:
    """Writers at work on one server, and what became of their calls.

    Attributes:
        failures: every call that was not acknowledged.
        most_attempts: the most calls that one acknowledged event needed.
    """

    def __init__(self, address: str, users: Sequence[str], history: History, *, world: World, within: float) -> None:
        self._address, self._users, self._history, self._world, self._within = address, users, history, world, within
        self._acknowledged = asyncio.Event()
        self._over = False
        self.failures: list[Reply] = []
        self.acknowledged = 0
        self.most_attempts = 0

    async def next_acknowledged(self, seconds: float) -> float:
        """Waits for the next acknowledgement; returns how long it took.

        Raises:
            TimeoutError: none came.
        """
        started = time.monotonic()
        self._acknowledged.clear()
        async with asyncio.timeout(seconds):
            await self._acknowledged.wait()
        return time.monotonic() - started

    def finish(self) -> None:
        """Lets every writer end after the call it is in."""
        self._over = True

    async def write(self, user: str) -> None:
        """Sends events of one customer, each until it is acknowledged, as a channel's backend should."""
        async with Caller(self._address, timeout=self._within) as caller:
            while not self._over:
                key = str(UUID(int=self._world.rng.getrandbits(128), version=4))
                for attempt in range(1, 1_000):
                    reply = await send(caller, user, key, self._history)
                    if reply.ok:
                        self.acknowledged += 1
                        self.most_attempts = max(self.most_attempts, attempt)
                        self._acknowledged.set()
                        break
                    self.failures.append(reply)
                    await asyncio.sleep(max(_PAUSE, (reply.pushback_ms or 0) / 1000))
                    if self._over:
                        return


@contextlib.asynccontextmanager
async def writers(address: str, users: Sequence[str], history: History, *, world: World, within: float = 2.0) -> AsyncIterator[Writing]:
    """Runs a writer per customer while the context is open; at its end each finishes its call."""
    writing = Writing(address, users, history, world=world, within=within)
    tasks = [asyncio.create_task(writing.write(user)) for user in users]
    try:
        yield writing
    finally:
        writing.finish()
        await asyncio.gather(*tasks)


async def send(caller: Caller, user: str, key: str, history: History) -> Reply:
    """Records one event and writes down what became of the attempt."""
    started = time.monotonic()
    reply = await caller.record(event(user, item="chaos", key=key))
    version = reply.answer.tokens[0].user_version if reply.ok else 0
    online = reply.ok and reply.answer.online
    history.writes.append(Write("writer", 0, "web", user, key, started, time.monotonic(), reply.code, version, online))
    return reply


def unacknowledged(history: History) -> list[Write]:
    """Returns one attempt of each event that nobody acknowledged."""
    done = {write.event_id for write in history.writes if write.status == "OK"}
    return list({write.event_id: write for write in history.writes if write.event_id not in done}.values())


def event_ids(stored: Stored) -> frozenset[str]:
    """Returns the ids of all stored events."""
    return frozenset(event_id for _, event_id in stored.events)


def judge(history: History, settings: ServerSettings, *, before: frozenset[str], checks: Checks) -> None:
    """Holds the history against PostgreSQL: acknowledged ⊆ stored ⊆ attempted, each once, and versions never go back."""
    stored = read_stored(settings.postgres_dsn)
    for finding in (nothing_lost(history, stored, before=before), nothing_twice(stored)):
        checks.expect(not finding.violations, f"{finding.rule}: {finding.violations} of {finding.checked}, {finding.excerpts[:2]}")
        checks.expect(finding.checked > 0, f"{finding.rule}: nothing was checked")
    newest: dict[str, int] = {}
    for write in history.writes:  # of one customer there is one writer, so its attempts are in order; a duplicate moves nothing
        if write.status == "OK":
            checks.expect(write.version >= newest.get(write.user, 0), f"versions never go back: {write.user} {write.version}")
            newest[write.user] = write.version
    acknowledged = {write.event_id for write in history.writes if write.status == "OK"}
    attempted = {write.event_id for write in history.writes}
    ids = event_ids(stored) - before
    checks.tell(f"{len(attempted)} attempted ⊇ {len(ids)} stored ⊇ {len(acknowledged)} acknowledged, 0 lost, 0 twice")
