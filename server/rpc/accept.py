"""A gRPC server that takes on new calls only while there is room, so that overload waits, and is refused, outside of Python.

grpc.aio accepts whatever arrives, and a call refused in Python costs 0.16 ms, a sixth of a call answered: at ten times capacity the
server would do nothing else. gRPC's core refuses for some 0.02 ms, on another thread, once more calls wait to be accepted
than ``grpc.server.max_pending_requests``; so what must be done is to accept late. Each method has a queue of its own there,
so health and operators' calls are accepted at once whatever customers' calls pile up.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

# While there is no room, one call in this many seconds is accepted all the same, and refused with a word on when to come back:
# 100 refusals a second, 1.6 % of a core.
REFUSAL_PAUSE = 0.01


class Lane(Protocol):
    """Where the calls of a kind find room."""

    @property
    def room(self) -> asyncio.Event:
        """Set while one more call can be taken on."""
        ...

    def refuse_next(self) -> None:
        """Has the next call refused."""
        ...


class Lanes(Protocol):
    """Knows the lane of each method."""

    def for_method(self, method: str) -> Lane | None:
        """Returns the method's lane, None where there is room always."""
        ...


class _PatientServer(cygrpc.AioServer):  # type: ignore[misc]
    """Overrides how grpcio asks its core for the next call of one method; it keeps one such request open per method."""

    lanes: Lanes
    _refused_at = -REFUSAL_PAUSE

    async def _request_registered_call(self, method: bytes) -> Any:
        lane = self.lanes.for_method(method.decode())
        if lane is not None and not lane.room.is_set():
            # Room comes and goes every millisecond under load, so the pause counts from the last refusal and not from now.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._refused_at + REFUSAL_PAUSE - perf_counter())):
                    await lane.room.wait()
            if not lane.room.is_set():
                self._refused_at = perf_counter()
                lane.refuse_next()
        return await super()._request_registered_call(method)


def patient_server(lanes: Lanes, *, interceptors: Sequence[Any], options: Sequence[tuple[str, int]]) -> grpc.aio.Server:
    """Returns a server like that of ``grpc.aio.server`` whose core asks ``lanes`` before it takes on a call.

    grpcio has no setting for this; a test fails if a release of it goes about accepting in another way, and then this server is
    no worse than the plain one.
    """
    server: Any = grpc.aio.server(interceptors=interceptors, options=options)
    server._server = _PatientServer(asyncio.get_running_loop(), None, (), tuple(interceptors), tuple(options), None)
    server._server.lanes = lanes
    return server  # type: ignore[no-any-return]
