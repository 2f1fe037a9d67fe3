"""Several worker processes behind one port, as a user runs them: the same answers, and none lost when one of them is killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import grpc
import psycopg
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cli.stack import Stack, free_port
from concord import Concord, user
from concord.v1 import recommendation_pb2
from concord.v1.recommendation_pb2_grpc import RecommendationServiceStub
from features.catalogue import publish_epoch
from features.item_table import load_item_table
from features.materialize import rebuild_users
from features.models import activate, publish
from features.registry import is_applied, load_registry
from features.schema import current_revision, head_revision
from server.settings import ServerSettings
from tests.integration import serving
from tests.integration.fixtures import NewShop
from tests.integration.test_processes import customers, environment, process_and_ports, run
from tests.unit.bundles import write_bundle


@pytest.fixture(scope="module")
def live(new_shop: NewShop, tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    """A shop with data and a model of random weights, which takes no training: its answers are as exact as any."""
    settings = new_shop()
    serving.fill(settings, tmp_path_factory.mktemp("sample"), users=60)
    with psycopg.connect(settings.postgres_dsn) as connection:
        publish_epoch(connection)
        write_bundle(settings.data_dir / "bundle", load_item_table(connection))
        publish(connection, settings.data_dir / "bundle", settings.models_base)
        activate(connection, "m1")
    rebuild_users(settings)
    return settings


@contextmanager
def two_workers(settings: ServerSettings, **more: str) -> Iterator[tuple["subprocess.Popen[str]", dict[str, int]]]:
    with process_and_ports(settings, CONCORD_WORKERS="2", **more) as started:
        yield started


def workers_of(server: "subprocess.Popen[str]") -> list[int]:
    """Process ids of the workers that run now."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(server.pid)], capture_output=True, text=True, check=False).stdout.split()
    return sorted(int(pid) for pid in listed)


def samples(port: int, name: str) -> dict[str, float]:
    """Values of a metric by worker, summed over its other labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found: Counter[str] = Counter()
    for sample in (sample for family in families for sample in family.samples if sample.name == name):
        found[sample.labels.get("worker", "")] += sample.value
    return dict(found)


async def ask(address: str, customer: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """Asks over a connection of its own, which the kernel gives to one of the workers."""
    async with Concord(address, channel="web", timeout=10.0) as web:
        answer = await web.recommend(user(customer), surface="home", limit=10)
    return answer.slate_id, tuple((item.item_id, item.score) for item in answer.items)


async def spread(address: str, metrics_port: int, customer: str) -> set[tuple[str, tuple[tuple[str, float], ...]]]:
    """Asks until every worker has answered at least three times; returns the different answers."""
    answers = set()
    async with asyncio.timeout(60):
        while True:
            answers |= set(await asyncio.gather(*(ask(address, customer) for _ in range(8))))
            asked = await asyncio.to_thread(samples, metrics_port, "concord_answers_total")
            if len(asked) == 2 and min(asked.values()) >= 3:
                return answers


async def test_two_workers_answer_one_port_identically_and_their_metrics_are_told_apart(live: ServerSettings) -> None:
    whom = customers(live)[:2]
    with two_workers(live) as (server, ports):
        address = f"127.0.0.1:{ports['port']}"
        assert len(workers_of(server)) == 2
        for customer in whom:
            assert len(await spread(address, ports["metrics_port"], customer)) == 1
        redis.Redis.from_url(live.redis_url).flushdb()  # what was committed is gone: either computes it anew
        assert len(await spread(address, ports["metrics_port"], whom[0])) == 1
        assert set(samples(ports["metrics_port"], "process_resident_memory_bytes")) == {"0", "1"}
        assert samples(ports["metrics_port"], "concord_workers_ready") == {"": 2.0}
        with psycopg.connect(live.postgres_dsn) as connection:
            rows = connection.execute("SELECT address FROM live_replicas").fetchall()
        assert rows == [(address,), (address,)]
    with psycopg.connect(live.postgres_dsn) as connection:
        connection.execute("DELETE FROM replicas")  # the supervisor was killed: nobody left in good order


async def test_a_worker_killed_under_writers_loses_nothing_and_the_port_goes_on_answering(live: ServerSettings) -> None:
    whom = [user(name) for name in customers(live)[2:6]]
    acknowledged: set[str] = set()
    attempted: set[str] = set()
    failures: list[grpc.StatusCode] = []
    reads: list[tuple[float, grpc.StatusCode]] = []
    over = asyncio.Event()

    async def read(address: str) -> None:
        """Reads over a new connection each time, and tries nothing twice: who is not ready must not be given connections."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        request = recommendation_pb2.RecommendRequest(subject=whom[0], channel="web", surface="home", limit=5)
        while not over.is_set():
            code = grpc.StatusCode.OK
            async with grpc.aio.insecure_channel(address, options=options) as channel:
                try:
                    await RecommendationServiceStub(channel).Recommend(request, timeout=5)
                except grpc.aio.AioRpcError as error:
                    code = error.code()
            reads.append((time.monotonic(), code))

    async def write(address: str, number: int) -> None:
        """Writes over one connection after the other; a call that fails is sent again with the same id, as a channel would."""
        k = 0
        while not over.is_set():
            async with Concord(address, channel="web", timeout=5.0) as web:
                for _ in range(10):
                    event = web.event(whom[number], "view", item_id=f"w{number}")
                    event.event_id = f"00000000-0000-4000-9000-{number:04d}{k:08d}"
                    attempted.add(event.event_id)
                    try:
                        answer = await web.record(event)
                    except grpc.aio.AioRpcError as error:
                        failures.append(error.code())
                        break
                    acknowledged.update(result.event_id for result in answer.results)
                    k += 1

    with two_workers(live) as (server, ports):
        address = f"127.0.0.1:{ports['port']}"
        first, other = workers_of(server)
        writers = [asyncio.create_task(write(address, number)) for number in range(4)] + [asyncio.create_task(read(address))]
        await asyncio.sleep(1.0)
        os.kill(first, signal.SIGKILL)
        killed = time.monotonic()
        before = len(acknowledged)
        async with asyncio.timeout(20):
            while len(acknowledged) < before + 40:
                await asyncio.sleep(0.05)
        answered_again = time.monotonic() - killed
        async with asyncio.timeout(60):  # and the dead one is replaced
            while samples(ports["metrics_port"], "concord_workers_ready") != {"": 2.0} or first in workers_of(server):
                await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)  # reads that the new one answers
        over.set()
        await asyncio.gather(*writers)
        assert other in workers_of(server)
        assert list(samples(ports["metrics_port"], "concord_worker_restarts_total").values()) == [1.0]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    with psycopg.connect(live.postgres_dsn) as connection:
        stored = [row[0] for row in connection.execute("SELECT event_id::text FROM events WHERE item_id ~ '^w[0-3]$'").fetchall()]
    assert answered_again < 10
    assert acknowledged <= set(stored) <= attempted
    assert len(stored) == len(set(stored))
    assert set(failures) <= {grpc.StatusCode.UNAVAILABLE}
    later = [code for at, code in reads if at > killed + 0.5]  # what was under way when it died may fail
    assert len(later) > 20
    assert set(later) == {grpc.StatusCode.OK}
    log = [json.loads(line) for line in (live.data_dir / "server.log").read_text().splitlines() if line.startswith("{")]
    assert any(line["event"] == "a worker ended and is started again" and line["status"] == -signal.SIGKILL for line in log)


async def test_sigterm_drains_both_workers_and_leaves_nobody_in_the_fleet(live: ServerSettings) -> None:
    customer = user(customers(live)[1])
    with two_workers(live) as (server, ports):
        address = f"127.0.0.1:{ports['port']}"
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Concord(address, channel="web", timeout=10.0)) for _ in range(6)]
            calls = [asyncio.create_task(web.record(web.event(customer, "view", item_id=f"x{k}"))) for k in range(8) for web in clients]
            await asyncio.sleep(0.05)
            server.send_signal(signal.SIGTERM)
            done = await asyncio.gather(*calls, return_exceptions=True)
        assert server.wait(30) == 0
    acknowledged = {result.event_id for answer in done if not isinstance(answer, BaseException) for result in answer.results}
    refused = [answer for answer in done if isinstance(answer, BaseException)]
    assert {error.code() for error in refused if isinstance(error, grpc.aio.AioRpcError)} <= {grpc.StatusCode.UNAVAILABLE}
    assert all(isinstance(error, grpc.aio.AioRpcError) for error in refused)
    with psycopg.connect(live.postgres_dsn) as connection:
        stored = {str(row[0]) for row in connection.execute("SELECT event_id FROM events WHERE item_id LIKE 'x%%'", [])}
        assert connection.execute("SELECT count(*) FROM replicas WHERE address = %s", [address]).fetchone() == (0,)
    assert acknowledged
    assert acknowledged <= stored


def test_workers_of_a_killed_supervisor_end_by_themselves(live: ServerSettings) -> None:
    with two_workers(live) as (server, ports):
        left = workers_of(server)
        server.kill()
        server.wait(10)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in left):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{ports['metrics_port']}/metrics", timeout=5)


def test_a_port_that_is_taken_is_named_whoever_comes_second(live: ServerSettings) -> None:
    port = free_port()
    with two_workers(live, CONCORD_PORT=str(port), CONCORD_ADMIN_PORT="-1"):
        for workers in ("1", "2"):
            refused = run(live, "serve", CONCORD_PORT=str(port), CONCORD_WORKERS=workers)
            assert refused.returncode == 2
            assert f"CONCORD_PORT: cannot listen on 127.0.0.1:{port}" in refused.stderr
    with process_and_ports(live, CONCORD_PORT=str(port)):
        refused = run(live, "serve", CONCORD_PORT=str(port), CONCORD_WORKERS="2")
        assert (refused.returncode, f"cannot listen on 127.0.0.1:{port}" in refused.stderr) == (2, True)


def test_a_setting_no_worker_can_serve_with_ends_the_server_with_its_name(live: ServerSettings) -> None:
    missing = str(live.data_dir / "none.pem")
    refused = run(live, "serve", CONCORD_WORKERS="2", CONCORD_TLS_CERTIFICATE=missing, CONCORD_TLS_KEY=missing)
    assert refused.returncode == 2
    assert "none.pem" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_server_on_an_empty_database_migrates_and_applies_first(live: ServerSettings, stack: Stack) -> None:
    name = f"t_{uuid.uuid4().hex[:12]}"
    empty = live.model_copy(update={"postgres_dsn": make_conninfo(stack.postgres_dsn, dbname=name)})
    with psycopg.connect(stack.postgres_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with process_and_ports(empty):
            assert current_revision(empty.postgres_dsn) == head_revision()
            assert is_applied(load_registry(empty))
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_answers_calls_has_neither_pandas_nor_feast_in_memory(live: ServerSettings, workers: str) -> None:
    with process_and_ports(live, CONCORD_WORKERS=workers) as (server, ports):
        asyncio.run(ask(f"127.0.0.1:{ports['port']}", customers(live)[0]))
        for pid in [server.pid, *workers_of(server)]:
            mapped = Path(f"/proc/{pid}/maps").read_text()
            assert [name for name in ("pandas", "pyarrow", "torch", "scipy", "sqlalchemy") if f"/{name}/" in mapped] == []


def test_serving_a_call_in_one_process_imports_none_of_the_heavy_rooms(live: ServerSettings) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SERVE_AND_LIST],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(live, CONCORD_METRICS_PORT="-1", WHOM=customers(live)[0]),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded["items"] == 5
    assert [name for name in loaded["modules"] if name in _FORBIDDEN] == []


_FORBIDDEN = {
    "feast",
    "pandas",
    "dask",
    "pyarrow",
    "torch",
    "transformers",
    "scipy",
    "sqlalchemy",
    "alembic",
    "training",
    "onnx",
    "sklearn",
}
_SERVE_AND_LIST = """
import asyncio, json, os, sys
from server.settings import ServerSettings
from features.settings import load_settings
from server.process import serve
from concord import Concord, user

async def main():
    stop, asked = asyncio.Event(), []
    async def ask(port):
        async with Concord(f"127.0.0.1:{port}", channel="web", timeout=20.0) as web:
            customer = user(os.environ["WHOM"])
            await web.record(web.event(customer, "view", item_id="h1"))
            answer = await web.recommend(customer, surface="home", limit=5)
            await web.profile(customer)
            asked.append(len(answer.items))
        stop.set()
    tasks = []
    await serve(load_settings(ServerSettings), announce=lambda ports: tasks.append(asyncio.create_task(ask(ports.port))), stop=stop)
    print(json.dumps({"items": asked[0], "modules": sorted(sys.modules)}))

asyncio.run(main())
"""
