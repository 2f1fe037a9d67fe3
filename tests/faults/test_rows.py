"""The fast rows of the table on real processes, with a tenth of the work; `make chaos` does all 36 in full."""

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults.__main__ import perform
from tests.faults.rows import ROWS, NotRunError, Row
from tests.faults.world import World, built

FAST = [row for number, row in sorted(ROWS.items()) if row.fast]


@pytest.fixture(scope="module")
async def world(bundle: Path) -> AsyncIterator[World]:
    """Stores and a shop of our own: what the rows do to them must not meet other tests."""
    with tempfile.TemporaryDirectory(prefix="concord-faults-", ignore_cleanup_errors=True) as folder:
        async with built(Path(folder), bundle=bundle, scale=0.1) as made:
            yield made


@pytest.mark.parametrize("row", FAST, ids=lambda row: f"{row.number}-{row.injected.partition(',')[0].replace(' ', '-')}")
async def test_row(world: World, row: Row) -> None:
    try:
        seen = await perform(row, world, seed=1)
    except NotRunError as reason:
        pytest.skip(f"row {row.number}: {reason}")
    assert seen.ok, seen.text


def test_the_table_is_whole() -> None:
    assert sorted(ROWS) == list(range(1, 37))
    assert len(FAST) > 15
