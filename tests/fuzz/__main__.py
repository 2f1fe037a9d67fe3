"""`make fuzz`: at least 100,000 cases against every method of a real server; the last line is JSON."""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.context import progress_bars
from cli.stack import running_stack
from features.schema import migrate
from features.store import apply_repository
from server.settings import ServerSettings
from tests.fuzz.campaign import Verdict, campaign
from tests.integration import serving

_out = Console()


def main() -> int:
    """Runs a campaign on a shop of its own; the exit status is 1 when anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, epilog="Example: python -m tests.fuzz --seed 7")
    parser.add_argument("--cases", type=int, default=105_000, help="how many cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="equal seeds give equal cases (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="concord-fuzz-", ignore_cleanup_errors=True) as name, running_stack(Path(name)) as stack:
        settings = _shop(stack.postgres_dsn, stack.redis_url, Path(name))
        with progress_bars() as progress:
            done = [0]

            def advance(count: int) -> None:
                done[0] += count
                if done[0] % 500 == 0:
                    progress("fuzzing every method", done[0], arguments.cases)

            verdict = asyncio.run(campaign(settings, seed=arguments.seed, count=arguments.cases, advance=advance))
    _report(verdict)
    print(verdict.line())
    return 0 if verdict.clean else 1


def _shop(dsn: str, redis_url: str, folder: Path) -> ServerSettings:
    """A small shop with a model that is really trained, so that no method ends at «no active model»."""
    settings = ServerSettings(
        postgres_dsn=dsn, redis_url=redis_url, port=0, metrics_port=-1, data_dir=folder, models_url=f"file:{folder / 'models'}"
    )
    _out.print("preparing a small shop with a trained model (about half a minute)")
    migrate(dsn)
    apply_repository(settings)
    serving.fill(settings, folder / "sample")
    serving.train_tiny(settings, folder / "bundle")
    serving.deploy(settings, folder / "bundle")
    return settings


def _report(verdict: Verdict) -> None:
    findings = verdict.findings
    names = sorted({code for _, code in findings.codes})
    table = Table("method", *names, title=f"answers to {findings.cases} cases")
    for method in sorted({method for method, _ in findings.codes}):
        table.add_row(method, *(str(findings.codes[method, name] or "") for name in names))
    _out.print(table)
    samples = findings.resident_mib
    _out.print(
        f"resident memory: {samples[0]:.0f} MiB at the start, {samples[len(samples) // 2]:.0f} at half time, {samples[-1]:.0f} at the end"
    )
    for finding, (case, text) in findings.examples.items():
        _out.print(
            f"[red]{finding}[/red] ({case.kind}) {text[:300]}\n  {[payload.hex()[:400] for payload in case.payloads]}", highlight=False
        )


if __name__ == "__main__":
    sys.exit(main())
