"""Traces: one tree per sampled call, nothing for the others, and nothing in them that names a customer or quotes an error."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from time import perf_counter
from typing import Any
from uuid import UUID

import grpc
import psycopg
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry

from concord.v1 import common_pb2, recommendation_pb2
from server.domain import EventOutcome, IncomingEvent, Stored, Subject, Token
from server.ingest.recorder import EventRecorder
from server.ingest.writer import Written
from server.metrics import Metrics
from server.recommend.computing import Computing
from server.traced import statement_name
from server.tracing import Tracing, on_behalf_of, origin, span, trace_provider
from tests.edge import refusal, serving
from tests.fakes import FakeRecommender, Fakes

RECOMMEND = "/concord.v1.RecommendationService/Recommend"
REQUEST = recommendation_pb2.RecommendRequest(subject=common_pb2.Subject(user_id="secret-customer"), channel="web", surface="home")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Recorded:
    """Tracing into memory."""

    def __init__(self, ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        provider = trace_provider(ratio)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {found.name: found for found in self._exporter.get_finished_spans()}

    @property
    def text(self) -> str:
        return "".join(found.to_json() for found in self._exporter.get_finished_spans())


@pytest.fixture(autouse=True)
def _no_context_left() -> Iterator[None]:
    yield
    structlog.contextvars.clear_contextvars()


def parent_of(found: ReadableSpan) -> int | None:
    return found.parent.span_id if found.parent else None


def id_of(found: ReadableSpan) -> int:
    return int(found.get_span_context().span_id)  # type: ignore[union-attr]


async def in_a_call(recorded: Recorded, work: Any, **metadata: str) -> None:
    """Runs work as the edge runs a call: in a task of its own."""

    async def call() -> None:
        traced = recorded.tracing.call("RecommendationService/Recommend", list(metadata.items()))
        try:
            await work()
        finally:
            traced.end("OK", "web")

    await asyncio.create_task(call())


async def test_spans_nest_through_tasks_and_threads() -> None:
    recorded = Recorded()

    def ranker() -> None:
        with span("onnx ranker"):
            pass

    computing = Computing(threads=1, waiting=1)

    async def compute() -> None:
        with span("ranking"):
            await computing.run(ranker)

    async def work() -> None:
        with span("snapshot"):
            await asyncio.create_task(compute())
        with span("offers"):
            pass

    await in_a_call(recorded, work)
    spans = recorded.spans
    root = spans["RecommendationService/Recommend"]
    assert parent_of(root) is None
    assert parent_of(spans["snapshot"]) == parent_of(spans["offers"]) == id_of(root)
    assert parent_of(spans["ranking"]) == id_of(spans["snapshot"])
    assert parent_of(spans["onnx ranker"]) == id_of(spans["ranking"])


async def test_outside_a_call_and_in_one_that_is_not_sampled_nothing_is_recorded() -> None:
    recorded = Recorded(ratio=0.0)

    async def work() -> None:
        with span("ranking"):
            pass

    await work()
    await in_a_call(recorded, work)
    assert recorded.spans == {}


async def test_a_callers_decision_to_sample_holds_and_its_trace_goes_on() -> None:
    recorded = Recorded(ratio=0.0)

    async def work() -> None:
        with span("ranking"):
            pass

    await in_a_call(recorded, work, traceparent=f"00-{TRACE}-{PARENT}-01")
    root = recorded.spans["RecommendationService/Recommend"]
    assert f"{root.get_span_context().trace_id:032x}" == TRACE  # type: ignore[union-attr]
    assert f"{parent_of(root):016x}" == PARENT
    recorded = Recorded(ratio=1.0)
    await in_a_call(recorded, work, traceparent=f"00-{TRACE}-{PARENT}-00")
    assert recorded.spans == {}


async def test_a_failed_span_says_the_type_and_never_the_text() -> None:
    recorded = Recorded()

    async def work() -> None:
        with pytest.raises(RuntimeError), span("commit"):
            raise RuntimeError("secret-customer at postgresql://u:hunter2@h/d")

    await in_a_call(recorded, work)
    failed = recorded.spans["commit"]
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes is not None
    assert failed.attributes["error.type"] == "RuntimeError"
    assert not failed.events
    assert "hunter2" not in recorded.text
    assert "secret-customer" not in recorded.text


async def test_a_call_carries_its_trace_into_span_log_and_error() -> None:
    recorded = Recorded()
    error = psycopg.OperationalError("cannot reach postgresql://u:hunter2@h/d for secret-customer")
    lines: list[Any] = []

    class Logging(FakeRecommender):
        async def recommend(self, query: Any) -> Any:
            lines.append(structlog.contextvars.get_contextvars())
            return await super().recommend(query)

    async with serving(Fakes(recommender=Logging(error=error)), tracing=recorded.tracing) as edge:
        metadata = (("x-request-id", "r-1"), ("traceparent", f"00-{TRACE}-{PARENT}-01"), ("authorization", "Bearer hunter2"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.raw(RECOMMEND, REQUEST.SerializeToString(), metadata=metadata)
        trailing: dict[str, Any] = dict(caught.value.trailing_metadata() or ())  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details[0].Unpack(info)
    assert dict(info.metadata) == {"request_id": "r-1", "trace_id": TRACE}
    assert (lines[0]["request_id"], lines[0]["trace_id"]) == ("r-1", TRACE)
    root = recorded.spans["RecommendationService/Recommend"]
    assert root.status.status_code is StatusCode.ERROR
    assert dict(root.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "concord.v1.RecommendationService",
        "rpc.method": "Recommend",
        "rpc.grpc.status_code": 14,
        "concord.channel": "web",
    }
    for secret in ("hunter2", "secret-customer", "r-1", "127.0.0.1"):
        assert secret not in recorded.text


@pytest.mark.parametrize("code", ["CANCELLED", "INVALID_ARGUMENT"])
async def test_what_the_caller_did_is_no_fault_of_the_server(code: str) -> None:
    recorded = Recorded()
    slow = FakeRecommender(delay=30)
    async with serving(Fakes(recommender=slow), tracing=recorded.tracing) as edge:
        request = REQUEST if code == "CANCELLED" else recommendation_pb2.RecommendRequest()
        call = asyncio.create_task(edge.raw(RECOMMEND, request.SerializeToString()))
        if code == "CANCELLED":
            await slow.called.wait()
            call.cancel()
        with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
            await call
        async with asyncio.timeout(5):
            while not recorded.spans:
                await asyncio.sleep(0.01)
    root = recorded.spans["RecommendationService/Recommend"]
    assert (root.attributes or {})["rpc.grpc.status_code"] == getattr(grpc.StatusCode, code).value[0]
    assert root.status.status_code is StatusCode.UNSET


async def test_without_tracing_an_error_names_the_request_alone() -> None:
    async with serving(Fakes(recommender=FakeRecommender(error=psycopg.OperationalError("x")))) as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.raw(RECOMMEND, REQUEST.SerializeToString(), metadata=(("x-request-id", "r-2"), ("traceparent", "junk")))
    assert refusal(caught.value).request_id == "r-2"


class Writer:
    """Notes what a log line of the group commit would carry."""

    def __init__(self) -> None:
        self.contexts: list[dict[str, Any]] = []
        self.gate = asyncio.Event()

    async def write(self, calls: Any) -> list[Written]:
        self.contexts.append(dict(structlog.contextvars.get_contextvars()))
        await self.gate.wait()
        return [Written((EventOutcome(Stored.STORED, "u"),), (Token("u", 1),)) for _ in calls]

    def caught_up(self, versions: Any) -> None: ...


class States:
    async def refresh(self, user_ids: Any) -> dict[str, int]:
        return dict.fromkeys(user_ids, 1)


async def test_a_group_commit_is_done_in_the_name_of_all_its_calls() -> None:
    recorded, writer = Recorded(), Writer()
    recorder = EventRecorder(writer, States(), Metrics(CollectorRegistry()), queue_events=100, batch_events=100)  # type: ignore[arg-type]
    running = asyncio.create_task(recorder.run())

    async def call(number: int) -> str:
        structlog.contextvars.bind_contextvars(request_id=f"r{number}")
        traced = recorded.tracing.call(f"EventService/RecordEvents{number}", ())
        event = IncomingEvent(Subject("u"), UUID(int=number), "web", "view", datetime(2026, 1, 1, tzinfo=UTC), "i", "")
        await recorder.record([event])
        traced.end("OK", "web")
        return traced.trace_id

    calls = [asyncio.create_task(call(0))]
    while not writer.contexts:
        await asyncio.sleep(0)
    calls += [asyncio.create_task(call(number)) for number in (1, 2)]  # they wait for the first commit, and share the next
    await asyncio.sleep(0.01)
    writer.gate.set()
    await asyncio.gather(*calls)
    running.cancel()
    assert [context["request_ids"] for context in writer.contexts] == [["r0"], ["r1", "r2"]]
    shared = recorded.spans["group commit"]  # the last one
    assert (shared.attributes or {})["concord.calls"] == 2
    assert parent_of(shared) == id_of(recorded.spans["EventService/RecordEvents1"])
    linked = recorded.spans["EventService/RecordEvents2"].get_span_context()
    assert linked is not None
    assert [link.context.trace_id for link in shared.links] == [linked.trace_id]
    assert parent_of(recorded.spans["commit"]) == id_of(shared)
    visible = recorded.spans["group publish"]  # of both groups: nobody waited between them
    assert (visible.attributes or {})["concord.calls"] == 3
    assert parent_of(visible) == id_of(recorded.spans["EventService/RecordEvents0"])
    assert parent_of(recorded.spans["online_write"]) == id_of(visible)


async def test_work_done_for_nobody_in_particular_leaves_no_context_behind() -> None:
    with on_behalf_of([origin()], "group commit"):
        assert structlog.contextvars.get_contextvars() == {"request_ids": []}
    assert structlog.contextvars.get_contextvars() == {}


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("SELECT user_id FROM users WHERE user_id = 'u_1'", "postgres SELECT users"),
        (
            "\nSELECT user_id, extract(epoch FROM now() - enqueued_at) FROM online_outbox FOR UPDATE SKIP LOCKED",
            "postgres SELECT online_outbox",
        ),
        ("INSERT INTO events (user_id) SELECT 1", "postgres INSERT events"),
        ("UPDATE users SET version = 1", "postgres UPDATE users"),
        (b"DELETE FROM online_outbox", "postgres DELETE online_outbox"),
        ("WITH moved AS (UPDATE users u SET version = 2)", "postgres WITH users"),
        ("LISTEN x", "postgres statement"),
        (object(), "postgres statement"),
    ],
)
def test_statements_are_named_by_verb_and_table(query: Any, name: str) -> None:
    assert statement_name(query) == name


def test_a_span_that_is_not_recorded_costs_next_to_nothing() -> None:
    """Measured 0.15 µs on 2 cores; a stage of the hit path takes 20 µs and more."""
    count = 20_000
    best = 1.0
    for _ in range(5):
        started = perf_counter()
        for _ in range(count):
            with span("offers"):
                pass
        best = min(best, (perf_counter() - started) / count)
    assert best < 3e-6, json.dumps({"seconds": best})
