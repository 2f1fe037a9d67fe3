"""Everything a training run can be told, field by field, and the presets the commands use."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from features.behaviour import ACTIONS, ACTIVITY_LENGTH

SPLITS = ("time", "session")
_POSITIVE = (
    "session_folds",
    "ranker_folds",
    "snapshot_days",
    "tower_labels",
    "validation_labels",
    "ranker_labels",
    "user_tokens",
    "item_tokens",
    "behaviour_limit",
    "batch_size",
    "negative_count",
    "epochs",
    "learning_rate",
    "head_learning_rate",
    "clip_norm",
    "temperature",
    "validations_per_epoch",
    "patience",
    "ease_lambda",
    "ease_half_life_days",
    "collaborative_top_k",
    "half_life_days",
    "ranker_hidden",
    "ranker_learning_rate",
    "ranker_patience",
    "warmup_fraction",
    "sequence_length",
    "sequence_width",
    "sequence_layers",
    "sequence_heads",
    "sequence_windows",
    "sequence_epochs",
    "sequence_batch_size",
    "sequence_learning_rate",
    "ensemble",
    "adapter_rank",
    "accumulation_steps",
    "warmup_steps",
    "warmup_customers",
)
# Fields that take one of a few names.
_CHOICES = {
    "tower": ("text", "sequence"),
    "regime": ("", "full", "top_k", "frozen", "lora", "adalora", "adapter"),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("linear", "cosine", "constant"),
    "mixed_precision": ("auto", "no", "bf16", "fp16"),
    "device": ("auto", "cpu", "cuda"),
    "warmup_objective": ("none", "mlm", "contrastive"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; they are stored in the run folder and, for the record, in the bundle's manifest.

    Attributes:
        base_model: pretrained BERT: a folder, a hub name, "" for the packaged all-MiniLM-L6-v2, "tiny" for a random 2-layer model.
        seed: of every random choice of the run.
        threads: CPU threads of PyTorch and ONNX Runtime; 0 means one per core.
        cut: end of the training period, an ISO 8601 time (UTC without an offset); "" means the last ``holdout_fraction`` of the time span.
        holdout_fraction: share of the time span after the cut, when ``cut`` is empty; in (0, 1).
        split: "time": what follows the cut is held out; "session": each customer's last visit before it is.
        session_folds: parts by time of the held-out visits of a split by sessions; collaborative weights are fitted anew before each.
        ranker_fraction: share of the time span before the cut whose labels train the ranker and validate the tower; in (0, 1).
        ranker_folds: parts of the ranker's period; collaborative weights are fitted anew on everything before each part.
        snapshot_days: days between popularity snapshots within the ranker's period.
        target_actions: actions that make an item a label, comma-separated.
        tower_actions: actions that make an item a label of the tower, comma-separated; wider, because it needs many labels.
        tower_labels: labels the tower trains on at the most, newest kept; a label is one customer's visit.
        validation_labels: labels of the ranker's period that the tower is validated on at the most.
        ranker_labels: labels the ranker trains on at the most, chosen at random.
        evaluation_users: customers evaluated at the most, chosen at random; 0 means all.
        regime: what of BERT is fine-tuned: full; top_k, its ``trainable_layers`` top layers; frozen, nothing; or through peft, merged
            into BERT at the end: lora, adalora, adapter (IA3). "" means top_k for the tower and full for classifier and rating.
        trainable_layers: top BERT layers that the regime top_k fine-tunes; -1 means all layers and the embeddings.
        adapter_rank: rank of LoRA's matrices, and the mean rank AdaLoRA ends with (it begins with half as much again).
        user_tokens: tokens a behaviour text is truncated to.
        item_tokens: tokens an item text is truncated to.
        behaviour_limit: phrases written into a behaviour text at the most.
        batch_size: labels per batch; under torchrun the processes share it, so that a run is the same on any number of them.
        accumulation_steps: batches whose gradients make one optimizer step; each batch has negatives of its own.
        negative_count: sampled negatives per step, shared by the labels of the batch.
        negative_power: exponent of an item's label count in the sampling of negatives; 0 is uniform.
        exposure_negatives: weight in the loss of an item the customer was shown before the visit and did not take, where an
            item nobody showed them weighs 1; 0 leaves exposures unread, and shown items are like all others.
        epochs: passes over the tower's labels at the most.
        max_steps: optimizer steps of tower, classifier or rating at the most; 0 means no bound. A bound makes two runs bit-identical.
        time_budget_s: seconds these train at the most; 0 means no bound. The learning rate decays over it.
        learning_rate: peak learning rate of the BERT layers.
        head_learning_rate: peak learning rate of heads, item residuals and temperature.
        optimizer: adamw, or sgd.
        momentum: of SGD; in [0, 1).
        schedule: of the learning rate after its rise: linear or cosine, down to zero, or constant.
        weight_decay: decay of weight matrices: AdamW's decoupled one, SGD's L2 penalty.
        residual_decay: the same of the item residuals; large values keep items close to their text.
        warmup_fraction: share of the run over which the learning rate rises linearly.
        clip_norm: gradients are scaled down to this Euclidean norm.
        label_smoothing: share of a label's weight that is spread over all answers, in [0, 1); ratings know none.
        dropout: dropout probability inside BERT while fine-tuning.
        temperature: initial softmax temperature of the cosine similarities; learned.
        mixed_precision: auto (bf16 or else fp16 on a graphics card, no on a processor), no, bf16 or fp16.
        device: auto (the graphics card where there is one), cpu or cuda.
        checkpoint_steps: optimizer steps between checkpoints that ``concord train --resume`` can go on from; 0 means none.
        warmup_objective: self-supervised training before the labels: none, mlm (masked language modelling on the texts of items
            and behaviours) or contrastive (the older and the newer part of one history find each other among those of others).
        warmup_steps: optimizer steps of that training.
        warmup_customers: customers whose histories that training reads at the most, chosen at random.
        validations_per_epoch: validations (and refreshed item vectors) per pass over the labels.
        patience: validations without a better result after which the training of tower, classifier or rating stops.
        ease_lambda: L2 regularisation of EASE, in squared history weights.
        ease_half_life_days: half-life of a behaviour's weight when EASE is fitted, counted from the customer's newest behaviour.
        collaborative_top_k: weights kept per item.
        ease_max_items: catalogue size above which co-visitation replaces EASE (EASE inverts an n × n matrix).
        half_life_days: half-life of a behaviour's weight in the signals, offline and online.
        ranker_hidden: width of the ranker's hidden layer.
        ranker_epochs: passes over the ranker's labels at the most.
        ranker_learning_rate: AdamW learning rate of the ranker.
        ranker_weight_decay: AdamW weight decay of the ranker.
        ranker_dropout: dropout probability in the ranker's hidden layer.
        ranker_patience: passes without a better validation NDCG@10 after which the ranker stops.
        classifier_negatives: sampled negatives per positive of the click classifier.
        ensemble: towers that are trained, with the seeds ``seed``, ``seed`` + 1, …, and whose scores are averaged; each takes the
            whole ``epochs``, ``max_steps`` and ``time_budget_s``.
        ensemble_models: base models of the towers in turn, comma-separated, all of one tokenizer; "" means ``base_model`` for all.
        distil_weight: above 0 the ensemble is distilled into one tower, and this is the share of its softmax in the loss; at most 1.
        tower: kind of user tower: text (BERT over the behaviour text) or sequence (a small transformer over behaviour vectors; BERT stays
            as it is). The settings of labels, batches and learning rates above are the text tower's, except where they name all.
        sequence_length: behaviours the sequence tower reads at the most, the newest; the online feature holds 50.
        sequence_texts: searches, messages and reviews among them at the most: each costs the server a run of BERT, once.
        sequence_width: components of its item and user vectors.
        sequence_layers: its transformer's layers.
        sequence_heads: its attention heads.
        sequence_dropout: dropout probability inside it.
        sequence_input_dropout: dropout probability on its input vectors.
        sequence_identity_dropout: share of items that lose their id embedding in a step, so that text alone learns to carry new items.
        sequence_label_smoothing: share of a target's probability that is spread over the catalogue.
        sequence_windows: stretches of behaviours it trains on at the most, newest kept.
        sequence_epochs: passes over them at the most; ``max_steps``, ``time_budget_s`` and ``patience`` bound it as well.
        sequence_batch_size: stretches per step and process.
        sequence_learning_rate: its peak learning rate.
    """

    base_model: str = ""
    seed: int = 17
    threads: int = 0
    cut: str = ""
    holdout_fraction: float = 0.1
    split: str = "time"
    session_folds: int = 8
    ranker_fraction: float = 0.15
    ranker_folds: int = 2
    snapshot_days: int = 7
    target_actions: str = "purchase"
    tower_actions: str = "purchase,add_to_cart,wishlist"
    tower_labels: int = 12_000
    validation_labels: int = 400
    ranker_labels: int = 3_000
    evaluation_users: int = 0
    regime: str = ""
    trainable_layers: int = 2
    adapter_rank: int = 8
    user_tokens: int = 96
    item_tokens: int = 32
    behaviour_limit: int = 16
    batch_size: int = 32
    accumulation_steps: int = 1
    negative_count: int = 512
    negative_power: float = 0.5
    exposure_negatives: float = 0.0
    epochs: int = 3
    max_steps: int = 0
    time_budget_s: float = 0.0
    learning_rate: float = 5e-5
    head_learning_rate: float = 1e-3
    optimizer: str = "adamw"
    momentum: float = 0.9
    schedule: str = "linear"
    weight_decay: float = 0.01
    residual_decay: float = 0.1
    warmup_fraction: float = 0.1
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    dropout: float = 0.1
    temperature: float = 0.05
    mixed_precision: str = "auto"
    device: str = "auto"
    checkpoint_steps: int = 100
    warmup_objective: str = "none"
    warmup_steps: int = 100
    warmup_customers: int = 5_000
    validations_per_epoch: int = 1
    patience: int = 3
    ease_lambda: float = 100.0
    ease_half_life_days: float = 90.0
    collaborative_top_k: int = 200
    ease_max_items: int = 20_000
    half_life_days: float = 30.0
    ranker_hidden: int = 64
    ranker_epochs: int = 40
    ranker_learning_rate: float = 2e-3
    ranker_weight_decay: float = 0.1
    ranker_dropout: float = 0.1
    ranker_patience: int = 10
    classifier_negatives: int = 4
    ensemble: int = 1
    ensemble_models: str = ""
    distil_weight: float = 0.0
    tower: str = "text"
    sequence_length: int = 50
    sequence_texts: int = 8
    sequence_width: int = 128
    sequence_layers: int = 2
    sequence_heads: int = 2
    sequence_dropout: float = 0.4
    sequence_input_dropout: float = 0.5
    sequence_identity_dropout: float = 0.1
    sequence_label_smoothing: float = 0.1
    sequence_windows: int = 100_000
    sequence_epochs: int = 20
    sequence_batch_size: int = 128
    sequence_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("holdout_fraction", "ranker_fraction", "dropout", "ranker_dropout", "warmup_fraction", "momentum", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"training field {name!r} must be at least 0 and below 1")
        if not 0.0 <= self.distil_weight <= 1.0:
            raise ValueError("training field 'distil_weight' must be between 0 and 1")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"training field {name!r} must be above 0")
        self._check_sequence_tower()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"training field {name!r} must be one of {', '.join(choice or repr(choice) for choice in choices)}")
        if self.checkpoint_steps < 0:
            raise ValueError("training field 'checkpoint_steps' must not be below 0")
        if self.warmup_objective != "none" and self.regime == "frozen":
            raise ValueError("training field 'warmup_objective': a frozen encoder has nothing to warm up")
        for name in ("target_actions", "tower_actions"):
            if not self.actions(getattr(self, name)) or set(self.actions(getattr(self, name))) - set(ACTIONS):
                raise ValueError(f"training field {name!r} must name actions: {', '.join(ACTIONS)}")
        if self.split not in SPLITS:
            raise ValueError(f"training field 'split' must be one of {', '.join(SPLITS)}")
        if not self.exposure_negatives >= 0:
            raise ValueError("training field 'exposure_negatives' must be at least 0")
        if self.cut:
            try:
                datetime.fromisoformat(self.cut)
            except ValueError:
                raise ValueError(f"training field 'cut': {self.cut!r} is not an ISO 8601 time") from None

    def _check_sequence_tower(self) -> None:
        for name in ("sequence_dropout", "sequence_input_dropout", "sequence_identity_dropout", "sequence_label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"training field {name!r} must be at least 0 and below 1")
        if self.sequence_length > ACTIVITY_LENGTH or self.sequence_texts < 0 or self.sequence_width % self.sequence_heads:
            raise ValueError(
                f"training field 'sequence_length' must be at most {ACTIVITY_LENGTH}, 'sequence_texts' at least 0, and 'sequence_width' "
                "a multiple of 'sequence_heads'"
            )
        if self.tower == "sequence" and (self.ensemble > 1 or self.warmup_objective != "none"):
            raise ValueError("training field 'tower': a sequence tower knows neither 'ensemble' nor 'warmup_objective'")
        if self.tower == "sequence" and self.split == "session":
            raise ValueError("training field 'split': a sequence tower learns from every visit before a time, so it takes 'time'")

    @classmethod
    def demo(cls) -> "TrainConfig":
        """Returns the preset of ``make demo``: a fine-tuned model of the sample shop within three minutes on 2 cores."""
        return cls(user_tokens=64, time_budget_s=60.0, validation_labels=200, ranker_labels=1_200, evaluation_users=1_000)

    @classmethod
    def full(cls) -> "TrainConfig":
        """Returns the preset for a real shop of some thousand items and customers: about a quarter of an hour on 2 cores."""
        return cls(user_tokens=64, time_budget_s=330.0, half_life_days=120.0, ease_lambda=300.0)

    @classmethod
    def tiny(cls) -> "TrainConfig":
        """Returns the preset of the tests: every stage runs for real, on a random 2-layer BERT, in seconds."""
        return cls(
            base_model="tiny",
            threads=1,  # two threads that wait for each other on a busy machine take ten times as long for matrices this small
            trainable_layers=-1,
            user_tokens=32,
            item_tokens=16,
            batch_size=16,
            negative_count=32,
            epochs=1,
            max_steps=10,
            tower_labels=200,
            validation_labels=30,
            ranker_labels=300,
            ranker_folds=1,
            ranker_epochs=20,
            ranker_learning_rate=1e-2,
            evaluation_users=60,
            sequence_width=32,
            sequence_epochs=1,
            sequence_batch_size=16,
        )

    @classmethod
    def intent(cls) -> "TrainConfig":
        """Returns the preset of text classifiers: few steps on few texts, the upper half of BERT trained (docs/understanding.md)."""
        return cls(epochs=2, max_steps=60, batch_size=32, learning_rate=3e-5, head_learning_rate=1e-3, trainable_layers=3)

    def member(self, number: int) -> "TrainConfig":
        """Returns the configuration of one tower of the ensemble, counted from 0."""
        models = [model.strip() for model in self.ensemble_models.split(",")] if self.ensemble_models else [self.base_model]
        base = models[number % len(models)]
        return replace(self, base_model=base, seed=self.seed + number, ensemble=1, ensemble_models="", distil_weight=0.0)

    def distilled(self) -> "TrainConfig":
        """Returns the configuration with its ensemble distilled, by the configured weight, or mostly by the teacher where none is."""
        return replace(self, distil_weight=self.distil_weight or 0.7)

    def with_cut(self, cut: datetime | None) -> "TrainConfig":
        """Returns the configuration with another cut; None keeps the one it has."""
        return self if cut is None else replace(self, cut=cut.isoformat())

    def with_values(self, values: Mapping[str, str]) -> "TrainConfig":
        """Returns the configuration with fields set from text, as a command line gives them.

        Raises:
            ValueError: there is no such field, or the text is not of its type; the message names the field.
        """
        changed: dict[str, Any] = {}
        for name, text in values.items():
            if name not in {field.name for field in fields(self)}:
                raise ValueError(f"unknown training field {name!r}")
            kind = type(getattr(self, name))
            try:
                changed[name] = kind(text)
            except ValueError:
                raise ValueError(f"training field {name!r}: {text!r} is not of type {kind.__name__}") from None
        return replace(self, **changed)

    def actions(self, names: str) -> tuple[str, ...]:
        """Splits a comma-separated list of actions."""
        return tuple(name.strip() for name in names.split(",") if name.strip())

    def record(self) -> dict[str, str | int | float | bool | None]:
        """Returns the fields as plain values, for the manifest."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Writes the configuration as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """Reads what ``save`` wrote.

        Raises:
            ValueError: the file names a field this release does not know.
        """
        return cls.from_record(json.loads(path.read_text()), path.name)

    @classmethod
    def from_record(cls, values: Mapping[str, Any], source: str) -> "TrainConfig":
        """Returns the configuration of plain values, as ``record`` gives them; fields that they lack have their default.

        Raises:
            ValueError: they name a field this release does not know; the message names ``source``.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{source}: unknown field {', '.join(sorted(unknown))}")
        return cls(**values)
