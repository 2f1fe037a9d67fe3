"""Reads why a call failed from the standard ``google.rpc.Status`` that Concord sends with every error."""

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

_STATUS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class ErrorDetails:
    """Why a call failed.

    Attributes:
        reason: machine-readable, UPPER_SNAKE_CASE, such as ``CHANNEL_UNKNOWN``; empty when the error is not Concord's own
            (no connection, a deadline passed on the way).
        field: path of the request field at fault, such as ``events[3].channel``; empty when it is not about one field.
        message: for a person to read; its wording may change.
    """

    reason: str
    field: str
    message: str


def error_details(error: grpc.aio.AioRpcError) -> ErrorDetails:
    """Returns the reason, field and message of a failed call.

    Example:
        ```python
        try:
            await concord.recommend("anna", surface="hoem")
        except grpc.aio.AioRpcError as error:
            print(error.code(), error_details(error))  # INVALID_ARGUMENT, reason SURFACE_UNKNOWN, field "surface"
        ```
    """
    plain = ErrorDetails("", "", error.details() or "")
    metadata: Any = error.trailing_metadata()
    packed = next((value for key, value in metadata or () if key == _STATUS_KEY), b"")
    try:
        return _read(packed, plain)
    except DecodeError:  # not Concord's but a proxy's own, malformed: the code still says how the call failed
        return plain


def _read(packed: bytes, plain: ErrorDetails) -> ErrorDetails:
    reason, field, message = plain.reason, plain.field, plain.message
    for detail in Status.FromString(packed).details:
        info, bad = ErrorInfo(), BadRequest()
        if detail.Unpack(info) and info.domain == "concord":
            reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            field, message = bad.field_violations[0].field, bad.field_violations[0].description or message
    return ErrorDetails(reason, field, message)
