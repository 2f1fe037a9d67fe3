"""Runs the twelve benchmarks of docs/PERFORMANCE.md, one after the other, and collects their last lines.

    python bench/run_all.py                      # about forty minutes on two cores
    python bench/run_all.py recommend ingest     # some of them

Each runs as a process of its own and is given ten minutes. The lines go to build/bench/results.jsonl. Ends with status 1 when one
failed; a bar that is not met is a finding, not a failure.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from harness import WORK, console

BENCHMARKS = (
    "online_features",
    "recommend",
    "freshness",
    "rank_items",
    "ingest",
    "materialization",
    "candidates",
    "text_encoding",
    "scaling",
    "startup",
    "search",
    "assistant",
)
_SECONDS = 600


def run(name: str) -> dict[str, object] | None:
    """Runs a benchmark, showing what it prints; returns its last line, None when it failed."""
    script = Path(__file__).with_name(f"{name}.py")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last, ends = "", time.monotonic() + _SECONDS
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.startswith("{") else last
        if time.monotonic() > ends:
            process.kill()
    found: dict[str, object] | None = json.loads(last) if process.wait() == 0 and last else None
    return found


def main() -> None:
    """Runs the benchmarks and prints what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    names = parser.parse_args().names or BENCHMARKS
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    WORK.mkdir(parents=True, exist_ok=True)
    table = Table("benchmark", "ours", "times the peer", "of the limit", "unit", "met", "seconds", title="all benchmarks")
    failed = False
    with (WORK / "results.jsonl").open("w") as results:
        for name in names:
            console.rule(name)
            started = time.monotonic()
            found = run(name)
            seconds = f"{time.monotonic() - started:.0f}"
            failed |= found is None
            if found is None:
                table.add_row(name, "failed", "", "", "", "", seconds)
                continue
            results.write(json.dumps(found) + "\n")
            ratios = ("" if found[key] is None else f"{found[key]:.2f}" for key in ("ratio_peer", "ratio_limit"))
            table.add_row(name, f"{found['ours']:,}", *ratios, str(found["unit"]), "yes" if found["met"] else "no", seconds)
    console.print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
