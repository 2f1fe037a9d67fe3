"""The run for C1: all channels ask all replicas while events, prices and descriptions stream in."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tests.guarantees.crowd import Crowd, crowd
from tests.guarantees.history import History, load

Progress = Callable[[str, int, int], None]


async def ask_while_everything_moves(
    addresses: Sequence[str],
    *,
    dsn: str,
    folder: Path,
    answers: int,
    seconds: float,
    seed: int = 1,
    users: int = 40,
    clients: int = 24,
    events_per_second: float = 8.0,
    offers_per_second: float = 8.0,
    epoch_seconds: float = 4.0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> History:
    """Collects ``answers`` answers, or as many as ``seconds`` allow.

    Half of the reads carry the newest token of their customer, so the same run feeds C2 and C3 as well.
    """
    path = folder / f"answers-{seed}.jsonl"
    deadline = time.monotonic() + seconds
    async with crowd("asker", addresses, path, dsn=dsn, users=users, seed=seed) as people:

        def over() -> bool:
            return people.recorder.answers >= answers or time.monotonic() > deadline

        async def report() -> None:
            while not over():
                progress("C1 answers", people.recorder.answers, answers)
                await asyncio.sleep(0.5)
            progress("C1 answers", people.recorder.answers, answers)

        await asyncio.gather(
            report(),
            *(_asking(people, over) for _ in range(clients)),
            _every(1 / events_per_second, over, lambda: people.record(people.dice.choice(people.users))),
            _every(1 / offers_per_second, over, people.reprice),
            _every(epoch_seconds, over, people.redescribe),
        )
    return load([path])


async def _asking(people: Crowd, over: Callable[[], bool]) -> None:
    while not over():
        question = people.question()
        token = people.tokens.get(question.user) if people.dice.random() < 0.5 else None
        await people.ask(question, token=token)


async def _every(pause: float, over: Callable[[], bool], act: Callable[[], Awaitable[object]]) -> None:
    while not over():
        await act()
        await asyncio.sleep(pause)
