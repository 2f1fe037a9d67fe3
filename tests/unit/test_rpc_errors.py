"""The outermost boundary: every exception becomes a status that says enough and never too much; deadlines, load, ids, metrics."""

import asyncio
import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import grpc
import psycopg
import psycopg_pool
import pytest
import redis.exceptions

from concord.v1 import common_pb2, recommendation_pb2, recommendation_pb2_grpc
from server.domain import Answer, RecommendQuery
from server.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    StaleStateError,
    UnavailableError,
)
from tests.edge import Edge, refusal, serving
from tests.fakes import FakeRecommender, Fakes

RECOMMEND = "/concord.v1.RecommendationService/Recommend"
REQUEST = recommendation_pb2.RecommendRequest(subject=common_pb2.Subject(user_id="u1"), channel="web", surface="home")
Code = grpc.StatusCode


def failing(error: Exception) -> Fakes:
    return Fakes(recommender=FakeRecommender(error=error))


async def failure(edge: Edge, **options: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.raw(RECOMMEND, REQUEST.SerializeToString(), **options)
    return caught.value


@pytest.mark.parametrize(
    ("error", "code", "reason", "message", "pushback"),
    [
        (InvalidRequestError("limit", "is odd"), Code.INVALID_ARGUMENT, "INVALID_FIELD", "limit: is odd", ""),
        (NotFoundError("none", reason="GONE"), Code.NOT_FOUND, "GONE", "none", ""),
        (PreconditionError("not yet", reason="NO_ACTIVE_MODEL"), Code.FAILED_PRECONDITION, "NO_ACTIVE_MODEL", "not yet", ""),
        (ConflictError("moved", reason="SLATE_EXPIRED"), Code.ABORTED, "SLATE_EXPIRED", "moved", ""),
        (OverloadedError("full", reason="FULL"), Code.RESOURCE_EXHAUSTED, "FULL", "full", "250"),
        (UnavailableError("away", reason="AWAY"), Code.UNAVAILABLE, "AWAY", "away", "500"),
        (StaleStateError("old", reason="STALE"), Code.UNAVAILABLE, "STALE", "old", "500"),
    ],
)
async def test_our_errors_are_told_in_full(error: Exception, code: Code, reason: str, message: str, pushback: str) -> None:
    async with serving(failing(error)) as edge:
        refused = refusal(await failure(edge, metadata=(("x-request-id", "req-1"),)))
    assert (refused.code, refused.reason, refused.message, refused.pushback) == (code, reason, message, pushback)
    assert (refused.domain, refused.request_id) == ("concord", "req-1")
    assert (refused.field, refused.rule) == (("limit", "is odd") if code is Code.INVALID_ARGUMENT else ("", ""))


@pytest.mark.parametrize(
    ("error", "code", "reason", "pushback"),
    [
        (psycopg.OperationalError("secret-host"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", "500"),
        (psycopg.errors.AdminShutdown("secret"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", "500"),
        (psycopg.errors.QueryCanceled("secret"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", "500"),
        (psycopg.InterfaceError("the connection is closed: secret"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", "500"),
        (psycopg_pool.PoolTimeout("secret"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", "500"),
        (psycopg_pool.TooManyRequests("secret"), Code.RESOURCE_EXHAUSTED, "STORE_BUSY", "250"),
        (psycopg.errors.TooManyConnections("secret"), Code.RESOURCE_EXHAUSTED, "STORE_BUSY", "250"),
        (psycopg.errors.DiskFull("secret"), Code.RESOURCE_EXHAUSTED, "STORE_FULL", "-1"),
        (psycopg.errors.SerializationFailure("secret"), Code.ABORTED, "CONCURRENT_CHANGE", ""),
        (psycopg.errors.DeadlockDetected("secret"), Code.ABORTED, "CONCURRENT_CHANGE", ""),
        (redis.exceptions.ConnectionError("secret"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", "500"),
        (redis.exceptions.TimeoutError("secret"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", "500"),
        (redis.exceptions.BusyLoadingError("secret"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", "500"),
        (TimeoutError("secret"), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", ""),
    ],
)
async def test_store_errors_are_told_in_general(error: Exception, code: Code, reason: str, pushback: str) -> None:
    async with serving(failing(error)) as edge:
        caught = await failure(edge)
    refused = refusal(caught)
    assert (refused.code, refused.reason, refused.pushback) == (code, reason, pushback)
    assert "secret" not in str(caught) + str(caught.trailing_metadata())
    assert any(type(error).__name__ in str(call) for call in edge.log)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("secret"),
        psycopg.DataError("secret"),
        KeyError("secret"),
        redis.exceptions.ResponseError("secret"),
        ExceptionGroup("secret", [ValueError()]),
    ],
)
async def test_a_bug_tells_the_caller_a_random_id_and_nothing_else(error: Exception) -> None:
    async with serving(failing(error)) as edge:
        first, second = await failure(edge), await failure(edge)
    assert first.code() is Code.INTERNAL
    assert "secret" not in str(first) + str(first.trailing_metadata()) + (first.debug_error_string() or "")
    ids = [(caught.details() or "").removeprefix("internal error ") for caught in (first, second)]
    assert len(set(ids)) == 2
    assert all(len(error_id) == 32 for error_id in ids)
    logged = [call.kwargs for call in edge.log if call.method_name == "error"]
    assert [entry["error_id"] for entry in logged] == ids
    assert logged[0]["exc_info"] is error


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff",
        b"\x12\x02\xff\xfe",  # invalid UTF-8 in `channel`
        b"\x0a\xff",
        bytes(range(1, 256)),
        b"\x0b" * 500,  # groups within groups
    ],
)
async def test_malformed_messages_are_refused_without_a_word(raw: bytes) -> None:
    async with serving() as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.raw(RECOMMEND, raw)
        await edge.raw(RECOMMEND, REQUEST.SerializeToString())
    assert (caught.value.code(), caught.value.details()) == (Code.INVALID_ARGUMENT, "")
    assert "grpc-status-details-bin" not in dict(caught.value.trailing_metadata() or ())  # type: ignore[arg-type]
    assert len(edge.fakes.recommender.calls) == 1


async def test_a_message_over_the_limit_is_refused() -> None:
    async with serving(max_message_bytes=1000) as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.raw(RECOMMEND, b"\0" * 1001)
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED


async def test_a_call_without_deadline_is_given_one_and_its_handler_is_cancelled() -> None:
    async with serving(Fakes(recommender=FakeRecommender(delay=20)), default_deadline_seconds=0.1) as edge:
        refused = refusal(await failure(edge))
        assert (refused.code, refused.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert edge.fakes.recommender.cancelled == 1


async def test_a_call_with_its_own_deadline_keeps_it() -> None:
    async with serving(Fakes(recommender=FakeRecommender(delay=0.3)), default_deadline_seconds=0.1) as edge:
        await edge.raw(RECOMMEND, REQUEST.SerializeToString(), timeout=10)
        assert (await failure(edge, timeout=0.05)).code() is Code.DEADLINE_EXCEEDED


async def test_a_cancelled_call_cancels_its_handler_and_is_counted() -> None:
    async with serving(Fakes(recommender=FakeRecommender(delay=20))) as edge:
        call: Any = edge.channel.unary_unary(RECOMMEND)(REQUEST.SerializeToString())  # type: ignore[call-arg]
        await edge.fakes.recommender.called.wait()
        call.cancel()
        await counted(edge, code="CANCELLED")
        assert edge.fakes.recommender.cancelled == 1
        assert edge.registry.get_sample_value("concord_rpc_in_flight") == 0


async def test_load_beyond_the_bound_is_shed_with_pushback() -> None:
    async with serving(Fakes(recommender=FakeRecommender(delay=1.0)), max_in_flight=2) as edge:
        calls = [asyncio.create_task(edge.raw(RECOMMEND, REQUEST.SerializeToString())) for _ in range(5)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [refusal(result) for result in results if isinstance(result, grpc.aio.AioRpcError)]
        await edge.raw(RECOMMEND, REQUEST.SerializeToString())
    assert len(refused) == 3
    assert {(one.code, one.reason, one.pushback) for one in refused} == {(Code.RESOURCE_EXHAUSTED, "SERVER_OVERLOADED", "250")}


async def counted(edge: Edge, *, code: str, channel: str = "web") -> float:
    """Returns how many calls ended so; the counter moves just after the client has its answer."""
    labels = {"method": "RecommendationService/Recommend", "code": code, "channel": channel}
    for _ in range(200):
        if value := edge.registry.get_sample_value("concord_rpc_total", labels):
            return value
        await asyncio.sleep(0.01)
    raise AssertionError(f"no call was counted as {labels}")


@pytest.mark.parametrize(("channel", "label", "code"), [("store", "store", "OK"), ("fax", "", "INVALID_ARGUMENT")])
async def test_calls_are_counted_by_registered_channel_only(channel: str, label: str, code: str) -> None:
    request = recommendation_pb2.RecommendRequest(subject=REQUEST.subject, channel=channel, surface="home")
    async with serving() as edge:
        try:
            await edge.raw(RECOMMEND, request.SerializeToString())
        except grpc.aio.AioRpcError as error:
            assert error.code().name == code  # noqa: PT017 - one of the two cases fails by design
        assert await counted(edge, code=code, channel=label) == 1
        labels = {"method": "RecommendationService/Recommend", "channel": label}
        assert edge.registry.get_sample_value("concord_rpc_seconds_count", labels) == 1


@pytest.mark.parametrize(("sent", "echoed"), [("abc-123", True), ("", False), ("x" * 129, False), ("a b", False)])
async def test_the_request_id_comes_back(sent: str, echoed: bool) -> None:
    async with serving() as edge:
        call = recommendation_pb2_grpc.RecommendationServiceStub(edge.channel).Recommend(REQUEST, metadata=(("x-request-id", sent),))
        await call
        returned = dict(await call.trailing_metadata())["x-request-id"]
    assert (returned == sent) is echoed
    assert len(returned) == (len(sent) if echoed else 32)


class Witness:
    """Lives as long as the frame that made it."""


@dataclass
class WitnessedRecommender(FakeRecommender):
    witnesses: list["weakref.ref[Witness]"] = field(default_factory=list)

    async def recommend(self, query: RecommendQuery) -> Answer:
        witness = Witness()
        self.witnesses.append(weakref.ref(witness))
        raise NotFoundError("none", reason="GONE")


async def test_a_call_that_failed_is_held_by_nothing() -> None:
    """Held, its stream would stay open until the collector comes, and a connection has only so many."""
    recommender = WitnessedRecommender()
    async with serving(Fakes(recommender=recommender)) as edge:
        gc.disable()
        try:
            assert refusal(await failure(edge)).reason == "GONE"
            async with asyncio.timeout(5):
                while recommender.witnesses[0]() is not None:  # the server's end of the call comes after the client's
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()
