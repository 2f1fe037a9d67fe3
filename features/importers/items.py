"""Import of items: every row checked, the rows of an item merged, the catalogue written through ``features.catalogue``."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import psycopg
import pyarrow as pa

from features.catalogue import Item, upsert_items
from features.importers.checks import Reasons
from features.importers.columns import number_column, source_column, text_column, time_column
from features.importers.fields import ListField, NumberField, TextField, TimeField
from features.importers.item_rows import ItemTable, build_items, parse_attributes, parse_list
from features.importers.mapping import ItemsMapping, Mapping, MappingError
from features.importers.rejects import Rejects
from features.importers.report import ImportReport, Progress, Tally
from features.importers.sources import open_source
from features.settings import DEFAULT_CHANNELS

_ITEMS_PER_TRANSACTION = 5_000
_LIMITS = {"item_id": 256, "title": 1024, "text": 65_536, "category": 512, "brand": 256, "currency": 3, "image_ref": 2048}


def import_items(
    dsn: str,
    source: Path,
    mapping: Mapping,
    *,
    rejects: Path,
    channels: Sequence[str] = DEFAULT_CHANNELS,
    progress: Progress | None = None,
    batch_rows: int = 65_536,
) -> ImportReport:
    """Imports the items of one file; importing it again changes nothing.

    The file is read to its end before the catalogue is written, because an item's rows may stand anywhere in it. Memory grows with
    the number of items, not of rows.

    Args:
        dsn: the migrated database.
        source: a Parquet, CSV or JSON lines file.
        mapping: its mapping, with an items section.
        rejects: file for rows that were not used, replaced.
        channels: registered channel names; an item sold in another is rejected.
        progress: called after each batch of rows, and of items written.
        batch_rows: rows converted at a time.

    Raises:
        MappingError: no items section, or a column the file lacks.
        OSError: a file cannot be read or written.
        psycopg.Error: the database refused.
    """
    started = time.monotonic()
    if mapping.items is None:
        raise MappingError(f"the mapping of {mapping.dataset!r} has no [items] section")
    tally = Tally("items")
    opened = open_source(source, mapping, batch_rows=batch_rows)
    opened.require(mapping.items.columns(), "items")
    items = ItemTable(_picks(mapping.items))
    with Rejects(rejects) as out:
        for batch in opened.batches:
            out.malformed(batch, tally)
            if len(batch.rows):
                frame, reasons = item_frame(batch.rows, mapping.items, channels=channels)
                out.write_rows(batch.rows, batch.lines, reasons.names())
                items.add(frame)
                tally.read += len(batch.rows)
                tally.rejected.update(reasons.counts())
            if progress:
                progress("items: reading", batch.position, opened.size)
    rows = items.rows()
    tally.stored = len(rows)
    tally.repeated = tally.read - tally.rejected.total() - tally.stored
    with psycopg.connect(dsn) as connection:
        _write(connection, build_items(rows), len(rows), tally, progress)
    return tally.report(time.monotonic() - started)


def _picks(spec: ItemsMapping) -> dict[str, str]:
    given = {name: getattr(spec, name) for name in type(spec).model_fields if name not in ("item_id", "reject")}
    return {name: getattr(field, "pick", "last") for name, field in given.items() if field is not None}


def _write(connection: psycopg.Connection, items: Iterable[Item], count: int, tally: Tally, progress: Progress | None) -> None:
    done = 0
    for chunk in _chunks(items):
        with connection.transaction():
            result = upsert_items(connection, chunk)
        tally.details["new or with a changed description"] += result.redescribed_count
        tally.details["new or with a changed offer"] += result.offer_changed_count
        done += len(chunk)
        if progress:
            progress("items: writing", done, count)


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, _ITEMS_PER_TRANSACTION)):
        yield chunk


def item_frame(rows: pa.Table, spec: ItemsMapping, *, channels: Sequence[str]) -> tuple[pd.DataFrame, Reasons]:
    """Returns the good rows of a batch, ``item_id`` and a column per mapped field, and why the others are rejected."""
    reasons = Reasons(len(rows))
    columns: dict[str, pa.Array] = {}
    lists: dict[str, list[tuple[str, ...] | None]] = {}
    for name in type(spec).model_fields:
        field = getattr(spec, name)
        if isinstance(field, TextField):
            columns[name] = text_column(rows, field)
        elif isinstance(field, NumberField | TimeField):
            converted = number_column(rows, field) if isinstance(field, NumberField) else time_column(rows, field)
            reasons.add(converted.invalid, f"{name} is not a {'number' if isinstance(field, NumberField) else 'time from 1970 to 2199'}")
            columns[name] = converted.values
        elif isinstance(field, ListField):
            lists[name] = [parse_list(value, field.separator) for value in source_column(rows, field.column).to_pylist()]
    reasons.missing(columns["item_id"], "item_id")
    reasons.missing(columns["title"], "title")
    reasons.rules(rows, spec.reject)  # before the general checks: the mapping's own reasons say more
    _check(columns, lists, reasons, channels)
    frame = pd.DataFrame({name: column.to_pandas() for name, column in columns.items()})
    for name, values in lists.items():
        frame[name] = pd.Series(values, dtype=object)
    return frame[reasons.good], reasons


def _check(columns: dict[str, pa.Array], lists: dict[str, list[tuple[str, ...] | None]], reasons: Reasons, channels: Sequence[str]) -> None:
    for name, limit in _LIMITS.items():
        if name in columns:
            reasons.longer(columns[name], limit, name)
    if "price" in columns:
        reasons.add(columns["price"].to_numpy(zero_copy_only=False) < 0, "price is below zero")
    if "stock" in columns:
        stock = columns["stock"].to_numpy(zero_copy_only=False)
        reasons.add((stock < 0) | (stock != np.floor(stock)) & ~np.isnan(stock), "stock is not a whole number from zero on")
    if "attributes" in columns:
        bad = [parse_attributes(text) is None for text in columns["attributes"].to_pylist()]
        reasons.add(np.array(bad, bool), "attributes is not a JSON object")
    for name, values in lists.items():
        reasons.add(np.array([value is None for value in values], bool), f"{name} is not a list")
        reasons.add(np.array([value is not None and not set(value) <= set(channels) for value in values], bool), "unknown channel")
    reasons.unstorable(columns.values())
