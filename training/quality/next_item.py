"""Amazon Beauty, leave-one-out, and the same with items held out: a sequence tower, neighbours and text, blended and re-ranked.

The published protocol: fitted on each sequence without its last two items, tuned on the second to last, ranked for the last
item with the whole history before it, over the full catalogue. Nothing looks at a last item but the finished model's card.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from features.item_table import FloatArray
from training.blend import RECENCY, SIGNALS, SignalSource, fit_neighbours, fit_weights
from training.encode import pretrained_vectors
from training.metrics import BoolArray, Tally
from training.quality.cards import Ranked, next_item_card
from training.quality.result import QualityResult
from training.rerank import fit_reranker, rank
from training.sequence import Rows, SequenceConfig, SequenceTower, log_probabilities
from training.sequence_fit import train_sequence_tower
from training.words import word_components, word_similarity, word_vectors

ITEMS, SEQUENCES = "amazon_beauty_items.parquet", "amazon_beauty_sequences.parquet"
PARTS = ("text", "sequence", "collaborative", "recency", "ensemble")
TOWERS = (SequenceConfig(width=128, epochs=20),)
# Cold items are 5 % of the catalogue for tuning and 5 % for the test, the same ones whatever the run's seed.
COLD_SHARE, COLD_SEED = 0.05, 0
_COLD_IDENTITY_DROPOUT = 0.2
_NETWORKS = 5
_WEIGHTED_USERS, _TUNED_USERS, _MEASURED_USERS, _RANKED = 4_000, 8_000, 4_000, 50


@dataclass(frozen=True)
class Sequences:
    """Users' item rows in order of time, with item ids and titles by row."""

    users: list[str]
    rows: list[Rows]
    items: list[str]
    titles: list[str]


def load(data: Path) -> Sequences:
    """Reads the set.

    Raises:
        FileNotFoundError: a file of the set is not in the folder; the message names it.
    """
    for name in (ITEMS, SEQUENCES):
        if not (data / name).is_file():
            raise FileNotFoundError(f"{name} is not in {data}")
    items, sequences = pd.read_parquet(data / ITEMS), pd.read_parquet(data / SEQUENCES)
    ids = items["item"].astype(str).tolist()
    row = {item: place for place, item in enumerate(ids)}
    rows = [np.array([row[str(item)] for item in sequence], np.int64) for sequence in sequences["items"]]
    return Sequences(sequences["user"].astype(str).tolist(), rows, ids, items["title"].fillna("").astype(str).tolist())


def run(
    data: Path,
    *,
    seed: int,
    without: frozenset[str] = frozenset(),
    cold: bool = False,
    configs: Sequence[SequenceConfig] = TOWERS,
    kept: Path | None = None,
) -> QualityResult:
    """Trains on the fit part, tunes on the second to last items and ranks for the last ones.

    Args:
        data: folder of the set.
        seed: of towers, and of the users that weights are learned on.
        without: parts left out, of PARTS, for the ablation.
        cold: hold items out of all training, and rank them among the others.
        configs: of the towers; their seeds follow from ``seed``.
        kept: folder of trained towers: one trained before on the same sequences and text, with the same settings, is read back.
    """
    started = time.monotonic()
    shop = load(data)
    tuning, test = cold_items(len(shop.items)) if cold else (np.zeros(len(shop.items), np.bool_),) * 2
    fitted = [sequence[:-2][~(tuning | test)[sequence[:-2]]] for sequence in shop.rows]
    words = word_vectors(shop.titles)
    text, described = _text_vectors(shop, words) if "text" not in without else (np.zeros((len(shop.items), 0), np.float32),) * 2
    order = np.random.default_rng(seed).permutation([place for place, rows in enumerate(shop.rows) if not test[rows[-2]]])
    tuned, measured = (half[:users] for half, users in zip(np.array_split(order, 2), (_TUNED_USERS, _MEASURED_USERS), strict=True))
    configs = [replace(config, seed=len(configs) * seed + place) for place, config in enumerate(configs)]
    if cold:
        configs = [replace(config, identity_dropout=_COLD_IDENTITY_DROPOUT) for config in configs]
    begun = time.monotonic()
    towers, curves, tower_seconds = _train_towers(shop, fitted, described, configs=_chosen(configs, without), judged=measured, kept=kept)
    started += time.monotonic() - begun - tower_seconds  # a tower read back counts with the time that it once took
    neighbours = fit_neighbours(fitted, len(shop.items))
    source = SignalSource(
        towers=(lambda histories: mean_log_probabilities(towers, histories)) if towers else None,
        neighbours=neighbours,
        text=text,
        words=word_similarity(words),
        cold=neighbours.counts == 0,
        names=signal_names(without),
    )
    targets = [int(rows[-2]) for rows in shop.rows]
    pasts = [rows[:-2] for rows in shop.rows]
    tuned_pasts, tuned_targets = [pasts[k] for k in tuned], [targets[k] for k in tuned]
    few = slice(_WEIGHTED_USERS)
    weights = fit_weights(source, tuned_pasts[few], tuned_targets[few], excluded=test, seed=seed)
    networks = 1 if "ensemble" in without else _NETWORKS
    reranker = fit_reranker(source, weights, tuned_pasts, tuned_targets, excluded=test, seed=seed, networks=networks)
    found, _ = rank(source, weights, reranker, [pasts[k] for k in measured], excluded=test, count=_RANKED)
    nobody = np.zeros_like(test)
    ranked, probability = rank(source, weights, reranker, [rows[:-1] for rows in shop.rows], excluded=nobody, count=_RANKED)
    details: dict[str, object] = {
        "weights": dict(zip(source.columns, map(float, weights), strict=True)),
        "towers": [asdict(tower.config) for tower in towers],
        "tower_validation_ndcg_at_10": curves,
        "items_without_interactions": int(source.cold.sum()),
        "without": sorted(without),
    }
    if cold:
        details["test"] = cold_metrics(ranked, [int(rows[-1]) for rows in shop.rows], test)
    rankings = {user: [shop.items[row] for row in line] for user, line in zip(shop.users, ranked.tolist(), strict=True)}
    validation, seconds = _metrics(found, [targets[k] for k in measured]), time.monotonic() - started
    card = next_item_card(
        Ranked(shop.rows, shop.titles, ranked, probability),
        counts=neighbours.counts,
        curves=curves,
        details=details,
        seconds=seconds,
        seed=seed,
    )
    return QualityResult(rankings, validation, details, seconds, card)


def cold_items(count: int) -> tuple[BoolArray, BoolArray]:
    """Returns two masks bool[n] of disjoint random items: those held out for tuning and those held out for the test."""
    order, share = np.random.default_rng(COLD_SEED).permutation(count), round(COLD_SHARE * count)
    tuning, test = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    tuning[order[:share]], test[order[share : 2 * share]] = True, True
    return tuning, test


def cold_metrics(ranked: Rows, targets: Sequence[int], cold: BoolArray) -> dict[str, float]:
    """Returns the metrics of users whose target is a held-out item and of all others, over the full catalogue, and their ratio."""
    parts = {name: [k for k, target in enumerate(targets) if cold[target] == wanted] for name, wanted in (("cold", True), ("warm", False))}
    values = {
        f"{name}_{metric}": value
        for name, part in parts.items()
        for metric, value in (_metrics(ranked[part], [targets[k] for k in part]) | {"users": float(len(part))}).items()
    }
    return values | {"ratio": values["cold_ndcg_at_10"] / values["warm_ndcg_at_10"]}


def centred(vectors: FloatArray) -> FloatArray:
    """Returns unit vectors float32[n, t] around their mean: titles of one trade share most of their direction."""
    moved = vectors - vectors.mean(0)
    return np.asarray(moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-9), np.float32)


def _text_vectors(shop: Sequences, words: sp.csr_matrix) -> tuple[FloatArray, FloatArray]:
    """Returns the titles' BERT vectors float32[n, t] and, for the towers, those beside components of their words float32[n, t + k]."""
    text = centred(pretrained_vectors(shop.titles))
    return text, np.hstack([text, centred(word_components(words))]) / np.float32(np.sqrt(2))


def signal_names(without: frozenset[str]) -> tuple[str, ...]:
    """Returns the signals that remain without some parts."""
    return tuple(name for name, part in SIGNALS.items() if part not in without and not ("recency" in without and name in RECENCY))


def mean_log_probabilities(towers: Sequence[SequenceTower], histories: Sequence[Rows]) -> FloatArray:
    """Returns float32[u, n]: the logarithm of the towers' mean probability."""
    total: FloatArray = np.logaddexp.reduce([log_probabilities(tower, histories) for tower in towers])
    return total - np.float32(np.log(len(towers)))


def _chosen(configs: Sequence[SequenceConfig], without: frozenset[str]) -> Sequence[SequenceConfig]:
    if "sequence" in without:
        return ()
    return configs[:1] if "ensemble" in without else configs


def _train_towers(
    shop: Sequences, fitted: Sequence[Rows], text: FloatArray, *, configs: Sequence[SequenceConfig], judged: Rows, kept: Path | None
) -> tuple[list[SequenceTower], list[list[float]], float]:
    histories, targets = [shop.rows[k][:-2] for k in judged], [int(shop.rows[k][-2]) for k in judged]

    def validate(tower: SequenceTower) -> float:
        scores = log_probabilities(tower, histories)
        for line, history in zip(scores, histories, strict=True):
            line[history] = -np.inf
        place = (scores > scores[np.arange(len(targets)), targets][:, None]).sum(1)
        return float(np.where(place < 10, 1 / np.log2(place + 2), 0).mean())

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def train(config: SequenceConfig) -> tuple[SequenceTower, list[float], float]:
        started = time.monotonic()
        file = kept / f"tower-{_fingerprint(config, text, *fitted, judged)}.pt" if kept else None
        if file and file.exists():
            found = torch.load(file, weights_only=True, map_location=device)
            tower = SequenceTower(config, found["tower"]["text"], found["tower"]["known"][:, 0])
            tower.load_state_dict(found["tower"])
            return tower.to(device).eval(), found["curve"], found["seconds"]
        tower, curve = train_sequence_tower(fitted, text, config=config, validate=validate, device=device)
        seconds = time.monotonic() - started
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"tower": tower.state_dict(), "curve": curve, "seconds": seconds}, file)
        return tower, curve, seconds

    trained = [train(config) for config in configs]
    return [tower for tower, _, _ in trained], [curve for _, curve, _ in trained], sum(seconds for _, _, seconds in trained)


def _fingerprint(config: SequenceConfig, *arrays: FloatArray | Rows) -> str:
    digest = hashlib.sha256(repr(config).encode())
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _metrics(ranked: Rows, targets: Sequence[int]) -> dict[str, float]:
    tally = Tally()
    for line, target in zip(ranked.tolist(), targets, strict=True):
        tally.add(line, {target})
    return tally.means()
