"""RecordEvents and StreamEvents: rejections event by event, results in order, streams that end cleanly."""

import asyncio
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from concord.v1 import common_pb2, events_pb2, events_pb2_grpc
from server import tokens
from server.domain import IncomingEvent, Subject, Token
from server.errors import OverloadedError, UnavailableError
from server.rpc import events as rpc_events
from tests.edge import Edge, refusal, serving
from tests.fakes import NOW, FakeRecorder, Fakes

ID = "00000000-0000-4000-8000-0000000000{:02}"
STREAM = "/concord.v1.EventService/StreamEvents"


def event(number: int = 0, **changes: Any) -> events_pb2.Event:
    base = {
        "event_id": ID.format(number),
        "subject": common_pb2.Subject(user_id="u1"),
        "channel": "web",
        "action": common_pb2.ACTION_VIEW,
        "item_id": "i1",
    }
    return events_pb2.Event(**base | changes)


async def record(edge: Edge, *events: events_pb2.Event) -> events_pb2.RecordEventsResponse:
    answer: events_pb2.RecordEventsResponse = await events_pb2_grpc.EventServiceStub(edge.channel).RecordEvents(
        events_pb2.RecordEventsRequest(events=events)
    )
    return answer


def stamp(offset: timedelta) -> Timestamp:
    result = Timestamp()
    result.FromDatetime(NOW + offset)
    return result


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"event_id": "x"}, "EVENT_ID_INVALID", "event_id"),
        ({"event_id": "{00000000-0000-4000-8000-000000000000}"}, "EVENT_ID_INVALID", "event_id"),
        ({"event_id": "urn:uuid:00000000-0000-4000-8000-000000000000"}, "EVENT_ID_INVALID", "event_id"),
        ({"event_id": ID.format(1) + "\n"}, "EVENT_ID_INVALID", "event_id"),
        ({"channel": "fax"}, "CHANNEL_UNKNOWN", "channel"),
        ({"channel": ""}, "CHANNEL_UNKNOWN", "channel"),
        (
            {"subject": common_pb2.Subject(identity=common_pb2.ChannelIdentity(channel="fax", channel_user_id="a"))},
            "CHANNEL_UNKNOWN",
            "subject.identity.channel",
        ),
        ({"subject": common_pb2.Subject(user_id="u" * 129)}, "INVALID_FIELD", "subject.user_id"),
        ({"action": 0}, "ACTION_UNSPECIFIED", "action"),
        ({"action": 99}, "ACTION_UNSPECIFIED", "action"),
        ({"item_id": ""}, "ITEM_ID_REQUIRED", "item_id"),
        ({"item_id": "i" * 129}, "INVALID_FIELD", "item_id"),
        ({"item_id": "i\0"}, "INVALID_FIELD", "item_id"),
        ({"text": "t" * 2001}, "TEXT_TOO_LONG", "text"),
        ({"text": "t\0"}, "INVALID_FIELD", "text"),
        ({"session_id": "s" * 129}, "INVALID_FIELD", "session_id"),
        ({"slate_id": "s" * 129}, "INVALID_FIELD", "slate_id"),
        ({"value": math.nan}, "VALUE_INVALID", "value"),
        ({"value": math.inf}, "VALUE_INVALID", "value"),
        ({"action": common_pb2.ACTION_PURCHASE, "value": -1.0}, "VALUE_INVALID", "value"),
        ({"action": common_pb2.ACTION_RETURN, "value": 1e300}, "VALUE_INVALID", "value"),
        ({"action": common_pb2.ACTION_RATE, "value": 0.5}, "VALUE_INVALID", "value"),
        ({"action": common_pb2.ACTION_REVIEW, "value": 5.1}, "VALUE_INVALID", "value"),
        ({"quantity": -1.0}, "QUANTITY_INVALID", "quantity"),
        ({"quantity": -math.inf}, "QUANTITY_INVALID", "quantity"),
        ({"occurred_at": stamp(timedelta(hours=1, seconds=1))}, "OCCURRED_AT_IN_FUTURE", "occurred_at"),
        ({"occurred_at": Timestamp(seconds=-1)}, "OCCURRED_AT_INVALID", "occurred_at"),
        ({"occurred_at": Timestamp(seconds=253402300799)}, "OCCURRED_AT_INVALID", "occurred_at"),
        ({"occurred_at": Timestamp(nanos=10**9)}, "OCCURRED_AT_INVALID", "occurred_at"),
    ],
)
async def test_a_bad_event_is_rejected_alone(changes: dict[str, Any], reason: str, field: str) -> None:
    async with serving() as edge:
        answer = await record(edge, event(1), event(2, **changes), event(3))
    good, bad, last = answer.results
    assert good.status == last.status == events_pb2.EVENT_STATUS_STORED
    assert (bad.status, bad.reason, bad.field) == (events_pb2.EVENT_STATUS_REJECTED, reason, f"events[1].{field}")
    assert bad.message
    assert (bad.user_id, bad.event_id) == ("", changes.get("event_id", ID.format(2)))
    assert [e.event_id for e in edge.fakes.recorder.calls[0]] == [UUID(ID.format(1)), UUID(ID.format(3))]
    assert edge.registry.get_sample_value("concord_ingest_events_total", {"status": "rejected"}) == 1


@pytest.mark.parametrize(
    ("events", "field"),
    [
        ([], "events"),
        ([event()] * 501, "events"),
        ([event(), event(1, subject=None)], "events[1].subject"),
        ([event(), event(1, subject=common_pb2.Subject())], "events[1].subject"),
        ([event(), event(1, subject=common_pb2.Subject(user_id=""))], "events[1].subject"),
        ([event(), event(1, subject=common_pb2.Subject(identity=common_pb2.ChannelIdentity(channel="web")))], "events[1].subject"),
    ],
)
async def test_a_malformed_batch_is_refused_whole(events: list[events_pb2.Event], field: str) -> None:
    async with serving() as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await record(edge, *events)
    assert (refusal(caught.value).code, refusal(caught.value).field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert edge.fakes.recorder.calls == []


async def test_an_event_is_read_whole() -> None:
    sent = event(
        7,
        action=common_pb2.ACTION_PURCHASE,
        text="'); DROP TABLE events; --",
        value=19.99,
        quantity=2.0,
        session_id="s",
        slate_id="sl",
        occurred_at=Timestamp(seconds=1_700_000_000, nanos=123_456_789),
    )
    async with serving() as edge:
        await record(edge, sent)
    assert edge.fakes.recorder.calls[0][0] == IncomingEvent(
        subject=Subject(user_id="u1"),
        event_id=UUID(ID.format(7)),
        channel="web",
        action="purchase",
        occurred_at=sent.occurred_at.ToDatetime(NOW.tzinfo),
        item_id="i1",
        text="'); DROP TABLE events; --",
        value=19.99,
        quantity=2.0,
        session_id="s",
        slate_id="sl",
    )


async def test_defaults_channel_of_the_identity_time_of_receipt_and_a_fresh_id() -> None:
    subject = common_pb2.Subject(identity=common_pb2.ChannelIdentity(channel="store", channel_user_id="card"))
    async with serving() as edge:
        answer = await record(edge, event(event_id="", subject=subject, channel="", action=common_pb2.ACTION_SEARCH, item_id=""))
    stored = edge.fakes.recorder.calls[0][0]
    assert (stored.channel, stored.occurred_at, stored.item_id, stored.text, stored.value) == ("store", NOW, None, None, None)
    assert answer.results[0].event_id == str(stored.event_id)


async def test_a_value_means_nothing_to_a_view() -> None:
    async with serving() as edge:
        await record(edge, event(value=3.0))
    assert edge.fakes.recorder.calls[0][0].value is None


async def test_duplicates_canonical_ids_and_tokens() -> None:
    async with serving() as edge:
        await record(edge, event(1))
        answer = await record(edge, event(1, event_id=ID.format(1).replace("-", "").upper()), event(2))
    assert [result.status for result in answer.results] == [events_pb2.EVENT_STATUS_DUPLICATE, events_pb2.EVENT_STATUS_STORED]
    assert answer.results[0].event_id == ID.format(1)
    assert [(token.user_id, token.user_version) for token in answer.tokens] == [("u1", 2)]
    assert tokens.decode(answer.tokens[0].consistency_token, "") == Token("u1", 2)
    assert answer.online


async def test_a_batch_of_rejected_events_stores_nothing() -> None:
    async with serving() as edge:
        answer = await record(edge, event(channel="fax"))
    assert answer.results[0].status == events_pb2.EVENT_STATUS_REJECTED
    assert not answer.tokens
    assert edge.fakes.recorder.calls == []


def batch(sequence: int, *events: events_pb2.Event) -> events_pb2.StreamEventsRequest:
    return events_pb2.StreamEventsRequest(sequence=sequence, events=events or [event(sequence)])


class Backwards(FakeRecorder):
    """Finishes later calls first, and remembers how many ran at once."""

    running = most = 0

    async def record(self, events: Any) -> Any:
        self.running += 1
        self.most = max(self.most, self.running)
        self.delay = 0.1 / (1 + len(self.calls))
        try:
            return await super().record(events)
        finally:
            self.running -= 1


async def test_a_stream_answers_in_order_while_batches_run_side_by_side() -> None:
    recorder = Backwards()
    async with serving(Fakes(recorder=recorder)) as edge:
        call = events_pb2_grpc.EventServiceStub(edge.channel).StreamEvents(iter([batch(n) for n in range(30)]))
        answers = [answer async for answer in call]
    assert [answer.sequence for answer in answers] == list(range(30))
    assert all(answer.results[0].status == events_pb2.EVENT_STATUS_STORED for answer in answers)
    assert 1 < recorder.most <= 30


@pytest.mark.parametrize(("events", "batches"), [(1, 8), (3, 2), (20, 1)], ids=["small batches", "larger ones", "one that is too large"])
async def test_a_stream_reads_ahead_only_so_far(events: int, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_events, "READ_AHEAD", 8)
    requests = [events_pb2.StreamEventsRequest(sequence=n, events=[event(events * n + k) for k in range(events)]) for n in range(30)]
    async with serving(Fakes(recorder=FakeRecorder(delay=30)), default_deadline_seconds=30) as edge:
        call = events_pb2_grpc.EventServiceStub(edge.channel).StreamEvents(iter(requests))
        recorder = edge.fakes.recorder
        await eventually(lambda: len(recorder.calls) >= batches)
        await asyncio.sleep(0.1)
        assert len(recorder.calls) == batches
        call.cancel()
        await eventually(lambda: recorder.cancelled == batches)


async def test_streams_share_what_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_events, "READ_AHEAD", 8)
    async with serving(Fakes(recorder=FakeRecorder(delay=30)), default_deadline_seconds=30) as edge:
        calls = []
        for most in (8, 8 + 4, 8 + 4 + 2):
            calls.append(events_pb2_grpc.EventServiceStub(edge.channel).StreamEvents(iter([batch(n) for n in range(30)])))
            await eventually(lambda most=most: len(edge.fakes.recorder.calls) >= most)
            await asyncio.sleep(0.05)
            assert len(edge.fakes.recorder.calls) == most
        for call in calls:
            call.cancel()


async def test_a_stream_reads_on_as_soon_as_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_events, "READ_AHEAD", 3)
    recorder = Backwards()
    async with serving(Fakes(recorder=recorder)) as edge:
        call = events_pb2_grpc.EventServiceStub(edge.channel).StreamEvents(iter([batch(n) for n in range(12)]))
        answers = [answer.sequence async for answer in call]
    assert (answers, recorder.most) == (list(range(12)), 3)


async def eventually(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to hold")


async def test_a_malformed_message_ends_the_stream_after_earlier_answers() -> None:
    async with serving(Fakes(recorder=FakeRecorder(delay=0.05))) as edge:
        call: Any = edge.channel.stream_stream(STREAM)()  # type: ignore[call-arg]
        for message in (batch(1).SerializeToString(), batch(2).SerializeToString(), b"\xff\xff\xff"):
            await call.write(message)
        answers = [events_pb2.StreamEventsResponse.FromString(await call.read()).sequence for _ in range(2)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert answers == [1, 2]
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "")


async def ended(edge: Edge, request: events_pb2.StreamEventsRequest) -> grpc.aio.AioRpcError:
    """Returns how a stream ends over one request. (A request iterator would race: grpc.aio calls a failed send INTERNAL.)"""
    call: Any = events_pb2_grpc.EventServiceStub(edge.channel).StreamEvents()
    await call.write(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnavailableError("away", reason="AWAY"), grpc.StatusCode.UNAVAILABLE),
        (OverloadedError("full", reason="FULL"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_failing_batch_ends_the_stream(error: Exception, code: grpc.StatusCode) -> None:
    async with serving(Fakes(recorder=FakeRecorder(error=error))) as edge:
        assert (await ended(edge, batch(1))).code() is code


async def test_an_empty_batch_on_a_stream_names_the_field() -> None:
    async with serving() as edge:
        refused = refusal(await ended(edge, events_pb2.StreamEventsRequest(sequence=1)))
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "events")


async def test_a_batch_on_a_stream_has_the_default_deadline() -> None:
    async with serving(Fakes(recorder=FakeRecorder(delay=5)), default_deadline_seconds=0.1) as edge:
        assert (await ended(edge, batch(1))).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert edge.fakes.recorder.cancelled == 1


async def test_stopping_ends_an_open_stream_at_once_after_answering_what_was_read() -> None:
    async with serving(Fakes(recorder=FakeRecorder(delay=0.2))) as edge:
        call: Any = events_pb2_grpc.EventServiceStub(edge.channel).StreamEvents()
        await call.write(batch(1))
        await edge.fakes.recorder.called.wait()
        started = asyncio.get_running_loop().time()
        stopping = asyncio.create_task(edge.server.stop(20))
        assert (await call.read()).sequence == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        await stopping
        assert asyncio.get_running_loop().time() - started < 5
    assert (refusal(caught.value).code, refusal(caught.value).reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
