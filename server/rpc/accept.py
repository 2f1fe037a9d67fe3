"""A gRPC server that takes on new calls only while there is room, so that overload waits, and is mostly refused, outside of Python.

grpc.aio accepts whatever arrives, and a call refused by a handler costs 0.15 ms, a quarter of a call answered: at ten times capacity
the server would do nothing else. gRPC's core refuses for some 0.02 ms, on another thread, once more calls wait to be accepted than
``grpc.server.max_pending_requests``; so what must be done is to accept late. Each method has a queue of its own there, so health
and operators' calls are accepted at once whatever customers' calls pile up.

The core ends a call without a word on when to come back. So while it turns calls away, one is refused in Python for every two that
are let in (0.06 ms): a part of the callers learn what is the matter, for 5 % of the answers.

Several calls of a method are asked of the core at a time. grpc.aio asks for one, and before it asks for the next it waits on one
future for every method there is.
"""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

# While there is no room, one call in this many seconds is refused.
REFUSAL_PAUSE = 0.004
# Calls let in for each refused while the core turns calls away.
_LET_IN = 2
# Calls of a method asked of the core at a time, and held while there is no room.
_AT_A_TIME = 8
# The core's count of calls is looked at 10 times a second, which costs 0.1 ms; it turned calls away in the last second if more
# arrived than were taken and can be waiting.
_LOOKS, _LOOK_SECONDS = 10, 0.1

# By whether requests and answers are streams.
_HANDLE = {
    (False, False): cygrpc._handle_unary_unary_rpc,
    (False, True): cygrpc._handle_unary_stream_rpc,
    (True, False): cygrpc._handle_stream_unary_rpc,
    (True, True): cygrpc._handle_stream_stream_rpc,
}


class Lane:
    """Calls in flight of one kind, and how many there may be; ``room`` is set while one more may come."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_flight = 0
        self.room = asyncio.Event()
        self.room.set()

    def enter(self) -> None:
        """Counts a call in."""
        self._in_flight += 1
        if self._in_flight >= self._most:
            self.room.clear()

    def leave(self, _task: object = None) -> None:
        """Counts a call out."""
        self._in_flight -= 1
        if self._in_flight < self._most:
            self.room.set()


class Edge(Protocol):
    """Says in which lane calls of a method are, wraps its handler, and refuses a call for which there is no room."""

    def lane_of(self, method: str) -> Lane | None:
        """Returns the lane of a method, None where there is always room."""
        ...

    def wrapped(self, method: str, handler: Any) -> Any:
        """Returns the handler that calls of a method are given to."""
        ...

    async def refuse(self, context: Any) -> None:
        """Ends a call with the status for one too many."""
        ...


class _Method:
    """One method: its handler, its lane, and the turn among calls that wait to be let in."""

    def __init__(self, name: str, handler: Any, lane: Lane | None) -> None:
        self.name = name
        self.handler = handler
        self.handle = _HANDLE[bool(handler.request_streaming), bool(handler.response_streaming)]
        self.lane = lane
        self.turn = asyncio.Lock()
        self.let_in = 0


class _PatientServer(cygrpc.AioServer):  # type: ignore[misc]
    """Overrides how grpcio asks its core for calls of the methods it knows; others it goes on asking for itself.

    ``most_waiting``: calls the core keeps waiting for a method before it turns all others away.
    """

    def __init__(self, edge: Edge, most_waiting: int, loop: asyncio.AbstractEventLoop, options: tuple[tuple[str, int], ...]) -> None:
        others = _servers()
        super().__init__(loop, None, (), (), options, None)
        (self._id,) = _servers() - others
        self._event_loop = loop
        self._edge = edge
        self._most_waiting = most_waiting
        self._methods: dict[bytes, _Method] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._taken = 0
        self._turns_away = False

    def add_registered_method_handlers(self, method_handlers: Mapping[str, Any]) -> None:
        """Wraps handlers once and for all."""
        wrapped = {name: self._edge.wrapped(name, handler) for name, handler in method_handlers.items()}
        for name, handler in wrapped.items():
            self._methods[name.encode()] = _Method(name, handler, self._edge.lane_of(name))
        super().add_registered_method_handlers(wrapped)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: object) -> None:
        """Adds none: generated code registers the same handlers again for servers that know no methods, and they are not wrapped."""

    async def shutdown(self, grace: float | None) -> None:
        """Stops counting once all calls have ended."""
        await super().shutdown(grace)
        for task in self._tasks:
            task.cancel()

    async def _request_registered_call(self, name: bytes) -> Any:
        """Takes calls of a method on until the server stops, which ends with an error as grpcio expects it to; never returns one."""
        if not self._tasks:
            self._spawn(self._watch())
        await asyncio.gather(*(self._accept(name, self._methods[name]) for _ in range(_AT_A_TIME)))

    async def _request_call(self) -> Any:
        call = await super()._request_call()
        self._taken += 1
        return call

    async def _accept(self, name: bytes, method: _Method) -> None:
        lane = method.lane
        while True:
            call = await super()._request_registered_call(name)
            self._taken += 1
            if lane is not None:
                if not (lane.room.is_set() and not self._turns_away and not method.turn.locked()) and not await self._has_room(
                    method, lane
                ):
                    await self._refuse(call)
                    continue
                lane.enter()
            task = self._spawn(
                cygrpc._schedule_rpc_coro(method.handle(method.handler, call, self._event_loop), call, self._event_loop, method.name)
            )
            if lane is not None:
                task.add_done_callback(lane.leave)

    async def _has_room(self, method: _Method, lane: Lane) -> bool:
        """Waits for room, one call after the other; says whether it came before the call's time to be refused did."""
        async with method.turn:
            if self._turns_away:
                method.let_in = (method.let_in + 1) % (_LET_IN + 1)
                if not method.let_in:
                    return False
            while not lane.room.is_set():
                try:
                    async with asyncio.timeout(REFUSAL_PAUSE):
                        await lane.room.wait()
                except TimeoutError:
                    return False
            return True

    async def _refuse(self, call: Any) -> None:
        with contextlib.suppress(grpc.aio.AbortError, cygrpc.ExecuteBatchError):  # the latter: the caller went away
            await self._edge.refuse(cygrpc._ServicerContext(call, None, None, self._event_loop))

    async def _watch(self) -> None:
        """Compares the core's count of calls with those taken, since it does not say when it turns calls away."""
        not_taken: deque[int] = deque(maxlen=_LOOKS)
        while True:
            counts = json.loads(cygrpc.channelz_get_server(self._id))["server"]["data"]
            not_taken.append(int(counts["callsStarted"]) - self._taken)
            self._turns_away = not_taken[-1] - min(not_taken) > self._most_waiting
            await asyncio.sleep(_LOOK_SECONDS)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._event_loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _servers() -> set[int]:
    """Returns the numbers under which the core counts for the servers of this process; it gives them out when first asked."""
    found: set[int] = set()
    while True:
        page = json.loads(cygrpc.channelz_get_servers(max(found, default=0) + 1))  # at most 100 at a time
        found |= {int(server["ref"]["serverId"]) for server in page.get("server", [])}
        if page.get("end"):
            return found


def patient_server(edge: Edge, *, most_waiting: int, options: Sequence[tuple[str, int]]) -> grpc.aio.Server:
    """Returns a server like that of ``grpc.aio.server`` that asks ``edge`` before it takes on a call.

    grpcio has no setting for this; tests fail if a release of it goes about accepting or counting in another way.
    """
    server: Any = grpc.aio.server(options=options)
    server._server = _PatientServer(edge, most_waiting, asyncio.get_running_loop(), tuple(options))
    return server  # type: ignore[no-any-return]
