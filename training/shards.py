"""A joined set on disk: Parquet shards, each whole or absent, read back one row group at a time."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

T = TypeVar("T")
# A reader holds one group: 2,000 customers of 50 behaviours are some 30 MB as Python values.
_ROWS_PER_GROUP = 2_000
_PLAN = "plan.json"


@dataclass(frozen=True)
class Shards:
    """A folder of shards ``part-00000.parquet``, …, their rows ascending by (at, key) within and across shards.

    Attributes:
        folder: where they are.
        key: name of the entity column, ``user_id`` or ``item_id``.
    """

    folder: Path
    key: str

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Makes the folder ready for a set; shards of a set with another plan are removed, those of this one stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plan, indent=2, sort_keys=True) + "\n"
        path = self.folder / _PLAN
        if not path.exists() or path.read_text() != text:
            for shard in self.paths():
                shard.unlink()
            path.write_text(text)

    def finished(self, number: int, row_count: int) -> bool:
        """Returns whether a shard is there, whole."""
        path = self._path(number)
        return path.exists() and int(pq.read_metadata(path).num_rows) == row_count

    def write(self, number: int, rows: pa.Table) -> None:
        """Writes a shard: under another name first, so that a killed writer leaves none that looks whole."""
        path = self._path(number)
        unfinished = path.with_suffix(".writing")
        pq.write_table(rows, unfinished, row_group_size=_ROWS_PER_GROUP, compression="zstd")
        os.replace(unfinished, path)

    def paths(self) -> list[Path]:
        """Returns the shards there are, in order."""
        return sorted(self.folder.glob("part-*.parquet"))

    def __len__(self) -> int:
        """Returns the number of rows."""
        return sum(int(pq.read_metadata(path).num_rows) for path in self.paths())

    def groups(self) -> Iterator[pa.Table]:
        """Yields the row groups in order, each only once the one before is done with."""
        for path in self.paths():
            with pq.ParquetFile(path) as file:
                for number in range(file.num_row_groups):
                    yield file.read_row_group(number)

    def find(self, keys: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
        """Yields the rows of some (key, at), reading only the groups that can hold one of them."""
        wanted = sorted((at, key) for key, at in keys)
        if not wanted:
            return
        ats, names = pa.array(sorted({at for at, _ in wanted}), pa.int64()), pa.array(sorted({key for _, key in wanted}))
        for path in self.paths():
            with pq.ParquetFile(path) as file:
                for number in range(file.num_row_groups):
                    low, high = self._bounds(file, number)
                    if high < wanted[0] or low > wanted[-1]:
                        continue
                    group = file.read_row_group(number)
                    near = group.filter(pc.and_(pc.is_in(group["at"], ats), pc.is_in(group[self.key], names)))
                    yield from (row for row in near.to_pylist() if (row[self.key], row["at"]) in keys)

    def _bounds(self, file: pq.ParquetFile, number: int) -> tuple[tuple[int, str], tuple[int, str]]:
        """Returns the first and last (at, key) of a row group, or wider bounds where it holds several times."""
        schema, metadata = file.schema_arrow, file.metadata.row_group(number)
        at, key = (metadata.column(schema.get_field_index(name)).statistics for name in ("at", self.key))
        if at.min == at.max and key is not None and key.has_min_max:
            return (at.min, key.min), (at.max, key.max)
        return (at.min, ""), (at.max, "\U0010ffff")

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields ``items`` in lists of ``size``, the last one shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch
