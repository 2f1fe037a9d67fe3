"""Writes a trained text classifier into a folder of its own: ONNX graph checked against PyTorch, tokenizer, golden values."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.export import Dim

from features.bundle import Classifier, classifier_files
from features.classifiers import save_folder
from training.export import ParityError, export_graph
from training.invariance import measure, open_graph, token_examples
from training.quantize import TOLERANCE
from training.text import tokenize
from training.text_classifier import predict


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


def write_classifier(folder: Path, name: str, trained: TrainedClassifier, texts: Sequence[str]) -> Classifier:
    """Writes the folder, ``classifier.json`` last, and returns what that says.

    Args:
        folder: made where it is not there.
        name: of the classifier.
        trained: the classifier.
        texts: some of its own kind and of several lengths, whose logits become the golden values.

    Raises:
        ParityError: ONNX Runtime does not reproduce the model.
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
    session = open_graph(folder / files.graph)
    tokens = tokenize(trained.tokenizer, texts, trained.tokens)
    singles = [session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0] for ids in map(_row, tokens.ids)]
    logits = np.stack(singles)
    padded, _ = tokens.pad(range(len(tokens)))
    np.savez(folder / files.golden, input_ids=padded.numpy(), lengths=np.array([len(ids) for ids in tokens.ids], np.int64), logits=logits)
    difference = float(np.abs(logits - predict(trained.model, tokens, len(trained.labels))).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(logits).max())):
        raise ParityError(f"ONNX Runtime differs from PyTorch: {name} by {difference:.2g}")
    classifier = Classifier(
        labels=tuple(trained.labels),
        tokens=trained.tokens,
        own_tokenizer=True,
        temperature=trained.temperature,
        threshold=trained.threshold,
        base_model=trained.base_model,
        metrics=trained.metrics,
        parity=difference,
        invariance=measure(
            session, token_examples(("input_ids", "attention_mask"), trained.tokenizer.get_vocab_size()), longest=trained.tokens
        ),
        settings=trained.settings,
    )
    save_folder(folder, name, classifier)
    return classifier


def _row(ids: Sequence[int]) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    return np.array([ids], np.int64)
