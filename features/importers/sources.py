"""Source files as a stream of column batches: Parquet, CSV, JSON lines and JSON, with the line of every row."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.importers.mapping import CsvOptions, FileFormat, Mapping, MappingError

_SUFFIXES: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
}


@dataclass(frozen=True)
class Malformed:
    """A piece of a text file that is not a row."""

    line: int
    reason: str
    text: str


@dataclass(frozen=True)
class SourceBatch:
    """Some rows of a source.

    Attributes:
        rows: the source's columns; of a text file all are strings, null where blank or absent.
        lines: where each row starts: line of a text file, row number (from 1) of a Parquet or JSON file; shape ``[rows]``.
        malformed: what stood between these rows and could not be read as one.
        position: how far the source is read, in units of ``Source.size``.
    """

    rows: pa.Table
    lines: np.ndarray
    malformed: tuple[Malformed, ...]
    position: int


@dataclass(frozen=True)
class Source:
    """A file being read.

    Attributes:
        size: rows of a Parquet file, bytes of a text file.
        columns: its columns, None where each row names its own (JSON lines).
    """

    size: int
    columns: tuple[str, ...] | None
    batches: Iterator[SourceBatch]

    def require(self, wanted: Iterable[tuple[str, str]], section: str) -> None:
        """Checks that the source has every column a mapping reads.

        Raises:
            MappingError: it lacks one; the message names the key and the column.
        """
        for key, column in wanted:
            if self.columns is not None and column not in self.columns:
                raise MappingError(f"{section}.{key}: the source has no column {column!r}; it has {', '.join(self.columns)}")


def open_source(path: Path, mapping: Mapping, *, batch_rows: int) -> Source:
    """Opens ``path`` for reading in batches of at most ``batch_rows`` rows.

    Raises:
        MappingError: the format is neither given nor told by the suffix, or the file is not of that format.
        OSError: the file cannot be read.
    """
    kind = mapping.format or _SUFFIXES.get(path.suffix.lower())
    if kind == "parquet":
        return _parquet(path, batch_rows)
    if kind == "csv":
        return _csv(path, mapping.csv, batch_rows)
    if kind == "jsonl":
        return Source(path.stat().st_size, None, _json_batches(path, batch_rows))
    if kind == "json":
        return _json(path, batch_rows)
    raise MappingError(f'{path.name}: say format = "parquet", "csv", "jsonl" or "json" in the mapping; the suffix does not tell')


def _parquet(path: Path, batch_rows: int) -> Source:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise MappingError(f"{path.name} is not a Parquet file: {error}") from None
    return Source(file.metadata.num_rows, tuple(file.schema_arrow.names), _parquet_batches(file, batch_rows))


def _parquet_batches(file: pq.ParquetFile, batch_rows: int) -> Iterator[SourceBatch]:
    done = 0
    for batch in file.iter_batches(batch_size=batch_rows):
        lines = np.arange(done + 1, done + 1 + len(batch))
        done += len(batch)
        rows = pa.Table.from_batches([batch])
        try:
            rows.validate(full=True)  # Parquet readers do not check that a string is UTF-8
            yield SourceBatch(rows, lines, (), done)
        except pa.ArrowInvalid:
            yield _without_undecodable(rows, lines, done)


def _without_undecodable(rows: pa.Table, lines: np.ndarray, position: int) -> SourceBatch:
    good = np.array([_is_valid(rows.slice(i, 1)) for i in range(len(rows))])
    malformed = tuple(Malformed(int(line), "not UTF-8", "") for line in lines[~good])
    return SourceBatch(rows.filter(pa.array(good)), lines[good], malformed, position)


def _is_valid(row: pa.Table) -> bool:
    try:
        row.combine_chunks().validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _csv(path: Path, options: CsvOptions, batch_rows: int) -> Source:
    with path.open(encoding=options.encoding, errors="surrogateescape", newline="") as file:
        header = next(csv.reader(file, delimiter=options.delimiter), [])
    header = [name.strip().removeprefix("\ufeff") for name in header]
    if len(set(header)) != len(header) or not all(header):
        raise MappingError(f"{path.name}: the header needs one name per column, each once; it is {', '.join(header) or 'empty'}")
    return Source(path.stat().st_size, tuple(header), _csv_batches(path, options, header, batch_rows))


def _csv_batches(path: Path, options: CsvOptions, header: Sequence[str], batch_rows: int) -> Iterator[SourceBatch]:
    with path.open("rb") as raw:
        text = _Lines(line.decode(options.encoding, "surrogateescape") for line in raw)
        next(csv.reader(text, delimiter=options.delimiter))
        text.take()
        records = _csv_records(text, options, len(header))
        yield from _batches(records, batch_rows, lambda values: _string_table(header, values), raw.tell)


class _Lines:
    """Lines of text, remembering those of the record being read."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._held, self.first = lines, list[str](), 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._held.append(line)
        return line

    def take(self) -> tuple[int, str]:
        """Returns first line number and text of what was read since the last call."""
        first, text = self.first, "".join(self._held)
        self.first += len(self._held)
        self._held.clear()
        return first, text


def _csv_records(text: _Lines, options: CsvOptions, width: int) -> Iterator[tuple[int, list[str]] | Malformed]:
    reader = csv.reader(text, delimiter=options.delimiter, strict=True)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            line, raw = text.take()
            yield Malformed(line, f"not CSV: {error}", raw[:2000])
            reader = csv.reader(text, delimiter=options.delimiter, strict=True)
            continue
        line, raw = text.take()
        if len(record) == width:
            yield line, record
        elif record:  # an empty line is no row
            yield Malformed(line, f"{len(record)} columns instead of {width}", raw[:2000])


def _json_batches(path: Path, batch_rows: int) -> Iterator[SourceBatch]:
    with path.open("rb") as raw:
        yield from _batches(_json_records(raw), batch_rows, _json_table, raw.tell)


def _json_records(raw: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]] | Malformed]:
    for line, text in enumerate(raw, start=1):
        if text.isspace():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Malformed(line, f"not JSON: {type(error).__name__}", text[:2000].decode("utf-8", "replace"))
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            yield Malformed(line, "not a JSON object", text[:2000].decode("utf-8", "replace"))


def _json(path: Path, batch_rows: int) -> Source:
    """Opens a file that is one JSON list of objects; it is held in memory as a whole."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MappingError(f"{path.name} is not JSON: {type(error).__name__}") from None
    if not isinstance(found, list):
        raise MappingError(f"{path.name} is not a JSON list of objects")
    return records_source(found, batch_rows)


def records_source(found: Sequence[Any], batch_rows: int) -> Source:
    """Returns a source of objects in memory; what is neither an object nor ``Malformed`` already is malformed."""
    read = 0

    def records() -> Iterator[tuple[int, dict[str, Any]] | Malformed]:
        nonlocal read
        for number, record in enumerate(found, start=1):
            read = number
            if isinstance(record, dict):
                yield number, record
            else:
                yield record if isinstance(record, Malformed) else Malformed(number, "not a JSON object", repr(record)[:2000])

    return Source(len(found), None, _batches(records(), batch_rows, _json_table, lambda: read))


def _json_table(records: Sequence[dict[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for record in records for name in record))
    return _string_table(names, [[_json_text(record.get(name)) for name in names] for record in records])


def _json_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _string_table(names: Sequence[str], records: Sequence[Sequence[str | None]]) -> pa.Table:
    columns = zip(*records, strict=True) if records else [()] * len(names)
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})


def _batches(
    records: Iterator[tuple[int, Any] | Malformed], batch_rows: int, table: Callable[[list[Any]], pa.Table], position: Callable[[], int]
) -> Iterator[SourceBatch]:
    while chunk := list(islice(records, batch_rows)):
        malformed = [piece for piece in chunk if isinstance(piece, Malformed)]
        good = [piece for piece in chunk if not isinstance(piece, Malformed)]
        try:
            rows = table([values for _, values in good])
        except UnicodeEncodeError:  # a lone surrogate: bytes that were not text in the file's encoding
            bad = {line for line, values in good if not _encodable(values)}
            malformed += [Malformed(line, "not text in the file's encoding", repr(values)[:2000]) for line, values in good if line in bad]
            good = [(line, values) for line, values in good if line not in bad]
            rows = table([values for _, values in good])
        yield SourceBatch(rows, np.array([line for line, _ in good], np.int64), tuple(malformed), position())


def _encodable(values: Any) -> bool:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
