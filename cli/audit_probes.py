"""The audit's questions to live servers, asked as a channel backend asks them: through the client."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC
from typing import Self

import grpc

from cli.credentials import CallSettings
from concord import Concord, user
from concord.v1.recommendation_pb2 import RecommendResponse
from server.audit.probes import Probe
from server.audit.report import Answered

_TIMEOUT = 10.0
# No shop sells it, so the event changes the customer's version and nothing that is ranked.
_CANARY_ITEM = "concord-audit-canary"


class Clients:
    """One client per replica and channel, opened when first needed."""

    def __init__(self, calls: CallSettings) -> None:
        self._credentials = calls.channel_credentials()
        self._key = calls.call_key.get_secret_value()
        self._clients: dict[tuple[str, str], Concord] = {}
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Nothing is connected yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes every connection."""
        await self._open.aclose()

    async def client(self, replica: str, channel: str) -> Concord:
        """Returns the client of one channel to one replica; it remembers no tokens, which would hide staleness."""
        key = (replica, channel)
        if key not in self._clients:
            client = Concord(
                replica, channel=channel, credentials=self._credentials, api_key=self._key, timeout=_TIMEOUT, remembered_customers=1
            )
            self._clients[key] = await self._open.enter_async_context(client)
        return self._clients[key]

    async def ask(self, probe: Probe) -> Answered | None:
        """Asks one question without leaving an exposure; None when it is not answered.

        Raises:
            LookupError: the customer was forgotten meanwhile.
        """
        client = await self.client(probe.replica, probe.channel)
        try:
            answer = await client.recommend(user(probe.user_id), surface=probe.surface, limit=probe.limit, skip_exposure_logging=True)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise LookupError(probe.user_id) from None
            return None
        return _answered(answer, probe)


async def visible_after(clients: Clients, replicas: Sequence[str], channels: Sequence[str], *, customer: str) -> float | None:
    """Records one view in the first channel and returns the seconds until all others show it through every replica.

    None when it did not show within the deadline.
    """
    writer = await clients.client(replicas[0], channels[0])
    started = time.monotonic()
    recorded = await writer.record(writer.event(user(customer), "view", item_id=_CANARY_ITEM))
    if not recorded.tokens:
        return None
    version = recorded.tokens[0].user_version

    async def shows(replica: str, channel: str) -> None:
        client = await clients.client(replica, channel)
        while (await client.profile(user(customer))).user_version < version:  # noqa: ASYNC110 - what is awaited is in the server
            await asyncio.sleep(0.005)

    try:
        async with asyncio.timeout(_TIMEOUT):
            await asyncio.gather(*(shows(replica, channel) for replica in replicas for channel in channels[1:]))
    except (TimeoutError, grpc.aio.AioRpcError):
        return None
    return time.monotonic() - started


def _answered(answer: RecommendResponse, probe: Probe) -> Answered:
    versions = answer.versions
    return Answered(
        source="probe",
        user_id=answer.user_id,
        slate_id=answer.slate_id,
        channel=probe.channel,
        surface=probe.surface,
        context_item_ids=(),
        user_version=versions.user_version,
        model_version=versions.model_version,
        index_version=versions.index_version,
        offer_version=versions.offer_version,
        as_of=answer.as_of.ToDatetime(UTC),
        item_ids=tuple(item.item_id for item in answer.items),
        positions=tuple(item.position for item in answer.items),
        scores=tuple(item.score for item in answer.items),
        prices_micros=tuple(item.price.units * 1_000_000 + item.price.nanos // 1_000 for item in answer.items),
        currencies=tuple(item.price.currency_code for item in answer.items),
        in_stock=tuple(item.in_stock for item in answer.items),
        page_limit=probe.limit,
        filtered=False,
        stale=answer.stale,
        degraded_reasons=tuple(answer.degraded_reasons),
        replica=probe.replica,
    )
