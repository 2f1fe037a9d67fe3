"""Traces: a span per call, stage, statement and model run, for calls that are sampled; nearly free for all others.

Where a call is being recorded stands in a context variable, so tasks and threads started for it know it too. Spans carry names,
counts and codes. Customer ids, tokens, parameters and the text of exceptions have no way in: spans are sent to another system.

The edge opens the first span itself instead of by opentelemetry-instrumentation-grpc (read at 0.66b2): that records exceptions
with their text, the caller's address and user agent, calls a cancelled call OK, and does so inside every handler anew.
"""

import asyncio
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import grpc
import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.settings import ServerSettings

Attributes = Mapping[str, str | int | float | bool]

_PROPAGATOR = TraceContextTextMapPropagator()  # no baggage: it is free text of the caller
_PROPAGATED = ("traceparent", "tracestate")
_EXPORT_SECONDS = 3.0  # a collector that is away must not hold up a stop for longer
# The caller is not at fault for these: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
_SERVER_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
_GRPC_CODES = {code.name: int(code.value[0]) for code in grpc.StatusCode}


@dataclass(frozen=True)
class _Here:
    """The place in a recorded trace that new spans hang under."""

    tracer: Tracer
    context: Context

    @property
    def span(self) -> Span:
        return trace.get_current_span(self.context)


_HERE: ContextVar[_Here | None] = ContextVar("concord_trace", default=None)
_NOTHING = nullcontext()


def span(name: str, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL) -> AbstractContextManager[None]:
    """Records the body as a span under the current one; outside a sampled call it does nothing, at the cost of one look-up."""
    here = _HERE.get()
    return _NOTHING if here is None else _recorded(here, name, attributes, kind=kind, links=())


@contextmanager
def _recorded(here: _Here, name: str, attributes: Attributes | None, *, kind: SpanKind, links: Sequence[Link]) -> Iterator[None]:
    opened = here.tracer.start_span(name, here.context, kind, attributes, links)
    _HERE.set(_Here(here.tracer, trace.set_span_in_context(opened, here.context)))
    try:
        yield
    except BaseException as error:
        # The type alone: an exception's text may quote a customer or an address.
        opened.set_attribute("error.type", type(error).__name__)
        opened.set_status(Status(StatusCode.ERROR))
        raise
    finally:
        _HERE.set(here)  # not reset by token: a generator closed from elsewhere would make that fail
        opened.end()


@dataclass(frozen=True)
class Origin:
    """The call that some work is done for: its request id, and its place in a trace when it is recorded."""

    request_id: str
    here: _Here | None


def origin() -> Origin:
    """Returns the call under way, to be handed to work that another task does for it."""
    return Origin(structlog.contextvars.get_contextvars().get("request_id", ""), _HERE.get())


@contextmanager
def on_behalf_of(origins: Sequence[Origin], name: str) -> Iterator[None]:
    """Does work shared by several calls: its log lines carry their request ids (20 at most), its span links to their traces.

    The span hangs under the first recorded call and is linked to the others.
    """
    places = [found.here for found in origins if found.here is not None]
    ids = list(dict.fromkeys(found.request_id for found in origins if found.request_id))[:20]
    work: AbstractContextManager[None] = _NOTHING
    if places:
        links = [Link(place.span.get_span_context()) for place in places[1:]]
        work = _recorded(places[0], name, {"concord.calls": len(origins)}, kind=SpanKind.INTERNAL, links=links)
    try:
        with structlog.contextvars.bound_contextvars(request_ids=ids), work:
            yield
    finally:
        _HERE.set(None)


class CallTrace:
    """The span of one call at the edge; ``trace_id`` is empty while tracing is off."""

    def __init__(self, opened: Span | None = None) -> None:
        self._span = opened
        self.trace_id = trace.format_trace_id(opened.get_span_context().trace_id) if opened else ""

    def end(self, code: str, channel: str) -> None:
        """Ends the span with the call's gRPC code; ``channel`` is a registered one or empty."""
        if self._span is None:
            return
        self._span.set_attributes({"rpc.grpc.status_code": _GRPC_CODES[code], "concord.channel": channel})
        if code in _SERVER_FAULTS:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


_UNTRACED = CallTrace()


class Tracing:
    """Opens the span of each call. Without a provider tracing is off."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("concord") if provider else None

    def call(self, method: str, metadata: Iterable[tuple[str, Any]]) -> CallTrace:
        """Opens the span of a call in its task, under the caller's span if the metadata names one (W3C trace context).

        Args:
            method: ``Service/Method``.
            metadata: the call's invocation metadata.
        """
        if self._tracer is None:
            return _UNTRACED
        carrier = {key: value for key, value in metadata if key in _PROPAGATED and isinstance(value, str)}
        service, _, name = method.partition("/")
        opened = self._tracer.start_span(
            method,
            _PROPAGATOR.extract(carrier, Context()),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": f"concord.v1.{service}", "rpc.method": name},
        )
        # gRPC gives each call a task, so what is set here ends with the call.
        _HERE.set(_Here(self._tracer, trace.set_span_in_context(opened, Context())) if opened.is_recording() else None)
        return CallTrace(opened)

    async def close(self) -> None:
        """Sends what is recorded and ends; takes a few seconds at the most when the collector is away."""
        if self._provider is not None:
            await asyncio.to_thread(self._provider.force_flush, int(_EXPORT_SECONDS * 1000))
            await asyncio.to_thread(self._provider.shutdown)


def tracing(settings: ServerSettings) -> Tracing:
    """Returns tracing to the collector that the settings name, or tracing that is off."""
    if not settings.otlp_endpoint:
        return Tracing()
    provider = trace_provider(settings.trace_ratio)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.otlp_endpoint, timeout=_EXPORT_SECONDS)))
    return Tracing(provider)


def trace_provider(ratio: float) -> TracerProvider:
    """Returns a provider that records ``ratio`` of the calls whose caller did not decide already."""
    resource = Resource.create({"service.name": "concord", "service.version": version("concord"), "service.instance.id": uuid.uuid4().hex})
    return TracerProvider(
        sampler=ParentBasedTraceIdRatio(ratio), resource=resource, span_limits=SpanLimits(max_links=128), shutdown_on_exit=False
    )
