"""A caller that never retries by itself, so that a row sees what the server really answered."""
# ruff: noqa: ASYNC109 - a call's timeout becomes its gRPC deadline, which the server sees.

import time
from collections import Counter
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import grpc

from concord import error_details
from concord.v1 import (
    catalog_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    features_pb2_grpc,
    identity_pb2_grpc,
    models_pb2_grpc,
    profile_pb2,
    profile_pb2_grpc,
    recommendation_pb2,
    recommendation_pb2_grpc,
    understanding_pb2_grpc,
)
from concord.v1.common_pb2 import Action, ChannelIdentity, Subject

PUSHBACK = "grpc-retry-pushback-ms"
_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)


@dataclass(frozen=True)
class Reply:
    """How a call ended: ``answer`` when it is OK, else code, reason and pushback (milliseconds, None without)."""

    code: str
    seconds: float
    answer: Any = None
    details: str = ""
    reason: str = ""
    pushback_ms: int | None = None

    @property
    def ok(self) -> bool:
        """True when the call was answered."""
        return self.code == "OK"


async def timed(call: Awaitable[Any]) -> Reply:
    """Awaits a call and says how it ended."""
    started = time.perf_counter()
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        trailing: Any = error.trailing_metadata() or ()
        pushback = next((int(value) for key, value in trailing if key == PUSHBACK), None)
        return Reply(error.code().name, time.perf_counter() - started, None, error.details() or "", error_details(error).reason, pushback)
    return Reply("OK", time.perf_counter() - started, answer)


def subject(whom: "str | Subject") -> Subject:
    """A string is Concord's own id of the customer."""
    return whom if isinstance(whom, Subject) else Subject(user_id=whom)


def identity(channel: str, name: str) -> Subject:
    """A customer as a channel knows them."""
    return Subject(identity=ChannelIdentity(channel=channel, channel_user_id=name))


def event(whom: "str | Subject", *, item: str = "x", key: str = "", channel: str = "web", **fields: Any) -> events_pb2.Event:
    """A view of an item, with an id of its own."""
    return events_pb2.Event(
        event_id=key or str(uuid4()), subject=subject(whom), channel=channel, item_id=item, **{"action": Action.ACTION_VIEW, **fields}
    )


class Caller:
    """One bare connection without retries. Every method returns a Reply and raises nothing of gRPC."""

    def __init__(
        self,
        address: str,
        *,
        options: Iterable[tuple[str, Any]] = (),
        timeout: float = 5.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        arguments = [*_OPTIONS, *options]
        if credentials is None:
            self.wire = grpc.aio.insecure_channel(address, options=arguments)
        else:
            self.wire = grpc.aio.secure_channel(address, credentials, options=arguments)
        self._timeout = timeout
        self.events = events_pb2_grpc.EventServiceStub(self.wire)
        self.recommendations = recommendation_pb2_grpc.RecommendationServiceStub(self.wire)
        self.profiles = profile_pb2_grpc.ProfileServiceStub(self.wire)
        self.catalog = catalog_pb2_grpc.CatalogServiceStub(self.wire)
        self.features = features_pb2_grpc.FeatureServiceStub(self.wire)
        self.identities = identity_pb2_grpc.IdentityServiceStub(self.wire)
        self.understanding = understanding_pb2_grpc.UnderstandingServiceStub(self.wire)
        self.models = models_pb2_grpc.ModelServiceStub(self.wire)

    async def __aenter__(self) -> Self:
        """Connects with the first call."""
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Closes the connection."""
        await self.wire.close()

    async def record(self, *events: events_pb2.Event, timeout: float | None = None) -> Reply:
        """Records events."""
        return await timed(self.events.RecordEvents(events_pb2.RecordEventsRequest(events=events), timeout=timeout or self._timeout))

    async def recommend(
        self, whom: "str | Subject", *, surface: str = "home", limit: int = 10, token: str = "", timeout: float | None = None, **more: Any
    ) -> Reply:
        """Asks for recommendations; exposures are not logged unless asked for."""
        request = recommendation_pb2.RecommendRequest(
            subject=subject(whom),
            channel="web",
            surface=surface,
            limit=limit,
            consistency_token=token,
            **{"skip_exposure_logging": True, **more},
        )
        return await timed(self.recommendations.Recommend(request, timeout=timeout or self._timeout))

    async def profile(self, whom: "str | Subject", *, token: str = "", timeout: float | None = None) -> Reply:
        """Reads a profile."""
        request = profile_pb2.GetProfileRequest(subject=subject(whom), consistency_token=token)
        return await timed(self.profiles.GetProfile(request, timeout=timeout or self._timeout))

    async def raw(self, method: str, body: bytes, *, timeout: float | None = None, metadata: Any = None) -> Reply:
        """Sends bytes to a method; the answer is bytes."""
        call = self.wire.unary_unary(method, request_serializer=None, response_deserializer=None)
        return await timed(call(body, timeout=timeout or self._timeout, metadata=metadata))


def codes(replies: Iterable[Reply]) -> str:
    """Returns how many calls ended how, such as "190 OK, 10 UNAVAILABLE"."""
    return ", ".join(f"{count} {code}" for code, count in sorted(Counter(reply.code for reply in replies).items(), key=lambda p: -p[1]))


def percentile(replies: Iterable[Reply], share: float) -> float:
    """Returns the time below which a share of the calls ended, in milliseconds."""
    ordered = sorted(reply.seconds for reply in replies)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000
