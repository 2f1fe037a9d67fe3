"""EventService: telling Concord what customers did."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from concord.v1 import events_pb2, events_pb2_grpc
from server import tokens
from server.domain import EventOutcome, IncomingEvent, RecordOutcome, Stored
from server.errors import UnavailableError
from server.metrics import Metrics
from server.rpc.event_validation import EventValidator, canonical_id
from server.rpc.interceptor import Context
from server.rpc.ports import Recorder

# Events of streams being recorded at a time, shared evenly by all that are open; a faster sender is slowed by flow control. As many
# as two commits take: with eight batches of 50, a commit and the customers it concerns were too small for what each of them costs
# besides.
READ_AHEAD = 4_000
# How long a stream that has been idle for too long may take to send its last answers before it is broken off.
_PARTING_SECONDS = 1.0

_STATUS = {
    Stored.STORED: events_pb2.EVENT_STATUS_STORED,
    Stored.DUPLICATE: events_pb2.EVENT_STATUS_DUPLICATE,
    Stored.REJECTED: events_pb2.EVENT_STATUS_REJECTED,
}


class EventServicer(events_pb2_grpc.EventServiceServicer):
    """Records batches, one per call or many over a stream.

    Each batch of a stream has ``deadline_seconds``; a stream whose client sends nothing, or takes no answer, for ``idle_seconds``
    is ended, so that stalled clients do not hold the places of others.
    """

    def __init__(
        self, recorder: Recorder, validator: EventValidator, metrics: Metrics, *, deadline_seconds: float, idle_seconds: float
    ) -> None:
        self._recorder = recorder
        self._validator = validator
        self._metrics = metrics
        self._deadline_seconds = deadline_seconds
        self._idle_seconds = idle_seconds
        self._readers: set[asyncio.Task[None]] = set()
        self._draining = False

    async def RecordEvents(self, request: events_pb2.RecordEventsRequest, _context: Context) -> events_pb2.RecordEventsResponse:
        """Stores a batch of events."""
        results, outcome = await self._record(request.events)
        return events_pb2.RecordEventsResponse(results=results, tokens=_user_tokens(outcome), online=outcome.online)

    async def StreamEvents(
        self, requests: AsyncIterator[events_pb2.StreamEventsRequest], _context: Context
    ) -> AsyncIterator[events_pb2.StreamEventsResponse]:
        """Records up to its share of READ_AHEAD events at a time and answers their batches in the order sent.

        What ends the reading (a malformed message, the client's end, idleness) is told only after all batches before it are
        answered. A client that does not take these answers would keep us at the `yield` for ever: then the call is broken off.
        """
        answers: asyncio.Queue[asyncio.Task[events_pb2.StreamEventsResponse] | None] = asyncio.Queue()
        room = _Room(lambda: READ_AHEAD // max(1, len(self._readers)))
        reader = asyncio.create_task(self._read(requests, answers, room))
        self._readers.add(reader)
        reader.add_done_callback(lambda _: answers.put_nowait(None))
        reader.add_done_callback(_break_off(asyncio.current_task()))
        if self._draining:
            reader.cancel()
        try:
            while (answer := await answers.get()) is not None:
                response = await answer
                yield response
                room.leave(len(response.results))
            if reader.cancelled():
                raise UnavailableError("the server is stopping; send what is not answered to another", reason="SERVER_STOPPING")
            reader.result()
        finally:
            self._readers.discard(reader)
            await _end(reader, answers)

    def drain(self) -> None:
        """Makes every open stream answer what it has read and then end, so that stopping need not wait for its client."""
        self._draining = True
        for reader in self._readers:
            reader.cancel()

    async def _read(
        self,
        requests: AsyncIterator[events_pb2.StreamEventsRequest],
        answers: "asyncio.Queue[asyncio.Task[events_pb2.StreamEventsResponse] | None]",
        room: "_Room",
    ) -> None:
        while True:
            async with asyncio.timeout(self._idle_seconds):
                request = await anext(requests, None)
                if request is None:
                    return
                await room.enter(len(request.events))
            answers.put_nowait(asyncio.create_task(self._answer(request)))

    async def _answer(self, request: events_pb2.StreamEventsRequest) -> events_pb2.StreamEventsResponse:
        async with asyncio.timeout(self._deadline_seconds):
            results, outcome = await self._record(request.events)
        return events_pb2.StreamEventsResponse(
            sequence=request.sequence, results=results, tokens=_user_tokens(outcome), online=outcome.online
        )

    async def _record(self, events: Sequence[events_pb2.Event]) -> tuple[list[events_pb2.EventResult], RecordOutcome]:
        """Records the events that keep the rules, and puts what became of them in the places of all."""
        events = list(events)  # else protobuf makes an object of each of them every time they are gone through
        read = self._validator.events(events)
        accepted = [event for event in read if isinstance(event, IncomingEvent)]
        if len(accepted) < len(read):
            self._metrics.events(Stored.REJECTED.value, len(read) - len(accepted))
        outcome = await self._recorder.record(accepted) if accepted else RecordOutcome((), (), online=True)
        recorded = iter(outcome.outcomes)
        results = []
        for index, (event, checked) in enumerate(zip(events, read, strict=True)):
            if isinstance(checked, IncomingEvent):
                results.append(_result(str(checked.event_id), _placed(next(recorded), index)))
            else:
                results.append(_result(canonical_id(event.event_id), checked))
        return results, outcome


class _Room:
    """Lets batches in while their events are no more than ``most()`` together; one that is larger comes in alone."""

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._inside = 0
        self._left = asyncio.Event()

    async def enter(self, events: int) -> None:
        while self._inside and self._inside + events > self._most():
            self._left.clear()
            await self._left.wait()
        self._inside += events

    def leave(self, events: int) -> None:
        self._inside -= events
        self._left.set()


def _break_off(call: "asyncio.Task[object] | None") -> Callable[["asyncio.Task[None]"], None]:
    """Returns what cancels the call a while after its reader timed out; a call that has ended by then is not touched."""

    def after(reader: "asyncio.Task[None]") -> None:
        if call is not None and not reader.cancelled() and isinstance(reader.exception(), TimeoutError):
            asyncio.get_running_loop().call_later(_PARTING_SECONDS, call.cancel)

    return after


async def _end(reader: "asyncio.Task[None]", answers: "asyncio.Queue[asyncio.Task[events_pb2.StreamEventsResponse] | None]") -> None:
    """Cancels what a broken stream leaves behind; its events may be stored all the same, and the client sends them again."""
    left: list[asyncio.Task[object]] = [reader]
    while not answers.empty():
        if (answer := answers.get_nowait()) is not None:
            left.append(answer)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def _placed(outcome: EventOutcome, index: int) -> EventOutcome:
    """The recorder names a field of its event; the caller needs the path in the request."""
    return outcome._replace(field=f"events[{index}].{outcome.field}") if outcome.field else outcome


def _result(event_id: str, outcome: EventOutcome) -> events_pb2.EventResult:
    return events_pb2.EventResult(
        event_id=event_id,
        status=_STATUS[outcome.status],
        user_id=outcome.user_id,
        reason=outcome.reason,
        field=outcome.field,
        message=outcome.message,
    )


def _user_tokens(outcome: RecordOutcome) -> list[events_pb2.UserToken]:
    return [
        events_pb2.UserToken(user_id=token.user_id, user_version=token.version, consistency_token=tokens.encode(token))
        for token in outcome.tokens
    ]
