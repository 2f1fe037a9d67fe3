"""What searches, messages, ratings and reviews in the behaviour sequence are worth: NDCG@10 of the whole pipeline with and without them.

    python bench/behaviour_texts.py                                   # three sample shops, text tower; an hour on 2 busy cores
    python bench/behaviour_texts.py --tower sequence --users 600 --steps 60

Each seed is a shop of its own, imported twice into databases of their own: with everything that happened, and without the events of
``--without``. Both are trained with the same seed and the same number of steps, and measured on the same customers' first purchase
visits after the same cut. Prints a table and a last line of JSON.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
from rich.console import Console
from rich.table import Table

from features.sample_shop import Shop, generate
from harness import imported
from training.config import TrainConfig
from training.run import train

END = datetime(2026, 11, 1, tzinfo=UTC)
FIGURES = ("ndcg_at_10", "tower_ndcg_at_10", "popularity_ndcg_at_10")


def measured(shop: Shop, config: TrainConfig) -> dict[str, float]:
    """Trains on a shop and returns the figures on its holdout."""
    with imported(shop) as settings:
        metrics = train(settings, config, track=()).metrics
    return {name: metrics[name] for name in FIGURES}


def study(seeds: Sequence[int], without: Sequence[str], config: TrainConfig, *, users: int) -> list[dict[str, dict[str, float]]]:
    """Returns for each seed the figures ``with`` and ``without`` the events."""
    found = []
    for seed in seeds:
        whole = generate(seed, end=END, users=users)
        less = replace(whole, events=tuple(event for event in whole.events if event.action not in without))
        own = replace(config, seed=config.seed + seed)
        found.append({"without": measured(less, own), "with": measured(whole, own)})
        print(f"seed {seed}, {len(whole.events)} and {len(less.events)} events: {json.dumps(found[-1])}", flush=True)
    return found


def main() -> None:
    """Runs the study and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=("text", "sequence"), default="text")
    parser.add_argument("--without", default="search,message,rate,review", help="actions left out, comma-separated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--users", type=int, default=1500, help="customers of each shop")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of the tower")
    parser.add_argument("--set", action="append", default=[], help="a field of the training configuration, name=value; repeatable")
    arguments = parser.parse_args()
    started = time.monotonic()
    config = replace(TrainConfig.demo(), tower=arguments.tower, time_budget_s=0.0, max_steps=arguments.steps, checkpoint_steps=0)
    config = replace(config, evaluation_users=0, cut=(END - timedelta(days=9)).isoformat())
    config = config.with_values(dict(text.split("=", 1) for text in arguments.set))
    runs = study(arguments.seeds, arguments.without.split(","), config, users=arguments.users)
    table = Table("", *(f"seed {seed}" for seed in arguments.seeds), "mean", title=f"NDCG@10, {arguments.tower} tower")
    gains = {}
    for name in FIGURES:
        values = {way: [run[way][name] for run in runs] for way in ("without", "with")}
        values["gain"] = np.subtract(values["with"], values["without"]).tolist()
        gains[name] = values["gain"]
        for way, row in values.items():
            table.add_row(f"{name}, {way}", *(f"{value:.4f}" for value in row), f"{np.mean(row):.4f}")
    Console().print(table)
    figures = {"bench": "behaviour_texts", "tower": arguments.tower, "without": arguments.without, "seeds": arguments.seeds}
    print(json.dumps({**figures, "runs": runs, "gains": gains, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
