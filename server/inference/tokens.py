"""Texts as graphs read them: token ids, cut to what a graph was trained on, and padded where several share a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Tokens:
    """A text as a graph reads it.

    Attributes:
        ids: of its tokens, the tokenizer's own marks at the ends among them.
        readable: whether there is any token besides those marks.
        truncated: whether the text went on.
    """

    ids: Sequence[int]
    readable: bool
    truncated: bool


def read_tokens(tokenizer: Tokenizer, text: str, limit: int) -> Tokens:
    """Reads the first tokens of a text, ``limit`` of them at the most."""
    encoded = tokenizer.encode(text)
    ids = encoded.ids
    readable = len(ids) > sum(encoded.special_tokens_mask)
    if len(ids) <= limit:
        return Tokens(ids, readable, truncated=False)
    return Tokens([*ids[: limit - 1], ids[-1]], readable, truncated=True)  # it still ends with the terminator the graph learned


def padded(rows: Rows) -> dict[str, npt.NDArray[np.int64]]:
    """Returns ``input_ids`` and ``attention_mask``, int64[b, l]: rows padded at their ends where they differ in length."""
    lengths = np.array([len(row) for row in rows])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.zeros_like(mask)
    ids[mask == 1] = np.concatenate(rows)
    return {"input_ids": ids, "attention_mask": mask}


class Tokenizers:
    """The tokenizers opened last, by checksum: models of one base share one.

    Opening one holds the interpreter for its whole time (13 ms for 30,000 words, ten times that on a busy machine), and every
    call in flight with it: a new model of the same base must not cost that.
    """

    _KEPT = 4  # the encoder's, and those of classifiers that read otherwise

    def __init__(self) -> None:
        self._opened: dict[str, Tokenizer] = {}

    def open(self, path: Path, checksum: str) -> Tokenizer:
        """Returns the tokenizer in ``path``, whose checksum has been verified."""
        tokenizer = self._opened.pop(checksum, None)
        if tokenizer is None:
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._opened[checksum] = tokenizer
        for oldest in list(self._opened)[: -self._KEPT]:
            self._opened.pop(oldest, None)  # several models may be loading
        return tokenizer
