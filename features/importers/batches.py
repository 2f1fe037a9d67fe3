"""Imports whose batches stand alone: each is read, converted, stored in one transaction, and counted."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa

from features.importers.checks import Reasons
from features.importers.mapping import Mapping, Section
from features.importers.rejects import Rejects
from features.importers.report import ImportReport, Progress, Tally
from features.importers.sources import Source, open_source

Columns = dict[str, pa.Array]
Convert = Callable[[pa.Table, Reasons], Columns]
# Stores the good rows (the reasons say which), may add reasons, and returns (stored, stored before).
Store = Callable[[psycopg.Connection, Columns, Reasons], tuple[int, int]]


def open_part(source: Path, mapping: Mapping, spec: Section, name: str) -> Source:
    """Opens a file that has every column its section of the mapping reads.

    Raises:
        MappingError: it lacks one, or is of no known format.
        OSError: it cannot be read.
    """
    opened = open_source(source, mapping, batch_rows=65_536)
    opened.require(spec.columns(), name)
    return opened


class BatchImport:
    """The loop that these imports share: read, convert, store, count."""

    def __init__(self, what: str, convert: Convert, store: Store) -> None:
        self._what, self._convert, self._store = what, convert, store

    def __call__(self, dsn: str, source: Source, *, rejects: Path, progress: Progress | None) -> ImportReport:
        """Imports a source; ``rejects`` is the file for rows that were not stored."""
        started = time.monotonic()
        tally = Tally(self._what)
        with psycopg.connect(dsn) as connection, Rejects(rejects) as out:
            for batch in source.batches:
                out.malformed(batch, tally)
                if len(batch.rows):
                    reasons = self._batch(connection, batch.rows, tally)
                    out.write_rows(batch.rows, batch.lines, reasons.names())
                if progress:
                    progress(self._what, batch.position, source.size)
        return tally.report(time.monotonic() - started)

    def _batch(self, connection: psycopg.Connection, rows: pa.Table, tally: Tally) -> Reasons:
        reasons = Reasons(len(rows))
        columns = self._convert(rows, reasons)
        with connection.transaction():
            stored, before = self._store(connection, columns, reasons)
        tally.read += len(rows)
        tally.stored += stored
        tally.already_stored += before
        tally.repeated += int(reasons.good.sum()) - stored - before
        tally.rejected.update(reasons.counts())
        return reasons


def good_rows(columns: Columns, reasons: Reasons) -> list[tuple[Any, ...]]:
    """Returns the rows without a reason, a tuple of the columns each."""
    good = pa.array(reasons.good)
    return list(zip(*(column.filter(good).to_pylist() for column in columns.values()), strict=True))
