"""The one table from exceptions to gRPC status codes, and the error details every failed call carries."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import psycopg
import psycopg_pool
import redis.exceptions
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from server.errors import (
    ConcordError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
)

DOMAIN = "concord"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
REQUEST_ID_KEY = "x-request-id"

_OVERLOAD_MS = 250  # a full queue drains in about this long
_AWAY_MS = 500  # a store that restarts needs longer
_NEVER_MS = -1  # gRFC A6: a negative pushback tells the client not to retry

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class _Row:
    """What errors of ``kinds`` become; our own errors bring their text and reason, a store's text is never shown."""

    kinds: tuple[type[BaseException], ...]
    code: grpc.StatusCode
    reason: str = ""
    message: str = ""
    pushback_ms: int | None = None


# The first row that fits holds, so special cases stand above general ones.
_TABLE = (
    _Row((InvalidRequestError,), grpc.StatusCode.INVALID_ARGUMENT),
    _Row((NotFoundError,), grpc.StatusCode.NOT_FOUND),
    _Row((PreconditionError,), grpc.StatusCode.FAILED_PRECONDITION),
    _Row((ConflictError,), grpc.StatusCode.ABORTED),
    _Row((UnauthenticatedError,), grpc.StatusCode.UNAUTHENTICATED),
    _Row((ForbiddenError,), grpc.StatusCode.PERMISSION_DENIED),
    _Row((OverloadedError,), grpc.StatusCode.RESOURCE_EXHAUSTED, pushback_ms=_OVERLOAD_MS),
    _Row((UnavailableError,), grpc.StatusCode.UNAVAILABLE, pushback_ms=_AWAY_MS),
    _Row((psycopg.errors.DiskFull,), grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL", "the store is full", _NEVER_MS),
    _Row(
        (psycopg.errors.TooManyConnections, psycopg_pool.TooManyRequests),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "STORE_BUSY",
        "the store takes no more connections now; try again",
        _OVERLOAD_MS,
    ),
    _Row(
        (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected),
        grpc.StatusCode.ABORTED,
        "CONCURRENT_CHANGE",
        "a concurrent change won; try again",
    ),
    _Row(
        (
            psycopg.OperationalError,  # psycopg_pool.PoolTimeout and PoolClosed are among these
            psycopg.InterfaceError,  # the connection was lost earlier
            redis.exceptions.ConnectionError,
            redis.exceptions.TimeoutError,
            redis.exceptions.ReadOnlyError,  # a replica during failover
            redis.exceptions.ClusterDownError,
        ),
        grpc.StatusCode.UNAVAILABLE,
        "STORE_UNAVAILABLE",
        "a store cannot answer now; try again",
        _AWAY_MS,
    ),
    _Row((TimeoutError,), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the deadline passed before the answer was ready"),
)


@dataclass(frozen=True)
class Failure:
    """What a failed call tells its caller.

    Attributes:
        violation: field and rule of the broken rule, None when no field is at fault.
        pushback_ms: pause to ask of the client before a retry, None to leave it to the client.
        error_id: set for a bug only; the log holds the traceback under it.
    """

    code: grpc.StatusCode
    reason: str
    message: str
    violation: tuple[str, str] | None = None
    pushback_ms: int | None = None
    error_id: str = ""


def failure_of(error: Exception, *, new_id: Callable[[], str]) -> Failure:
    """Looks an exception up in the table; what is not in it is a bug, of which the caller learns a random id and nothing else."""
    row = next((row for row in _TABLE if isinstance(error, row.kinds)), None)
    if row is None:
        error_id = new_id()
        return Failure(grpc.StatusCode.INTERNAL, "INTERNAL", f"internal error {error_id}", error_id=error_id)
    violation = (error.field, error.rule) if isinstance(error, InvalidRequestError) else None
    if isinstance(error, ConcordError):
        pause = error.pause_seconds if isinstance(error, OverloadedError) else None
        return Failure(row.code, error.reason, str(error), violation, row.pushback_ms if pause is None else math.ceil(pause * 1000))
    return Failure(row.code, row.reason, row.message, violation, row.pushback_ms)


def trailing_metadata(failure: Failure, request_id: str, **more: str) -> Metadata:
    """Returns the request id, the google.rpc.Status with its details (``more`` stands in ErrorInfo too), and the pushback if any."""
    details: list[Message] = [ErrorInfo(reason=failure.reason, domain=DOMAIN, metadata={"request_id": request_id, **more})]
    if failure.violation is not None:
        field, rule = failure.violation
        details.append(BadRequest(field_violations=[BadRequest.FieldViolation(field=field, description=rule, reason=failure.reason)]))
    status = Status(code=failure.code.value[0], message=failure.message, details=[_pack(detail) for detail in details])
    metadata: Metadata = ((REQUEST_ID_KEY, request_id), (DETAILS_KEY, status.SerializeToString()))
    return metadata if failure.pushback_ms is None else (*metadata, (PUSHBACK_KEY, str(failure.pushback_ms)))


def _pack(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
