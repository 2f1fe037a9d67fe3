"""Models that read a customer's behaviours and a candidate's title together: BERT over the pair of texts, under a head of its own.

A head (``training/classifier.py``, ``training/rating.py``) says what pairs there are, what the loss is and how one measures;
the training, the run folder and the export are the same for all.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForSequenceClassification

from features.item_table import FloatArray
from features.settings import Settings
from training.config import TrainConfig
from training.dataset import Shop, Split, TrainingDataError, open_shop, split_of
from training.distributed import agreed, is_first, processes, rank_zero_first
from training.export import export_graph
from training.invariance import measure, open_graph, token_examples
from training.loop import Loop, Plan, Progress, decayed
from training.progress import quiet
from training.regimes import Regime, rest_frozen
from training.run import TrainResult, prepare_torch
from training.runs import Begun, begin, checkpoints, finish
from training.text import TINY, base_path, load_tokenizer, tiny_config
from training.tracking import Tracker, open_trackers, require_trackers

_EVALUATION_BATCH = 64
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts and the answer to each: ragged ids and segment ids, answers int64[n] or float32[n]."""

    ids: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[int, ...], ...]
    answers: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def pad(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns input_ids, attention_mask and token_type_ids, int64[b, l]."""
        width = max(len(self.ids[row]) for row in rows)
        fill = [(0,) * (width - len(self.ids[row])) for row in rows]
        ids = torch.tensor([self.ids[row] + rest for row, rest in zip(rows, fill, strict=True)])
        mask = torch.tensor([(1,) * len(self.ids[row]) + rest for row, rest in zip(rows, fill, strict=True)])
        segments = torch.tensor([self.segments[row] + rest for row, rest in zip(rows, fill, strict=True)])
        return ids, mask, segments

    @classmethod
    def of(cls, texts: Sequence[tuple[str, str]], answers: Tensor, tokenizer: Tokenizer, limit: int) -> "Pairs":
        """Tokenizes (behaviours, title) pairs; where a pair is longer than ``limit`` tokens, the oldest behaviours are cut."""
        tokenizer.enable_truncation(limit, strategy="only_first")
        encoded = tokenizer.encode_batch(list(texts))
        tokenizer.no_truncation()
        return cls(tuple(tuple(e.ids) for e in encoded), tuple(tuple(e.type_ids) for e in encoded), answers)


@dataclass(frozen=True)
class PairSets:
    """The pairs of a run, by what they are for; ``test`` is None where the head measures on its validation pairs."""

    train: Pairs
    validation: Pairs
    test: Pairs | None = None


class Head(ABC):
    """What is asked about a pair.

    Attributes:
        name: of the task, the run folder's suffix and the graph's file.
        outputs: numbers the model gives a pair.
        output: what the graph calls them.
        metric: what the best weights are chosen by, and whether more of it is better.
    """

    name: str
    outputs: int
    output: str
    metric: str
    more_is_better: bool

    @abstractmethod
    def pairs(self, shop: Shop, split: Split, tokenizer: Tokenizer, config: TrainConfig) -> PairSets:
        """Returns the pairs, those to train on all from before those to validate on.

        Raises:
            TrainingDataError: there are none.
        """

    @abstractmethod
    def prepare(self, model: "PairModel", answers: Tensor) -> None:
        """Fits the model's last layer to the training answers before the first step."""

    @abstractmethod
    def loss(self, outputs: Tensor, answers: Tensor, config: TrainConfig) -> Tensor:
        """Returns the mean loss of outputs float32[b, o]."""

    @abstractmethod
    def measure(self, outputs: Tensor, answers: Tensor) -> dict[str, float]:
        """Returns the metrics of outputs float32[n, o], among them ``metric``."""

    @abstractmethod
    def baseline(self, train: Tensor, answers: Tensor) -> dict[str, float]:
        """Returns what one gets on ``answers`` by saying the same of every pair, knowing the training answers."""


@dataclass(frozen=True)
class PairBatch:
    """One batch: input_ids, attention_mask and token_type_ids int64[b, l], answers [b]."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> Self:
        """Returns the batch on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


class PairModel(nn.Module):
    """BERT with a linear layer over its pooled pair; what that gives is spread by ``scale`` about ``mean``."""

    mean: Tensor
    scale: Tensor

    def __init__(self, head: Head, config: TrainConfig) -> None:
        super().__init__()
        self._head, self._config = head, config
        self.bert = _pretrained(config, head.outputs)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("scale", torch.ones(1))

    def train(self, mode: bool = True) -> Self:
        """Switches dropout on or off; frozen layers stay without it."""
        super().train(mode)
        rest_frozen(self.bert.base_model)
        return self

    def answer(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Returns outputs float32[b, o] of pairs int64[b, l]."""
        logits = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits
        outputs: Tensor = self.mean + self.scale * logits
        return outputs

    def forward(self, batch: PairBatch) -> Tensor:
        """Returns the head's loss."""
        outputs = self.answer(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        return self._head.loss(outputs.float(), batch.answers, self._config)

    @torch.inference_mode()
    def answers(self, pairs: Pairs) -> Tensor:
        """Returns outputs float32[n, o] of all pairs, without dropout, on the processor."""
        training, device, parts = self.training, self.mean.device, []
        self.eval()
        for start in range(0, len(pairs), _EVALUATION_BATCH):
            batch = pairs.pad(range(start, min(start + _EVALUATION_BATCH, len(pairs))))
            parts.append(self.answer(*(tensor.to(device) for tensor in batch)).cpu())
        self.train(training)
        return torch.cat(parts)


def _pretrained(config: TrainConfig, outputs: int) -> BertForSequenceClassification:
    options = {"num_labels": outputs, "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    path = base_path(config.base_model)
    with quiet():
        bert = AutoConfig.from_pretrained(path, **options)
        if config.base_model == TINY:
            return BertForSequenceClassification(tiny_config(bert))
        return AutoModelForSequenceClassification.from_pretrained(path, config=bert, dtype=torch.float32)


class PairTask:
    """A head's training as the task of a loop."""

    def __init__(self, model: PairModel, head: Head, sets: PairSets, config: TrainConfig) -> None:
        self.model, self._head, self._sets, self._config = model, head, sets, config

    def groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups; the new layer learns as BERT does."""
        return decayed([self.model], peak=self._config.learning_rate, weight_decay=self._config.weight_decay)

    def batch(self, rows: Sequence[int], mine: Sequence[int]) -> PairBatch:
        """Assembles this process's pairs of a batch."""
        own = [rows[place] for place in mine]
        return PairBatch(*self._sets.train.pad(own), self._sets.train.answers[own])

    def validate(self) -> float:
        """Returns the head's metric on the validation pairs, higher being better."""
        value = self._head.measure(self.model.answers(self._sets.validation), self._sets.validation.answers)[self._head.metric]
        return value if self._head.more_is_better else -value

    def state_dict(self) -> dict[str, Any]:
        """Returns a mark of the data; nothing else of the task changes."""
        return {"data": self._mark()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that a checkpoint belongs to these pairs.

        Raises:
            TrainingDataError: it was made on others.
        """
        if state["data"] != self._mark():
            raise TrainingDataError("its events before the cut or its items have changed since this run began; begin a new one")

    def _mark(self) -> str:
        parts = [(pairs.ids, pairs.answers.tolist()) for pairs in (self._sets.train, self._sets.validation)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def train_pairs(
    settings: Settings,
    head: Head,
    config: TrainConfig,
    *,
    now: datetime | None = None,
    resume: Path | None = None,
    track: Sequence[str] = ("tensorboard",),
) -> TrainResult:
    """Trains a head on pairs before the ranker's period, keeps the best weights on that period, and exports them as a graph.

    Args:
        settings: the shop.
        head: what to train.
        config: how.
        now: names the run folder; by default the time of the call.
        resume: a run folder that was broken off, to go on from its last checkpoint.
        track: who follows the run, of ``training.tracking.TRACKERS``.

    Raises:
        TrackerMissingError: the package of a tracker is not installed.
        TrainingDataError: no items, no events, too few before the cut, or others than when the run to resume began.
    """
    started = time.monotonic()
    require_trackers(track)
    prepare_torch(config)
    with ExitStack() as followed:
        with processes(config):
            run_dir = agreed(resume or settings.data_dir / "runs" / f"{now or datetime.now(UTC):%Y%m%dT%H%M%S}-{head.name}")
            with rank_zero_first():
                shop = open_shop(settings)
                split = begin(run_dir, Begun(head.name, config, split_of(shop.log, config).cut)).split(shop.log)
            sets = head.pairs(shop, split, load_tokenizer(config.base_model), config)
            model = new_model(head, sets, config)
            tracker = followed.enter_context(open_trackers(track, run_dir, active=is_first()))
            tracker.params(config.record())
            progress = fit(model, head, sets, config=config, folder=checkpoints(run_dir), tracker=tracker)
        if not is_first():
            return TrainResult(run_dir, {}, time.monotonic() - started, progress.step)
        shown = sets.test or sets.validation
        metrics = head.measure(model.answers(shown), shown.answers) | head.baseline(sets.train.answers, shown.answers)
        for name, value in metrics.items():
            tracker.scalar(f"{'test' if sets.test else 'best'}/{name}", value, progress.step)
    save_file(model.state_dict(), run_dir / f"{head.name}.safetensors")
    config.save(run_dir / f"{head.name}.json")
    metrics["parity"] = export_pairs(model, head, shown, run_dir / f"{head.name}.onnx")
    (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    invariance = measure_pairs(run_dir / f"{head.name}.onnx", config)
    (run_dir / "invariance.json").write_text(json.dumps(invariance, indent=2) + "\n")
    finish(run_dir)
    return TrainResult(run_dir, metrics, time.monotonic() - started, progress.step)


def load(run_dir: Path, head: Head) -> tuple[PairModel, TrainConfig]:
    """Reads a head's trained model and its configuration.

    Raises:
        FileNotFoundError: the folder is not a finished run of this head.
    """
    config = TrainConfig.load(run_dir / f"{head.name}.json")
    model = PairModel(head, config)
    model.load_state_dict(load_file(run_dir / f"{head.name}.safetensors"))
    return model.eval(), config


def new_model(head: Head, sets: PairSets, config: TrainConfig) -> PairModel:
    """Returns the pretrained BERT under a fresh last layer, seeded."""
    torch.manual_seed(config.seed)
    model = PairModel(head, config)
    head.prepare(model, sets.train.answers)
    return model


def fit(
    model: PairModel, head: Head, sets: PairSets, *, config: TrainConfig, folder: Path | None = None, tracker: Tracker | None = None
) -> Progress:
    """Trains within the configured epochs, steps, seconds and patience; leaves the best weights, merged, in the model."""
    regime = Regime(model.bert.base_model, config.regime or "full", config)
    task, plan = PairTask(model, head, sets, config), Plan.of(len(sets.train), config, metric=head.metric)
    progress = Loop(task, plan, config=config, regime=regime, folder=folder).run(tracker.scalar if tracker else None)
    regime.merge()
    return progress


def measure_pairs(path: Path, config: TrainConfig) -> dict[str, dict[str, bool | float]]:
    """Returns, by property, whether the batch changes what a head's graph answers, as a bundle's manifest says of its graphs."""
    vocabulary, longest = load_tokenizer(config.base_model).get_vocab_size(), config.user_tokens + config.item_tokens
    measured = measure(open_graph(path), token_examples(_INPUTS, vocabulary), longest=longest)
    return {name: one.model_dump() for name, one in measured.items()}


class _Answer(nn.Module):
    def __init__(self, model: PairModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.model.answer(input_ids, attention_mask, token_type_ids)


def export_pairs(model: PairModel, head: Head, examples: Pairs, path: Path) -> float:
    """Writes ``input_ids, attention_mask, token_type_ids`` int64[b, l] → the head's output float32[b, o].

    Returns:
        The largest absolute difference between ONNX Runtime and PyTorch on a ragged batch of ``examples``.
    """
    names = _INPUTS
    shape = {0: Dim("batch"), 1: Dim("length")}
    wrapped = _Answer(model).eval()
    batch = examples.pad(range(min(8, len(examples))))
    export_graph(wrapped, batch, path, inputs=names, outputs=(head.output,), shapes=dict.fromkeys(names, shape))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
    got: FloatArray = session.run([head.output], inputs)[0]
    with torch.inference_mode():
        return float(np.abs(got - wrapped(*batch).numpy()).max())
