"""Golden values of a sequence tower's graph, compared with PyTorch, and whether what it should not read changes them."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from features.behaviour import MICROS_PER_DAY, Activity, Behaviour
from features.bundle import GOLDEN, TOWER, Invariance
from features.item_table import FloatArray
from features.sequence import TOWER_INPUTS, SequenceSpec, behaviour_sequence, tower_inputs
from training.invariance import Gap
from training.sequence_model import ExportedTower, SequenceModel


def write_tower_golden(folder: Path, model: SequenceModel, vectors: FloatArray) -> float:
    """Adds golden values of ``tower.onnx`` to the folder's ``golden.npz``.

    They are, for g customers, ``tower_`` + each name of ``features.sequence.TOWER_INPUTS`` and ``tower_user_vectors`` float32[g, d].

    Args:
        folder: the bundle's, with the graph, and with golden values of the others.
        model: the trained model.
        vectors: float32[n, d], the items' unit vectors.

    Returns:
        The largest absolute difference between ONNX Runtime and PyTorch.
    """
    counts = sorted({1, 2, model.spec.length // 2 + 1, model.spec.length})
    inputs = [tower_example(model.spec, vectors, count) for count in counts]
    session = onnxruntime.InferenceSession(str(folder / TOWER), providers=["CPUExecutionProvider"])
    users = np.concatenate([session.run(["user_vector"], one)[0] for one in inputs])
    columns = {name: np.concatenate([one[name] for one in inputs]) for name in TOWER_INPUTS}
    with torch.inference_mode():
        expected = ExportedTower(model.tower).eval()(*(torch.from_numpy(columns[name]) for name in TOWER_INPUTS))
    golden: dict[str, Any] = dict(np.load(folder / GOLDEN)) | {f"tower_{name}": column for name, column in columns.items()}
    np.savez(folder / GOLDEN, **golden | {"tower_user_vectors": users})
    return float(np.abs(users - expected.numpy()).max())


def measure_tower(session: onnxruntime.InferenceSession, golden: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Invariance]:
    """Measures ``padding``: whether what precedes the oldest behaviour changes the vector of a golden customer.

    The graph has one shape, so it knows no batch size, and no order of a batch.
    """
    padding, rng = Gap(), np.random.default_rng(0)
    for place, length in enumerate(golden["tower_length"].tolist()):
        inputs = {name: golden[f"tower_{name}"][place : place + 1] for name in TOWER_INPUTS}
        noisy = {name: value.copy() for name, value in inputs.items()}
        unread = inputs["vectors"].shape[1] - length
        noisy["vectors"][0, :unread] = rng.standard_normal(inputs["vectors"].shape[1:])[:unread]
        for name in ("actions", "channels", "gaps"):
            noisy[name][0, :unread] = inputs[name][0, -1]
        padding.see(session.run(None, noisy), session.run(None, inputs))
    return {"padding": padding.verdict()}


def tower_example(spec: SequenceSpec, vectors: FloatArray, count: int) -> dict[str, npt.NDArray[np.generic]]:
    """Returns the graph's inputs for somebody who did something with ``count`` items, each time sooner than the time before."""
    names = zip(itertools.cycle(spec.actions or ("",)), itertools.cycle(("", *spec.channels)), strict=False)
    behaviours = tuple(
        Behaviour(str(place % len(vectors)), action, channel, 1_000 * MICROS_PER_DAY - 60_000_000 * place**4)
        for place, (action, channel) in zip(range(count), names, strict=False)
    )
    sequence = behaviour_sequence(Activity(count, behaviours), {str(row): row for row in range(len(vectors))}, spec)
    return tower_inputs(sequence, sequence.vectors(vectors, lambda _: vectors[0]), spec)
