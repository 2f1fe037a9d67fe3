"""A joined set on disk: Parquet shards, each whole or absent, read back one row group at a time."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

T = TypeVar("T")
# What a reader holds of: 1,000 customers of 50 behaviours are some 15 MB as Python values.
_ROWS_PER_GROUP = 1_000
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
        """Yields the row groups in order, one at a time."""
        for path in self.paths():
            with pq.ParquetFile(path) as file:
                for number in range(file.num_row_groups):
                    yield file.read_row_group(number)

    def read(self, path: Path, number: int) -> pa.Table:
        """Returns one row group."""
        with pq.ParquetFile(path) as file:
            return file.read_row_group(number)

    def index(self) -> list[tuple[tuple[int, str], tuple[Path, int]]]:
        """Returns the last (at, key) of each row group and where the group is, in order: for finding a row by bisection."""
        found = []
        for path in self.paths():
            with pq.ParquetFile(path) as file:
                for number in range(file.num_row_groups):
                    keys = file.read_row_group(number, columns=["at", self.key])
                    last = keys.slice(len(keys) - 1).to_pylist()[0]
                    found.append(((last["at"], last[self.key]), (path, number)))
        return found

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields ``items`` in lists of ``size``, the last one shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch
