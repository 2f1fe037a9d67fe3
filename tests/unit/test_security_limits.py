"""Rates and shares: a bucket never gives more than it should, a batch larger than it passes, channels do not share."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import OverloadedError
from server.security.limits import ChannelLimits, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, *, in_flight: float = 1e9, calls: float = 0, events: float = 0) -> ChannelLimits:
    return ChannelLimits(in_flight=in_flight, calls_per_second=calls, events_per_second=events, clock=clock)


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5)), max_size=60), st.floats(1, 20))
def test_a_bucket_gives_its_rate_and_one_burst_and_no_more(steps: list[tuple[float, int]], rate: float) -> None:
    bucket, at, given_out = TokenBucket(rate), 1000.0, 0.0
    for pause, count in steps:
        at += pause
        if bucket.take(count, at=at) == 0:
            given_out += count
    assert given_out <= rate * (at - 1000.0) + 2 * rate + 5 + 1e-6


@given(st.integers(1, 50), st.floats(0.5, 20))
def test_who_waits_as_told_gets_in(count: int, rate: float) -> None:
    bucket, at = TokenBucket(rate), 1000.0
    for _ in range(5):
        wait = bucket.take(count, at=at)
        at += wait
        assert wait == 0 or bucket.take(count, at=at + 1e-6) == 0


def test_a_batch_larger_than_the_bucket_passes_and_is_paid_for() -> None:
    bucket = TokenBucket(10)
    assert bucket.take(500, at=1000.0) == 0
    assert bucket.take(1, at=1000.0) == pytest.approx(48.1)


def test_a_channel_has_its_share_of_the_calls_in_flight() -> None:
    held = limits(Clock(), in_flight=2)
    held.enter("web", "S")
    held.enter("web", "S")
    with pytest.raises(OverloadedError) as refused:
        held.enter("web", "S")
    assert refused.value.reason == "QUOTA_EXCEEDED"
    held.enter("app", "S")
    held.enter("web", "OtherService")
    held.leave("web", "S")
    held.enter("web", "S")


def test_a_channel_that_calls_too_often_is_told_how_long_to_wait() -> None:
    clock = Clock()
    held = limits(clock, in_flight=100, calls=2)
    for _ in range(4):
        held.enter("web", "S")
    with pytest.raises(OverloadedError) as refused:
        held.enter("web", "S")
    assert (refused.value.reason, refused.value.pause_seconds) == ("RATE_LIMITED", 0.5)
    held.enter("app", "S")
    clock.now += 0.5
    held.enter("web", "S")


def test_events_are_charged_one_by_one() -> None:
    clock = Clock()
    held = limits(clock, events=100)
    held.events("web", 150)
    with pytest.raises(OverloadedError) as refused:
        held.events("web", 100)
    assert refused.value.pause_seconds == pytest.approx(0.5)
    limits(clock).events("web", 1_000_000)


async def test_a_stream_is_slowed_instead() -> None:
    held = ChannelLimits(in_flight=1, calls_per_second=0, events_per_second=100, clock=asyncio.get_running_loop().time)
    started = asyncio.get_running_loop().time()
    await held.events_in_turn("web", 200)
    await held.events_in_turn("web", 20)
    assert 0.15 < asyncio.get_running_loop().time() - started < 5
