"""Training sets for outside use: every label of a shop with what was known just before it, as Parquet with its own description.

The shop's events are streamed customer by customer and its labels go straight to the join, so the set may be of any size.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.parquet as pq

from features.item_table import ItemTable
from features.settings import Settings
from training.config import TrainConfig
from training.dataset import Split, TrainingDataError, customer_job, newest_table, open_store, split_between
from training.events import Micros, stream_events, to_micros
from training.join import Column, join
from training.labels import Label, all_labels

PARTS = ("tower", "ranker", "holdout")
_CARRIED = (
    Column("part", "text", "What the row is for: tower, ranker or holdout, by the split that the set was made with."),
    Column("targets", "text[]", "Items the customer turned to on the visit, none bought before; the holdout's may be empty."),
    Column("bought", "text[]", "Items bought before the row's time."),
    Column("taken", "text[]", "All items bought, put into the cart or wished for on the visit: never negatives of this row."),
)


@dataclass(frozen=True)
class SetReport:
    """What was written: rows in all, shards, and the columns with their types and meanings."""

    row_count: int
    shard_count: int
    columns: tuple[tuple[str, str, str], ...]


def write_set(settings: Settings, config: TrainConfig, folder: Path) -> SetReport:
    """Writes the whole training set of a shop into ``folder``: shards of Parquet, ``schema.json`` and the split's times.

    Unlike a training run it has all labels: ``tower_labels`` and its like do not apply. Features are those of the contract's views on
    customers, as of strictly before each row's time; profiles are the snapshots there are. Killed, it goes on where it was.

    Raises:
        TrainingDataError: no items, no events, no labels, or the Feast repository was not applied.
    """
    store = open_store(settings)
    with psycopg.connect(settings.postgres_dsn) as connection:
        table = newest_table(connection)
        split = split_between(*_window(connection), config)
        connection.commit()
        shards = join(customer_job(store, _CARRIED), _rows(connection, table, split, config), folder)
    if not len(shards):
        raise TrainingDataError("no visit follows another: there is nothing to learn from")
    columns = _columns(shards.paths()[0])
    described = {
        "rows": len(shards),
        "order": "ascending by at, then user_id",
        "split": {"kind": config.split, "begin": split.begin, "ranker_start": split.ranker_start, "cut": split.cut, "end": split.end},
        "columns": [dict(zip(("name", "type", "meaning"), column, strict=True)) for column in columns],
    }
    (folder / "schema.json").write_text(json.dumps(described, indent=2) + "\n")
    return SetReport(len(shards), len(shards.paths()), columns)


def _window(connection: "psycopg.Connection[tuple[Any, ...]]") -> tuple[Micros, Micros]:
    first, last = connection.execute("SELECT min(occurred_at), max(occurred_at) FROM events").fetchone() or (None, None)
    if first is None or last is None:
        raise TrainingDataError("0 events: import them first")
    return to_micros(first), to_micros(last)


def _rows(
    connection: "psycopg.Connection[tuple[Any, ...]]", table: ItemTable, split: Split, config: TrainConfig
) -> Iterator[tuple[object, ...]]:
    for piece in stream_events(connection, table):
        for part, labels in zip(PARTS, all_labels(piece, split, config), strict=True):
            yield from (_row(part, label, table) for label in labels)


def _row(part: str, label: Label, table: ItemTable) -> tuple[object, ...]:
    def ids(rows: "tuple[int, ...] | frozenset[int]") -> list[str]:
        return [table.ids[row] for row in rows]

    return label.user_id, label.time, part, ids(label.items), sorted(ids(label.bought)), sorted(ids(label.taken))


def _columns(path: Path) -> tuple[tuple[str, str, str], ...]:
    return tuple((field.name, str(field.type), (field.metadata or {}).get(b"description", b"").decode()) for field in pq.read_schema(path))
