"""The life of a server process: opens its rooms and ports, joins the fleet, and drains on SIGTERM."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from server.app import ended, open_rooms, report_end
from server.fleet import FleetWatch
from server.health import HealthWatch
from server.listening import Ports
from server.loop import spare_what_stays
from server.metrics import Metrics, serve_metrics
from server.rpc.server import build_server
from server.security.gate import check_exposure
from server.settings import ServerSettings
from server.tracing import tracing

_log = structlog.get_logger(__name__)


async def serve(
    settings: ServerSettings, *, announce: Callable[[Ports], None], stop: asyncio.Event | None = None, is_worker: bool = False
) -> None:
    """Runs a server until SIGTERM, SIGINT or ``stop``, then lets calls in flight finish.

    A worker opens its ports when it has joined, not before: connections are dealt out to all who listen, and one that still loads
    would answer UNAVAILABLE where another could answer. A server by itself says there that it does not serve yet.

    Args:
        settings: everything the server can be told.
        announce: called once when the server answers.
        stop: what may end it besides a signal.
        is_worker: other processes serve on the same ports, and this one's metrics are collected on the loopback interface.

    Raises:
        SettingsError: the address is public and nothing was said about authentication.
    """
    check_exposure(settings, settings.host)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    stop = stop or asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    address = ("127.0.0.1", 0) if is_worker else (settings.host, settings.metrics_port)
    endpoint = serve_metrics(registry, *address) if settings.metrics_port >= 0 else None
    traces = tracing(settings)
    try:
        async with open_rooms(settings, metrics) as rooms, contextlib.AsyncExitStack() as stack:
            if is_worker and not await _unless(stop, _join(rooms.fleet, settings.host, settings.port)):
                return
            server = build_server(rooms.services, settings, metrics, _log, tracing=traces, share_ports=is_worker)
            await server.start()
            health = HealthWatch(rooms.probes, metrics, server.show_health)
            watching = asyncio.create_task(health.run(settings.health_seconds))
            watching.add_done_callback(report_end)
            stack.push_async_callback(ended, watching)
            if is_worker or await _unless(stop, _join(rooms.fleet, settings.host, server.port)):
                await health.look()
                spare_what_stays()
                await server.set_serving(True)
                announce(Ports(server.port, server.admin_port, endpoint.port if endpoint else -1))
                await stop.wait()
            _log.info("draining", seconds=settings.drain_seconds)
            await server.set_serving(False)
            await server.stop(settings.drain_seconds)
    finally:
        await traces.close()
        if endpoint:
            endpoint.close()


async def _unless(stop: asyncio.Event, act: Coroutine[Any, Any, None]) -> bool:
    """Runs ``act`` to its end, or until ``stop`` is set; says whether it ended."""
    acting, stopping = asyncio.ensure_future(act), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((acting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if acting.done():
            acting.result()
        return acting.done()
    finally:
        acting.cancel()
        stopping.cancel()
        await asyncio.gather(acting, stopping, return_exceptions=True)


async def _join(fleet: FleetWatch, host: str, port: int) -> None:
    """Loads what the fleet answers with before the first call, under the address by which the others name this replica."""
    name = socket.gethostname() if host in {"0.0.0.0", "::"} else host  # noqa: S104 - compared with, not bound to
    snapshot = await fleet.join(f"{name}:{port}")
    provider = snapshot.model.provider if snapshot.model else "none"
    _log.info("ready", model_version=snapshot.model_version, index_version=snapshot.index_version, onnx_provider=provider)
