"""What a self-supervised warm-up is worth when labels are few: NDCG@10 of the user tower at 0, 1, 10 and 100 % of the labels.

    python bench/label_efficiency.py                     # a sample shop of its own; within 10 minutes on 2 cores
    python bench/label_efficiency.py --here --seeds 3    # the shop that the environment names, three seeds

For every seed, each objective (none, mlm, contrastive) warms a fresh tower up on histories and texts from before the labels'
end, which cost nobody a label; then the tower is fine-tuned for the same number of steps on a share of the labels, the same
labels for all objectives. There is no early stopping: labels to validate on are just what is short. Measured on the holdout: each
customer's first purchase visit after the cut, all items ranked by the product of vectors. Prints a table and a last line of JSON.
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from cli.context import shop as named_shop
from features.sample_shop import generate
from features.settings import Settings
from harness import imported
from training.checkpoint import new_tower
from training.config import TrainConfig
from training.dataset import Customers, Shop, join_customers, open_shop, split_of
from training.encode import pools
from training.labels import Label, choose_labels, keys_of
from training.model import TwoTower
from training.regimes import Regime
from training.run import prepare_torch
from training.text import Tokens, activity_texts, load_tokenizer, tokenize
from training.train import TowerSet, Trainer, mean_ndcg
from training.warmup import past_activities, warm_up

OBJECTIVES = ("none", "mlm", "contrastive")


@dataclass(frozen=True)
class Ground:
    """What all runs of a study share: the shop's tokens, and the labels by what they are for."""

    shop: Shop
    items: Tokens
    train: TowerSet
    holdout: TowerSet


def ground(settings: Settings, config: TrainConfig) -> Ground:
    """Reads the shop and joins what was known of the customers at each label."""
    shop = open_shop(settings)
    labels, tokenizer = choose_labels(shop.log, split_of(shop.log, config), config), load_tokenizer(config.base_model)
    holdout = [label for label in labels.holdout if label.items]
    customers = join_customers(shop.store, keys_of([*labels.tower, *holdout]))
    sets = [tower_set(shop, part, customers, tokenizer, config) for part in (labels.tower, holdout)]
    return Ground(shop, tokenize(tokenizer, shop.table.texts, config.item_tokens), *sets)


def tower_set(shop: Shop, labels: Sequence[Label], customers: Customers, tokenizer: Tokenizer, config: TrainConfig) -> TowerSet:
    """Returns the labels whose customers have a past, with its tokens."""
    texts = activity_texts([customers[key].activity for key in keys_of(labels)], shop.table, config.behaviour_limit)
    kept = [row for row, text in enumerate(texts) if text]
    return TowerSet([labels[row] for row in kept], tokenize(tokenizer, [texts[row] for row in kept], config.user_tokens))


def warmed(on: Ground, config: TrainConfig) -> tuple[TwoTower, float]:
    """Returns a fresh tower after its warm-up, and the seconds that took; histories end where the labels' period does."""
    tower, started = new_tower(config, len(on.items)), time.monotonic()
    regime = Regime(tower.encoder, config.regime or "top_k", config)
    if config.warmup_objective != "none":
        until = split_of(on.shop.log, config).ranker_start
        warm_up(tower, past_activities(on.shop, until=until, config=config), on.shop.table, config=config)
    regime.merge()
    return tower, time.monotonic() - started


def measured(tower: TwoTower, on: Ground) -> float:
    """Returns the tower's NDCG@10 on the holdout."""
    with torch.inference_mode():
        items = tower.item_vector(pools(tower, on.items, "items"), torch.arange(len(on.items))).numpy()
        users = tower.user_vector(pools(tower, on.holdout.tokens, "holdout")).numpy()
    return mean_ndcg(users, items, on.holdout.labels)


def fine_tuned(tower: TwoTower, on: Ground, share: float, config: TrainConfig) -> tuple[float, int]:
    """Fine-tunes a copy on a share of the labels; returns its NDCG@10 on the holdout and the number of labels."""
    rng = np.random.default_rng([config.seed, 7])
    count = max(round(share * len(on.train.labels)), 1)
    rows = np.sort(rng.permutation(len(on.train.labels))[:count]).tolist()
    part = TowerSet([on.train.labels[row] for row in rows], Tokens(tuple(on.train.tokens.ids[row] for row in rows)))
    copied = copy.deepcopy(tower)
    trainer = Trainer(copied, on.items, train=part, validation=TowerSet([], Tokens(())), config=config)
    trainer.validate()  # reads the items once, for the sampled negatives
    trainer.loop.plan = replace(trainer.loop.plan, steps=config.max_steps, every=0)
    trainer.run()
    return measured(copied, on), count


def study(on: Ground, config: TrainConfig, shares: Sequence[float]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Returns NDCG@10 by objective and share of the labels, and the seconds of each warm-up, for one seed."""
    found: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for objective in OBJECTIVES:
        tower, seconds[objective] = warmed(on, replace(config, warmup_objective=objective))
        found[objective] = {"0": measured(tower, on)}
        for share in shares:
            found[objective][f"{share:g}"], count = fine_tuned(tower, on, share, config)
            print(f"seed {config.seed}, {objective}, {count} labels: {found[objective][f'{share:g}']:.4f}", flush=True)
    return found, seconds


def main() -> None:
    """Runs the study and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="use the shop that the environment names instead of a sample shop")
    parser.add_argument("--shares", default="0.01,0.1,1", help="shares of the labels, comma-separated")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each fine-tuning")
    parser.add_argument("--warmup-steps", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], help="a field of the training configuration, name=value; repeatable")
    arguments = parser.parse_args()
    started, shares = time.monotonic(), [float(share) for share in arguments.shares.split(",")]
    base = replace(TrainConfig.demo(), time_budget_s=0.0, max_steps=arguments.steps, warmup_steps=arguments.warmup_steps)
    base = replace(base, user_tokens=48, behaviour_limit=8, tower_labels=4_000, evaluation_users=500, checkpoint_steps=0)
    base = base.with_values(dict(text.split("=", 1) for text in arguments.set))
    prepare_torch(base)
    with named_shop(Settings) if arguments.here else imported(generate(7, end=datetime(2026, 11, 1, tzinfo=UTC))) as settings:
        on = ground(settings, base)
        runs = [study(on, replace(base, seed=base.seed + seed), shares) for seed in range(arguments.seeds)]
    names = ["0", *(f"{share:g}" for share in shares)]
    figures = {objective: {name: [round(found[objective][name], 4) for found, _ in runs] for name in names} for objective in OBJECTIVES}
    table = Table("warm-up", "seconds", *(f"{float(name):.0%} of labels" for name in names), title="NDCG@10 of the user tower, holdout")
    for objective, cells in figures.items():
        spent = np.mean([seconds[objective] for _, seconds in runs])
        shown = [f"{np.mean(values):.4f}" + (f" ± {np.std(values):.4f}" if len(values) > 1 else "") for values in cells.values()]
        table.add_row(objective, f"{spent:.0f}", *shown)
    Console().print(table)
    counts = {"labels": len(on.train.labels), "holdout": len(on.holdout.labels), "items": len(on.items)}
    print(json.dumps({"bench": "label_efficiency", **counts, "ndcg_at_10": figures, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
