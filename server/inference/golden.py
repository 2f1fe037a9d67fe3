"""Golden outputs: what a graph computes here beside what it computed where it was exported."""

import numpy as np

from features.bundle import BundleError
from features.item_table import FloatArray

# What they may differ by: other processors sum in other orders. On the exporting machine the difference is 0.
GOLDEN_TOLERANCE = 1e-3


def compare_golden(model_version: str, name: str, seen: FloatArray, expected: FloatArray, *, allowed: float = GOLDEN_TOLERANCE) -> None:
    """Compares arrays of one shape.

    Raises:
        BundleError: they differ by more than ``allowed``, or one of them holds no number.
    """
    difference = float(np.abs(seen - expected).max()) if seen.shape == expected.shape else float("inf")
    if not difference <= allowed:  # also catches NaN
        raise BundleError(f"{model_version}: {name} differs from the golden output by {difference:.2g}")
