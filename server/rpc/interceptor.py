"""The outermost interceptor: every call of ours passes it for load shedding, parsing, deadline, request id, metrics and errors."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from server.errors import ConcordError, OverloadedError, UnavailableError
from server.metrics import Metrics
from server.rpc.status import REQUEST_ID_KEY, failure_of, trailing_metadata
from server.tracing import Tracing

_OURS = "/concord."
_REQUEST_ID = re.compile(r"^[\x21-\x7e]{1,128}$")

# Text, because the class takes type arguments in the stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass
class _Call:
    """One call on its way; ``channel`` and ``code`` become known as it goes."""

    method: str
    request_id: str
    code: str = "OK"
    channel: str = ""
    trace_id: str = ""

    @property
    def trace(self) -> dict[str, str]:
        """The trace id for logs and errors; nothing while tracing is off."""
        return {"trace_id": self.trace_id} if self.trace_id else {}


class EdgeInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the unary and bidirectional methods of this service; health and reflection pass untouched.

    Parsing happens in here, because grpc.aio answers UNKNOWN, with parser text, to a malformed message.
    """

    def __init__(
        self,
        metrics: Metrics,
        logger: structlog.stdlib.BoundLogger,
        *,
        channels: tuple[str, ...],
        default_deadline_seconds: float,
        max_in_flight: int,
        new_id: Callable[[], str],
        tracing: Tracing,
    ) -> None:
        self._metrics = metrics
        self._logger = logger
        self._channels = frozenset(channels)
        self._default_deadline = default_deadline_seconds
        self._max_in_flight = max_in_flight
        self._new_id = new_id
        self._tracing = tracing
        self._draining = False
        self._in_flight = 0
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the wrapped handler of the method called; unknown methods stay unknown."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        if method not in self._wrapped:
            self._wrapped[method] = self._wrap(handler, method.removeprefix(_OURS).partition(".")[2])
        return self._wrapped[method]

    def _wrap(self, handler: Any, method: str) -> Any:
        """Our contract has unary and bidirectional methods only; another kind would have to be wrapped here too."""
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler, method), request_deserializer=None, response_serializer=handler.response_serializer
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler, method), request_deserializer=None, response_serializer=handler.response_serializer
            )
        raise TypeError(f"{method} is neither unary nor bidirectional")

    def _unary(self, handler: Any, method: str) -> Callable[[bytes, Any], Awaitable[Any]]:
        parse: Any = handler.request_deserializer
        behaviour: Any = handler.unary_unary

        async def handle(raw: bytes, context: Context) -> Any:
            with self._call(method, context) as call:
                try:
                    self._admit()
                    request = parse(raw)
                    call.channel = self._channel_of(request)
                    async with asyncio.timeout(self._default_deadline if context.time_remaining() is None else None):
                        return await behaviour(request, context)
                except Exception as error:  # noqa: BLE001 - the outermost boundary: every exception becomes a status
                    await self._abort(error, call, context)

        return handle

    def _stream(self, handler: Any, method: str) -> Callable[[AsyncIterator[bytes], Any], AsyncIterator[Any]]:
        """A stream lives as long as its client wants; the deadline of each of its messages is the servicer's."""
        parse: Any = handler.request_deserializer
        behaviour: Any = handler.stream_stream

        async def parsed(raw_messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
            async for raw in raw_messages:
                yield parse(raw)

        async def handle(raw_messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            with self._call(method, context) as call:
                try:
                    self._admit()
                    async with aclosing(behaviour(parsed(raw_messages), context)) as responses:
                        async for response in responses:
                            yield response
                except Exception as error:  # noqa: BLE001 - the outermost boundary: every exception becomes a status
                    await self._abort(error, call, context)

        return handle

    @contextmanager
    def _call(self, method: str, context: Context) -> Iterator[_Call]:
        """Everything that holds from a call's first moment to its last, however it ends."""
        traced = self._tracing.call(method, context.invocation_metadata() or ())
        call = _Call(method, _request_id(context) or self._new_id(), trace_id=traced.trace_id)
        structlog.contextvars.bind_contextvars(request_id=call.request_id, method=method, **call.trace)
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        started = perf_counter()
        self._in_flight += 1
        self._metrics.call_started()
        try:
            yield call
        except (asyncio.CancelledError, GeneratorExit):
            call.code = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
            raise
        finally:
            self._in_flight -= 1
            self._metrics.call_finished()
            self._metrics.observe_rpc(method, call.code, channel=call.channel, seconds=perf_counter() - started)
            traced.end(call.code, call.channel)

    def drain(self) -> None:
        """Refuses new calls from now on with UNAVAILABLE, which clients retry elsewhere; gRPC's own stop would say CANCELLED."""
        self._draining = True

    def _admit(self) -> None:
        if self._draining:
            raise UnavailableError("this server is stopping", reason="SERVER_STOPPING")
        if self._in_flight > self._max_in_flight:
            raise OverloadedError("too many calls in flight", reason="SERVER_OVERLOADED")

    def _channel_of(self, request: Any) -> str:
        """Names the request's channel for metrics; callers' inventions would make the number of labels unbounded."""
        channel = getattr(request, "channel", "")
        return channel if channel in self._channels else ""

    async def _abort(self, error: Exception, call: _Call, context: Context) -> None:
        if isinstance(error, DecodeError):  # what the parser says of arbitrary bytes helps nobody but an attacker
            call.code = "INVALID_ARGUMENT"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "")
        failure = failure_of(error, new_id=self._new_id)
        call.code = failure.code.name
        if failure.error_id:
            self._logger.error("call failed", error_id=failure.error_id, exc_info=error)
        elif not isinstance(error, ConcordError):  # our own refusals are counted, not logged: under overload they are many
            self._logger.warning("call failed", code=failure.code.name, error=f"{type(error).__name__}: {error}")
        await context.abort(failure.code, failure.message, trailing_metadata(failure, call.request_id, **call.trace))


def _request_id(context: Context) -> str:
    """Returns the caller's request id if it is printable and short, so that it can stand in a log line."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.match(value):
            return value
    return ""
