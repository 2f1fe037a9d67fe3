"""How much is let in: calls in flight for the process, shares of them and rates for each channel."""

import asyncio
from collections import defaultdict
from collections.abc import Callable

from server.errors import OverloadedError

_BURST_SECONDS = 2.0


class TokenBucket:
    """A rate of ``per_second`` with bursts of two seconds' worth; the caller brings the time, so that tests can."""

    def __init__(self, per_second: float) -> None:
        self._rate = per_second
        self._most = per_second * _BURST_SECONDS
        self._held = self._most
        self._at = 0.0

    def take(self, count: float, *, at: float) -> float:
        """Takes ``count`` tokens and returns 0, or takes none and returns how many seconds to wait for them.

        A batch larger than the bucket is let in when the bucket is full and leaves it in debt, or it could never pass. Nothing
        costs nothing, in debt too.
        """
        if not count:
            return 0.0
        self._held = min(self._most, self._held + (at - self._at) * self._rate)
        self._at = at
        lacking = min(count, self._most) - self._held
        if lacking > 0:
            return lacking / self._rate
        self._held -= count
        return 0.0


class ChannelLimits:
    """What each channel may have in flight in each service and do a second on this replica; a rate of 0 does not bind."""

    def __init__(self, *, in_flight: float, calls_per_second: float, events_per_second: float, clock: Callable[[], float]) -> None:
        self._most = in_flight
        self._clock = clock
        self._in_flight: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._calls = _buckets(calls_per_second)
        self._events = _buckets(events_per_second)

    def enter(self, channel: str, service: str) -> None:
        """Counts a call of a service in; every call that was counted in must ``leave``.

        Raises:
            OverloadedError: the channel holds its share of the calls in flight (QUOTA_EXCEEDED) or calls too often (RATE_LIMITED).
        """
        if self._in_flight[channel, service] >= self._most:
            raise OverloadedError("this channel has too many calls in flight", reason="QUOTA_EXCEEDED")
        self._take(self._calls, channel, 1, "this channel calls too often")
        self._in_flight[channel, service] += 1

    def leave(self, channel: str, service: str) -> None:
        """Counts a call out."""
        self._in_flight[channel, service] -= 1

    def events(self, channel: str, count: int) -> None:
        """Charges events about to be recorded.

        Raises:
            OverloadedError: the channel records too many (RATE_LIMITED).
        """
        self._take(self._events, channel, count, "this channel records too many events a second")

    async def events_in_turn(self, channel: str, count: int) -> None:
        """Charges events of a stream: waits until they may be recorded, so that flow control slows the sender."""
        if self._events is None:
            return
        bucket = self._events[channel]
        while (wait := bucket.take(count, at=self._clock())) > 0:  # noqa: ASYNC110 - tokens come with time; nobody could set an event
            await asyncio.sleep(wait)

    def _take(self, buckets: "defaultdict[str, TokenBucket] | None", channel: str, count: int, message: str) -> None:
        if buckets is None:
            return
        wait = buckets[channel].take(count, at=self._clock())
        if wait > 0:
            raise OverloadedError(message, reason="RATE_LIMITED", pause_seconds=wait)


def _buckets(per_second: float) -> "defaultdict[str, TokenBucket] | None":
    return defaultdict(lambda: TokenBucket(per_second)) if per_second > 0 else None
