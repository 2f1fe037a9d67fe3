"""The gRPC server of a process: services, interceptor, health and reflection, and a stop that loses no call."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter
from uuid import UUID, uuid4

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from concord.v1 import (
    articles_pb2,
    articles_pb2_grpc,
    assistant_pb2,
    assistant_pb2_grpc,
    catalog_pb2,
    catalog_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    features_pb2,
    features_pb2_grpc,
    identity_pb2,
    identity_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    profile_pb2,
    profile_pb2_grpc,
    recommendation_pb2,
    recommendation_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
    understanding_pb2,
    understanding_pb2_grpc,
)
from features.settings import SettingsError
from server.health import Health
from server.identifiers import new_identifier
from server.metrics import Metrics
from server.rpc.accept import patient_server
from server.rpc.access import Access
from server.rpc.articles import ArticleServicer
from server.rpc.assistant import AssistantServicer
from server.rpc.catalog import CatalogServicer
from server.rpc.event_validation import EventValidator
from server.rpc.events import EventServicer
from server.rpc.features import FeatureServicer
from server.rpc.health import DrainingHealth
from server.rpc.identity import IdentityServicer
from server.rpc.interceptor import EdgeInterceptor
from server.rpc.models import ModelServicer
from server.rpc.ports import Services
from server.rpc.profile import ProfileServicer
from server.rpc.recommendation import RecommendationServicer
from server.rpc.search import SearchServicer
from server.rpc.understanding import UnderstandingServicer
from server.rpc.validation import Validator
from server.security.certificates import server_credentials
from server.security.limits import ChannelLimits
from server.security.settings import is_loopback
from server.settings import ServerSettings
from server.tracing import Tracing

# Calls that gRPC's core keeps waiting for each method: past the first number it refuses some, past the second all. A replica
# answers about 1,000 a second, so whoever waits here waits a quarter of a second at the most.
_WAITING, _MOST_WAITING = 128, 256
_DRAIN_PAUSE = 0.3

SERVICE_NAMES = tuple(
    service.full_name
    for module in (
        articles_pb2,
        assistant_pb2,
        catalog_pb2,
        events_pb2,
        features_pb2,
        identity_pb2,
        models_pb2,
        profile_pb2,
        recommendation_pb2,
        search_pb2,
        understanding_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
)


class GrpcServer:
    """A bound gRPC server at ``port`` and, for admin methods, ``admin_port``; it says NOT_SERVING until ``set_serving(True)``.

    ``admin_port`` equals ``port`` where one port serves all.
    """

    def __init__(self, main: "_Port", admin: "_Port | None", health_servicer: DrainingHealth, events: EventServicer) -> None:
        self._ports = [main] if admin is None else [main, admin]
        self._health = health_servicer
        self._events = events
        self.port = main.number
        self.admin_port = self._ports[-1].number

    async def start(self) -> None:
        """Starts answering calls."""
        for port in self._ports:
            await port.server.start()

    async def set_serving(self, serving: bool) -> None:
        """Tells load balancers whether to send calls here."""
        await self._health.flip(serving)

    async def show_health(self, seen: Health) -> None:
        """Tells load balancers which services can answer with the dependencies that are up, and which those are."""
        await self._health.show(seen)

    async def stop(self, grace_seconds: float) -> None:
        """Says NOT_SERVING, then refuses new calls, and gives those in flight ``grace_seconds`` to finish; open streams are ended.

        The pauses let load balancers look away and let calls already on the wire be accepted: those that gRPC has received but
        not handed over when it stops end as CANCELLED, which no client retries.
        """
        await self._health.close()
        self._events.drain()
        await asyncio.sleep(min(_DRAIN_PAUSE, grace_seconds))
        for port in self._ports:
            port.edge.drain()
        await asyncio.sleep(min(_DRAIN_PAUSE, grace_seconds))
        await asyncio.gather(*(port.server.stop(grace_seconds) for port in self._ports))


@dataclass(frozen=True)
class _Port:
    """One listening server and its interceptor."""

    server: grpc.aio.Server
    edge: EdgeInterceptor
    number: int


def build_server(
    services: Services,
    settings: ServerSettings,
    metrics: Metrics,
    logger: structlog.stdlib.BoundLogger,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    new_uuid: Callable[[], UUID] = uuid4,
    tracing: Tracing | None = None,
    share_ports: bool = False,
) -> GrpcServer:
    """Builds a server over ``services`` and binds it to the main and the admin address of ``settings``.

    With ``share_ports`` other processes may bind the same ones, and the kernel gives each connection to one of them.

    Raises:
        SettingsError: an address cannot be bound, or certificates cannot be used.
    """
    validator = Validator(channels=settings.channels, surfaces=settings.surfaces)
    read_events = EventValidator(validator, now, new_uuid)
    events = EventServicer(
        services.recorder,
        read_events,
        metrics,
        deadline_seconds=settings.default_deadline_seconds,
        idle_seconds=settings.stream_idle_seconds,
    )
    health_servicer = DrainingHealth(SERVICE_NAMES)
    limits = ChannelLimits(
        in_flight=math.inf if settings.channel_share == 1 else max(1.0, settings.channel_share * settings.max_in_flight),
        calls_per_second=settings.channel_calls_per_second,
        events_per_second=settings.channel_events_per_second,
        clock=perf_counter,
    )

    def open_port(host: str, port: int, *, admin: bool | None) -> _Port:
        access = Access(services.gate, services.audit, limits, channels=settings.channels, admin_port=admin, clock=perf_counter)
        edge = EdgeInterceptor(
            access,
            metrics,
            logger,
            channels=settings.channels,
            default_deadline_seconds=settings.default_deadline_seconds,
            max_in_flight=settings.max_in_flight,
            new_id=new_identifier,
            tracing=tracing or Tracing(),
        )
        server = patient_server(edge, most_waiting=_MOST_WAITING, options=_options(settings, share_ports=share_ports))
        _register(
            server,
            services,
            events,
            validator,
            SearchServicer(services.searcher, services.suggester, read_events),
            new_uuid=new_uuid,
            deadline_seconds=settings.default_deadline_seconds,
        )
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        if is_loopback(host) if settings.reflection is None else settings.reflection:
            reflection.enable_server_reflection((*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = f"{host}:{port}"
        credentials = server_credentials(settings)  # one for each port: gRPC gives its first certificate to one server alone
        try:
            number = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        except RuntimeError:  # gRPC's own words for any reason; nearly always another process has the port
            raise SettingsError(f"CONCORD_{'ADMIN_' if admin else ''}PORT: cannot listen on {address}; is the port taken?") from None
        return _Port(server, edge, number)

    one_port = settings.admin_port < 0
    main = open_port(settings.host, settings.port, admin=None if one_port else False)
    return GrpcServer(main, None if one_port else open_port(settings.admin_host, settings.admin_port, admin=True), health_servicer, events)


def _register(
    server: grpc.aio.Server,
    services: Services,
    events: EventServicer,
    validator: Validator,
    search: SearchServicer,
    *,
    new_uuid: Callable[[], UUID],
    deadline_seconds: float,
) -> None:
    events_pb2_grpc.add_EventServiceServicer_to_server(events, server)
    identity = IdentityServicer(services.identities, services.graph, services.erasure, validator)
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(identity, server)
    profile_pb2_grpc.add_ProfileServiceServicer_to_server(ProfileServicer(services.profiles, validator), server)
    catalog_pb2_grpc.add_CatalogServiceServicer_to_server(CatalogServicer(services.catalog, validator), server)
    features_pb2_grpc.add_FeatureServiceServicer_to_server(FeatureServicer(services.features, validator), server)
    recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server(RecommendationServicer(services.recommender, validator), server)
    search_pb2_grpc.add_SearchServiceServicer_to_server(search, server)
    understanding = UnderstandingServicer(services.embedder, services.intents, services.sentiments, validator)
    understanding_pb2_grpc.add_UnderstandingServiceServicer_to_server(understanding, server)
    assistant = AssistantServicer(services.assistant, validator, new_event_id=new_uuid)
    assistant_pb2_grpc.add_AssistantServiceServicer_to_server(assistant, server)
    articles_pb2_grpc.add_ArticleServiceServicer_to_server(ArticleServicer(services.articles, validator), server)
    models_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(services.models, deadline_seconds=deadline_seconds), server)


def _options(settings: ServerSettings, *, share_ports: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(share_ports)),  # left to itself gRPC shares: a second server takes the same port without a word
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.absolute_max_metadata_size", 16 * 1024),  # left to itself gRPC lets up to a quarter more pass
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        ("grpc.server.max_pending_requests", _WAITING),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_WAITING),
        # A dead peer is noticed after 30 + 10 s; clients may ping idle connections every 10 s and no faster.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
