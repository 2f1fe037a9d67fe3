"""Standard gRPC health: a status for the replica, for each service and for each dependency, and an end to open watches."""

import asyncio
from collections.abc import Iterable

from grpc_health.v1 import health, health_pb2

from server.health import DEPENDENCIES, Health
from server.rpc.interceptor import Context

DEPENDENCY_PREFIX = "concord.dependency."
"""Health names of dependencies, so that degraded states can be told apart: ``concord.dependency.redis`` and so on."""

_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class DrainingHealth(health.aio.HealthServicer):  # type: ignore[misc, name-defined]
    """NOT_SERVING from the start, and until the replica is warm; its open watches end on shutdown instead of using up the grace."""

    def __init__(self, services: Iterable[str]) -> None:
        super().__init__()
        self._closing = asyncio.Event()
        self._warm = False
        self._able = dict.fromkeys(("", *services), True)
        dependencies = (DEPENDENCY_PREFIX + name for name in DEPENDENCIES)
        self._server_status = dict.fromkeys((*self._able, *dependencies), _NOT_SERVING)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Streams a service's status until the client leaves or the server stops."""
        watch = asyncio.ensure_future(super().Watch(request, context))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait((watch, closing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            closing.cancel()
            await asyncio.gather(watch, closing, return_exceptions=True)

    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> health_pb2.HealthListResponse:
        """Lists every name with its status."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def flip(self, serving: bool) -> None:
        """Says whether the replica is warm; before that no service is SERVING, whatever its dependencies."""
        self._warm = serving
        await self._say(self._able)

    async def show(self, seen: Health) -> None:
        """Says of each service whether it can answer, and of each dependency whether it is up."""
        self._able.update(seen.services)
        self._able[""] = seen.overall
        await self._say(self._able)
        for name, up in seen.dependencies.items():
            await self._change(DEPENDENCY_PREFIX + name, up)

    async def close(self) -> None:
        """Says NOT_SERVING for good, then ends the watches."""
        await self.enter_graceful_shutdown()
        await asyncio.sleep(0)  # lets the watches send the last status
        self._closing.set()

    async def _say(self, able: dict[str, bool]) -> None:
        for name, can in able.items():
            await self._change(name, can and self._warm)

    async def _change(self, name: str, up: bool) -> None:
        status = _SERVING if up else _NOT_SERVING
        if self._server_status[name] != status:  # a watch that wakes for nothing costs a write lock of its condition
            await self.set(name, status)
