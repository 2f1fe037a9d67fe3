"""The append-only log of admin calls, merges and refusals: what is noted, when, and what happens when it cannot be."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
import structlog

from server.database import Pool
from server.errors import UnavailableError
from server.security.limits import TokenBucket

_log = structlog.get_logger(__name__)
REQUESTED = "REQUESTED"
# Refusals a second that are noted; whoever tries keys by the thousand must not fill the store. Beyond it they are only counted.
_REFUSALS_PER_SECOND = 20.0
# A refusal must not take longer because PostgreSQL does.
_SECONDS = 1.0

_INSERT = """
INSERT INTO admin_audit (principal, method, target, outcome, request_id)
SELECT %s, %s,
    CASE WHEN %s::text = '' THEN %s
         ELSE 'customer:' || left(encode(sha256(secret || convert_to(%s, 'UTF8')), 'hex'), 32) END,
    %s, %s
FROM audit_secret
"""


@dataclass(frozen=True)
class AuditEntry:
    """One row.

    Attributes:
        principal: who, as ``Principal.name``; empty when the caller did not prove who it is.
        method: ``Service/Method``, or a command of an operator.
        outcome: REQUESTED, OK, or status code and reason.
        request_id: as in the logs.
        target: what it was about, never a customer's id.
        customer: the customer's id, stored as a digest in the place of ``target``.
    """

    principal: str
    method: str
    outcome: str
    request_id: str = ""
    target: str = ""
    customer: str = ""

    @property
    def values(self) -> Sequence[str]:
        """Values of the statement."""
        return (self.principal, self.method, self.customer, self.target, self.customer, self.outcome, self.request_id)


class AdminAudit:
    """Writes entries through the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._refusals = TokenBucket(_REFUSALS_PER_SECOND)

    async def require(self, entry: AuditEntry) -> None:
        """Notes what is about to be done.

        Raises:
            UnavailableError: it could not be noted, so it must not be done.
        """
        try:
            await self._write(entry)
        except (psycopg.Error, TimeoutError) as error:
            _log.error("admin call not noted, so refused", method=entry.method, error=type(error).__name__)
            raise UnavailableError("the audit log cannot be written, so nothing was done", reason="AUDIT_UNAVAILABLE") from None

    async def note(self, entry: AuditEntry) -> None:
        """Notes what was done or refused already; when that fails, the log holds it instead."""
        try:
            await self._write(entry)
        except (psycopg.Error, TimeoutError) as error:
            _log.error(
                "audit entry not stored",
                principal=entry.principal,
                method=entry.method,
                target=entry.target,
                outcome=entry.outcome,
                error=type(error).__name__,
            )

    async def note_refusal(self, entry: AuditEntry, *, at: float) -> None:
        """Notes a refused call, up to a bounded number a second; ``at`` is a monotonic time in seconds."""
        if self._refusals.take(1, at=at) == 0:
            await self.note(entry)

    async def _write(self, entry: AuditEntry) -> None:
        async with asyncio.timeout(_SECONDS), self._pool.connection() as connection:
            await connection.execute(_INSERT, entry.values)


def note_command(connection: psycopg.Connection, entry: AuditEntry) -> None:
    """Notes a command of an operator, in the transaction that carries it out."""
    connection.execute(_INSERT, entry.values)
