"""How long a server takes from exec to serving 10,000 items, what a worker keeps in memory, and whether it holds what it should not.

Ours, Feast's own feature server on the same registry (the peer), and a bare Python that imports the same libraries and opens the
same encoder (the limit: no server with this model starts faster) take turns:

    python bench/startup.py --items 10000 --rounds 3

The catalogue is generated, the model is the sample shop's, widened to it. Prints a table and a last line of JSON.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import grpc
from rich.table import Table

from cli.stack import free_port
from concord.v1.common_pb2 import ChannelIdentity, Subject
from concord.v1.recommendation_pb2 import RecommendRequest
from concord.v1.recommendation_pb2_grpc import RecommendationServiceStub
from features.settings import Settings
from features.store import REPOSITORY
from harness import Verdict, console, in_turn, prepared_shop
from large_shop import empty_shop, large_shop

FORBIDDEN = ("feast", "pandas", "dask", "pyarrow", "torch", "transformers", "scipy", "sqlalchemy", "alembic")
SECONDS, MEGABYTES = 3.0, 350.0
_BARE = """
import sys, grpc.aio, numpy, psycopg, psycopg_pool, redis.asyncio, pydantic_settings, tokenizers
import onnxruntime as ort
options = ort.SessionOptions(); options.intra_op_num_threads = 2
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""


@dataclass(frozen=True)
class Memory:
    """Resident and proportional megabytes of a process (pages shared with others count in part in the latter)."""

    resident: float
    proportional: float


def memory_of(pid: int) -> Memory:
    """Reads what a process holds now."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith("kB")}
    return Memory(found["Rss"], found["Pss"])


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """Returns the variables under which a server serves this shop on free ports."""
    named = {
        "CONCORD_POSTGRES_DSN": settings.postgres_dsn,
        "CONCORD_REDIS_URL": settings.redis_url,
        "CONCORD_DATA_DIR": str(settings.data_dir),
        "CONCORD_PORT": "0",
        "CONCORD_METRICS_PORT": "-1",
    }
    return os.environ | named | more


class Server:
    """``concord serve`` as a process of its own, up when the constructor returns."""

    def __init__(self, settings: Settings, *python: str, log: Path = Path(os.devnull), **more: str) -> None:
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *python, "-m", "cli.main", "serve", "--ready"],
                stdout=subprocess.PIPE,
                stderr=out,
                env=environment(settings, **more),
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server did not start; see {log}"
        self.port = int(json.loads(line)["port"])

    def workers(self) -> list[int]:
        """Process ids of its workers, empty where it serves by itself."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def close(self) -> None:
        """Stops it in good order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class Starts:
    """The questions: each starts something that stays up until ``close``, which is not timed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._encoder = next((settings.data_dir / "models").glob("*/encoder.onnx"))
        self._running: list[Callable[[], object]] = []

    def close(self) -> None:
        """Ends what the last question left running."""
        while self._running:
            self._running.pop()()

    def ours(self) -> None:
        """From exec until it says that it answers."""
        self._running.append(Server(self._settings).close)

    def feast(self) -> None:
        """From exec of ``feast serve`` until its health check answers."""
        port = free_port()
        command = [sys.executable, "-m", "feast.cli.cli", "-c", str(REPOSITORY), "serve", "-h", "127.0.0.1", "-p", str(port), "-w", "1"]
        process = subprocess.Popen(
            command,
            env=os.environ | self._settings.feast_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it starts workers, which are to end with it
        )
        self._running.append(lambda: (os.killpg(process.pid, signal.SIGKILL), process.wait()))
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                return
            assert process.poll() is None, "feast serve ended before it answered"
            time.sleep(0.05)

    def bare(self) -> None:
        """From exec until the encoder is open, and nothing else."""
        subprocess.run([sys.executable, "-c", _BARE, str(self._encoder)], check=True)


def forbidden_modules(settings: Settings) -> list[str]:
    """Serves, and answers a call, with every import told (``-X importtime``); returns the forbidden ones among them."""
    log = settings.data_dir / "imports.log"
    server = Server(settings, "-X", "importtime", log=log)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.enable_http_proxy", 0)]) as channel:
            subject = Subject(identity=ChannelIdentity(channel="web", channel_user_id="startup"))
            request = RecommendRequest(subject=subject, channel="web", surface="home")
            RecommendationServiceStub(channel).Recommend(request, timeout=20)
    finally:
        server.close()
    imported = {line.rpartition("|")[2].strip() for line in log.read_text().splitlines() if line.startswith("import time:")}
    assert "onnxruntime" in imported, "the list of imports is not whole"
    return sorted(imported & set(FORBIDDEN))


def held(settings: Settings, **more: str) -> list[Memory]:
    """Returns what each process that answers holds, just after the server says that it is ready."""
    server = Server(settings, **more)
    found = [memory_of(pid) for pid in server.workers() or [server.process.pid]]
    server.close()
    return found


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with prepared_shop() as sample, large_shop(sample, arguments.items, redis_database=8) as settings:
        starts = Starts(settings)
        questions = {"ours": starts.ours, "feast": starts.feast, "bare": starts.bare}
        taken = in_turn(questions, rounds=arguments.rounds, warm_up=1, after=starts.close)
        seconds = {name: median(values) for name, values in taken.items()}
        empty, (whole,), pair = held(empty_shop(sample)), held(settings), held(settings, CONCORD_WORKERS="2")
        loaded = forbidden_modules(settings)
    table = Table("what", "figure")
    table.add_row(f"exec to serving, {arguments.items} items, s", f"{seconds['ours']:.2f}")
    table.add_row("Feast's feature server, same registry, s", f"{seconds['feast']:.2f}")
    table.add_row("bare imports and encoder, s", f"{seconds['bare']:.2f}")
    table.add_row("resident MB without a model", f"{empty[0].resident:.0f}")
    table.add_row("resident MB with model and items", f"{whole.resident:.0f}")
    table.add_row("proportional MB of each of two workers", " ".join(f"{one.proportional:.0f}" for one in pair))
    table.add_row("forbidden modules", ", ".join(loaded) or "none")
    console.print(table)
    met = seconds["ours"] <= SECONDS and empty[0].resident <= MEGABYTES and not loaded
    verdict = Verdict("startup", seconds["ours"], seconds["feast"], seconds["bare"], "s", met)
    print(
        verdict.line(
            items=arguments.items,
            resident_mb_without_model=empty[0].resident,
            resident_mb=whole.resident,
            worker_proportional_mb=sum(one.proportional for one in pair) / len(pair),
            forbidden=loaded,
        )
    )


if __name__ == "__main__":
    main()
