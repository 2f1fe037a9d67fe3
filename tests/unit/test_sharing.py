"""What may share a run of the encoder: the manifest's claim, and what this machine bears out of it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from features.bundle import ENCODER, Invariance
from features.item_table import FloatArray
from server.inference.batching import Sharing
from server.inference.model import load_model
from server.inference.sharing import Run, claimed, proved
from tests.unit.bundles import write_bundle
from tests.unit.tables import table
from tests.unit.test_bundle import rewrite


def measured(*equal: str) -> Mapping[str, Invariance]:
    names = ("batch_size", "order", "padding")
    return {name: Invariance(bit_equal=name in equal, largest_difference=0.0 if name in equal else 1e-7) for name in names}


def encoder(*, of_batch: float = 0.0, of_padding: float = 0.0) -> Run:
    """Returns sums of the rows, off by so much where they share a run, or are padded."""

    def run(rows: "list[list[int]]") -> FloatArray:
        padded = len({len(row) for row in rows}) > 1
        off = (of_batch if len(rows) > 1 else 0.0) + (of_padding if padded else 0.0)
        return np.array([[sum(row) + off] for row in rows], np.float32)

    return run  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("equal", "claim"),
    [
        (("batch_size", "order", "padding"), Sharing.ANY_LENGTH),
        (("batch_size", "order"), Sharing.EQUAL_LENGTH),
        (("batch_size", "padding"), Sharing.NONE),
        (("order", "padding"), Sharing.NONE),
        ((), Sharing.NONE),
    ],
)
def test_the_manifest_claims(equal: tuple[str, ...], claim: Sharing) -> None:
    assert claimed(measured(*equal), provider="cpu") is claim


def test_a_bundle_that_measured_nothing_claims_nothing() -> None:
    assert claimed({}, provider="cpu") is Sharing.NONE


def test_what_was_measured_on_the_cpu_says_nothing_of_cuda() -> None:
    assert claimed(measured("batch_size", "order", "padding"), provider="cuda") is Sharing.NONE


@pytest.mark.parametrize(
    ("claim", "run", "found"),
    [
        (Sharing.ANY_LENGTH, encoder(), Sharing.ANY_LENGTH),
        (Sharing.ANY_LENGTH, encoder(of_padding=1e-3), Sharing.EQUAL_LENGTH),
        (Sharing.ANY_LENGTH, encoder(of_batch=1e-3), Sharing.NONE),
        (Sharing.EQUAL_LENGTH, encoder(of_padding=1e-3), Sharing.EQUAL_LENGTH),
        (Sharing.EQUAL_LENGTH, encoder(of_batch=1e-3), Sharing.NONE),
        (Sharing.NONE, encoder(), Sharing.NONE),
    ],
)
def test_this_machine_bears_out_no_more_than_it_does(claim: Sharing, run: Run, found: Sharing) -> None:
    assert proved(claim, run, vocabulary=100) is found


def test_a_bundle_that_claims_too_much_is_held_to_what_is_true(tmp_path: Path) -> None:
    """In this graph a batch of one goes by another kernel, and the mean is taken over padding too."""
    write_bundle(tmp_path, table(10))
    with capture_logs() as quiet:
        assert load_model(tmp_path, provider="cpu", threads=1).sharing is Sharing.NONE
    rewrite(tmp_path, invariance={ENCODER: measured("batch_size", "order", "padding")})
    with capture_logs() as told:
        assert load_model(tmp_path, provider="cpu", threads=1).sharing is Sharing.NONE
    assert quiet == []
    assert [(entry["claimed"], entry["proved"]) for entry in told] == [("any length", "none")]
