"""Training of a sentiment classifier on reviews: its weights, its calibration, and what it reaches on reviews it never saw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from features.item_table import FloatArray
from training.classifier_export import TrainedClassifier
from training.config import TrainConfig
from training.estimates import calibration_error, reliability
from training.loop import Loop, Plan, decayed
from training.messages import messages
from training.metrics import area_under_curve
from training.regimes import Regime
from training.reviews import TEST, TRAIN, VALIDATION, Reviews
from training.run import prepare_torch
from training.sentiment_model import (
    LABELS,
    SIDES,
    STARS,
    UNKNOWN,
    Phrases,
    PretrainedNet,
    SentimentModel,
    Verdicts,
    WindowNet,
    character_tokenizer,
)
from training.sentiment_phrases import fit_phrases
from training.text import Tokens, base_name, load_encoder, load_tokenizer, tokenize
from training.text_classifier import fit_temperature, predict

_RECORDED = ("seed", "epochs", "max_steps", "learning_rate", "weight_decay", "dropout")  # of the loop's many settings
_AT_ONCE = 3_200  # texts sorted by length before they are cut into batches: shorter ones are padded less, and still mixed

# Of the small net: a row of the loop is a whole batch, it is over before a checkpoint would pay, and its products are too small for
# several threads to share.
_LOOP = TrainConfig(
    batch_size=1, epochs=3, learning_rate=2e-3, dropout=0.4, checkpoint_steps=0, device="cpu", mixed_precision="no", threads=1
)


@dataclass(frozen=True)
class SentimentConfig:
    """How a classifier is trained.

    Attributes:
        base: a pretrained BERT to fine-tune, by path or name; empty: the small net.
        tokens: read of a text.
        texts: per batch.
        width, filters, window, lost: of the small net: components of an embedding, outputs of a window, tokens in it, and the share of
            words that go missing in a step.
        buckets: places for the weights of phrases.
        loop: optimizer, schedule, epochs, bounds and seed; of a pretrained BERT also what of it is fine-tuned.
    """

    base: str = ""
    tokens: int = 128
    texts: int = 64
    width: int = 128
    filters: int = 192
    window: int = 3
    lost: float = 0.1
    buckets: int = 1 << 18
    loop: TrainConfig = _LOOP

    @classmethod
    def pretrained(cls, base: str) -> "SentimentConfig":
        """Returns the configuration of a fine-tuning: its top two layers, and fewer texts at a time."""
        usual = cls()
        return replace(
            usual, base=base, tokens=64, texts=32, loop=replace(usual.loop, epochs=1, learning_rate=1e-4, dropout=0.1, threads=0)
        )

    def seeded(self, seed: int) -> "SentimentConfig":
        """Returns the configuration with another seed."""
        return replace(self, loop=replace(self.loop, seed=seed))

    def record(self) -> dict[str, str | int | float | bool | None]:
        """Returns it as flat values, for a manifest."""
        own = {name: value for name, value in vars(self).items() if name != "loop"}
        return own | {name: getattr(self.loop, name) for name in _RECORDED}


@dataclass(frozen=True)
class _Batch:
    """Texts int64[b, l], their mask, and targets int64[b]."""

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Self:
        """Returns the batch on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class _Answered:
    """n tokenized texts and their targets, int64[n]."""

    tokens: Tokens
    targets: npt.NDArray[np.int64]


class _Learner(nn.Module):
    """The model as the loop calls it."""

    def __init__(self, model: SentimentModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: _Batch) -> Tensor:
        return cross_entropy(self.model.read(batch.input_ids, batch.attention_mask), batch.targets)


class _Task:
    """The training as the task of a loop, whose rows are whole batches of texts of similar length."""

    def __init__(self, model: SentimentModel, train: "_Answered", validation: "_Answered", config: SentimentConfig) -> None:
        self.model, self._train, self._validation, self._config = _Learner(model), train.tokens, validation, config
        self._wanted = torch.from_numpy(train.targets)
        self._batches = _of_like_length(train.tokens, config.texts, seed=config.loop.seed)

    def __len__(self) -> int:
        return len(self._batches)

    def groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups."""
        return decayed([self.model], peak=self._config.loop.learning_rate, weight_decay=self._config.loop.weight_decay)

    def batch(self, rows: Sequence[int], mine: Sequence[int]) -> _Batch:
        """Assembles the one batch that ``rows`` names."""
        (place,) = (rows[k] for k in mine)
        texts = self._batches[place]
        return _Batch(*self._train.pad(texts), self._wanted[texts])

    def validate(self) -> float:
        """Returns the mean log likelihood of the validation reviews' targets."""
        model = self.model.model
        said = predict(_Part(model, model.read), self._validation.tokens, model.verdicts.count)
        return -float(cross_entropy(torch.from_numpy(said), torch.from_numpy(self._validation.targets)))

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: a run of minutes keeps no checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes nothing."""


def _of_like_length(tokens: Tokens, size: int, *, seed: int) -> list[list[int]]:
    shuffled = np.random.default_rng(seed).permutation(len(tokens)).tolist()
    batches = []
    for start in range(0, len(shuffled), _AT_ONCE):
        part = sorted(shuffled[start : start + _AT_ONCE], key=lambda row: len(tokens.ids[row]))
        batches += [part[k : k + size] for k in range(0, len(part), size)]
    return batches


def train_sentiment(reviews: Reviews, config: SentimentConfig) -> TrainedClassifier:
    """Trains on the training part, calibrates on the validation part, and measures on the test part.

    The metrics: ``auc`` of the score against whether the author recommends it, ``accuracy`` and with ratings ``macro_f1`` of the
    label, ``calibration_error``, and with ratings ``rating_accuracy`` and ``rating_mae``, in stars.
    """
    prepare_torch(config.loop)
    torch.manual_seed(config.loop.seed)
    tokenizer = _tokenizer(reviews, config)
    verdicts = verdicts_of(reviews)
    phrases = Phrases(verdicts.count, longest=3 if reviews.language == "zh" else 2, buckets=config.buckets)
    model = SentimentModel(_reader(reviews, tokenizer, config), phrases, verdicts)
    train, validation = (_answered(reviews, part, tokenizer, config.tokens) for part in (TRAIN, VALIDATION))
    task = _Task(model, train, validation, config)
    regime = Regime(model.reader.encoder, "top_k", config.loop) if isinstance(model.reader, PretrainedNet) else None
    plan = Plan.of(len(task), config.loop, metric="log_likelihood")
    Loop(task, replace(plan, stage="sentiment"), config=config.loop, regime=regime).run()
    fit_phrases(model.phrases, train.tokens, train.targets, validation.tokens, validation.targets)
    _mix(model, validation)
    temperature = _calibrated(model, reviews, tokenizer, config)
    return TrainedClassifier(
        model=model,
        tokenizer=tokenizer,
        labels=LABELS,
        tokens=config.tokens,
        temperature=temperature,
        threshold=None,
        base_model=base_name(config.base) if config.base else "convolution",
        metrics=measure(*judged(model, tokenizer, reviews, TEST, config.tokens, temperature=temperature), reviews, TEST),
        settings=config.record(),
    )


def _mix(model: SentimentModel, held: "_Answered") -> None:
    """Finds the shares of reader and phrases in what the model says that make the held-out targets likeliest."""
    parts = [predict(_Part(model, part), held.tokens, model.verdicts.count) for part in (model.read, model.phrases)]
    said, wanted = torch.from_numpy(np.stack(parts)), torch.from_numpy(held.targets)
    shares = torch.ones(2, requires_grad=True)
    search = torch.optim.LBFGS([shares], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        found = cross_entropy(torch.einsum("s,sno->no", shares, said), wanted)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    search.step(loss)  # type: ignore[no-untyped-call]
    model.shares.copy_(shares.detach())


def _answered(reviews: Reviews, part: int, tokenizer: Tokenizer, limit: int) -> _Answered:
    """Returns the reviews of a part; those to train on with messages among them."""
    rows, verdicts = reviews.rows(part), verdicts_of(reviews)
    said = messages(reviews.language) if part == TRAIN else ()
    asked, complained = verdicts.groups[1][0], verdicts.groups[0][-1]
    extra = [complained if one.complains else asked for one in said]
    texts = [*(reviews.texts[row] for row in rows), *(one.text for one in said)]
    return _Answered(tokenize(tokenizer, texts, limit), np.concatenate([targets(reviews)[rows], np.array(extra, np.int64)]))


def verdicts_of(reviews: Reviews) -> Verdicts:
    """Returns what is told apart: stars where there are ratings, else the sides and what is on neither."""
    return SIDES if reviews.stars is None else STARS


def targets(reviews: Reviews) -> npt.NDArray[np.int64]:
    """Returns int64[n], the outcome of each review."""
    return np.where(reviews.positive, SIDES.groups[-1][0], SIDES.groups[0][0]) if reviews.stars is None else reviews.stars - 1


def _tokenizer(reviews: Reviews, config: SentimentConfig) -> Tokenizer:
    if config.base:
        return load_tokenizer(config.base)
    if reviews.language == "zh":
        return character_tokenizer(reviews.texts[row] for row in reviews.rows(TRAIN))
    return load_tokenizer("")


def _reader(reviews: Reviews, tokenizer: Tokenizer, config: SentimentConfig) -> WindowNet | PretrainedNet:
    if config.base:
        return PretrainedNet(config.base, dropout=config.loop.dropout)
    unknown = tokenizer.token_to_id(UNKNOWN)
    assert unknown is not None  # every tokenizer here has one
    net = WindowNet(
        tokenizer.get_vocab_size(),
        width=config.width,
        filters=config.filters,
        window=config.window,
        dropout=config.loop.dropout,
        unknown=unknown,
        lost=config.lost,
    )
    if reviews.language != "zh":  # the base model's own words, so what it knows of them is where these begin
        net.begin_with(load_encoder("", dropout=0.0).get_input_embeddings().weight.detach())
    return net


def _calibrated(model: SentimentModel, reviews: Reviews, tokenizer: Tokenizer, config: SentimentConfig) -> float:
    rows = reviews.rows(VALIDATION)
    tokens = tokenize(tokenizer, [reviews.texts[row] for row in rows], config.tokens)
    return fit_temperature(predict(model, tokens, len(LABELS)), label_of(reviews)[rows].tolist())


def label_of(reviews: Reviews) -> npt.NDArray[np.int64]:
    """Returns int64[n], the place of each review's label among ``LABELS``."""
    return verdicts_of(reviews).labels(targets(reviews))


def judged(
    model: SentimentModel, tokenizer: Tokenizer, reviews: Reviews, part: int, limit: int, *, temperature: float
) -> tuple[FloatArray, FloatArray]:
    """Returns calibrated probabilities float32[m, labels] and outcome logits float32[m, outcomes] of a part's m reviews."""
    tokens = tokenize(tokenizer, [reviews.texts[row] for row in reviews.rows(part)], limit)
    outcomes = predict(_Part(model, model.outcomes), tokens, model.verdicts.count)
    logits = np.stack([np.logaddexp.reduce(outcomes[:, list(group)], axis=1) for group in model.verdicts.groups], axis=1) / temperature
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(shares / shares.sum(1, keepdims=True), np.float32), outcomes


class _Part(nn.Module):
    """One of the things that a model says of a text."""

    def __init__(self, model: nn.Module, part: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._part = model, part

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._part(input_ids, attention_mask)


def measure(probabilities: FloatArray, outcomes: FloatArray, reviews: Reviews, part: int) -> dict[str, float]:
    """Returns the metrics that ``train_sentiment`` names, of probabilities and outcome logits of a part's reviews."""
    rows = reviews.rows(part)
    found, wanted = probabilities.argmax(1), label_of(reviews)[rows]
    right = found == wanted
    bins = reliability(probabilities.max(1).astype(np.float64), right)
    figures = {
        "auc": area_under_curve(probabilities[:, -1] - probabilities[:, 0], reviews.positive[rows]),
        "accuracy": float(right.mean()),
        "calibration_error": calibration_error(bins),
    }
    if reviews.stars is None:
        return figures
    stars = outcomes.argmax(1) + 1
    return figures | {
        "macro_f1": macro_f1(found, wanted),
        "rating_accuracy": float((stars == reviews.stars[rows]).mean()),
        "rating_mae": float(np.abs(stars - reviews.stars[rows]).mean()),
    }


def macro_f1(found: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> float:
    """Returns the mean over the wanted labels of the harmonic mean of precision and recall."""
    scores = []
    for label in np.unique(wanted):
        hits = int(((found == label) & (wanted == label)).sum())
        scores.append(2 * hits / (int((found == label).sum()) + int((wanted == label).sum())))
    return float(np.mean(scores))
