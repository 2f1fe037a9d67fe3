"""The intent classifier: logistic regression on the vectors of a pretrained BERT, then a few steps of fine-tuning both.

What an utterance file teaches is mostly its templates, so that the pretrained sentence space is kept: the head is fitted to it first,
the lower layers stay as they are, the steps are few, the labels' names are learned as well, and texts are reworded each time they
are seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from features.item_table import FloatArray
from training.classifier_export import TrainedClassifier
from training.config import TrainConfig
from training.estimates import calibration_error, reliability
from training.loop import Loop, Plan, decayed
from training.regimes import freeze_below, rest_frozen
from training.text import Tokens, base_name, load_encoder, load_tokenizer, tokenize
from training.text_classifier import TextClassifier, fit_head, fit_temperature, predict
from training.utterances import OUT_OF_SCOPE, Rewording, Utterances, different, name_texts, wording_groups

TOKENS = 64
# How often each form of a name counts when the head is fitted: of 3, 10 and 30 the best on held-out wordings (docs/LOG.md).
_NAME_COUNT = 10
_NAMES, _STRANGERS = 4, 4  # of a batch, beside its utterances: labels' names, and texts that are out of scope
_ACCEPTED = 0.95  # of held-out utterances: what passes the threshold where no texts out of scope are known


@dataclass(frozen=True)
class _Batch:
    """Texts int64[b, l] and the wanted probabilities float32[b, labels]."""

    input_ids: Tensor
    attention_mask: Tensor
    wanted: Tensor

    def to(self, device: torch.device) -> "_Batch":
        """Returns the batch on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


class _Learner(nn.Module):
    def __init__(self, classifier: TextClassifier, label_smoothing: float) -> None:
        super().__init__()
        self.classifier, self._smoothing = classifier, label_smoothing

    def train(self, mode: bool = True) -> "_Learner":
        super().train(mode)
        rest_frozen(self.classifier.encoder)
        return self

    def forward(self, batch: _Batch) -> Tensor:
        scores = self.classifier(batch.input_ids, batch.attention_mask)
        return cross_entropy(scores, batch.wanted, label_smoothing=self._smoothing)


class _Task:
    """What the loop trains: reworded utterances, and in each batch some names of labels and some texts out of scope."""

    def __init__(
        self,
        classifier: TextClassifier,
        known: Utterances,
        labels: Sequence[str],
        *,
        named: Sequence[tuple[str, int]],
        strangers: Sequence[str],
        config: TrainConfig,
    ) -> None:
        self.model = _Learner(classifier, config.label_smoothing)
        self._config, self._texts, self._strangers = config, known.texts, list(strangers)
        self._answers = [labels.index(intent) for intent in known.intents]
        self._names = list(named)
        self._count = len(labels)
        self._reword, self._rng = Rewording(config.seed), np.random.default_rng([config.seed, 2])
        self._tokenizer = load_tokenizer(config.base_model)

    def groups(self) -> list[dict[str, Any]]:
        """Returns the encoder's parameters and those of the head."""
        config, classifier = self._config, self.model.classifier
        head = list(classifier.head.parameters())
        return [
            *decayed([classifier.encoder], peak=config.learning_rate, weight_decay=config.weight_decay),
            {"params": head, "peak": config.head_learning_rate, "weight_decay": 0.0},
        ]

    def batch(self, rows: Sequence[int], mine: Sequence[int]) -> _Batch:
        """Returns some utterances, reworded, with what goes beside them."""
        texts = [self._reword(self._texts[rows[place]]) for place in mine]
        wanted = [one_hot(torch.tensor(self._answers[rows[place]]), self._count).float() for place in mine]
        for at in self._rng.integers(0, len(self._names), _NAMES).tolist() if self._names else ():
            texts.append(self._names[at][0])
            wanted.append(one_hot(torch.tensor(self._names[at][1]), self._count).float())
        for at in self._rng.integers(0, len(self._strangers), _STRANGERS).tolist() if self._strangers else ():
            texts.append(self._reword(self._strangers[at]))
            wanted.append(torch.full((self._count,), 1.0 / self._count))
        tokens = tokenize(self._tokenizer, texts, TOKENS)
        return _Batch(*tokens.pad(range(len(texts))), torch.stack(wanted))

    def validate(self) -> float:
        """Returns nothing of use: the held-out wordings are for temperature and threshold, and the last weights are kept."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: so short a training has no checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has nothing to go on from."""


def train_intents(
    utterances: Utterances, strangers: Sequence[str], *, config: TrainConfig, examples: int = 100, names: bool = True
) -> TrainedClassifier:
    """Trains and calibrates a classifier.

    One of five groups of wordings of each intent is held out: temperature and threshold are chosen on it. Where no intent has ten
    utterances nothing is: the temperature is 1 and every text is in scope.

    Args:
        utterances: at least two intents; those of ``out_of_scope`` are texts that are none of the others' business.
        strangers: more of these. Half of them all are learned from, half choose the threshold.
        config: ``base_model``, ``seed``, ``threads``, rates, ``epochs``, ``max_steps``, ``batch_size``, ``trainable_layers``, ``dropout``
            and ``label_smoothing`` are read. With no trainable layer the head is all that is trained.
        examples: utterances of an intent that are fine-tuned on at the most, the most different ones; the head is fitted to all.
        names: whether the labels' names say something; False where they are codes.
    """
    outside = [text for text, intent in zip(utterances.texts, utterances.intents, strict=True) if intent == OUT_OF_SCOPE]
    known = utterances.of([row for row, intent in enumerate(utterances.intents) if intent != OUT_OF_SCOPE])
    labels = sorted(set(known.intents))
    answers = np.array([labels.index(intent) for intent in known.intents])
    tokenizer = load_tokenizer(config.base_model)
    torch.manual_seed(config.seed)
    classifier = TextClassifier(load_encoder(config.base_model, dropout=config.dropout), len(labels), dropout=config.dropout)
    vectors = _pooled(classifier, tokenize(tokenizer, known.texts, TOKENS))
    groups = wording_groups(vectors, answers.tolist(), seed=config.seed)
    held = groups == config.seed % 5
    learning, rng = np.flatnonzero(~held), np.random.default_rng([config.seed, 3])
    named = [(text, answer) for answer, label in enumerate(labels) for text in name_texts(label)] if names else []
    said = _pooled(classifier, tokenize(tokenizer, [text for text, _ in named], TOKENS))
    fitted = np.concatenate([vectors[learning], *[said] * _NAME_COUNT])
    fit_head(classifier, fitted, [*answers[learning].tolist(), *[answer for _, answer in named] * _NAME_COUNT])
    rows = _chosen(vectors, answers, learning, examples, rng=rng)
    mixed = rng.permutation(np.array([*outside, *strangers], dtype=object)).tolist()
    if config.trainable_layers:
        freeze_below(classifier.encoder, config.trainable_layers)
        task = _Task(classifier, known.of(rows), labels, named=named, strangers=mixed[::2], config=config)
        steps = max(config.epochs * (len(rows) // config.batch_size), 1)
        Loop(task, Plan(len(rows), min(steps, config.max_steps or steps)), config=config).run()
    temperature, threshold, metrics = 1.0, None, {"utterances": float(len(learning))}
    if held.any():
        logits, strange = (
            predict(classifier, tokenize(tokenizer, texts, TOKENS), len(labels))
            for texts in (known.of(np.flatnonzero(held).tolist()).texts, mixed[1::2])
        )
        temperature, threshold, found = _calibrated(logits, answers[held].tolist(), strange)
        metrics |= found
    settings = config.record() | {"examples": examples}
    return TrainedClassifier(classifier, tokenizer, labels, TOKENS, temperature, threshold, base_name(config.base_model), metrics, settings)


def _calibrated(logits: FloatArray, answers: Sequence[int], strange: FloatArray) -> tuple[float, float, dict[str, float]]:
    """Returns temperature, threshold and what both give, from logits of held-out utterances and of texts out of scope (may be none)."""
    temperature = fit_temperature(logits, answers)
    shares = probabilities(logits, temperature)
    known, outside = shares.max(1), probabilities(strange, temperature).max(1) if len(strange) else None
    threshold = choose_threshold(known, outside)
    metrics = {f"validation_{name}": value for name, value in measured(shares, answers).items()}
    metrics["validation_accepted"] = float((known >= threshold).mean())
    if outside is not None:
        metrics["validation_out_of_scope_refused"] = float((outside < threshold).mean())
    return temperature, threshold, metrics


def probabilities(logits: FloatArray, temperature: float) -> FloatArray:
    """Returns the softmax of logits float32[n, labels] at a temperature."""
    scaled = logits / temperature
    shares = np.exp(scaled - scaled.max(1, keepdims=True))
    return np.asarray(shares / shares.sum(1, keepdims=True), np.float32)


def measured(shares: FloatArray, answers: Sequence[int]) -> dict[str, float]:
    """Returns ``accuracy``, ``macro_f1`` over the labels that occur, and ``ece``, the calibration error of the likeliest label."""
    said, wanted = shares.argmax(1), np.asarray(answers)
    return {
        "accuracy": float((said == wanted).mean()),
        "macro_f1": float(f1_score(wanted, said, labels=np.unique(wanted), average="macro", zero_division=0)),
        "ece": calibration_error(reliability(shares.max(1), said == wanted)),
    }


def choose_threshold(known: FloatArray, strange: FloatArray | None) -> float:
    """Returns the probability below which a text is out of scope.

    Args:
        known: float32[n], how probable the likeliest label of held-out utterances is.
        strange: the same of texts out of scope; None where there are none, and then 95 % of ``known`` pass.

    Returns:
        Of the values seen the one with the highest mean of the share of ``known`` that pass and of ``strange`` that do not.
    """
    if strange is None:
        return float(np.quantile(known, 1 - _ACCEPTED))
    values = np.unique(np.concatenate([known, strange]))
    passed = 1 - np.searchsorted(np.sort(known), values) / len(known)
    refused = np.searchsorted(np.sort(strange), values) / len(strange)
    return float(values[np.argmax(passed + refused)])


def _chosen(
    vectors: FloatArray, answers: "np.ndarray[Any, Any]", rows: "np.ndarray[Any, Any]", examples: int, *, rng: np.random.Generator
) -> list[int]:
    """Returns of each label the rows that are learned from, in order."""
    chosen: list[int] = []
    for label in np.unique(answers):
        mine = rows[answers[rows] == label]
        chosen += mine[different(vectors[mine], examples, rng=rng)].tolist()
    return sorted(chosen)


class _Pooled(nn.Module):
    def __init__(self, classifier: TextClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classifier.pool(input_ids, attention_mask)


def _pooled(classifier: TextClassifier, tokens: Tokens) -> FloatArray:
    return predict(_Pooled(classifier), tokens, classifier.head.in_features)
