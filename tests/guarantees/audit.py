"""All runs one after the other on one ground: what `make audit` does in full, and `make test` run by run with small numbers."""

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.guarantees import profiles, stored
from tests.guarantees.answers import Progress, ask_while_everything_moves
from tests.guarantees.ground import Ground
from tests.guarantees.losses import FAULTS, rebuild_twice, survive
from tests.guarantees.report import Report, Trials
from tests.guarantees.rollouts import run_rollouts
from tests.guarantees.rules import Finding, check
from tests.guarantees.switches import SWITCHES, tried
from tests.guarantees.tokens import read_your_writes
from tests.guarantees.trials import two_models


@dataclass(frozen=True)
class Plan:
    """How much to do.

    Attributes:
        answers: for C1.
        writes: for C2 and C3, each read back three times.
        reads: of whole profiles; feast_reads of plain Feast's.
        interleavings: of writers.
        switches: of models, back and forth.
        losses: rounds of all faults.
        seconds: bound of each load.
    """

    answers: int = 100_000
    writes: int = 3_000
    reads: int = 50_000
    feast_reads: int = 2_000
    interleavings: int = 1_000
    switches: int = 50
    losses: int = 2
    seconds: float = 240.0


_PRICE_KINDS = ("stale_price", "wrong_price", "stale_stock", "wrong_stock", "not_sold_there", "unversioned_offer", "price_differs")


async def served_runs(ground: Ground, plan: Plan, *, folder: Path, progress: Progress) -> Report:
    """The runs that need replicas: C1, C2 and C3, C6."""
    report = Report()
    await same_answers(ground, plan, report, folder=folder, progress=progress)
    await honoured_tokens(ground, plan, report, folder=folder, progress=progress)
    await switched_models(ground, plan, report, folder=folder, progress=progress)
    for seed in range(1, plan.losses + 1):
        await nothing_lost(ground, report, folder=folder, seed=seed, progress=progress)
    report.add(await rebuild_twice(ground, folder=folder))
    await logged_answers(ground, report)
    return report


async def same_answers(ground: Ground, plan: Plan, report: Report, *, folder: Path, progress: Progress) -> None:
    """C1, and what the same history says of C2 and C3."""
    history = await ask_while_everything_moves(
        ground.addresses, dsn=ground.settings.postgres_dsn, folder=folder, answers=plan.answers, seconds=plan.seconds, progress=progress
    )
    report.answers += sum(read.answered for read in history.reads)
    report.add(await asyncio.to_thread(check, history))


async def honoured_tokens(ground: Ground, plan: Plan, report: Report, *, folder: Path, progress: Progress) -> None:
    """C2 and C3 while Redis fails."""
    history = await read_your_writes(ground, folder=folder, writes=plan.writes, seconds=plan.seconds, progress=progress)
    report.answers += sum(read.answered for read in history.reads)
    report.add(await asyncio.to_thread(check, history, one_slate=False))
    refused = sum(not read.answered for read in history.reads)
    report.notes.append(f"C2/C3: {len(history.faults)} faults of Redis; {refused:,} of {len(history.reads):,} reads were refused.")


async def nothing_lost(
    ground: Ground, report: Report, *, folder: Path, seed: int, progress: Progress, faults: tuple[str, ...] = FAULTS, pause: float = 1.0
) -> None:
    """C6 under all faults."""
    before = await asyncio.to_thread(stored.read_stored, ground.settings.postgres_dsn)
    survival = await survive(ground, folder=folder, seed=seed, faults=faults, pause=pause, progress=progress)
    history = survival.history
    report.answers += sum(read.answered for read in history.reads)
    report.add(await asyncio.to_thread(check, history, one_slate=False))
    held = await asyncio.to_thread(stored.read_stored, ground.settings.postgres_dsn)
    codec = await asyncio.to_thread(stored.codec_of, ground.settings)
    hashes = await asyncio.to_thread(stored.read_online, ground.settings, codec, list(held.versions))
    report.add(
        [
            stored.nothing_lost(history, held, before=frozenset(event_id for _, event_id in before.events)),
            stored.nothing_twice(held, regroupings=stored.regroupings_of(before)),
            stored.caught_up(held, stored.online_versions(codec, hashes)),
            _lag(survival.lag_seconds),
        ]
    )
    acknowledged = sum(write.status == "OK" for write in history.writes)
    report.notes += [
        f"C6: {', '.join(survival.done)}; {acknowledged:,} of {len(history.writes):,} attempts acknowledged; "
        f"all caught up {survival.caught_up_seconds:.1f} s after the last fault.",
        *(f"C6 left out: {skipped}" for skipped in survival.skipped),
    ]


async def switched_models(ground: Ground, plan: Plan, report: Report, *, folder: Path, progress: Progress) -> None:
    """C4: models switched back and forth under load."""
    first, second = await asyncio.to_thread(two_models, ground.settings, folder)
    held = await asyncio.to_thread(stored.read_stored, ground.settings.postgres_dsn)
    busy = sorted(held.versions, key=lambda user: -held.versions[user])[:40]
    done = itertools.count()
    progress("C4 switches", 0, plan.switches)
    verdict = await run_rollouts(
        ground.addresses,
        [second, first],
        busy,
        count=plan.switches,
        pause_seconds=1.0,
        pids=[replica.process.pid for replica in ground.replicas if replica.process],
        progress=lambda _: progress("C4 switches", next(done) + 1, plan.switches),
    )
    report.answers += verdict.answers
    report.add(
        [
            Finding("C4 one answer per versions while models switch", verdict.answers, verdict.mixed),
            Finding("C4 no answer by the model before", verdict.answers, verdict.late),
            Finding("C4 no call fails while models switch", verdict.answers + verdict.switches, verdict.failures, verdict.first_failures),
        ]
    )
    grown = max(after / before for before, after in zip(verdict.rss[min(3, len(verdict.rss) - 1)], verdict.rss[-1], strict=True))
    report.notes.append(
        f"C4: {verdict.switches} switches; p99 {1e3 * verdict.usual_p99:.0f} ms usually, {1e3 * verdict.switching_p99:.0f} ms during "
        f"a switch; the replicas' memory at the end is at most {grown:.2f} times that after the fourth."
    )


async def logged_answers(ground: Ground, report: Report) -> None:
    """C5: `concord audit` over what the runs before logged, and live probes of all replicas."""
    printed = await asyncio.to_thread(ground.run, "audit", "--last", "1000", allowed=(0, 1))
    summary = json.loads(printed.splitlines()[-1])
    prices = sum(count for kind, count in summary["kinds"].items() if kind in _PRICE_KINDS)
    report.add(
        [
            Finding(
                "C5 concord audit: replays, probes, online state",
                summary["replayed"] + summary["probes"] + summary["states_checked"],
                summary["violations"] - prices,
                [str(summary["kinds"])] if summary["violations"] else [],
            ),
            Finding("C5 concord audit: prices and stock", summary["offers_checked"], prices),
        ]
    )
    report.notes.append(f"C5: {summary['replayed']:,} logged answers replayed, {summary['not_replayable']:,} not replayable.")


def _lag(seconds: float) -> Finding:
    finding = Finding("C6 lag metric back to 0", checked=1)
    if seconds:
        finding.broken(f"concord_online_lag_seconds is {seconds}")
    return finding


async def whole_profiles(ground: Ground, plan: Plan, report: Report, *, progress: Progress) -> None:
    """Torn reads of the server's path and of plain Feast's, and every interleaving."""
    report.add([profiles.whole(await profiles.push_and_read(ground.settings, reads=plan.reads))])
    interleaved = await profiles.interleave(
        ground.settings, rounds=plan.interleavings, seed=1, progress=lambda done: progress("interleavings", done, plan.interleavings)
    )
    report.add([interleaved])
    torn = await asyncio.to_thread(lambda: profiles.whole(profiles.feast_push_and_read(ground.settings, reads=plan.feast_reads)))
    report.notes.append(
        f"Whole profiles: plain Feast on the same Redis tore {torn.violations / torn.checked:.0%} of {torn.checked:,} reads."
    )


async def switched_off(ground: Ground, report: Report, *, progress: Progress) -> None:
    """Every mechanism on and off, in replicas of this process."""
    for number, switch in enumerate(SWITCHES):
        progress("mechanisms switched off", number, len(SWITCHES))
        control = await tried(switch, ground.settings, off=False)
        without = await tried(switch, ground.settings, off=True)
        report.trials[f"{switch.guarantee}: {switch.name}"] = Trials(control, without)
    progress("mechanisms switched off", len(SWITCHES), len(SWITCHES))


def everything(ground: Ground, plan: Plan, *, folder: Path, progress: Callable[[str, int, int], None]) -> Report:
    """Runs all of it."""
    with ground.serving(3):
        report = asyncio.run(served_runs(ground, plan, folder=folder, progress=progress))
    asyncio.run(whole_profiles(ground, plan, report, progress=progress))
    asyncio.run(switched_off(ground, report, progress=progress))
    return report
