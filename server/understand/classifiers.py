"""Texts to the labels of a classifier in the active model's bundle, with calibrated probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from features.item_table import FloatArray
from server.errors import PreconditionError
from server.inference.classifier import LoadedClassifier
from server.inference.model import LoadedModel
from server.inference.tokens import Tokens
from server.understand.text_runs import Graph, TextRuns


@dataclass(frozen=True)
class Classification:
    """What a classifier says of a text.

    Attributes:
        labels: n of them.
        probabilities: float32[n], together 1; None where there was nothing to read.
        in_scope: whether the likeliest label is probable enough for the classifier's threshold; False where nothing was read.
        token_count: how many tokens it read, 0 where there was nothing to.
        truncated: whether the text went on.
    """

    labels: tuple[str, ...]
    probabilities: FloatArray | None
    in_scope: bool
    token_count: int
    truncated: bool

    def top(self, count: int) -> list[tuple[str, float]]:
        """Returns the likeliest labels and their probabilities, likeliest first; equal ones in the order of the labels."""
        if self.probabilities is None:
            return []
        order = (-self.probabilities).argsort(kind="stable")[:count]
        return [(self.labels[k], float(self.probabilities[k])) for k in order]


class Classifiers:
    """Runs classifiers of a loaded model, each text to the bit as if it were alone."""

    def __init__(self, runs: TextRuns) -> None:
        self._runs = runs

    async def classify(self, model: LoadedModel, name: str, texts: Sequence[str]) -> list[Classification]:
        """Returns what the classifier ``name`` says of each text.

        Raises:
            PreconditionError: the model has no such classifier; the reason is ``NO_<NAME>_MODEL``.
            OverloadedError: too many texts wait.
        """
        classifier = require_classifier(model, name)
        read = await self._runs.read(partial(_read, classifier, texts))
        graph = Graph((model.model_version, "classifier", name), classifier.sharing, classifier.probabilities)
        found = await self._runs.results(graph, read, stage="classify")
        threshold, labels = classifier.spec.threshold or 0.0, classifier.spec.labels
        return [
            Classification(
                labels,
                shares,
                shares is not None and bool(shares.max() >= threshold),
                len(text.ids) if text.readable else 0,
                text.truncated,
            )
            for shares, text in zip(found, read, strict=True)
        ]


def require_classifier(model: LoadedModel, name: str) -> LoadedClassifier:
    """Returns a classifier of a model.

    Raises:
        PreconditionError: it has none of that name; the reason is ``NO_<NAME>_MODEL``.
    """
    if name not in model.classifiers:
        told = f"the active model has no {name} classifier: train one, export, publish and activate"
        raise PreconditionError(told, reason=f"NO_{name.upper()}_MODEL")
    return model.classifiers[name]


def _read(classifier: LoadedClassifier, texts: Sequence[str]) -> list[Tokens]:
    return [classifier.tokens(text) for text in texts]
