"""Runs all 36 rows and prints the table; the last line is JSON.

Example: ``python -m tests.faults --seed 7 --rows 1,2,5``
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from tests.faults import bad_bytes, bad_values, calls, crashes, models, overload, redis_faults, security, stores  # noqa: F401 - they register rows
from tests.faults.rows import ROWS, NotRunError, Row, Seen
from tests.faults.world import World, built

SECONDS_PER_ROW = 120


async def perform(row: Row, world: World, *, seed: int) -> Seen:
    """Performs a row on stores that run, with its own seed; what it raises is what was seen, and is not as expected."""
    world.heal()
    world.rng = random.Random(f"{seed}/{row.number}")
    try:
        async with asyncio.timeout(SECONDS_PER_ROW):
            return await row.perform(world)
    except NotRunError:
        raise
    except Exception as error:  # noqa: BLE001 - a row that fails must not end the others
        return Seen(False, f"NOT without an exception: {type(error).__name__}: {str(error)[-300:]}")
    finally:
        world.heal()


def markdown(lines: list[tuple[Row, Seen]]) -> str:
    """Returns the table as docs/faults.md holds it."""
    rows = [
        f"| {row.number} | {row.injected} | {row.expected} | {'' if seen.ok else '**'}{seen.text}{'' if seen.ok else '**'} |"
        for row, seen in lines
    ]
    return "\n".join(["| row | injected | expected | seen |", "|---|---|---|---|", *rows]) + "\n"


async def run(numbers: list[int], *, seed: int, keep: Path | None, bundle: Path | None, out: Path | None) -> int:
    """Performs rows in order and prints them; returns the exit status."""
    # gRPC ends its poller with the last channel and starts it with the next: after cancelled calls that end can wait for ever.
    grpc.aio.init_grpc_aio()
    console = Console(stderr=True)
    table = Table("row", "injected", "expected", "seen", "s", title=f"faults and bad input, seed {seed}", show_lines=True)
    expected = not_run = 0
    lines: list[tuple[Row, Seen]] = []
    with tempfile.TemporaryDirectory(prefix="concord-chaos-", ignore_cleanup_errors=True) as folder:
        async with built(keep or Path(folder), bundle=bundle, say=console.print) as world:
            for position, number in enumerate(numbers, 1):
                row = ROWS[number]
                console.print(f"[{position}/{len(numbers)}] row {number}: {row.injected}", markup=False, highlight=False)
                started = time.monotonic()
                try:
                    seen = await perform(row, world, seed=seed)
                except NotRunError as reason:
                    seen, not_run = Seen(False, f"not run: {reason}"), not_run + 1
                expected += seen.ok
                lines.append((row, seen))
                style = "" if seen.ok else "red"
                console.print(
                    f"    {'as expected' if seen.ok else 'NOT AS EXPECTED'}: {seen.text}", style=style, markup=False, highlight=False
                )
                table.add_row(str(number), row.injected, row.expected, seen.text, f"{time.monotonic() - started:.0f}", style=style)
    Console().print(table)
    if out is not None:
        await asyncio.to_thread(out.write_text, markdown(lines))
    print(json.dumps({"rows": len(numbers), "as_expected": expected, "not_run": not_run, "seed": seed}))
    return 0 if expected + not_run == len(numbers) else 1


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the order and the timing of faults")
    parser.add_argument("--rows", default="", help="numbers, comma-separated; default all")
    parser.add_argument("--keep", type=Path, default=None, help="an empty folder for data and logs, kept afterwards")
    parser.add_argument("--bundle", type=Path, default=None, help="a bundle of the sample shop to serve instead of training one (20 s)")
    parser.add_argument("--markdown", type=Path, default=None, help="also write the table to this file")
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("CONCORD_")]:
        del os.environ[name]
    warnings.simplefilter("ignore")
    numbers = [int(number) for number in options.rows.split(",") if number] or sorted(ROWS)
    sys.exit(asyncio.run(run(numbers, seed=options.seed, keep=options.keep, bundle=options.bundle, out=options.markdown)))


if __name__ == "__main__":
    main()
