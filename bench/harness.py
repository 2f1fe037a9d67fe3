"""What every benchmark shares: a shop to run on, questions asked in turn, peers in a venv of their own, and the last line of JSON.

A benchmark is one file that answers one question within five minutes on two cores: it prints a table for people and, as its last
line, ``Verdict.line()``. All figures of a benchmark come from one run in which ours, the peer and the limit take turns, so that
whatever else the machine does meanwhile falls on all of them alike.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import psycopg
from rich.console import Console

from cli.stack import running_stack
from features.importers import import_folder, load_mapping
from features.sample_shop import Shop, write
from features.schema import migrate
from features.settings import Settings, load_settings
from features.store import apply_repository

WORK = Path(__file__).resolve().parents[1] / "build" / "bench"
"""Where shops, peers' venvs and results lie; not in git."""

console = Console()


@dataclass(frozen=True)
class Verdict:
    """What a benchmark found.

    Attributes:
        bench: its file's name.
        ours, peer, limit: the figure in ``unit``; None where there is no such thing to compare with.
        unit: for example ``ms`` or ``events/s``.
        met: whether every bar of the benchmark holds.
        lower_is_better: whether a small figure is a good one.
    """

    bench: str
    ours: float
    peer: float | None
    limit: float | None
    unit: str
    met: bool
    lower_is_better: bool = True

    @property
    def ratio_peer(self) -> float | None:
        """How many times better than the peer; above 1 is better."""
        if self.peer is None:
            return None
        return self.peer / self.ours if self.lower_is_better else self.ours / self.peer

    @property
    def ratio_limit(self) -> float | None:
        """Ours over the limit, as it stands: of times 1 is the best there is, of rates too."""
        return None if self.limit is None else self.ours / self.limit

    def line(self, **more: object) -> str:
        """Returns the last line: JSON for programs, with further figures at its end."""
        figures = {name: value for name, value in asdict(self).items() if name != "lower_is_better"}
        met = figures.pop("met")
        unit = figures.pop("unit")
        ratios = {"ratio_peer": self.ratio_peer, "ratio_limit": self.ratio_limit, "unit": unit, "met": met}
        return json.dumps({name: _rounded(value) for name, value in {**figures, **ratios, **more}.items()})


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least ``share`` of the samples do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def in_turn(
    questions: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 3, after: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Asks every question once a round, in an order that moves on by one each round; returns the seconds each answer took.

    The rounds of ``warm_up`` do not count, nor does what ``after`` clears away when an answer is there.
    """
    names = list(questions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            started = perf_counter()
            questions[name]()
            taken = perf_counter() - started
            after()
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds


def loaded(script: str, address: str, path: str, bodies: Sequence[bytes], *words: str) -> dict[str, float]:
    """Loads a server by ``http1_load.py`` or ``http2_load.py``, in a process of its own, and returns that program's figures."""
    command = [sys.executable, str(Path(__file__).with_name(script)), "--address", address, "--path", path, *words]
    text = "\n".join(body.hex() for body in bodies)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def peer_python(name: str, *requirements: str) -> Path:
    """Returns the Python of the venv of a peer, which is installed from the package index the first time."""
    venv = WORK / "peers" / name
    python, installed = venv / "bin" / "python", venv / "installed.txt"
    wanted = "\n".join(requirements)
    if not installed.exists() or installed.read_text() != wanted:
        console.print(f"[dim]installing {', '.join(requirements)} for {name}[/dim]")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements], check=True)
        installed.write_text(wanted)
    return python


def returning_customers(settings: Settings, count: int, *, offset: int = 0) -> list[str]:
    """Returns customers of the sample shop who were there at its last materialization, in the order of their ids.

    Those that other benchmarks have left have no profile: every answer about one of them asks PostgreSQL for it.
    """
    query = """
    SELECT user_id FROM users u WHERE version > 5 AND merged_into IS NULL
        AND EXISTS (SELECT FROM user_profile p WHERE p.user_id = u.user_id)
    ORDER BY user_id LIMIT %s OFFSET %s
    """
    with psycopg.connect(settings.postgres_dsn) as connection:
        return [row[0] for row in connection.execute(query, [count, offset])]


@contextmanager
def imported(shop: Shop) -> Iterator[Settings]:
    """Yields the settings of a shop on embedded servers of its own."""
    with tempfile.TemporaryDirectory(prefix="concord-bench-", ignore_cleanup_errors=True) as name, running_stack(Path(name)) as stack:
        folder = Path(name)
        settings = Settings(postgres_dsn=stack.postgres_dsn, redis_url=stack.redis_url, data_dir=folder)
        migrate(settings.postgres_dsn)
        apply_repository(settings)
        write(shop, folder / "sample")
        import_folder(settings.postgres_dsn, folder / "sample", load_mapping("sample_shop"), rejects=folder)
        yield settings


@contextmanager
def prepared_shop() -> Iterator[Settings]:
    """Yields the sample shop on an embedded stack, with a model active and everything materialized.

    The first benchmark that asks prepares it (about two minutes) and all others share it. The model is the packaged MiniLM after
    two steps of fine-tuning, with a ranker of 200 labels: as large and as slow as one that is trained well, which is all that
    matters here.
    """
    from cli.demo import prepare
    from training.config import TrainConfig

    folder = WORK / "shop"
    os.environ["CONCORD_DATA_DIR"] = str(folder)
    with running_stack(folder):
        settings, done = load_settings(Settings), folder / "prepared"
        if not done.exists():
            few = {"tower_labels": 200, "validation_labels": 50, "ranker_labels": 200, "ranker_folds": 1, "evaluation_users": 50}
            prepare(settings, folder, 7, replace(TrainConfig.demo(), time_budget_s=0.0, max_steps=2, **few))
            done.touch()
        yield settings
