"""This process among the fleet's replicas: the row by which others know it, and the versions all of them agree on."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from time import monotonic

from server.database import Pool
from server.online.store import Fleet

# A replica is dead when it was not seen for this many of its own pauses, and never before the floor: a long collection of
# garbage or a busy machine must not take it off the list of those an activation waits for.
_PAUSES, _FLOOR_SECONDS = 5, 3.0
# Rows of replicas that died are kept for people to see, and removed when another one starts.
_FORGET = "DELETE FROM replicas WHERE seen_at < clock_timestamp() - interval '1 hour'"

_REPORT = """
INSERT INTO replicas (
    replica_id, address, patience_seconds, model_version, activation, index_version, ready, failed, claim, config, waits_for, onnx_provider,
    online_away, reported
) VALUES (
    %(replica_id)s, %(address)s, %(patience)s, %(model)s, %(activation)s, %(index)s, %(ready)s, %(failed)s, %(claim)s, %(config)s,
    %(waits_for)s, %(provider)s, %(online_away)s, %(reported)s
)
ON CONFLICT (replica_id) DO UPDATE SET
    seen_at = clock_timestamp(), model_version = excluded.model_version, activation = excluded.activation,
    index_version = excluded.index_version, ready = excluded.ready, failed = excluded.failed, claim = excluded.claim,
    waits_for = excluded.waits_for, onnx_provider = excluded.onnx_provider, online_away = excluded.online_away,
    reported = excluded.reported
WHERE replicas.reported < excluded.reported
"""
_DIFFERING = "SELECT coalesce(string_agg(address, ', ' ORDER BY address), '') FROM live_replicas WHERE config <> %s"
_STATE = """
SELECT s.model_version, s.activation, s.answering_index, s.offer_version, s.index_version, p.model, p.claim,
       (SELECT count(*) FROM live_replicas), (SELECT count(DISTINCT config) FROM live_replicas)
FROM fleet_state s CROSS JOIN LATERAL (
    SELECT CASE WHEN s.preparing_until > clock_timestamp() THEN s.preparing_model ELSE '' END AS model,
           CASE WHEN s.preparing_until > clock_timestamp() THEN s.preparing_by ELSE '' END AS claim
) p
"""
# The newest epoch that every live replica could answer with, under the model in preparation too (unless it failed there), or
# that has been waited for long enough: a replica that is slow or just died must not keep new items away from the others.
_ADVANCE = """
UPDATE fleet_state s SET answering_index = n.index_version FROM (
    SELECT max(e.index_version) AS index_version FROM index_epochs e, fleet_state s
    WHERE e.index_version > s.answering_index AND e.index_version <= s.index_version
      AND (e.published_at < clock_timestamp() - make_interval(secs => %s) OR NOT EXISTS (
        SELECT 1 FROM live_replicas r
        WHERE NOT coalesce(r.ready -> s.model_version @> to_jsonb(e.index_version), false)
           OR (s.preparing_until > clock_timestamp() AND NOT r.failed ? s.preparing_model
               AND NOT coalesce(r.ready -> s.preparing_model @> to_jsonb(e.index_version), false))))
) n WHERE n.index_version IS NOT NULL
"""


@dataclass(frozen=True)
class Agreed:
    """What PostgreSQL says of the fleet.

    Attributes:
        fleet: the versions that answer.
        published_index: the newest index epoch, which answers once the replicas have built it.
        preparing_model: the model every replica loads besides the active one, empty when none.
        claim: which activation asks for it.
        replica_count: replicas alive.
        config_count: different slate policies among them; more than one is a mistake of whoever configured them.
    """

    fleet: Fleet
    published_index: int
    preparing_model: str
    claim: str
    replica_count: int
    config_count: int


@dataclass(frozen=True)
class Report:
    """What a replica says of itself; see features.replicas.Replica."""

    model_version: str
    activation: int
    index_version: int
    ready: Mapping[str, Sequence[int]]
    failed: Mapping[str, str]
    claim: str
    onnx_provider: str
    online_away: bool


class Membership:
    """Reads what the fleet agreed on, and keeps this replica's row.

    A report is a lease: for this replica's patience from when it was sent the others count it among those who read Redis.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        replica_id: str,
        config: str,
        pause_seconds: float,
        epoch_wait_seconds: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._pool = pool
        self._replica_id = replica_id
        self._config = config
        self._patience = max(_PAUSES * pause_seconds, _FLOOR_SECONDS)
        self._epoch_wait = epoch_wait_seconds
        self._clock = clock
        self._reported = 0
        self._until = -inf

    @property
    def lapsed(self) -> bool:
        """True when the others may think this replica dead: what it reads from Redis may be older than what they showed since."""
        return self._clock() >= self._until

    async def agreed(self) -> Agreed:
        """Returns the versions the fleet agreed on."""
        async with self._pool.connection() as connection:
            row = await (await connection.execute(_STATE)).fetchone()
        assert row is not None
        return Agreed(Fleet(*row[:4]), *row[4:])

    async def join(self, address: str, report: Report) -> str:
        """Enters this replica in the list. From then on activations and epochs wait for it.

        The lock orders this before or after any move of the pointer: either the move sees this replica and waits for it, or this
        replica reads the pointer after the move. It orders replicas that join as well: of two that differ one sees the other.

        Returns:
            The addresses of live replicas whose settings would give other slates, empty when there are none. Where there are,
            this replica has not joined: its row only says for whom it waits.
        """
        sent = self._clock()
        async with self._pool.connection() as connection:
            await connection.execute("SELECT 1 FROM fleet_state FOR UPDATE")
            await connection.execute(_FORGET)
            row = await (await connection.execute(_DIFFERING, [self._config])).fetchone()
            assert row is not None
            await connection.execute(_REPORT, self._row(address, report, waits_for=row[0]))
        if not row[0]:
            self._until = sent + self._patience
        return str(row[0])

    async def report(self, address: str, report: Report) -> bool:
        """Says that this replica lives, and what it could answer with; one report at a time.

        Returns:
            False when the lease had lapsed before this report was committed: the others may have thought this replica dead.
        """
        sent = self._clock()
        async with self._pool.connection() as connection:  # committed to disk: a crash must not take back a lease that is relied on
            await connection.execute(_REPORT, self._row(address, report))
        held = not self.lapsed
        self._until = sent + self._patience
        return held

    async def leave(self) -> None:
        """Takes this replica off the list: nobody waits for it any more."""
        async with self._pool.connection() as connection:
            await connection.execute("DELETE FROM replicas WHERE replica_id = %s", [self._replica_id])

    async def advance(self) -> None:
        """Lets the newest epoch answer that all live replicas have built."""
        async with self._pool.connection() as connection:
            # Locked before looking, so that the model pointer does not move between the look and the update.
            await connection.execute("SELECT 1 FROM fleet_state FOR UPDATE")
            await connection.execute(_ADVANCE, [self._epoch_wait])

    def _row(self, address: str, report: Report, *, waits_for: str = "") -> dict[str, object]:
        self._reported += 1
        return {
            "replica_id": self._replica_id,
            "address": address,
            "patience": self._patience,
            "model": report.model_version,
            "activation": report.activation,
            "index": report.index_version,
            "ready": json.dumps(report.ready),
            "failed": json.dumps(report.failed),
            "claim": report.claim,
            "config": self._config,
            "waits_for": waits_for,
            "provider": report.onnx_provider,
            "online_away": report.online_away,
            "reported": self._reported,
        }
