"""Seen from outside, on real servers: traces at a real OTLP receiver, health through outages, numbers that follow the shop."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psycopg
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client import CollectorRegistry

from cli.stack import embedded_redis, free_port
from concord import Concord, user
from concord.v1 import common_pb2, events_pb2, events_pb2_grpc, recommendation_pb2, recommendation_pb2_grpc
from server.app import open_rooms
from server.health import HealthWatch
from server.metrics import Metrics
from server.settings import ServerSettings
from tests.integration.test_processes import customers, process, run

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
RUNBOOK = Path(__file__).parents[2] / "docs" / "runbook.md"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A receiver of the OTLP protocol that keeps what it is sent."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.raw.append(request.SerializeToString())
        for resource in request.resource_spans:
            self.resources.append({pair.key: pair.value.string_value for pair in resource.resource.attributes})
            self.spans += [found for scope in resource.scope_spans for found in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.contextmanager
def collecting() -> Any:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(1).wait()


async def test_a_traced_call_reaches_the_collector_whole_and_names_nobody(live: ServerSettings) -> None:
    customer = customers(live)[8]
    with (
        collecting() as (collector, endpoint),
        process(live, CONCORD_OTLP_ENDPOINT=endpoint, CONCORD_TRACE_RATIO="0") as (server, address),
    ):
        async with grpc.aio.insecure_channel(address) as channel:
            traced = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "request-of-alice"))
            subject = common_pb2.Subject(user_id=customer)
            event = events_pb2.Event(subject=subject, channel="web", action=common_pb2.ACTION_SEARCH, text="words of alice")
            record = events_pb2_grpc.EventServiceStub(channel).RecordEvents
            recorded = await record(events_pb2.RecordEventsRequest(events=[event]), metadata=traced)
            token = recorded.tokens[0].consistency_token
            request = recommendation_pb2.RecommendRequest(subject=subject, channel="web", surface="home", consistency_token=token)
            stub = recommendation_pb2_grpc.RecommendationServiceStub(channel)
            await stub.Recommend(request, metadata=traced)
            await stub.Recommend(request)  # not sampled: neither by its caller nor by the ratio
        server.terminate()  # what is recorded is sent before the process ends
        assert server.wait(20) == 0
    names = {found.name for found in collector.spans}
    stages = {"identity", "online_read", "features", "user_vector", "candidates", "ranking", "policy", "commit", "offers", "answer"}
    assert stages <= names
    assert {"record", "group commit", "online_write", "redis pipeline", "onnx encoder", "onnx ranker"} <= names
    assert {"postgres INSERT events", "postgres SELECT users", "postgres connection"} <= names
    assert {found.trace_id.hex() for found in collector.spans} == {TRACE}
    by_id = {found.span_id: found for found in collector.spans}
    roots = [found for found in collector.spans if found.parent_span_id.hex() == PARENT]
    assert sorted(found.name for found in roots) == ["EventService/RecordEvents", "RecommendationService/Recommend"]

    def path(found: Span) -> list[str]:
        above = by_id.get(found.parent_span_id)
        return [*(path(above) if above else []), found.name]

    paths = {"/".join(path(found)[1:]) for found in collector.spans}
    assert "Recommend/online_read/redis pipeline" in {"/".join(path(found)).partition("/")[2] for found in collector.spans}
    assert {"ranking/onnx ranker", "record", "group commit/commit/postgres INSERT events"} <= paths
    ahead = "record/user_vector/onnx encoder"
    assert [found for found in paths if found.endswith("user_vector/onnx encoder")] == [ahead]
    assert collector.resources[0]["service.name"] == "concord"
    sent = b"".join(collector.raw)
    for secret in (customer, "alice", token, recorded.results[0].event_id, live.postgres_dsn, "127.0.0.1"):
        assert secret.encode() not in sent, secret


async def test_a_collector_that_is_away_costs_neither_calls_nor_a_clean_stop(live: ServerSettings) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with process(live, CONCORD_OTLP_ENDPOINT=endpoint, CONCORD_TRACE_RATIO="1") as (server, address):
        async with Concord(address, channel="web", timeout=10.0) as web:
            for name in customers(live)[:5]:
                await web.recommend(user(name), surface="home")
        started = time.monotonic()
        server.terminate()
        assert server.wait(30) == 0
        assert time.monotonic() - started < 15


async def _statuses(address: str) -> dict[str, int]:
    async with grpc.aio.insecure_channel(address) as channel:
        listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=5)
    return {name: int(answer.status) for name, answer in listed.statuses.items()}


async def _becomes(address: str, true: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    async with asyncio.timeout(20):
        while not true(seen := await _statuses(address)):
            await asyncio.sleep(0.1)
    return seen


async def test_health_tells_redis_away_from_all_is_well(live: ServerSettings, tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        redis_server = stack.enter_context(contextlib.ExitStack())
        url = redis_server.enter_context(embedded_redis(tmp_path / "one", port=port))
        settings = live.model_copy(update={"redis_url": url})
        _, address = stack.enter_context(process(settings, CONCORD_HEALTH_SECONDS="0.2"))
        seen = await _statuses(address)
        assert set(seen.values()) == {SERVING}, seen
        shown = run(live, "health", "--server", address)
        assert shown.returncode == 0, shown.stderr
        assert "concord.dependency.redis" in shown.stdout
        redis_server.close()
        seen = await _becomes(address, lambda found: found["concord.dependency.redis"] == NOT_SERVING)
        assert (seen[""], seen["concord.v1.EventService"], seen["concord.dependency.postgres"]) == (SERVING, SERVING, SERVING)
        stack.enter_context(embedded_redis(tmp_path / "two", port=port))
        await _becomes(address, lambda found: set(found.values()) == {SERVING})


@contextlib.asynccontextmanager
async def _watched(settings: ServerSettings) -> AsyncIterator[tuple[HealthWatch, CollectorRegistry, Any]]:
    registry = CollectorRegistry()
    metrics = Metrics(registry)

    async def publish(_seen: Any) -> None: ...

    async with open_rooms(settings, metrics) as rooms:
        await rooms.fleet.join("127.0.0.1:1")
        yield HealthWatch(rooms.probes, metrics, publish), registry, rooms


async def test_an_empty_shop_serves_and_says_that_it_has_neither_model_nor_items(shop: ServerSettings) -> None:
    async with _watched(shop) as (watch, _, _):
        seen = await watch.look()
    assert [name for name, up in seen.dependencies.items() if not up] == ["model", "index"]
    assert all(seen.services.values())


async def test_a_model_this_replica_cannot_load_takes_recommendations_away_and_nothing_else(live: ServerSettings) -> None:
    async with _watched(live) as (watch, _, rooms):
        assert (await watch.look()).overall
        active = rooms.fleet.newest
        await rooms.fleet._online.point(type(active)("unknown", active.activation + 1, active.index_version, active.offer_version))
        for _ in range(2):
            seen = await watch.look()
        away = [name for name, able in seen.services.items() if not able]
        names = ("Assistant", "Recommendation", "Search", "Understanding")
        assert sorted(away) == [f"concord.v1.{name}Service" for name in names]
        assert seen.dependencies["model"]  # the one it holds still answers
        await rooms.fleet._online._client.flushdb()


async def test_pools_queues_versions_and_the_outbox_are_numbers(live: ServerSettings) -> None:
    with psycopg.connect(live.postgres_dsn) as connection:
        connection.execute("INSERT INTO online_outbox (user_id, version, enqueued_at) VALUES ('nobody', 1, now() + interval '1 hour')")
    async with _watched(live.model_copy(update={"recovery_seconds": 60.0})) as (_, registry, rooms):
        async with asyncio.timeout(10):
            while registry.get_sample_value("concord_outbox_customers") != 1:
                await asyncio.sleep(0.05)
            while registry.get_sample_value("concord_version", {"kind": "index", "place": "replica"}) != rooms.fleet.index_version:
                await asyncio.sleep(0.05)
        value = registry.get_sample_value
        assert rooms.fleet.index_version > 0
        assert value("concord_version", {"kind": "activation", "place": "fleet"}) == rooms.fleet.newest.activation > 0
        assert value("concord_store_connections", {"store": "postgres", "state": "free"}) is not None
        assert value("concord_store_connections", {"store": "redis", "state": "free"}) is not None
        assert value("concord_queue_length", {"queue": "events"}) == 0
    with psycopg.connect(live.postgres_dsn) as connection:
        connection.execute("DELETE FROM online_outbox WHERE user_id = 'nobody'")


async def test_every_log_line_of_a_failed_call_carries_its_request_id(live: ServerSettings, tmp_path: Path) -> None:
    """Redis goes away: the call's own line names the request, and so does the line of the commit shared by several calls."""
    port = free_port()
    settings = live.model_copy(update={"redis_url": f"redis://127.0.0.1:{port}/0", "data_dir": tmp_path})
    with contextlib.ExitStack() as stack:
        redis_server = stack.enter_context(contextlib.ExitStack())
        redis_server.enter_context(embedded_redis(tmp_path / "redis", port=port))
        _, address = stack.enter_context(process(settings))
        redis_server.close()
        async with Concord(address, channel="web", timeout=5.0) as web:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await web.record(web.event(user(customers(live)[9]), "view", item_id="i"))
    lines = [json.loads(line) for line in (tmp_path / "server.log").read_text().splitlines() if line.startswith("{")]
    missed = [line for line in lines if line["event"].startswith("online store missed a write")]
    assert missed
    assert all(len(line["request_ids"]) == 1 for line in missed)


def test_the_runbooks_statements_run(shop: ServerSettings) -> None:
    statements = re.findall(r'psql "\$CONCORD_POSTGRES_DSN" -c "([^"]+)"', RUNBOOK.read_text())
    assert len(statements) > 5
    with psycopg.connect(shop.postgres_dsn, autocommit=True) as connection:
        for statement in statements:
            assert statement.startswith(("SELECT", "SHOW")), statement  # a runbook's look changes nothing
            connection.execute(statement.encode())
