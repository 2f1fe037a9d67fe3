"""Import of events: streamed, counted and idempotent."""

import time
from collections.abc import Sequence
from pathlib import Path

import psycopg

from features.importers.event_rows import event_rows
from features.importers.mapping import EventsMapping, Mapping, MappingError
from features.importers.rejects import Rejects
from features.importers.report import ImportReport, Progress, Tally
from features.importers.sources import SourceBatch, open_source
from features.importers.store import EventStore
from features.settings import DEFAULT_CHANNELS

REPEATED = "repeats an earlier row"
FORGOTTEN = "customer was forgotten"


def import_events(
    dsn: str,
    source: Path,
    mapping: Mapping,
    *,
    rejects: Path,
    channels: Sequence[str] = DEFAULT_CHANNELS,
    progress: Progress | None = None,
    batch_rows: int = 65_536,
) -> ImportReport:
    """Imports the events of one file; importing it again stores nothing.

    Every batch is one transaction: the users and identities it needs, new events, ``users.version`` plus the number of new
    events, and an ``online_outbox`` entry per user. Stopped half-way, what is committed stays and the next run stores the rest.

    Args:
        dsn: the migrated database.
        source: a Parquet, CSV or JSON lines file.
        mapping: its mapping, with an events section.
        rejects: file for rows that were not stored, replaced.
        channels: registered channel names; a row of another is rejected.
        progress: called after each batch.
        batch_rows: rows a transaction, which bounds the memory used.

    Raises:
        MappingError: no events section, a column the file lacks, or a channel that is not registered.
        OSError: a file cannot be read or written.
        psycopg.Error: the database refused.
    """
    started = time.monotonic()
    spec = _section(mapping, channels)
    tally = Tally("events")
    opened = open_source(source, mapping, batch_rows=batch_rows)
    opened.require(spec.columns(), "events")
    with psycopg.connect(dsn) as connection, Rejects(rejects) as out:
        store = EventStore(connection)
        for batch in opened.batches:
            out.malformed(batch, tally)
            if len(batch.rows):
                _import_batch(store, batch, spec, mapping.dataset, channels=channels, tally=tally, out=out)
            if progress:
                progress("events", batch.position, opened.size)
    return tally.report(time.monotonic() - started)


def _section(mapping: Mapping, channels: Sequence[str]) -> EventsMapping:
    if mapping.events is None:
        raise MappingError(f"the mapping of {mapping.dataset!r} has no [events] section")
    unknown = mapping.events.channel.names - set(channels)
    if unknown:
        raise MappingError(f"events.channel: {', '.join(sorted(unknown))} is not registered; registered: {', '.join(channels)}")
    return mapping.events


def _import_batch(
    store: EventStore, batch: SourceBatch, spec: EventsMapping, dataset: str, *, channels: Sequence[str], tally: Tally, out: Rejects
) -> None:
    events = event_rows(batch.rows, batch.lines, spec, dataset=dataset, channels=channels)
    result = store.add(events.table)
    tally.read += len(batch.rows)
    tally.stored += result.stored
    tally.already_stored += result.already_stored
    tally.repeated += len(result.repeated_lines)
    tally.rejected.update(events.reasons.counts())
    if result.forgotten_lines:
        tally.rejected[FORGOTTEN] += len(result.forgotten_lines)
    tally.details.update(action for action in events.actions.drop_null().to_pylist())
    dropped = dict.fromkeys(result.repeated_lines, REPEATED) | dict.fromkeys(result.forgotten_lines, FORGOTTEN)
    reasons = [dropped.get(line, reason) for line, reason in zip(batch.lines, events.reasons.names(), strict=True)]
    out.write_rows(batch.rows, batch.lines, reasons)
