"""The run for C2 and C3: written in one channel, read in others through other replicas, while Redis fails and comes back."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.guarantees.answers import Progress
from tests.guarantees.crowd import CHANNELS, Crowd, Question, crowd
from tests.guarantees.ground import Ground
from tests.guarantees.history import History, load

FAULTS = ("freeze", "flush", "kill", "nap")


async def read_your_writes(
    ground: Ground,
    *,
    folder: Path,
    writes: int,
    seconds: float,
    seed: int = 1,
    faults: Sequence[str] = FAULTS,
    users: int = 12,
    clients: int = 6,
    progress: Progress = lambda _stage, _done, _total: None,
) -> History:
    """Writes, and reads each write back in three other channels; meanwhile others read the same customers without a token."""
    path = folder / f"tokens-{seed}.jsonl"
    deadline = time.monotonic() + seconds
    written = 0

    async with crowd("reader of own writes", ground.addresses, path, dsn=ground.settings.postgres_dsn, users=users, seed=seed) as people:
        people.within = 1.5

        def over() -> bool:
            return written >= writes or time.monotonic() > deadline

        async def write_and_read() -> None:
            nonlocal written
            while not over():
                await _once(people)
                written += 1
                progress("C2 writes read back", written, writes)

        async def look() -> None:
            while not over():
                await people.ask(Question(people.dice.choice(people.users), people.dice.choice(CHANNELS)))
                await asyncio.sleep(0.005)

        await asyncio.gather(
            _failing(ground, people, faults, random.Random(seed), over), look(), *(write_and_read() for _ in range(clients))
        )
    return load([path])


async def _once(people: Crowd) -> None:
    """One write and, if it was acknowledged, three reads elsewhere that carry its token."""
    dice = people.dice
    user, replica = dice.choice(people.users), dice.randrange(len(people.channels))
    write = await people.record(user, replica=replica)
    if write.status != "OK":
        await asyncio.sleep(0.05)
        return
    token = people.tokens[user]
    elsewhere = [(replica + 1 + k) % len(people.channels) for k in range(3)]
    for other in elsewhere:
        await people.ask(Question(user, dice.choice([name for name in CHANNELS if name != write.channel])), replica=other, token=token)


async def _failing(ground: Ground, people: Crowd, faults: Sequence[str], dice: random.Random, over: Callable[[], bool]) -> None:
    """Does one fault after another to Redis, in seeded order, with seeded pauses."""
    while faults and not over():
        await asyncio.sleep(dice.uniform(0.4, 1.2))
        what = dice.choice(faults)
        with people.fault(f"redis {what}"):
            if what == "freeze":  # longer than the server's timeout: calls in flight fail
                ground.redis.freeze()
                await asyncio.sleep(dice.uniform(0.6, 1.4))
                ground.redis.thaw()
            elif what == "nap":  # shorter: calls in flight are only slow
                ground.redis.freeze()
                await asyncio.sleep(dice.uniform(0.05, 0.3))
                ground.redis.thaw()
            elif what == "flush":
                await asyncio.to_thread(ground.redis.command, "FLUSHALL")
            else:
                await asyncio.to_thread(ground.redis.kill)
                await asyncio.sleep(dice.uniform(0.1, 0.8))
                await asyncio.to_thread(ground.redis.start)
