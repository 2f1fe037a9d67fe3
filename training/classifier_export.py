"""Writes a trained text classifier into a folder of its own: ONNX graph checked against PyTorch, tokenizer, golden values."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.export import Dim

from features.bundle import Classifier, classifier_files
from features.classifiers import save_folder
from features.item_table import FloatArray
from training.export import ParityError, export_graph
from training.invariance import invariant, measure, open_graph, token_examples
from training.progress import quiet
from training.quantize import TOLERANCE, RefusedVariantError
from training.text import Tokens, tokenize
from training.text_classifier import predict
from training.variants import weights_only


@dataclass(frozen=True)
class TrainedClassifier:
    """What a training of a classifier ends with; the attributes but these are those of ``features.bundle.Classifier``.

    Attributes:
        model: ``forward(input_ids, attention_mask)`` int64[b, l] → logits float32[b, labels].
        tokenizer: without truncation and padding.
    """

    model: nn.Module
    tokenizer: Tokenizer
    labels: Sequence[str]
    tokens: int
    temperature: float
    threshold: float | None
    base_model: str
    metrics: dict[str, float]
    settings: dict[str, str | int | float | bool | None]


def write_classifier(folder: Path, name: str, trained: TrainedClassifier, texts: Sequence[str], *, int4: bool = False) -> Classifier:
    """Writes the folder, ``classifier.json`` last, and returns what that says.

    Args:
        folder: made where it is not there.
        name: of the classifier.
        trained: the classifier.
        texts: some of its own kind and of several lengths, whose logits become the golden values.
        int4: keep the weights in 4 bits (MiniLM: 16 MB instead of 90, on disk and in memory); the arithmetic stays fp32.

    Raises:
        ParityError: ONNX Runtime does not reproduce the model.
        RefusedVariantError: the batch changes what the 4-bit graph computes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = classifier_files(name)
    example = (torch.full((2, 8), 5, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    shape = {0: Dim("batch"), 1: Dim("length")}
    export_graph(
        trained.model.eval(),
        example,
        folder / files.graph,
        inputs=("input_ids", "attention_mask"),
        outputs=("logits",),
        shapes={"input_ids": shape, "attention_mask": shape},
    )
    trained.tokenizer.save(str(folder / files.tokenizer))
    tokens = tokenize(trained.tokenizer, texts, trained.tokens)
    expected = predict(trained.model, tokens, len(trained.labels))
    logits = _alone(folder / files.graph, tokens)
    difference = float(np.abs(logits - expected).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(logits).max())):
        raise ParityError(f"ONNX Runtime differs from PyTorch: {name} by {difference:.2g}")
    if int4:
        with TemporaryDirectory() as scratch, quiet():
            weights_only(folder / files.graph, Path(scratch) / files.graph, bits=4)
            (folder / files.graph).write_bytes((Path(scratch) / files.graph).read_bytes())
        logits = _alone(folder / files.graph, tokens)
        difference = float(np.abs(logits - expected).max())  # the fp32 graph is right by now: this is a figure, not a defect
    examples = token_examples(("input_ids", "attention_mask"), trained.tokenizer.get_vocab_size())
    measured = measure(open_graph(folder / files.graph), examples, longest=trained.tokens)
    if int4 and not invariant(measured):
        raise RefusedVariantError(f"the batch changes what {name} computes with weights of 4 bits")
    padded, _ = tokens.pad(range(len(tokens)))
    np.savez(folder / files.golden, input_ids=padded.numpy(), lengths=np.array([len(ids) for ids in tokens.ids], np.int64), logits=logits)
    classifier = Classifier(
        labels=tuple(trained.labels),
        tokens=trained.tokens,
        own_tokenizer=True,
        temperature=trained.temperature,
        threshold=trained.threshold,
        base_model=trained.base_model,
        metrics=trained.metrics,
        parity=difference,
        invariance=measured,
        settings=trained.settings | {"weights": "int4" if int4 else "fp32"},
    )
    save_folder(folder, name, classifier)
    return classifier


def _alone(graph: Path, tokens: Tokens) -> FloatArray:
    """Returns float32[n, labels]: a graph's logits of single unpadded runs."""
    session = open_graph(graph)
    rows = (np.array([ids], np.int64) for ids in tokens.ids)
    return np.stack([session.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0] for row in rows])
