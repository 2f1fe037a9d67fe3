"""The rejects file: every row that was not stored, as one JSON object a line with its line number, reason and content."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from features.importers.report import Tally
from features.importers.sources import SourceBatch


class Rejects:
    """Writes rejected rows to ``path`` (replaced when it exists); a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # JSON has an escape for what UTF-8 cannot hold (lone surrogates of undecodable bytes): \udc80 and its like.
        self._file = self._path.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def write(self, line: int, reason: str, row: Any) -> None:
        """Writes one row; ``row`` is its columns, or its raw text where it could not be read."""
        self._file.write(json.dumps({"line": line, "reason": reason, "row": row}, ensure_ascii=False, default=str) + "\n")

    def write_rows(self, rows: pa.Table, lines: np.ndarray, reasons: Iterable[str | None]) -> None:
        """Writes the rows that have a reason.

        Args:
            rows: the source rows.
            lines: line of each row, shape ``[rows]``.
            reasons: reason of each row, None for a good one.
        """
        bad = [(position, reason) for position, reason in enumerate(reasons) if reason is not None]
        taken = rows.take([position for position, _ in bad]).to_pylist() if bad else []
        for (position, reason), row in zip(bad, taken, strict=True):
            self.write(int(lines[position]), reason, row)

    def malformed(self, batch: SourceBatch, tally: Tally) -> None:
        """Writes and counts what could not be read as rows."""
        for piece in batch.malformed:
            self.write(piece.line, piece.reason, piece.text)
            tally.read += 1
            tally.rejected[piece.reason] += 1
