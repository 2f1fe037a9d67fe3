"""Proves the guarantees on embedded servers of its own: three replicas, all channels, faults, and an offline check.

    python -m tests.guarantees                       about ten minutes on two cores; what `make audit` runs
    python -m tests.guarantees --answers 5000 --quick

Prints a table of guarantees with counts and, last, a line of JSON. Exit status 1 means that a guarantee was broken.
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

import structlog
from rich.console import Console

from cli.context import progress_bars
from tests.guarantees.audit import Plan, everything
from tests.guarantees.ground import open_ground


def main() -> int:
    """Runs the audit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=Plan.answers, help="answers to check for C1 (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a twentieth of everything else")
    parser.add_argument("--keep", type=Path, help="keep history files and logs in this new folder")
    arguments = parser.parse_args()
    share = 20 if arguments.quick else 1
    plan = Plan(
        answers=arguments.answers,
        writes=Plan.writes // share,
        reads=Plan.reads // share,
        feast_reads=Plan.feast_reads // share,
        interleavings=Plan.interleavings // share,
        switches=Plan.switches // share,
        losses=1 if arguments.quick else Plan.losses,
    )
    # The servers are our own: nobody's settings and addresses must get into them.
    for name in [name for name in os.environ if name.startswith("CONCORD_")]:
        del os.environ[name]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    out = Console(width=140)
    with tempfile.TemporaryDirectory(prefix="concord-audit-", ignore_cleanup_errors=True) as scratch, progress_bars() as progress:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        with open_ground(Path(scratch)) as ground:
            report = everything(ground, plan, folder=folder, progress=progress)
    report.show(out)
    print(report.last_line())
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
