"""Measures the variants of an encoder beside each other: size, time, what the batch changes, and the loss in NDCG@10."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime

from features.bundle import ENCODER, ENCODER_FP16, Invariance
from features.item_table import FloatArray, ItemTable
from training.checkpoint import Trained
from training.invariance import invariant, measure, open_graph, token_examples
from training.progress import bar
from training.text import Tokens, tokenize
from training.train import TowerSet, mean_ndcg
from training.variants import QUANTIZED, Variant, calibration_texts, write_variant

# fp32 arithmetic in another order: 1e-6 is usual, a wrong graph is off by 1e-2 and more.
TOLERANCE = 1e-4
_TIMED_TOKENS = 32
_TIMED_ROUNDS = 40


class RefusedVariantError(Exception):
    """A variant must not be served; the message says what was measured."""


@dataclass(frozen=True)
class Encoding:
    """Which form of the encoder a bundle carries.

    Attributes:
        variant: of the graph that servers run.
        fp16: whether a graph in half precision for CUDA comes with it.
        validation: labels and behaviour texts the loss in NDCG@10 is measured on, never the holdout.
    """

    variant: Variant
    fp16: bool
    validation: TowerSet


@dataclass(frozen=True)
class Figures:
    """What was measured of a variant on the CPU.

    Attributes:
        variant: which one.
        megabytes: size of the file, 10^6 bytes.
        milliseconds: median of single runs of 32 tokens, all variants by turns.
        difference: largest from the fp32 graph, any component, single runs of the validation texts.
        invariance: by property, as in the manifest.
        ndcg_at_10: of the user tower alone on the validation labels, item vectors as in the bundle (fp32).
        ndcg_loss: how much less that is than with the fp32 graph.
    """

    variant: Variant
    megabytes: float
    milliseconds: float
    difference: float
    invariance: Mapping[str, Invariance]
    ndcg_at_10: float
    ndcg_loss: float

    def record(self) -> dict[str, object]:
        """Returns plain values, for a file."""
        return asdict(self) | {"invariance": {name: one.model_dump() for name, one in self.invariance.items()}}


def figures_of(
    graphs: Mapping[Variant, Path], *, validation: TowerSet, items: FloatArray, vocabulary: int, longest: int
) -> dict[Variant, Figures]:
    """Measures graphs side by side; FP32 must be among them.

    Args:
        graphs: files by variant.
        validation: labels and behaviour texts.
        items: float32[n, d], the items' vectors.
        vocabulary: token ids are below this.
        longest: most tokens of a text.
    """
    sessions = {variant: open_graph(path) for variant, path in graphs.items()}
    texts = validation.tokens
    users = {v: user_vectors(session, texts) for v, session in bar(sessions.items(), "validation texts", len(sessions))}
    ndcg = {variant: mean_ndcg(vectors, items, validation.labels) for variant, vectors in users.items()}
    took = _milliseconds(sessions, min(_TIMED_TOKENS, longest), vocabulary)
    measured = {}
    for variant, session in bar(sessions.items(), "batch invariance", len(sessions)):
        examples = token_examples(("input_ids", "attention_mask"), vocabulary)
        measured[variant] = Figures(
            variant=variant,
            megabytes=graphs[variant].stat().st_size / 1e6,
            milliseconds=took[variant],
            difference=float(np.abs(users[variant] - users[Variant.FP32]).max()) if len(texts) else 0.0,
            invariance=measure(session, examples, longest=longest),
            ndcg_at_10=ndcg[variant],
            ndcg_loss=ndcg[Variant.FP32] - ndcg[variant],
        )
    return measured


def refusal(figures: Figures, fp32: Figures) -> str:
    """Returns why a variant must not be served, empty where it may."""
    worst = max(one.largest_difference for one in figures.invariance.values())
    if figures.variant is Variant.DYNAMIC:
        return f"its ranges come from the batch at hand: the batch changes a vector by up to {worst:.1e}"
    if figures.variant in QUANTIZED and not invariant(figures.invariance):
        return f"the batch changes a vector by up to {worst:.1e}"
    if figures.variant is Variant.FUSED and figures.difference > TOLERANCE:
        return f"differs from the fp32 graph by {figures.difference:.1e}"
    if figures.variant is Variant.FUSED and figures.milliseconds >= fp32.milliseconds:
        return f"not faster than the fp32 graph: {figures.milliseconds:.1f} ms, {fp32.milliseconds:.1f} ms"
    return ""


def check(figures: Figures, fp32: Figures) -> None:
    """Lets a variant pass.

    Raises:
        RefusedVariantError: it must not be served.
    """
    if reason := refusal(figures, fp32):
        raise RefusedVariantError(f"encoder {figures.variant.value}: {reason}")


def ship(folder: Path, trained: Trained, encoding: Encoding, *, table: ItemTable, items: FloatArray) -> dict[str, float]:
    """Puts the asked-for encoder in the place of the bundle's fp32 one, and half precision beside it.

    Args:
        folder: the bundle, with its fp32 encoder.
        trained: the model.
        encoding: what is asked for.
        table: the shop's items, for calibration.
        items: float32[n, d], their vectors.

    Returns:
        Metrics for the manifest: what each form loses in NDCG@10 on the validation labels.

    Raises:
        RefusedVariantError: it must not be served.
    """
    if (variant := encoding.variant) is Variant.FP16:
        raise RefusedVariantError("half precision is for CUDA and comes beside the encoder, not in its place")
    with TemporaryDirectory() as scratch:
        wanted: dict[Variant, Path] = {variant: Path(scratch) / ENCODER} if variant is not Variant.FP32 else {}
        if encoding.fp16:
            wanted[Variant.FP16] = folder / ENCODER_FP16
        measured = measure_all(wanted, trained, encoder=folder / ENCODER, table=table, items=items, validation=encoding.validation)
        if variant is not Variant.FP32:
            check(measured[variant], measured[Variant.FP32])
            shutil.copyfile(wanted[variant], folder / ENCODER)
    names = {variant: "encoder_validation_ndcg_loss", Variant.FP16: "encoder_fp16_validation_ndcg_loss"}
    return {names[kind]: measured[kind].ndcg_loss for kind in wanted}


def measure_all(
    wanted: Mapping[Variant, Path], trained: Trained, *, encoder: Path, table: ItemTable, items: FloatArray, validation: TowerSet
) -> dict[Variant, Figures]:
    """Writes variants of the fp32 graph ``encoder`` to the files wanted, and measures them beside it."""
    config = trained.config
    calibration = tokenize(trained.tokenizer, calibration_texts(table), config.user_tokens)
    for variant, path in bar(wanted.items(), "encoder variants", len(wanted)):
        write_variant(variant, path, encoder=encoder, tower=trained.tower, calibration=calibration)
    return figures_of(
        {Variant.FP32: encoder, **wanted},
        validation=validation,
        items=items,
        vocabulary=trained.tokenizer.get_vocab_size(),
        longest=max(config.user_tokens, config.item_tokens),
    )


def user_vectors(session: onnxruntime.InferenceSession, texts: Tokens) -> FloatArray:
    """Returns float32[n, d], by single unpadded runs, as a server makes them."""
    vectors = []
    for row in range(len(texts)):
        ids, mask = texts.pad([row])
        vectors.append(session.run(["user_vector"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])
    return np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)


def save(figures: Sequence[Figures], path: Path) -> None:
    """Writes the figures as JSON."""
    path.write_text(json.dumps([one.record() for one in figures], indent=2) + "\n")


def _milliseconds(sessions: Mapping[Variant, onnxruntime.InferenceSession], length: int, vocabulary: int) -> dict[Variant, float]:
    example = dict(token_examples(("input_ids", "attention_mask"), vocabulary)(length))
    took: dict[Variant, list[float]] = {variant: [] for variant in sessions}
    for session in sessions.values():
        session.run(None, example)
    for _ in range(_TIMED_ROUNDS):
        for variant, session in sessions.items():
            started = time.perf_counter()
            session.run(None, example)
            took[variant].append((time.perf_counter() - started) * 1e3)
    return {variant: float(np.median(times)) for variant, times in took.items()}
