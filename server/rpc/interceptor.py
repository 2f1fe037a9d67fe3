"""The outermost interceptor: every call of ours passes it for load shedding, parsing, deadline, request id, metrics and errors."""

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from server.errors import ConcordError, OverloadedError, UnavailableError
from server.metrics import Metrics
from server.rpc.access import Access, Context, Rule, rule_of
from server.rpc.status import REQUEST_ID_KEY, failure_of, trailing_metadata
from server.security.principals import Principal, calling
from server.tracing import Tracing

_OURS = "/concord."
# Streams wait for their clients most of the time; what they send is bounded by the queue of events. Operators are few.
_MAX_STREAMS = 1024
_MAX_OPERATIONS = 32
# Four turns of the eight calls that are asked for at a time.
_ROOMY = 32
_OVERLOAD = OverloadedError("too many calls in flight", reason="SERVER_OVERLOADED")
_OVERLOADED = failure_of(_OVERLOAD, new_id=str)
_SHED_METADATA = trailing_metadata(_OVERLOADED, "")  # made once: refusing must cost next to nothing
_REQUEST_ID = re.compile(r"^[\x21-\x7e]{1,128}$")


__all__ = ["Context", "EdgeInterceptor"]


@dataclass
class _Call:
    """One call on its way; ``caller``, ``channel`` and ``code`` become known as it goes."""

    rule: Rule
    request_id: str
    code: str = "OK"
    channel: str = ""
    caller: Principal | None = None
    trace_id: str = ""

    @property
    def trace(self) -> dict[str, str]:
        """The trace id for logs and errors; nothing while tracing is off."""
        return {"trace_id": self.trace_id} if self.trace_id else {}


class _Lane:
    """Calls in flight of one kind, and how many there may be."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_flight = 0
        self.room = asyncio.Event()
        self.room.set()

    @property
    def full(self) -> bool:
        return self._in_flight >= self._most

    @property
    def roomy(self) -> bool:
        """True while calls asked for ahead cannot be too many, though they are counted only when their handlers begin."""
        return self._most - self._in_flight >= _ROOMY

    @property
    def overfull(self) -> bool:
        return self._in_flight > self._most

    def enter(self) -> None:
        self._in_flight += 1
        if self.full:
            self.room.clear()

    def leave(self) -> None:
        self._in_flight -= 1
        if not self.full:
            self.room.set()


class EdgeInterceptor:
    """Wraps the unary and bidirectional methods of this service; health and reflection pass untouched.

    Each service has a lane of its own, so that a store that hangs under one does not stop the others; so have operators' calls,
    which customers' load must not shed, and streams, which mostly wait. Parsing happens in here, because grpc.aio answers
    UNKNOWN, with parser text, to a malformed message.
    """

    def __init__(
        self,
        access: Access,
        metrics: Metrics,
        logger: structlog.stdlib.BoundLogger,
        *,
        channels: tuple[str, ...],
        default_deadline_seconds: float,
        max_in_flight: int,
        new_id: Callable[[], str],
        tracing: Tracing,
    ) -> None:
        self._access = access
        self._metrics = metrics
        self._logger = logger
        self._channels = frozenset(channels)
        self._default_deadline = default_deadline_seconds
        self._new_id = new_id
        self._tracing = tracing
        self._draining = False
        self._services: defaultdict[str, _Lane] = defaultdict(lambda: _Lane(max_in_flight))
        self._streams, self._operations = _Lane(_MAX_STREAMS), _Lane(_MAX_OPERATIONS)
        self._wrapped: dict[str, tuple[_Lane, Any]] = {}

    def for_method(self, method: str) -> _Lane | None:
        """Returns the lane of a method, None for those that are always answered; see server.rpc.accept."""
        known = self._wrapped.get(method)
        return known[0] if known is not None else None

    async def refuse(self, context: Context) -> None:
        """Ends a call for which there is no room: its message is not read, it gets no request id, and nothing is logged."""
        self._metrics.call_shed()
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _OVERLOADED.message, _SHED_METADATA)

    def wrapped(self, method: str, handler: Any) -> Any:
        """Returns the handler of one of our methods inside this edge, and others as they are."""
        if not method.startswith(_OURS):
            return handler
        known = self._wrapped[method] = self._wrap(handler, rule_of(method.removeprefix(_OURS).partition(".")[2]))
        return known[1]

    def _wrap(self, handler: Any, rule: Rule) -> tuple[_Lane, Any]:
        """Our contract has unary and bidirectional methods only; another kind would have to be wrapped here too."""
        lane = self._operations if rule.operational else self._services[rule.service]
        if handler.unary_unary is not None:
            return lane, grpc.unary_unary_rpc_method_handler(
                self._unary(handler, rule, lane), request_deserializer=None, response_serializer=handler.response_serializer
            )
        if handler.stream_stream is not None:
            return self._streams, grpc.stream_stream_rpc_method_handler(
                self._stream(handler, rule), request_deserializer=None, response_serializer=handler.response_serializer
            )
        raise TypeError(f"{rule.method} is neither unary nor bidirectional")

    def _unary(self, handler: Any, rule: Rule, lane: _Lane) -> Callable[[bytes, Any], Awaitable[Any]]:
        parse: Any = handler.request_deserializer
        behaviour: Any = handler.unary_unary
        access = self._access

        async def handle(raw: bytes, context: Context) -> Any:
            with self._call(rule, lane, context) as call:
                try:
                    self._admit(lane)
                    call.caller = await access.authenticate(context)
                    access.permit(rule, call.caller)
                    calling.set(call.caller)
                    request = parse(raw)
                    call.channel = self._channel_of(request)
                    with access.entered(rule, call.caller, request):
                        async with asyncio.timeout(self._default_deadline if context.time_remaining() is None else None):
                            return await access.audited(rule, call.caller, call.request_id, request, lambda: behaviour(request, context))
                except Exception as error:  # noqa: BLE001 - the outermost boundary: every exception becomes a status
                    await self._abort(error, call, context)

        return handle

    def _stream(self, handler: Any, rule: Rule) -> Callable[[AsyncIterator[bytes], Any], AsyncIterator[Any]]:
        """A stream lives as long as its client wants; the deadline of each of its messages is the servicer's."""
        parse: Any = handler.request_deserializer
        behaviour: Any = handler.stream_stream
        access = self._access

        async def parsed(raw_messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
            async for raw in raw_messages:
                yield parse(raw)

        async def handle(raw_messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            with self._call(rule, self._streams, context) as call:
                try:
                    self._admit(self._streams)
                    call.caller = await access.authenticate(context)
                    access.permit(rule, call.caller)
                    requests = access.checked_stream(rule, context, parsed(raw_messages))
                    async with aclosing(behaviour(requests, context)) as responses:
                        async for response in responses:
                            yield response
                except Exception as error:  # noqa: BLE001 - the outermost boundary: every exception becomes a status
                    await self._abort(error, call, context)

        return handle

    @contextmanager
    def _call(self, rule: Rule, lane: _Lane, context: Context) -> Iterator[_Call]:
        """Everything that holds from a call's first moment to its last, however it ends."""
        traced = self._tracing.call(rule.method, context.invocation_metadata() or ())
        call = _Call(rule, _request_id(context) or self._new_id(), trace_id=traced.trace_id)
        structlog.contextvars.bind_contextvars(request_id=call.request_id, method=rule.method, **call.trace)
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        started = perf_counter()
        lane.enter()
        self._metrics.call_started()
        try:
            yield call
        except (asyncio.CancelledError, GeneratorExit):
            call.code = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
            raise
        finally:
            lane.leave()
            self._metrics.call_finished()
            self._metrics.observe_rpc(rule.method, call.code, channel=call.channel, seconds=perf_counter() - started)
            traced.end(call.code, call.channel)

    def drain(self) -> None:
        """Refuses new calls from now on with UNAVAILABLE, which clients retry elsewhere; gRPC's own stop would say CANCELLED."""
        self._draining = True

    def _admit(self, lane: _Lane) -> None:
        if self._draining:
            raise UnavailableError("this server is stopping", reason="SERVER_STOPPING")
        if lane.overfull:  # let in beside others before any of them was counted
            self._metrics.call_shed()
            raise _OVERLOAD

    def _channel_of(self, request: Any) -> str:
        """Names the request's channel for metrics; callers' inventions would make the number of labels unbounded."""
        channel = getattr(request, "channel", "")
        return channel if channel in self._channels else ""

    async def _abort(self, error: Exception, call: _Call, context: Context) -> None:
        if isinstance(error, DecodeError):  # what the parser says of arbitrary bytes helps nobody but an attacker
            call.code = "INVALID_ARGUMENT"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "")
        await self._access.refused(call.rule, call.caller, call.request_id, error)
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
