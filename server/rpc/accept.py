"""A gRPC server that takes on new calls only while there is room, so that overload waits, and is refused, outside of Python.

grpc.aio accepts whatever arrives, and a call refused in Python costs 0.16 ms, a sixth of a call answered: at ten times capacity the
server would do nothing else. gRPC's core refuses for some 0.02 ms, on another thread, once more calls wait to be accepted
than ``grpc.server.max_pending_requests``; so what must be done is to accept late. Each method has a queue of its own there,
so health and operators' calls are accepted at once whatever customers' calls pile up.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

# While there is no room, one call in this many seconds is accepted all the same, and refused with a word on when to come back.
REFUSAL_PAUSE = 0.004


class Room(Protocol):
    """Says whether one more call of a method can be taken on."""

    def for_method(self, method: str) -> asyncio.Event | None:
        """Returns what is set while there is room for the method, None where there always is."""
        ...


class _PatientServer(cygrpc.AioServer):  # type: ignore[misc]
    """Overrides how grpcio asks its core for the next call of one method; it keeps one such request open per method."""

    room: Room

    async def _request_registered_call(self, method: bytes) -> Any:
        room = self.room.for_method(method.decode())
        if room is not None and not room.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFUSAL_PAUSE):
                    await room.wait()
        return await super()._request_registered_call(method)


def patient_server(room: Room, *, interceptors: Sequence[Any], options: Sequence[tuple[str, int]]) -> grpc.aio.Server:
    """Returns a server like that of ``grpc.aio.server`` whose core asks ``room`` before it takes on a call.

    grpcio has no setting for this; a test fails if a release of it goes about accepting in another way, and then this server is
    no worse than the plain one.
    """
    server: Any = grpc.aio.server(interceptors=interceptors, options=options)
    server._server = _PatientServer(asyncio.get_running_loop(), None, (), tuple(interceptors), tuple(options), None)
    server._server.room = room
    return server  # type: ignore[no-any-return]
