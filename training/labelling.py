"""Asks a trained click classifier which unlabelled (customer, item) pairs of a shop to label next."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from features.item_table import FloatArray
from features.settings import Settings
from training.active import Strategy, choose, entropy
from training.classifier import Clicks
from training.config import TrainConfig
from training.dataset import Shop, join_customers, open_shop
from training.events import to_micros
from training.pairs import PairModel, Pairs, load
from training.progress import bar
from training.run import prepare_torch
from training.text import activity_texts, load_tokenizer

Pair = tuple[str, str]
"""A customer and an item."""

_BATCH = 64


@dataclass(frozen=True)
class Proposal:
    """A pair worth a label, the classifier's probability that the customer takes the item, and its entropy in nats."""

    user_id: str
    item_id: str
    probability: float
    entropy: float


@dataclass(frozen=True)
class LabelPlan:
    """What to label next, how many pairs it was chosen from, and how many could not be read."""

    proposals: tuple[Proposal, ...]
    pool: int
    unreadable: int


def read_pairs(path: Path) -> list[Pair]:
    """Reads the columns ``user_id`` and ``item_id`` of a Parquet, CSV or JSON lines file; a pair given twice counts once.

    Raises:
        ValueError: a column is missing, or the file is of another kind.
    """
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
    elif path.suffix == ".csv":
        frame = pd.read_csv(path, dtype=str)
    elif path.suffix == ".jsonl":
        frame = pd.read_json(path, lines=True, dtype=str)
    else:
        raise ValueError(f"{path.name}: pairs come as .parquet, .csv or .jsonl")
    if missing := {"user_id", "item_id"} - set(frame.columns):
        raise ValueError(f"{path.name}: no column {', '.join(sorted(missing))}")
    return list(dict.fromkeys(zip(frame["user_id"].astype(str), frame["item_id"].astype(str), strict=True)))


def label_next(
    settings: Settings,
    run_dir: Path,
    pairs: Sequence[Pair],
    *,
    count: int,
    strategy: Strategy = Strategy.BADGE,
    labelled: Sequence[Pair] = (),
    now: datetime | None = None,
) -> LabelPlan:
    """Chooses the pairs whose labels the classifier of a run would learn most from.

    Customers are read as of ``now``. A pair cannot be read when the shop does not know the item or nothing of the customer.

    Args:
        settings: the shop.
        run_dir: a run of ``concord train --task clicks``.
        pairs: unlabelled.
        count: labels that can be paid for.
        strategy: how to choose.
        labelled: pairs that have a label already; never proposed.
        now: by default the clock's.

    Raises:
        FileNotFoundError: the folder is no such run.
    """
    model, config = load(run_dir, Clicks())
    prepare_torch(config)
    shop = open_shop(settings)
    done = set(labelled)
    pool = [pair for pair in pairs if pair not in done]
    encoded, kept = _encode(shop, [*pool, *labelled], config, now or datetime.now(UTC))
    probabilities, embeddings = score(model, encoded)
    unlabelled = np.array([row < len(pool) for row in kept], np.bool_)
    mine = np.flatnonzero(unlabelled)
    chosen = choose(
        strategy,
        probabilities[mine],
        embeddings[mine],
        count=count,
        labelled=embeddings[~unlabelled],
        rng=np.random.default_rng(config.seed),
    )
    doubt = entropy(probabilities)
    proposals = []
    for row in mine[chosen]:
        user, item = pool[kept[row]]
        proposals.append(Proposal(user, item, float(probabilities[row, 1]), float(doubt[row])))
    return LabelPlan(tuple(proposals), len(mine), len(pool) - len(mine))


@torch.inference_mode()
def score(model: PairModel, pairs: Pairs) -> tuple[FloatArray, FloatArray]:
    """Returns class probabilities float32[n, 2] and the last layer's [CLS] vectors float32[n, h]."""
    model.eval()
    probabilities = np.zeros((len(pairs), 2), np.float32)
    embeddings = np.zeros((len(pairs), int(model.bert.config.hidden_size)), np.float32)
    order = sorted(range(len(pairs)), key=lambda row: len(pairs.ids[row]))
    for start in bar(range(0, len(order), _BATCH), "reading pairs"):
        rows = order[start : start + _BATCH]
        ids, mask, segments = pairs.pad(rows)
        output = model.bert(input_ids=ids, attention_mask=mask, token_type_ids=segments, output_hidden_states=True)
        probabilities[rows] = output.logits.softmax(-1).numpy()
        embeddings[rows] = output.hidden_states[-1][:, 0].numpy()
    return probabilities, embeddings


def _encode(shop: Shop, pairs: Sequence[Pair], config: TrainConfig, now: datetime) -> tuple[Pairs, list[int]]:
    """Returns the readable pairs' tokens, and their places in ``pairs``."""
    time = to_micros(now)
    users = sorted({user for user, item in pairs if item in shop.table.rows})
    customers = join_customers(shop.store, [(user, time) for user in users])
    written = activity_texts([customers[user, time].activity for user in users], shop.table, config.behaviour_limit)
    texts = dict(zip(users, written, strict=True))
    kept = [place for place, (user, item) in enumerate(pairs) if item in shop.table.rows and texts[user]]
    read = [(texts[pairs[place][0]], shop.table.titles[shop.table.rows[pairs[place][1]]]) for place in kept]
    unknown = torch.zeros(len(read), dtype=torch.int64)
    return Pairs.of(read, unknown, load_tokenizer(config.base_model), config.user_tokens + config.item_tokens), kept
