"""The replicas as PostgreSQL knows them: who lives, what each could answer with, and what it could not load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg import Connection
from psycopg.rows import TupleRow


@dataclass(frozen=True)
class Replica:
    """One server process by its last report.

    Attributes:
        replica_id: unique for the life of the process.
        address: ``host:port`` it answers on.
        seen_at: when it last reported, by PostgreSQL's clock.
        live: it reported lately enough to be waited for.
        model_version, activation, index_version: what it answers with.
        ready: index versions it could answer with at once, by model version.
        failed: why it could not load a model, by model version.
        config: fingerprint of the settings that decide a slate; replicas that differ in it would answer differently.
        waits_for: addresses of live replicas that differ in it: until they have left it is not live and answers nobody.
        onnx_provider: what runs its model, empty without one; where it differs, the slate committed first decides.
        online_away: Redis is away from it, or not certain to hold what was shown: what it reads there is flagged stale.
    """

    replica_id: str
    address: str
    started_at: datetime
    seen_at: datetime
    live: bool
    model_version: str
    activation: int
    index_version: int
    ready: Mapping[str, Sequence[int]]
    failed: Mapping[str, str]
    config: str
    waits_for: str
    onnx_provider: str
    online_away: bool


_REPLICAS = """
SELECT replica_id, address, started_at, seen_at, EXISTS (SELECT 1 FROM live_replicas l WHERE l.replica_id = r.replica_id),
       model_version, activation, index_version, ready, failed, config, waits_for, onnx_provider, online_away
FROM replicas r ORDER BY address, started_at
"""


def list_replicas(connection: Connection[TupleRow]) -> list[Replica]:
    """Returns all replicas that did not leave by themselves, by address; those of the last hour that died are marked."""
    return [Replica(*row) for row in connection.execute(_REPLICAS).fetchall()]
