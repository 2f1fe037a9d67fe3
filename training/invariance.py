"""Measures whether a graph's output for one input depends on the batch it runs in: its size, its padding, its order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from features.bundle import Invariance
from features.item_table import FloatArray

Inputs = Mapping[str, npt.NDArray[np.generic]]
"""Arrays by input name, each [batch, length, ...]."""

BATCH_SIZES = tuple(range(1, 65))
# 16 tokens show every batch size in seconds; the longest texts are looked at in a few sizes only.
_SHORT = 16
_SIZES_OF_LONG = (2, 8, 64)


class Gap:
    """The largest difference seen, and whether there was any at all."""

    def __init__(self) -> None:
        self._largest, self._equal = 0.0, True

    def see(self, got: Sequence[FloatArray], expected: Sequence[FloatArray]) -> None:
        """Compares outputs, one array each; bits decide, so that -0 is not 0 and a NaN is an infinite difference."""
        for left, right in zip(got, expected, strict=True):
            if left.tobytes() == right.tobytes():
                continue
            difference = float(np.abs(left.astype(np.float64) - right).max())
            self._equal, self._largest = False, max(self._largest, float("inf") if np.isnan(difference) else difference)

    def verdict(self) -> Invariance:
        """Returns what was seen."""
        return Invariance(bit_equal=self._equal, largest_difference=self._largest)


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    """Opens a graph on the CPU with two threads, a server's default, whatever cores this machine has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(session: onnxruntime.InferenceSession, example: Callable[[int], Inputs], *, longest: int) -> dict[str, Invariance]:
    """Compares batches with single unpadded runs.

    Args:
        session: a graph whose inputs are [batch, length, ...], padded by zeros.
        example: makes one input of a given length; each call another one.
        longest: the longest input the graph is meant for.

    Returns:
        ``batch_size`` (every size from 1 to 64), ``padding`` and ``order``.
    """
    batch_size, padding, order = Gap(), Gap(), Gap()
    short = min(_SHORT, longest)
    for length, sizes in ((short, BATCH_SIZES), (longest, _SIZES_OF_LONG)):
        rows = [example(length) for _ in range(max(sizes))]
        singles = [session.run(None, dict(row)) for row in rows]
        for size in sizes:
            _see_rows(batch_size, session.run(None, _stack(rows[:size])), singles)
        backwards = session.run(None, _stack(rows[::-1]))
        _see_rows(order, [output[::-1] for output in backwards], _rows(session.run(None, _stack(rows))))
    for length in sorted({2, short - 1, short, longest - 1}):
        row = example(max(length, 1))
        single = session.run(None, dict(row))
        for width in sorted({length + 1, length + 7, longest}):
            if width > length:
                padding.see(session.run(None, _pad(row, width)), single)
    return {"batch_size": batch_size.verdict(), "padding": padding.verdict(), "order": order.verdict()}


def measure_ranker(session: onnxruntime.InferenceSession, features: FloatArray) -> dict[str, Invariance]:
    """Compares scores of one list of candidates, float32[256, f], with those of its first rows alone and of another order.

    The graph has one shape, so it has no batch size: fewer candidates are padded with zero rows, as the server does.
    """
    padding, order = Gap(), Gap()
    scores = session.run(None, {"features": features})[0]
    for count in sorted({1, 2, min(63, len(features)), len(features) - 1}):
        part = np.zeros_like(features)
        part[:count] = features[:count]
        padding.see([session.run(None, {"features": part})[0][:count]], [scores[:count]])
    for places in (np.arange(len(features))[::-1], np.random.default_rng(0).permutation(len(features))):
        order.see([session.run(None, {"features": np.ascontiguousarray(features[places])})[0]], [scores[places]])
    return {"padding": padding.verdict(), "order": order.verdict()}


def token_examples(inputs: Sequence[str], vocabulary: int, *, seed: int = 0) -> Callable[[int], Inputs]:
    """Returns a maker of random texts: ids below ``vocabulary``, ``attention_mask`` of ones, ``token_type_ids`` of zeros then ones.

    Which words a text holds does not matter here, and a shop need not have 64 texts of one length.
    """
    rng = np.random.default_rng(seed)

    def example(length: int) -> Inputs:
        made: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": rng.integers(1, vocabulary, (1, length)),
            "attention_mask": np.ones((1, length), np.int64),
            "token_type_ids": (np.arange(length) >= length // 2).astype(np.int64)[None],
        }
        return {name: made[name] for name in inputs}

    return example


def invariant(measured: Mapping[str, Invariance]) -> bool:
    """Returns whether a graph is bit-equal in every property."""
    return all(one.bit_equal for one in measured.values())


def _stack(rows: Sequence[Inputs]) -> dict[str, npt.NDArray[np.generic]]:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _pad(row: Inputs, width: int) -> dict[str, npt.NDArray[np.generic]]:
    return {
        name: np.concatenate([value, np.zeros((1, width - value.shape[1], *value.shape[2:]), value.dtype)], axis=1)
        for name, value in row.items()
    }


def _rows(outputs: Sequence[FloatArray]) -> list[list[FloatArray]]:
    return [[output[k : k + 1] for output in outputs] for k in range(len(outputs[0]))]


def _see_rows(gap: Gap, outputs: Sequence[FloatArray], expected: Sequence[Sequence[FloatArray]]) -> None:
    for got, single in zip(_rows(outputs), expected, strict=False):
        gap.see(got, single)
