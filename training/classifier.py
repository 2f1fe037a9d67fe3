"""The click classifier: BERT reads a customer's behaviours and a candidate's title together and says whether it will be taken.

The paper-style task: ``BertForSequenceClassification`` over the pair of texts, two logits, cross-entropy. It is a model of its
own beside the two towers: trained and measured on the same visits, split by time, and exported as its own ONNX graph.
"""

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForSequenceClassification

from features.settings import Settings
from training.config import TrainConfig
from training.dataset import Shop, join_customers, open_shop, split_of
from training.export import export_graph
from training.labels import Label, choose_labels, keys_of
from training.metrics import area_under_curve
from training.progress import bar, quiet
from training.run import prepare_torch
from training.text import TINY, activity_texts, base_path, load_tokenizer, tiny_config

_EVALUATION_BATCH = 64
_WEIGHTS, _CONFIG = "classifier.safetensors", "classifier.json"


@dataclass(frozen=True)
class ClassifierResult:
    """A trained classifier: its folder, validation metrics, seconds and optimizer steps."""

    run_dir: Path
    metrics: dict[str, float]
    seconds: float
    steps: int


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts and whether the customer took the item: ragged ids and segment ids, clicked int64[n]."""

    ids: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[int, ...], ...]
    clicked: Tensor

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


def train_classifier(settings: Settings, config: TrainConfig, *, now: datetime | None = None) -> ClassifierResult:
    """Trains on visits before the ranker's period, validates on that period, and keeps the epoch with the best AUC.

    Raises:
        TrainingDataError: no items, no events, or too few events before the cut.
    """
    started = time.monotonic()
    prepare_torch(config)
    run_dir = settings.data_dir / "runs" / f"{now or datetime.now(UTC):%Y%m%dT%H%M%S}-classifier"
    run_dir.mkdir(parents=True, exist_ok=True)
    shop = open_shop(settings)
    labels = choose_labels(shop.log, split_of(shop.log, config), config)
    tokenizer, rng = load_tokenizer(config.base_model), np.random.default_rng(config.seed)
    training = make_pairs(shop, labels.tower, tokenizer, config=config, rng=rng)
    validation = make_pairs(shop, labels.validation, tokenizer, config=config, rng=rng)
    model = new_classifier(config)
    metrics, steps = fit(model, training, validation, config=config)
    save_file(model.state_dict(), run_dir / _WEIGHTS)
    config.save(run_dir / _CONFIG)
    metrics["parity"] = export_classifier(model, validation, run_dir / "classifier.onnx")
    (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return ClassifierResult(run_dir, metrics, time.monotonic() - started, steps)


def new_classifier(config: TrainConfig) -> BertForSequenceClassification:
    """Returns the pretrained BERT under a fresh classification layer of two logits."""
    options = {"num_labels": 2, "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    path = base_path(config.base_model)
    with quiet():
        bert = AutoConfig.from_pretrained(path, **options)
        if config.base_model == TINY:
            return BertForSequenceClassification(tiny_config(bert))
        return AutoModelForSequenceClassification.from_pretrained(path, config=bert, dtype=torch.float32)


def load_classifier(run_dir: Path) -> tuple[BertForSequenceClassification, TrainConfig]:
    """Reads a trained classifier and its configuration.

    Raises:
        FileNotFoundError: the folder is not a finished run of the classifier.
    """
    config = TrainConfig.load(run_dir / _CONFIG)
    model = new_classifier(config)
    model.load_state_dict(load_file(run_dir / _WEIGHTS))
    return model.eval(), config


def make_pairs(shop: Shop, labels: Sequence[Label], tokenizer: Tokenizer, *, config: TrainConfig, rng: np.random.Generator) -> Pairs:
    """Returns one taken item per label, and ``classifier_negatives`` others drawn by how often items are taken.

    Drawing negatives like positives keeps the classifier from learning mere popularity.
    """
    customers = join_customers(shop.store, keys_of(labels))
    behaviours = activity_texts([customers[key].activity for key in keys_of(labels)], shop.table, config.behaviour_limit)
    taken = np.array([row for label in labels for row in label.items], np.int64)
    texts: list[tuple[str, str]] = []
    clicked: list[int] = []
    for label, behaviour in zip(labels, behaviours, strict=True):
        if not behaviour:
            continue
        drawn = [row for row in rng.choice(taken, config.classifier_negatives).tolist() if row not in {*label.items, *label.bought}]
        for row, answer in [(int(rng.choice(label.items)), 1), *((row, 0) for row in drawn)]:
            texts.append((behaviour, shop.table.titles[row]))
            clicked.append(answer)
    return encode_pairs(tokenizer, texts, clicked, config=config)


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], clicked: Sequence[int], *, config: TrainConfig) -> Pairs:
    """Returns the tokens of (behaviours, candidate) texts; long behaviours are cut, candidates are not."""
    tokenizer.enable_truncation(config.user_tokens + config.item_tokens, strategy="only_first")
    encoded = tokenizer.encode_batch(list(texts))
    tokenizer.no_truncation()
    return Pairs(tuple(tuple(e.ids) for e in encoded), tuple(tuple(e.type_ids) for e in encoded), torch.tensor(clicked, dtype=torch.int64))


def fit(model: BertForSequenceClassification, training: Pairs, validation: Pairs, *, config: TrainConfig) -> tuple[dict[str, float], int]:
    """Trains within the configured epochs, steps and seconds; leaves the weights of the best validation AUC in the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    generator, started, steps = torch.Generator().manual_seed(config.seed), time.monotonic(), 0
    best, weights = measure(model, validation), copy.deepcopy(model.state_dict())

    def spent() -> bool:
        late = config.time_budget_s and time.monotonic() - started > config.time_budget_s
        return bool(late or (config.max_steps and steps >= config.max_steps))

    for _ in range(config.epochs):
        model.train()
        order = torch.randperm(len(training), generator=generator)
        for rows in bar(torch.split(order, config.batch_size), "click classifier"):
            if spent():
                break
            _step(model, training, rows.tolist(), optimizer=optimizer, clip_norm=config.clip_norm)
            steps += 1
        measured = measure(model, validation)
        if measured["auc"] > best["auc"]:
            best, weights = measured, copy.deepcopy(model.state_dict())
        if spent():
            break
    model.load_state_dict(weights)
    model.eval()
    return best, steps


def _step(
    model: BertForSequenceClassification, pairs: Pairs, rows: list[int], *, optimizer: torch.optim.Optimizer, clip_norm: float
) -> None:
    ids, mask, segments = pairs.pad(rows)
    logits = model(input_ids=ids, attention_mask=mask, token_type_ids=segments).logits
    loss = cross_entropy(logits, pairs.clicked[rows])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()


@torch.inference_mode()
def measure(model: BertForSequenceClassification, pairs: Pairs) -> dict[str, float]:
    """Returns ``auc``, ``accuracy`` and ``log_loss`` on labelled pairs."""
    model.eval()
    parts = []
    for start in range(0, len(pairs), _EVALUATION_BATCH):
        ids, mask, segments = pairs.pad(range(start, min(start + _EVALUATION_BATCH, len(pairs))))
        parts.append(model(input_ids=ids, attention_mask=mask, token_type_ids=segments).logits)
    logits = torch.cat(parts)
    margin = (logits[:, 1] - logits[:, 0]).numpy()
    return {
        "auc": area_under_curve(margin, (pairs.clicked == 1).numpy()),
        "accuracy": float((logits.argmax(-1) == pairs.clicked).float().mean()),
        "log_loss": float(cross_entropy(logits, pairs.clicked)),
    }


class _Logits(nn.Module):
    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits
        return logits


def export_classifier(model: BertForSequenceClassification, examples: Pairs, path: Path) -> float:
    """Writes ``input_ids, attention_mask, token_type_ids`` int64[b, l] → ``logits`` float32[b, 2].

    Returns:
        The largest absolute difference between ONNX Runtime and PyTorch on a ragged batch of ``examples``.
    """
    names = ("input_ids", "attention_mask", "token_type_ids")
    shape = {0: Dim("batch"), 1: Dim("length")}
    wrapped = _Logits(model).eval()
    batch = examples.pad(range(min(8, len(examples))))
    export_graph(wrapped, batch, path, inputs=names, outputs=("logits",), shapes=dict.fromkeys(names, shape))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(["logits"], {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)})[0]
    with torch.inference_mode():
        return float(np.abs(got - wrapped(*batch).numpy()).max())
