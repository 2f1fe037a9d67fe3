"""Writes a trained model as a bundle: ONNX graphs checked against PyTorch, item vectors, weights, golden values, manifest."""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

from features.bundle import (
    COLLABORATIVE,
    ENCODER,
    ENCODER_FP16,
    GOLDEN,
    ITEMS,
    MANIFEST,
    RANKER,
    REQUIRED_FILES,
    TOKENIZER,
    TOWER,
    TRAINING,
    Classifier,
    FeatureContract,
    Invariance,
    Manifest,
    checksums,
    write_manifest,
)
from features.candidates import CANDIDATE_COUNT
from features.classifiers import put_into
from features.item_table import FloatArray, ItemTable
from features.ranking import RANKING_FEATURES
from features.sequence import TOWER_INPUTS
from features.signals import CollaborativeWeights
from training.checkpoint import Trained
from training.events import from_micros
from training.invariance import measure, measure_ranker, open_graph, token_examples
from training.model import ExportedEncoder
from training.progress import bar, quiet
from training.quantize import TOLERANCE, Encoding, ship
from training.ranker import Ranker
from training.sequence_export import measure_tower, tower_example, write_tower_golden
from training.sequence_model import ExportedTower, SequenceModel
from training.text import Tokens, base_name, tokenize
from training.warm_start import Origin, save_origin

_GOLDEN_TEXTS = 8


class ParityError(Exception):
    """ONNX Runtime and PyTorch disagree on an exported graph; the message says by how much."""


@dataclass(frozen=True)
class BundleContext:
    """What the manifest says beyond the model itself; times in microseconds of Unix time.

    ``ranker_start``, ``cut`` and ``warm_start`` are those of ``training.checkpoint.RunRecord``.
    """

    name: str
    created_at: datetime
    contract: FeatureContract
    metrics: dict[str, float]
    cut: int
    first_event: int
    last_event: int
    ranker_start: int = 0
    warm_start: str = ""


def write_bundle(
    folder: Path,
    trained: Trained,
    *,
    table: ItemTable,
    collaborative: CollaborativeWeights,
    context: BundleContext,
    encoding: Encoding | None = None,
    classifiers: Iterable[Path] = (),
) -> Manifest:
    """Writes the bundle folder, manifest last; a bundle that stands there is replaced.

    ``encoding`` asks for another form of the encoder than fp32, or for one more in half precision; ``classifiers`` are folders that
    trainings of text classifiers left, for the bundle to carry.

    Raises:
        FileExistsError: the folder holds something that is no bundle.
        FileNotFoundError, BundleError, ValueError: a folder holds no classifier that this release reads, or two have one name.
        ParityError: ONNX Runtime does not reproduce the model.
        RefusedVariantError: the batch changes what the asked-for encoder computes, or it gains nothing.
    """
    _clear(folder)
    for stage in bar(("encoder", "ranker"), "export to ONNX"):
        export_encoder(trained, folder / ENCODER) if stage == "encoder" else export_ranker(trained.ranker, folder / RANKER)
    trained.tokenizer.save(str(folder / TOKENIZER))
    vectors = trained.item_vectors(table)
    np.savez(folder / ITEMS, item_ids=np.array(table.ids, np.str_), content_hashes=np.array(table.content_hashes, np.str_), vectors=vectors)
    np.savez(folder / COLLABORATIVE, indptr=collaborative.indptr, indices=collaborative.indices, weights=collaborative.weights)
    if not isinstance(trained.tower, SequenceModel):  # an update grows text towers only
        save_origin(Origin(trained, context.ranker_start, context.cut), folder / TRAINING)
    parity = write_golden(folder, trained, golden_texts(table))
    if encoding is not None:
        lost = ship(folder, trained, encoding, table=table, items=vectors)
        context = replace(context, metrics=context.metrics | lost)
        # The graph is known to be right by now: what a lossy form of it differs by is a figure, not a defect.
        parity = write_golden(folder, trained, golden_texts(table), tolerance=float("inf"))
    if isinstance(trained.tower, SequenceModel):
        export_tower(trained.tower, vectors, folder / TOWER)
        parity["tower"] = check_tower(trained.tower, vectors, folder)
    carried = put_into(folder, classifiers)
    form = "fp32" if encoding is None else encoding.variant.value
    manifest = _manifest(trained, context, parity=parity, folder=folder, encoder=form, classifiers=carried)
    write_manifest(folder, manifest)
    return manifest


def _clear(folder: Path) -> None:
    if folder.exists():
        names = {path.name for path in folder.iterdir()}
        # An export that broke off leaves some of the files.
        known = {*REQUIRED_FILES, ENCODER_FP16, TOWER, TRAINING}
        if MANIFEST not in names and any(name not in known and not name.startswith("classifier.") for name in names):
            raise FileExistsError(f"{folder} is not empty and no bundle")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def export_encoder(trained: Trained, path: Path) -> None:
    """Writes ``input_ids, attention_mask`` int64[b, l] → ``user_vector, item_vector`` float32[b, d], b and l free."""
    # Two tensors: torch.export takes one tensor given twice for one input, and reads the ids from the mask.
    example = (torch.full((2, 8), 5, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    shape = {0: Dim("batch"), 1: Dim("length")}
    export_graph(
        ExportedEncoder(trained.tower).eval(),
        example,
        path,
        inputs=("input_ids", "attention_mask"),
        outputs=("user_vector", "item_vector"),
        shapes={"input_ids": shape, "attention_mask": shape},
    )


def export_ranker(ranker: Ranker, path: Path) -> None:
    """Writes ``features`` float32[256, 23] → ``scores`` float32[256]; the fixed shape keeps scores equal to the bit."""
    example = torch.zeros(CANDIDATE_COUNT, len(RANKING_FEATURES))
    export_graph(ranker.eval(), (example,), path, inputs=("features",), outputs=("scores",), shapes=None)


def export_tower(model: SequenceModel, vectors: FloatArray, path: Path) -> None:
    """Writes ``features.sequence.tower_inputs`` → ``user_vector`` float32[1, d]; the fixed shape keeps vectors equal to the bit."""
    inputs = tower_example(model.spec, vectors, model.spec.length)
    example = tuple(torch.from_numpy(inputs[name]) for name in TOWER_INPUTS)
    export_graph(ExportedTower(model.tower).eval(), example, path, inputs=TOWER_INPUTS, outputs=("user_vector",), shapes=None)


def check_tower(model: SequenceModel, vectors: FloatArray, folder: Path) -> float:
    """Adds the golden values of the folder's tower graph and compares them with PyTorch.

    Returns:
        The largest absolute difference.

    Raises:
        ParityError: it is larger than rounding explains.
    """
    difference = write_tower_golden(folder, model, vectors)
    if not difference <= TOLERANCE:
        raise ParityError(f"ONNX Runtime differs from PyTorch: tower by {difference:.2g}")
    return difference


def export_graph(
    model: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: dict[str, dict[int, Dim]] | None,
) -> None:
    """Writes a module as an ONNX graph in one file; ``shapes`` names the free dimensions of each input."""
    with quiet(), torch.no_grad():
        torch.onnx.export(
            model,
            example,
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def golden_texts(table: ItemTable) -> list[str]:
    """Returns texts of the shop itself: item texts, and behaviour texts of one to four phrases."""
    half = _GOLDEN_TEXTS // 2
    step = max(len(table) // half, 1)
    titles = [table.titles[row % len(table)] for row in range(0, half * step, step)]
    behaviours = ["; ".join(f"bought {title}" for title in titles[: count + 1]) for count in range(half)]
    return [*(table.texts[row % len(table)] for row in range(0, half * step, step)), *behaviours]


def write_golden(folder: Path, trained: Trained, texts: Sequence[str], *, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Computes golden values on the exported graphs, stores them and compares them with PyTorch.

    ``golden.npz`` holds ``input_ids`` int64[g, l] padded with 0, ``lengths`` int64[g], ``user_vectors`` and ``item_vectors``
    float32[g, d] of single unpadded runs, ``ranker_features`` float32[256, 23] and ``ranker_scores`` float32[256].

    Returns:
        The largest absolute difference by graph: single runs, one ragged padded batch, the ranker.

    Raises:
        ParityError: a difference is larger than rounding explains.
    """
    tokens = tokenize(trained.tokenizer, texts, trained.config.user_tokens)
    encoder, ranker = open_graph(folder / ENCODER), open_graph(folder / RANKER)
    singles = [_encode(encoder, tokens, [row]) for row in range(len(tokens))]
    users, items = (np.concatenate([single[k] for single in singles]) for k in (0, 1))
    features = _golden_features(trained.ranker)
    scores = np.asarray(ranker.run(None, {"features": features})[0], np.float32)
    everything = list(range(len(tokens)))
    ids, _ = tokens.pad(everything)
    np.savez(
        folder / GOLDEN,
        input_ids=ids.numpy(),
        lengths=np.array([len(text) for text in tokens.ids], np.int64),
        user_vectors=users,
        item_vectors=items,
        ranker_features=features,
        ranker_scores=scores,
    )
    ragged = _difference(_encode(encoder, tokens, everything), _torch_encode(trained, tokens, everything))
    single = max(_difference(singles[row], _torch_encode(trained, tokens, [row])) for row in everything)
    with torch.inference_mode():
        ranked = float(np.abs(trained.ranker(torch.from_numpy(features)).numpy() - scores).max())
    parity = {"encoder": single, "encoder_ragged_batch": ragged, "ranker": ranked}
    if max(parity.values()) > tolerance:
        raise ParityError(f"ONNX Runtime differs from PyTorch: {parity}")
    return parity


def measure_graphs(folder: Path, trained: Trained) -> dict[str, dict[str, Invariance]]:
    """Measures, for every graph of a bundle folder, whether the batch changes its outputs."""
    config, vocabulary = trained.config, trained.tokenizer.get_vocab_size()
    measured = {RANKER: measure_ranker(open_graph(folder / RANKER), _golden_features(trained.ranker))}
    encoders = [name for name in (ENCODER, ENCODER_FP16) if (folder / name).exists()]
    for name in bar(encoders, "batch invariance"):
        examples = token_examples(("input_ids", "attention_mask"), vocabulary)
        measured[name] = measure(open_graph(folder / name), examples, longest=max(config.user_tokens, config.item_tokens))
    if isinstance(trained.tower, SequenceModel):
        measured[TOWER] = measure_tower(open_graph(folder / TOWER), np.load(folder / GOLDEN))
    return measured


def _encode(session: onnxruntime.InferenceSession, tokens: Tokens, rows: Sequence[int]) -> list[FloatArray]:
    ids, mask = tokens.pad(rows)
    vectors: list[FloatArray] = session.run(["user_vector", "item_vector"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return vectors


@torch.inference_mode()
def _torch_encode(trained: Trained, tokens: Tokens, rows: Sequence[int]) -> list[FloatArray]:
    return [vector.numpy() for vector in ExportedEncoder(trained.tower).eval()(*tokens.pad(rows))]


def _difference(left: Sequence[FloatArray], right: Sequence[FloatArray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def _golden_features(ranker: Ranker) -> npt.NDArray[np.float32]:
    """Returns plausible ranker input: random rows spread as its training rows were."""
    noise = np.random.default_rng(0).standard_normal((CANDIDATE_COUNT, len(RANKING_FEATURES)))
    return np.asarray(ranker.mean.numpy() + noise / ranker.scale.numpy(), np.float32)


def _manifest(
    trained: Trained, context: BundleContext, *, parity: dict[str, float], folder: Path, encoder: str, classifiers: dict[str, Classifier]
) -> Manifest:
    config, files = trained.config, dict(checksums(folder))
    spec = trained.tower.spec if isinstance(trained.tower, SequenceModel) else None
    digest = hashlib.sha256("".join(f"{name}{files[name]}" for name in sorted(files)).encode()).hexdigest()[:8]
    return Manifest(
        model_version=f"{context.name}-{digest}",
        created_at=context.created_at,
        base_model=base_name(config.base_model),
        tower="text" if spec is None else "sequence",
        sequence=spec,
        vector_size=trained.tower.vector_size,
        item_tokens=config.item_tokens,
        user_tokens=config.user_tokens,
        behaviour_limit=config.behaviour_limit,
        half_life_days=config.half_life_days,
        ranking_features=RANKING_FEATURES,
        candidate_count=CANDIDATE_COUNT,
        contract=context.contract,
        metrics=context.metrics,
        parity=parity,
        invariance=measure_graphs(folder, trained),
        classifiers=classifiers,
        data_from=from_micros(context.first_event),
        data_until=from_micros(context.last_event),
        settings=config.record()
        | {
            "metrics_of": f"holdout after {from_micros(context.cut).isoformat()}; tower and ranker trained before it",
            "collaborative_weights_of": "all events in the data window, refitted after the evaluation",
            "warm_start": context.warm_start,
            "encoder": encoder,
        },
        files=files,
    )
