"""Numbers an operator watches that no call reports: pools, queues, versions, the outbox and the event loop's delay."""

import asyncio

import psycopg
from redis.asyncio import Redis

from server.database import Pool
from server.fleet import FleetWatch
from server.ingest.recorder import EventRecorder
from server.journal.exposures import Journal
from server.metrics import Metrics
from server.understand.text_runs import TextRuns

_PAUSE_SECONDS = 1.0
_OUTBOX_SECONDS = 5.0  # the count reads the whole outbox, which is long just when PostgreSQL has other work
_OUTBOX = "SELECT count(*), coalesce(extract(epoch FROM now() - min(enqueued_at)), 0)::double precision FROM online_outbox"


class Vitals:
    """Takes the numbers once a second; while PostgreSQL is away those of the outbox stay as they were."""

    def __init__(
        self,
        pool: Pool,
        client: Redis,
        recorder: EventRecorder,
        journal: Journal,
        runs: TextRuns,
        fleet: FleetWatch,
        metrics: Metrics,
    ) -> None:
        self._pool = pool
        self._client = client
        self._recorder = recorder
        self._journal = journal
        self._runs = runs
        self._fleet = fleet
        self._metrics = metrics

    async def run(self) -> None:
        """Looks until cancelled; a PostgreSQL that hangs holds up the outbox's numbers alone."""
        await asyncio.gather(self._watch_process(), self._watch_outbox())

    async def _watch_process(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.look()
            due = loop.time() + _PAUSE_SECONDS
            await asyncio.sleep(_PAUSE_SECONDS)
            self._metrics.set_loop_delay(max(0.0, loop.time() - due))

    async def _watch_outbox(self) -> None:
        while True:
            await self.look_at_outbox()
            await asyncio.sleep(_OUTBOX_SECONDS)

    def look(self) -> None:
        """Takes the numbers of this process."""
        metrics, newest, current = self._metrics, self._fleet.newest, self._fleet.current
        queues = {"events": self._recorder.queued_events, "exposures": self._journal.queued, "texts": self._runs.waiting_count}
        metrics.set_queues(queues)
        metrics.set_versions("fleet", {"activation": newest.activation, "index": newest.index_version, "offer": newest.offer_version})
        metrics.set_versions("replica", {"index": current.index_version if current else 0})
        stats = self._pool.get_stats()
        size, free = stats.get("pool_size", 0), stats.get("pool_available", 0)
        metrics.set_connections("postgres", {"used": size - free, "free": free, "waiting": stats.get("requests_waiting", 0)})
        redis_pool = self._client.connection_pool  # redis-py counts its connections in these two alone (7.4)
        metrics.set_connections("redis", {"used": len(redis_pool._in_use_connections), "free": len(redis_pool._available_connections)})

    async def look_at_outbox(self) -> None:
        """Counts the customers in the outbox."""
        try:
            async with self._pool.connection() as connection:
                row = await (await connection.execute(_OUTBOX)).fetchone()
        except psycopg.Error:
            return  # the health watch says that PostgreSQL is away
        assert row is not None
        self._metrics.set_outbox(*row)
