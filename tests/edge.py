"""A real gRPC server over fakes, and what callers see of a call that failed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry

from server.metrics import Metrics
from server.rpc.server import GrpcServer, build_server
from server.settings import ServerSettings
from server.tracing import Tracing
from tests.fakes import NOW, Fakes


@dataclass
class Edge:
    """A running server over fakes, a channel to it, what it counted and what it logged."""

    fakes: Fakes
    server: GrpcServer
    channel: grpc.aio.Channel
    registry: CollectorRegistry
    log: list[Any]

    async def raw(self, method: str, message: bytes = b"", **options: Any) -> bytes:
        """Calls a unary method with bytes as they are."""
        answer: bytes = await self.channel.unary_unary(method)(message, **options)  # type: ignore[call-arg]
        return answer


@asynccontextmanager
async def serving(fakes: Fakes | None = None, *, tracing: Tracing | None = None, **settings: Any) -> AsyncIterator[Edge]:
    """Runs a real gRPC server over fakes on a free port."""
    fakes = fakes or Fakes()
    registry = CollectorRegistry()
    log = structlog.testing.CapturingLogger()
    server = build_server(
        fakes.services(),
        ServerSettings(**({"port": 0, "admin_port": -1} | settings)),
        Metrics(registry),
        structlog.wrap_logger(log, wrapper_class=structlog.stdlib.BoundLogger, processors=[_keep]),
        now=lambda: NOW,
        tracing=tracing,
    )
    await server.start()
    await server.set_serving(True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Edge(fakes, server, channel, registry, log.calls)
    await server.stop(0.05)


def _keep(_logger: Any, _method: str, event: Any) -> Any:
    return (), dict(event)


@dataclass(frozen=True)
class Refusal:
    """A failed call as a client sees it."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    domain: str = ""
    field: str = ""
    rule: str = ""
    request_id: str = ""
    pushback: str = ""


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Decodes the status and details of a failed call."""
    trailing: dict[str, Any] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]
    if "grpc-status-details-bin" not in trailing:
        return Refusal(error.code(), error.details() or "")
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        assert detail.Unpack(info) or detail.Unpack(bad)
    violation = bad.field_violations[0] if bad.field_violations else error_details_pb2.BadRequest.FieldViolation()
    return Refusal(
        error.code(),
        status.message,
        info.reason,
        info.domain,
        violation.field,
        violation.description,
        info.metadata["request_id"],
        str(trailing.get("grpc-retry-pushback-ms", "")),
    )
