"""What makes a row acceptable: an ordered list of masks, the first that fits names the reason."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.importers.columns import number_column, text_column
from features.importers.fields import NumberField, RejectRule, TextField


class Reasons:
    """Why each row of a batch is rejected; the first reason given to a row stays."""

    def __init__(self, row_count: int) -> None:
        self._names: list[str] = []
        self._code = np.full(row_count, -1)

    def add(self, mask: np.ndarray, reason: str) -> None:
        """Rejects the rows of ``mask`` (shape ``[rows]``) that are not rejected yet."""
        if mask.any():
            self._code[mask & (self._code < 0)] = len(self._names)
            self._names.append(reason)

    def missing(self, values: pa.Array, name: str) -> None:
        """Rejects rows that have no value."""
        self.add(is_null(values), f"{name} missing")

    def outside(self, values: pa.Array, allowed: Sequence[str], name: str) -> None:
        """Rejects rows with no value, or one that is not allowed."""
        self.missing(values, name)
        self.add(~matches(values, allowed), f"unknown {name}")

    def longer(self, values: pa.Array, limit: int, name: str) -> None:
        """Rejects texts of more than ``limit`` characters."""
        too_long = pc.fill_null(pc.greater(pc.utf8_length(values), limit), False)
        self.add(too_long.to_numpy(zero_copy_only=False), f"{name} is longer than {limit} characters")

    def rules(self, rows: pa.Table, rules: Iterable[RejectRule]) -> None:
        """Rejects rows by the mapping's own rules."""
        for rule in rules:
            if rule.at_most is None:
                self.add(is_null(text_column(rows, TextField(column=rule.column))), rule.reason)
            else:
                column = number_column(rows, NumberField(column=rule.column))
                values = column.values.to_numpy(zero_copy_only=False)
                self.add(column.invalid | (values <= rule.at_most), rule.reason)

    def unstorable(self, columns: Iterable[pa.Array]) -> None:
        """Rejects rows with a NUL character, which PostgreSQL cannot hold in a text."""
        for column in columns:
            if pa.types.is_string(column.type):
                self.add(pc.fill_null(pc.match_substring(column, "\x00"), False).to_numpy(zero_copy_only=False), "NUL character in a text")

    @property
    def good(self) -> np.ndarray:
        """Rows without a reason, shape ``[rows]``, bool."""
        return self._code < 0

    def names(self) -> list[str | None]:
        """Returns each row's reason, None for a good row."""
        return [None if code < 0 else self._names[code] for code in self._code]

    def counts(self) -> Counter[str]:
        """Returns how many rows each reason rejects."""
        codes, counts = np.unique(self._code[self._code >= 0], return_counts=True)
        return Counter({self._names[code]: int(count) for code, count in zip(codes, counts, strict=True)})


def is_null(values: pa.Array) -> np.ndarray:
    """Returns where a column has no value, shape ``[rows]``, bool."""
    return np.asarray(values.is_null(nan_is_null=True))


def matches(values: pa.Array, names: Sequence[str]) -> np.ndarray:
    """Returns where a column holds one of ``names``, shape ``[rows]``, bool."""
    return np.asarray(pc.is_in(values, value_set=pa.array(names, pa.string())))
