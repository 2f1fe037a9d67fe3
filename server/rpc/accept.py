"""A gRPC server that takes on new calls only while there is room, so that overload waits, and is mostly refused, outside of Python.

grpc.aio accepts whatever arrives, and a call refused by a handler costs 0.15 ms, a quarter of a call answered: at ten times capacity
the server would do nothing else. gRPC's core refuses for some 0.02 ms, on another thread, once more calls wait to be accepted than
``grpc.server.max_pending_requests``; so what must be done is to accept late. Each method has a queue of its own there, so health
and operators' calls are accepted at once whatever customers' calls pile up.

The core ends a call without a word on when to come back. So while it turns calls away, one is refused in Python for every six that
are let in (0.06 ms): a part of the callers learn what is the matter, for some 3 % of the answers.

While there is room several calls of a method are asked of the core at a time, and handlers are wrapped when they are registered:
grpc.aio asks for one, waits on one future for every method there is before it asks for the next, and looks for interceptors anew.
"""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

# While there is no room, one call in this many seconds is refused.
REFUSAL_PAUSE = 0.004
# Calls let in for each refused while the core turns calls away.
_LET_IN = 6
# Calls of a method asked of the core ahead of their turn: under load another thread brings them only every few milliseconds.
_AHEAD = 8
# Calls of a method asked for at a time while there is room for several times as many: a few turns of them come before any is counted.
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


class Lane(Protocol):
    """Calls in flight of one kind, and how many there may be."""

    @property
    def room(self) -> asyncio.Event:
        """Set while there is room for one more."""
        ...

    @property
    def roomy(self) -> bool:
        """True while calls asked for ahead cannot be too many."""
        ...


class Edge(Protocol):
    """Says whether one more call of a method can be taken on, and refuses one that cannot."""

    def for_method(self, method: str) -> Lane | None:
        """Returns the lane of a method, None where there is always room."""
        ...

    def wrapped(self, method: str, handler: Any) -> Any:
        """Returns the handler that calls of a method are given to."""
        ...

    async def refuse(self, context: Any) -> None:
        """Ends a call with the status for one too many."""
        ...


class _Line:
    """Calls of one method that the core handed over and that wait to be let in; ``places`` are free for as many more.

    ``fetchers`` ask the core for them, only while there is no room or calls are turned away: asked for one at a time, as grpcio does
    it, a call costs 0.06 ms less.
    """

    def __init__(self) -> None:
        self.places = asyncio.Semaphore(_AHEAD)
        self.fetchers = 0
        self.turn = asyncio.Lock()
        self._calls: asyncio.Queue[Any] = asyncio.Queue()

    def __len__(self) -> int:
        return self._calls.qsize()

    def join(self, call: Any) -> None:
        self._calls.put_nowait(call)

    async def next(self) -> Any:
        call = await self._calls.get()
        self.places.release()
        return call

    def leave(self) -> list[Any]:
        return [self._calls.get_nowait() for _ in range(self._calls.qsize())]


class _PatientServer(cygrpc.AioServer):  # type: ignore[misc]
    """Overrides how grpcio asks its core for the next call; it keeps one such request open per method.

    ``most_waiting``: calls the core keeps waiting for a method before it turns all others away.
    """

    def __init__(self, edge: Edge, most_waiting: int, *arguments: Any) -> None:
        others = _servers()
        super().__init__(*arguments)
        (self._id,) = _servers() - others
        self._edge = edge
        self._most_waiting = most_waiting
        self._lines: dict[bytes, _Line] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._taken = self._let_in = 0
        self._turns_away = False
        self._stopping = False
        self._closing = asyncio.Event()
        self._event_loop = arguments[0]
        self._handlers: dict[bytes, Any] = {}

    def add_registered_method_handlers(self, method_handlers: Any) -> None:
        """Wraps handlers once and for all."""
        wrapped = {name: self._edge.wrapped(name, handler) for name, handler in method_handlers.items()}
        self._handlers |= {name.encode(): handler for name, handler in wrapped.items()}
        super().add_registered_method_handlers(wrapped)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: object) -> None:
        """Adds none: generated code registers the same handlers again for servers that know no methods, and they are not wrapped."""

    async def shutdown(self, grace: float | None) -> None:
        """Refuses the calls that wait to be let in: dropped, they would stay open and hold up the end."""
        self._stopping = True
        await asyncio.gather(*(self._refuse(call) for line in self._lines.values() for call in line.leave()))
        self._closing.set()
        await super().shutdown(grace)
        for task in self._tasks:
            task.cancel()

    async def _request_registered_call(self, method: bytes) -> Any:
        """Takes calls of a method on until the server stops, which ends with an error as grpcio expects it to; never returns one."""
        await asyncio.gather(*(self._accept(method) for _ in range(_AT_A_TIME)))

    async def _accept(self, method: bytes) -> None:
        handler, name, loop = self._handlers[method], method.decode(), self._event_loop
        handle = _HANDLE[bool(handler.request_streaming), bool(handler.response_streaming)]
        while True:
            call = await self._next(method)
            self._spawn(cygrpc._schedule_rpc_coro(_released(handle(handler, call, loop)), call, loop, name))

    async def _next(self, method: bytes) -> Any:
        lane = self._edge.for_method(method.decode())
        if lane is None:
            return await self._take(method)
        line = self._line(method)
        if lane.roomy and not line.fetchers and not len(line) and not self._turns_away:
            self._let_in += 1
            return await self._take(method)
        async with line.turn:
            return await self._patiently(method, line, lane.room)

    async def _patiently(self, method: bytes, line: _Line, room: asyncio.Event) -> Any:
        if not line.fetchers and not len(line) and not self._short_of(room):
            self._let_in += 1
            return await self._take(method)
        while not room.is_set():
            self._fetch(method, line, room, _AHEAD)
            try:
                async with asyncio.timeout(REFUSAL_PAUSE):
                    await room.wait()
            except TimeoutError:
                if len(line):
                    self._spawn(self._refuse(await line.next()))
        self._let_in += 1
        if self._turns_away and self._let_in % _LET_IN == 0 and len(line):
            self._spawn(self._refuse(await line.next()))
        self._fetch(method, line, room, _AHEAD if self._turns_away else not len(line))
        return await line.next()

    def _short_of(self, room: asyncio.Event) -> bool:
        return self._turns_away or not room.is_set()

    async def _request_call(self) -> Any:
        call = await super()._request_call()
        self._taken += 1
        return call

    async def _take(self, method: bytes) -> Any:
        if self._stopping:  # to ask a core that has shut down ends the process
            await self._closing.wait()
            raise cygrpc._RequestCallError("the server stops")
        call = await super()._request_registered_call(method)
        self._taken += 1
        return call

    def _line(self, method: bytes) -> _Line:
        if not self._lines:
            self._spawn(self._watch())
        return self._lines.setdefault(method, _Line())

    def _fetch(self, method: bytes, line: _Line, room: asyncio.Event, fetchers: int) -> None:
        """Sees to it that so many calls are asked of the core ahead of their turn."""
        for _ in range(fetchers - line.fetchers):
            line.fetchers += 1
            self._spawn(self._fill(method, line, room))

    async def _fill(self, method: bytes, line: _Line, room: asyncio.Event) -> None:
        """Brings calls until there is room again; what it has asked of the core cannot be taken back, so one more comes."""
        try:
            with contextlib.suppress(cygrpc._RequestCallError):  # the server stops
                while not self._stopping:
                    await line.places.acquire()
                    call = await self._take(method)
                    if self._stopping:
                        await self._refuse(call)
                        return
                    line.join(call)
                    if not self._short_of(room):
                        return
        finally:
            line.fetchers -= 1

    async def _refuse(self, call: Any) -> None:
        context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())
        with contextlib.suppress(grpc.aio.AbortError, cygrpc.ExecuteBatchError):  # the latter: the caller went away
            await _released(self._edge.refuse(context))

    async def _watch(self) -> None:
        """Compares the core's count of calls with those taken, since it does not say when it turns calls away."""
        not_taken: deque[int] = deque(maxlen=_LOOKS)
        while True:
            counts = json.loads(cygrpc.channelz_get_server(self._id))["server"]["data"]
            not_taken.append(int(counts["callsStarted"]) - self._taken)
            self._turns_away = not_taken[-1] - min(not_taken) > self._most_waiting
            await asyncio.sleep(_LOOK_SECONDS)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _released(answering: Coroutine[Any, Any, None]) -> None:
    """Answers a call so that nothing holds it once it has ended, with an error too.

    The call keeps the error it was aborted with, whose traceback and cause keep the call: left so, its stream would stay open until
    the collector comes.
    """
    try:
        await answering
    except grpc.aio.AbortError as error:
        error.__traceback__ = error.__context__ = None
        raise


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
    server._server = _PatientServer(edge, most_waiting, asyncio.get_running_loop(), None, (), (), tuple(options), None)
    return server  # type: ignore[no-any-return]
