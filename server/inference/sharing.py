"""Whether texts may share a run of the encoder: what the bundle was measured to allow, proved once more on this machine."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from features.bundle import Invariance
from features.item_table import FloatArray
from server.inference.batching import Sharing
from server.inference.tokens import Rows

Run = Callable[[Rows], FloatArray]
"""Rows of token ids, padded at their ends where they differ in length, to float32[rows, d]."""


def claimed(measured: Mapping[str, Invariance], *, provider: str) -> Sharing:
    """Returns what a manifest's invariance of the encoder allows: nothing where it was not measured, and it is measured on the CPU.

    On CUDA kernels are chosen by shape.
    """
    equal = {name for name, one in measured.items() if one.bit_equal} if provider == "cpu" else set()
    if not {"batch_size", "order"} <= equal:
        return Sharing.NONE
    return Sharing.ANY_LENGTH if "padding" in equal else Sharing.EQUAL_LENGTH


def proved(claim: Sharing, run: Run, *, vocabulary: int) -> Sharing:
    """Returns what of a claim ``run`` bears out, to the bit, on eight rows of one length and eight of lengths from 2 to 16.

    The bundle was measured where it was exported: this machine's processor may be another one, and its threads more. ``vocabulary``
    is the number of tokens there are; which of them a row holds does not matter.
    """
    if claim is Sharing.NONE:
        return claim
    rng = np.random.default_rng(0)
    equal, ragged = ([rng.integers(0, vocabulary, length).tolist() for length in lengths] for lengths in ([8] * 8, range(2, 17, 2)))
    if not _same_bits(equal, run):
        return Sharing.NONE
    return claim if claim is Sharing.EQUAL_LENGTH or _same_bits(ragged, run) else Sharing.EQUAL_LENGTH


def _same_bits(rows: Sequence[Sequence[int]], run: Run) -> bool:
    return run(rows).tobytes() == b"".join(run([row]).tobytes() for row in rows)
