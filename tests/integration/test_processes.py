"""The server as a process of its own, as a user runs it: kill -9, SIGTERM, restarts of the stores, the command line."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import psycopg
import pytest
import redis
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from cli.stack import embedded_redis, free_port
from concord import Concord, user
from features.schema import head_revision
from server.settings import ServerSettings


def environment(settings: ServerSettings, **more: str) -> dict[str, str]:
    return os.environ | {
        "CONCORD_POSTGRES_DSN": settings.postgres_dsn,
        "CONCORD_REDIS_URL": settings.redis_url,
        "CONCORD_DATA_DIR": str(settings.data_dir),
        "CONCORD_MODELS_URL": settings.models_url,
        "CONCORD_PORT": "0",
        "CONCORD_ADMIN_PORT": "-1",
        "CONCORD_METRICS_PORT": "0",
        **more,
    }


@contextmanager
def process(settings: ServerSettings, **more: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Runs ``concord serve``; yields the process and its address."""
    with process_and_ports(settings, **more) as (server, ports):
        yield server, f"127.0.0.1:{ports['port']}"


@contextmanager
def process_and_ports(settings: ServerSettings, **more: str) -> Iterator[tuple["subprocess.Popen[str]", dict[str, int]]]:
    """Runs ``concord serve``; yields the process and what it says of its ports."""
    with (settings.data_dir / "server.log").open("a") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", "--ready"],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment(settings, **more),
            text=True,
        )
        assert server.stdout is not None
        with server.stdout:
            try:
                line = server.stdout.readline()
                assert line, (settings.data_dir / "server.log").read_text()[-2000:]
                yield server, json.loads(line)
            finally:
                if server.poll() is None:
                    server.kill()
                server.wait(10)


def customers(settings: ServerSettings) -> list[str]:
    with psycopg.connect(settings.postgres_dsn) as connection:
        return [row[0] for row in connection.execute("SELECT user_id FROM users WHERE version > 20 ORDER BY user_id DESC")]


async def test_kill_9_between_acknowledgement_and_answer_loses_nothing(live: ServerSettings) -> None:
    customer = user(customers(live)[0])
    with process(live) as (server, address):
        async with Concord(address, channel="web", timeout=10.0) as web:
            before = await web.recommend(customer, surface="home", limit=10)
            bought = before.items[0].item_id
            recorded = await web.record(web.event(customer, "purchase", item_id=bought, quantity=1, value=9.0))
            server.send_signal(signal.SIGKILL)
            server.wait(10)
    redis.Redis.from_url(live.redis_url).flushdb()  # and Redis is emptied as well
    with process(live) as (_, address):
        async with Concord(address, channel="app", timeout=10.0) as app:
            token = recorded.tokens[0]
            after = await app.recommend(customer, surface="home", limit=10, consistency_token=token.consistency_token)
            assert after.versions.user_version == token.user_version
            assert bought not in [item.item_id for item in after.items]
            profile = await app.profile(customer)
            assert profile.recent_behaviours[0].item_id == bought


async def test_sigterm_finishes_what_is_in_flight_and_exits_cleanly(live: ServerSettings) -> None:
    customer = user(customers(live)[1])
    with process(live) as (server, address):
        async with Concord(address, channel="web", timeout=10.0) as web:
            await web.recommend(customer, surface="home")
            calls = [asyncio.create_task(web.record(web.event(customer, "view", item_id=f"t{k}"))) for k in range(40)]
            await asyncio.sleep(0.01)
            server.send_signal(signal.SIGTERM)
            done = await asyncio.gather(*calls, return_exceptions=True)
        assert server.wait(15) == 0
    acknowledged = {result.event_id for answer in done if not isinstance(answer, BaseException) for result in answer.results}
    refused = [answer for answer in done if isinstance(answer, BaseException)]
    assert {error.code() for error in refused if isinstance(error, grpc.aio.AioRpcError)} <= {grpc.StatusCode.UNAVAILABLE}
    assert all(isinstance(error, grpc.aio.AioRpcError) for error in refused)
    with psycopg.connect(live.postgres_dsn) as connection:
        stored = {str(row[0]) for row in connection.execute("SELECT event_id FROM events WHERE item_id LIKE 't%%'", [])}
    assert acknowledged <= stored


def _started(settings: ServerSettings, port: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "cli.main", "serve"], env=environment(settings, CONCORD_PORT=str(port)))


async def test_a_replica_that_waits_to_join_says_not_serving_and_stops_when_told(live: ServerSettings) -> None:
    other = "INSERT INTO replicas VALUES ('other', '10.0.0.9:1', now(), clock_timestamp(), 600, '', 0, 0, '{}', '{}', '', 'other rules')"
    with psycopg.connect(live.postgres_dsn, autocommit=True) as connection:
        connection.execute(other)
        port = free_port()
        server = _started(live, port)
        try:
            async with asyncio.timeout(30):
                while not (row := connection.execute("SELECT address FROM replicas WHERE waits_for = '10.0.0.9:1'").fetchone()):
                    await asyncio.sleep(0.1)
            assert row[0] == f"127.0.0.1:{port}"
            async with grpc.aio.insecure_channel(row[0]) as wire:
                status = await HealthStub(wire).Check(HealthCheckRequest(), timeout=5)
            assert status.status == HealthCheckResponse.NOT_SERVING
            assert "Replicas wait, NOT_SERVING, until" in " ".join(run(live, "replicas").stdout.split())
            server.send_signal(signal.SIGTERM)
            assert server.wait(15) == 0
            assert connection.execute("SELECT replica_id FROM replicas WHERE waits_for <> ''").fetchall() == []
        finally:
            server.kill()
            server.wait(10)
            connection.execute("DELETE FROM replicas WHERE replica_id = 'other'")


async def test_killing_the_server_under_four_writers_keeps_every_acknowledged_event_once(live: ServerSettings) -> None:
    whom = [user(name) for name in customers(live)[2:6]]
    acknowledged: set[str] = set()
    attempted: dict[str, int] = {}

    async def write(address: str, number: int) -> None:
        async with Concord(address, channel="web", timeout=2.0) as web:
            for k in range(400):
                event = web.event(whom[number], "view", item_id=f"k{number}")
                event.event_id = f"00000000-0000-4000-8000-{number:04d}{k:08d}"
                attempted[event.event_id] = number
                try:
                    answer = await web.record(event)
                except grpc.aio.AioRpcError:
                    return
                acknowledged.update(result.event_id for result in answer.results)

    with process(live) as (server, address):
        writers = [asyncio.create_task(write(address, number)) for number in range(4)]
        await asyncio.sleep(0.7)
        server.send_signal(signal.SIGKILL)
        await asyncio.gather(*writers)
    with psycopg.connect(live.postgres_dsn) as connection:
        rows = connection.execute("SELECT event_id::text FROM events WHERE item_id ~ '^k[0-3]$'").fetchall()
        broken = connection.execute(
            "SELECT count(*) FROM users u WHERE merged_into IS NULL "
            "AND version <> (SELECT count(*) FROM events e WHERE e.user_id = u.user_id)"
        ).fetchone()
    stored = [row[0] for row in rows]
    assert len(acknowledged) > 20
    assert acknowledged <= set(stored) <= set(attempted)
    assert len(stored) == len(set(stored))
    assert broken == (0,)


async def test_redis_killed_and_restarted_comes_back_without_a_restart(live: ServerSettings, tmp_path: Path) -> None:
    customer = user(customers(live)[7])
    port = free_port()
    with embedded_redis(tmp_path / "one", port=port) as url:
        settings = live.model_copy(update={"redis_url": url})
        with process(settings) as (_, address):
            async with Concord(address, channel="web", timeout=2.0) as web:
                before = await web.recommend(customer, surface="home", limit=10)
                redis.Redis.from_url(url).execute_command("DEBUG", "SLEEP", "0")
                _kill_redis(url)
                recorded = await web.record(web.event(customer, "view", item_id="while-redis-is-away"))
                assert not recorded.online
                meanwhile = await web.recommend(customer, surface="home")
                assert meanwhile.versions.user_version == before.versions.user_version + 1
                assert (meanwhile.degraded, meanwhile.stale) == (True, False)
                with embedded_redis(tmp_path / "two", port=port):
                    async with asyncio.timeout(20):
                        while True:
                            try:
                                after = await web.recommend(customer, surface="home", limit=10)
                            except grpc.aio.AioRpcError:
                                continue
                            break
                    assert after.versions.user_version == before.versions.user_version + 1


def _kill_redis(url: str) -> None:
    pid = redis.Redis.from_url(url).info("server")["process_id"]
    os.kill(pid, signal.SIGKILL)


def run(settings: ServerSettings, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments], capture_output=True, text=True, env=environment(settings, **more), timeout=120
    )


def test_the_command_line_does_the_main_steps(live: ServerSettings) -> None:
    assert f"revision {head_revision()}" in run(live, "migrate").stdout
    assert "ranking_v1" in run(live, "apply").stdout
    assert "online" in run(live, "materialize").stdout
    listed = run(live, "models").stdout
    assert "yes" in listed
    assert "CONCORD_FEAST_PG_HOST" in run(live, "env").stdout


def test_customers_are_linked_shown_and_forgotten_from_the_command_line(live: ServerSettings) -> None:
    with process(live) as (_, address):
        told = {
            command: run(live, "identity", *command.split(), "--server", address)
            for command in (
                "link app/cli-1 web/cli-2",
                "graph web/cli-2",
                "unlink app/cli-1 web/cli-2",
                "forget web/cli-2 --yes",
                "graph web/cli-2",
            )
        }
    shown, unlinked, forgotten = (json.loads(list(told.values())[k].stdout) for k in (0, 2, 3))
    assert shown["user_id"] == unlinked["user_id"] or shown["user_id"] == unlinked["separated_customers"][0]["user_id"]
    assert (unlinked["removed_link_count"], forgotten["counts"]["persona_count"], forgotten["online_erased"]) == (1, "1", True)
    assert told["graph web/cli-2"].returncode == 2
    assert "NOT_FOUND" in told["graph web/cli-2"].stderr


@pytest.mark.long
def test_the_click_classifier_trains_and_says_what_to_label_next_from_the_command_line(live: ServerSettings, tmp_path: Path) -> None:
    # The cut is named: events that other tests record today would stretch the history until no visit is left before it.
    trained = run(live, "train", "--task", "clicks", "--preset", "tiny", "--set", "max_steps=3", "--set", "cut=2026-03-20")
    assert trained.returncode == 0, trained.stderr[-1000:]
    assert "auc" in trained.stdout
    assert list((live.data_dir / "runs").glob("*-classifier/classifier.onnx"))
    with psycopg.connect(live.postgres_dsn) as connection:
        items = [row[0] for row in connection.execute("SELECT item_id FROM items ORDER BY 1 LIMIT 2")]
    lines = [f"{customer},{item}" for customer in customers(live)[:10] for item in (*items, "nothing")] + [f"nobody,{items[0]}"]
    (tmp_path / "pairs.csv").write_text("\n".join(["user_id,item_id", *lines]))
    (tmp_path / "labelled.csv").write_text("\n".join(["user_id,item_id", *lines[:2]]))
    files = ("--pairs", str(tmp_path / "pairs.csv"), "--labelled", str(tmp_path / "labelled.csv"), "--out", str(tmp_path / "next.jsonl"))
    chosen = run(live, "label-next", *files, "--count", "7")
    assert chosen.returncode == 0, chosen.stderr[-1000:]
    assert "7 of 18 pairs" in chosen.stdout
    assert "11 more could not be read" in " ".join(chosen.stdout.split())
    proposals = [json.loads(line) for line in (tmp_path / "next.jsonl").read_text().splitlines()]
    named = [f"{one['user_id']},{one['item_id']}" for one in proposals]
    assert len(set(named)) == 7
    assert set(named) <= set(lines) - set(lines[:2])
    assert all(0 < one["probability"] < 1 for one in proposals)
    refused = run(live, "train", "--set", "batch_sise=1")
    assert refused.returncode == 2
    assert "batch_sise" in refused.stderr


def test_a_training_set_is_written_from_the_command_line(live: ServerSettings, tmp_path: Path) -> None:
    written = run(live, "dataset", "--out", str(tmp_path / "set"), "--set", "cut=2026-03-20")
    assert written.returncode == 0, written.stderr[-1000:]
    assert "recent_items" in written.stdout
    assert json.loads((tmp_path / "set" / "schema.json").read_text())["split"]["kind"] == "time"
    assert list((tmp_path / "set").glob("part-*.parquet"))
    refused = run(live, "dataset", "--out", str(tmp_path / "set"), "--set", "cut=1999-03-20")
    assert refused.returncode == 2
    assert "1999-03-20" in refused.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_embedded_stack_is_stopped_with_the_command(number: int) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONCORD_")}
    with tempfile.TemporaryDirectory(prefix="concord-test-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "cli.main", "up"]
        up = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=kept | {"CONCORD_DATA_DIR": folder},
            text=True,
            # A shell lets what it starts in the background ignore SIGINT, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert up.stdout is not None
        while "FEAST_USAGE" not in (line := up.stdout.readline()):  # the last of the variables it prints
            assert line, up.stderr and up.stderr.read()
        stack = json.loads((Path(folder) / "stack.json").read_text())
        up.send_signal(number)
        up.communicate(timeout=30)
        assert up.returncode == 0
        assert not (Path(folder) / "stack.json").exists()
        assert not (Path(folder) / "postgres" / "postmaster.pid").exists()
        address = urlsplit(stack["redis_url"])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address.hostname, address.port))


def test_an_unknown_or_invalid_setting_stops_with_its_name(live: ServerSettings) -> None:
    unknown = run(live, "migrate", CONCORD_PROT="1")
    assert unknown.returncode == 2
    assert "CONCORD_PROT" in unknown.stderr
    invalid = run(live, "serve", CONCORD_ONNX_THREADS="many")
    assert invalid.returncode == 2
    assert "CONCORD_ONNX_THREADS" in invalid.stderr
    assert "Traceback" not in invalid.stderr


@pytest.mark.parametrize(
    "command",
    [
        "up",
        "migrate",
        "import",
        "generate",
        "apply",
        "materialize",
        "dataset",
        "rebuild",
        "env",
        "settings",
        "train",
        "tune",
        "quantize",
        "label-next",
        "evaluate",
        "card",
        "export",
        "publish",
        "activate",
        "models",
        "replicas",
        "serve",
        "record",
        "recommend",
        "identity graph",
        "identity link",
        "identity unlink",
        "identity forget",
        "audit",
        "demo",
        "keys",
    ],
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    from typer.main import get_command

    from cli.main import app

    found: Any = get_command(app)
    for name in command.split():
        found = found.commands[name]
    assert found.help
    assert "Example: " in found.epilog


@pytest.mark.parametrize("command", ["create", "rotate", "list", "revoke"])
def test_every_command_on_keys_has_help_with_an_example(command: str) -> None:
    from typer.main import get_command

    from cli.main import app

    found = get_command(app).commands["keys"].commands[command]  # type: ignore[attr-defined]
    assert found.help
    assert "Example: " in found.epilog


def test_starting_takes_seconds_and_metrics_answer(live: ServerSettings) -> None:
    import urllib.request

    port = free_port()
    started = time.monotonic()
    with process(live, CONCORD_METRICS_PORT=str(port)):
        assert time.monotonic() - started < 60
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    assert "concord_stage_seconds" in text
    assert "concord_active_model_info" in text
