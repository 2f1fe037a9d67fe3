"""The guarantees on real processes and stores, with small numbers; `make audit` does the same with large ones."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guarantees import profiles
from tests.guarantees.audit import Plan, honoured_tokens, nothing_lost, same_answers
from tests.guarantees.ground import Ground
from tests.guarantees.losses import FAULTS, rebuild_twice
from tests.guarantees.report import Report

SMALL = Plan(answers=2_000, writes=250, reads=2_000, feast_reads=200, interleavings=100, seconds=25.0)


@pytest.fixture(scope="module")
def replicas(ground: Ground) -> Iterator[Ground]:
    """Three replicas as processes."""
    with ground.serving(3):
        yield ground


def silent(_stage: str, _done: int, _total: int) -> None:
    """No progress to show."""


def assert_kept(report: Report) -> None:
    broken = {rule: finding.excerpts for rule, finding in report.findings.items() if finding.violations}
    assert not broken, "\n".join(f"{rule}: {excerpt}" for rule, excerpts in broken.items() for excerpt in excerpts)


async def test_c1_all_channels_and_replicas_agree_while_everything_moves(replicas: Ground, tmp_path: Path) -> None:
    report = Report()
    await same_answers(replicas, SMALL, report, folder=tmp_path, progress=silent)
    assert_kept(report)
    assert report.answers > 500
    assert report.findings["C2 tokens honoured or refused"].checked > 20
    assert report.findings["C1 prices are the catalogue's"].checked > 1_000


async def test_c2_and_c3_hold_while_redis_fails(replicas: Ground, tmp_path: Path) -> None:
    report = Report()
    await honoured_tokens(replicas, SMALL, report, folder=tmp_path, progress=silent)
    assert_kept(report)
    assert report.findings["C2 tokens honoured or refused"].checked > 100
    assert not report.notes[0].startswith("C2/C3: 0 faults")


async def test_c6_nothing_is_lost_or_doubled_whatever_is_killed(replicas: Ground, tmp_path: Path) -> None:
    report = Report()
    await nothing_lost(replicas, report, folder=tmp_path, seed=1, progress=silent, faults=FAULTS, pause=0.5)
    report.add(await rebuild_twice(replicas, folder=tmp_path))
    assert_kept(report)
    done = report.notes[0]
    assert all(fault in done for fault in FAULTS if fault != "disk full")
    assert "disk full" in done or "root" in report.notes[1] or "mounted" in report.notes[1]


async def test_profiles_are_whole_and_the_newest_event_wins(ground: Ground) -> None:
    pairs = await profiles.push_and_read(ground.settings, reads=SMALL.reads)
    assert profiles.whole(pairs).violations == 0
    assert len({pair.activity for pair in pairs}) > 20
    assert (await profiles.interleave(ground.settings, rounds=SMALL.interleavings, seed=1)).violations == 0
    feast = await asyncio.to_thread(profiles.feast_push_and_read, ground.settings, reads=SMALL.feast_reads)
    print(f"plain Feast tore {profiles.whole(feast).violations} of {len(feast)} reads")
