"""Sequences of whole numbers of different lengths, kept as two arrays: millions of texts' tokens fit into memory."""

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from features.item_table import IntArray


class Ragged(Sequence[tuple[int, ...]]):
    """n sequences in 4 bytes a number and 8 a sequence; tuples take 8 to 36 bytes a number and 40 a sequence."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        parts = [np.asarray(sequence, np.int32) for sequence in sequences]
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._numbers: IntArray = np.concatenate([np.zeros(0, np.int32), *parts])

    @staticmethod
    def joined(parts: Sequence["Ragged"]) -> "Ragged":
        """Returns the sequences of several, in order."""
        whole = Ragged(())
        shifts = np.cumsum([0, *(len(part._numbers) for part in parts)])
        whole._numbers = np.concatenate([np.zeros(0, np.int32), *(part._numbers for part in parts)])
        whole._ends = np.concatenate([np.zeros(0, np.int64), *(part._ends + shift for part, shift in zip(parts, shifts, strict=False))])
        return whole

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        k = int(place) % len(self)
        return tuple(self._numbers[self._ends[k - 1] if k else 0 : self._ends[k]].tolist())

    def __repr__(self) -> str:
        """Returns the sequences themselves: equal ones look equal, which digests rely on."""
        return f"Ragged({list(self)!r})"
