"""What averaging several towers gains, and how much of it one distilled tower keeps: the sample shop, towers alone.

    python bench/ensembles.py --size 3 --steps 60

Trains towers of seeds in a row, averages them, and distils them into one of the first tower's seed and steps. All rank every
item a customer has not bought, for visits of the ranker's period (validation, where the best weights are chosen) and after the
cut (holdout). Prints a table and a last line of JSON. Starts embedded servers of its own in a temporary folder.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cli.stack import running_stack
from features.importers import import_folder, load_mapping
from features.sample_shop import generate, write
from features.schema import migrate
from features.settings import Settings, load_settings
from features.store import apply_repository
from training.checkpoint import new_tower
from training.config import TrainConfig
from training.dataset import join_customers, open_shop, split_of
from training.distill import Distiller, TowerData, validate
from training.ensemble import Ensemble
from training.labels import choose_labels, keys_of
from training.model import Tower
from training.run import prepare_torch, tower_data
from training.text import load_tokenizer
from training.train import Trainer

_END = datetime(2026, 1, 1, tzinfo=UTC)


def sample_shop(settings: Settings, folder: Path, users: int) -> None:
    """Fills an empty shop."""
    migrate(settings.postgres_dsn)
    apply_repository(settings)
    write(generate(7, end=_END, users=users), folder)
    import_folder(settings.postgres_dsn, folder, load_mapping("sample_shop"), rejects=folder)


def data_of(settings: Settings, config: TrainConfig) -> tuple[TowerData, TowerData]:
    """Returns what the towers learn from, and the same with the holdout's labels in the place of the validation's."""
    shop = open_shop(settings)
    split = split_of(shop.log, config)
    labels = choose_labels(shop.log, split, config)
    holdout = [label for label in labels.holdout if label.items]
    customers = join_customers(shop.store, keys_of([*labels.tower, *labels.validation, *holdout]))
    tokenizer = load_tokenizer(config.base_model)
    until = split.ranker_start
    data = tower_data(shop, labels, customers, config=config, tokenizer=tokenizer, until=until)
    return data, tower_data(shop, replace(labels, validation=holdout), customers, config=config, tokenizer=tokenizer, until=until)


def train_all(data: TowerData, config: TrainConfig) -> dict[str, Tower]:
    """Returns the members, their ensemble and the student by name."""
    members = []
    for number in range(config.ensemble):
        member = config.member(number)
        prepare_torch(member)
        members.append(new_tower(member, len(data.items)))
        Trainer(members[-1], data.items, train=data.train, validation=data.validation, config=member).run()
    ensemble = Ensemble(members).eval()
    prepare_torch(config)
    student = new_tower(config, len(data.items))
    Distiller(student, ensemble, data, config).run()
    return {f"tower {number}": tower for number, tower in enumerate(members)} | {"ensemble": ensemble, "distilled": student}


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=3, help="towers in the ensemble")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each tower")
    parser.add_argument("--users", type=int, default=1500, help="customers of the sample shop")
    parser.add_argument("--labels", type=int, default=1000, help="labels validated on at the most")
    parser.add_argument("--weight", type=float, default=0.7, help="share of the teacher in the student's loss")
    parser.add_argument("--set", dest="fields", action="append", default=[], help="a field of the configuration, name=value")
    options = parser.parse_args()
    config = replace(
        TrainConfig.demo(),
        time_budget_s=0.0,
        max_steps=options.steps,
        epochs=99,
        validation_labels=options.labels,
        evaluation_users=0,
        ensemble=options.size,
        distil_weight=options.weight,
    ).with_values(dict(text.split("=", 1) for text in options.fields))
    with tempfile.TemporaryDirectory(prefix="concord-bench-", ignore_cleanup_errors=True) as name, running_stack(Path(name)):
        os.environ["CONCORD_DATA_DIR"] = name
        settings = load_settings(Settings)
        sample_shop(settings, Path(name) / "sample", options.users)
        data, held_out = data_of(settings, config)
        towers = train_all(data, config)
        figures = {what: (validate(tower, data), validate(tower, held_out)) for what, tower in towers.items()}
    singles = np.array([figures[f"tower {k}"] for k in range(options.size)])
    table = Table("tower alone, NDCG@10", f"validation ({len(data.validation.labels)})", f"holdout ({len(held_out.validation.labels)})")
    for what, (validation, holdout) in figures.items():
        table.add_row(what, f"{validation:.4f}", f"{holdout:.4f}")
    Console().print(table)
    line = {
        "towers": options.size,
        "steps": options.steps,
        "single_mean": singles.mean(0).round(4).tolist(),
        "single_sd": singles.std(0, ddof=1).round(4).tolist(),
        "ensemble": np.round(figures["ensemble"], 4).tolist(),
        "distilled": np.round(figures["distilled"], 4).tolist(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
