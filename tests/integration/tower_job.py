"""Trains the tiny tower on the made-up chain shop in a process of its own, to be killed or shared; writes the losses and weights.

python -m tests.integration.tower_job FOLDER [--kill-at STEP] [--set name=value ...]
python -m torch.distributed.run --nproc-per-node 2 -m tests.integration.tower_job FOLDER
"""

import argparse
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.unit.training_shop import DAY, START, activity_before, chain_log, item_table
from training.checkpoint import new_tower
from training.config import TrainConfig
from training.distributed import is_first, processes
from training.labels import visit_labels
from training.model import Batch
from training.text import activity_texts, load_tokenizer, tokenize
from training.train import TowerReport, TowerSet, Trainer

CONFIG = replace(
    TrainConfig.tiny(),
    max_steps=11,
    epochs=9,
    patience=99,
    learning_rate=1e-3,
    negative_count=8,
    checkpoint_steps=3,
    validations_per_epoch=4,
)


class Mortal(Trainer):
    """A trainer that is killed while it assembles its ``kill_at``-th batch."""

    kill_at = 0
    assembled = 0

    def batch(self, rows: Sequence[int], mine: Sequence[int] | None = None) -> Batch:
        self.assembled += 1
        if self.assembled == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(rows, mine)


def trainer(config: TrainConfig, folder: Path) -> Mortal:
    """The run of this job: the same labels and seed whichever process does it."""
    torch.set_num_threads(1)
    tokenizer, log, table = load_tokenizer("tiny"), chain_log(customers=40), item_table()
    labels = visit_labels(log, ("purchase",), start=START, end=START + 99 * DAY)
    texts = activity_texts([activity_before(log, label.user_id, label.time, table) for label in labels], table, 4)
    data = TowerSet(labels, tokenize(tokenizer, texts, config.user_tokens))
    items = tokenize(tokenizer, table.texts, config.item_tokens)
    tower = new_tower(config, len(table.ids))
    return Mortal(tower, items, train=data, validation=data, config=config, checkpoints=folder / "checkpoints")


def train(config: TrainConfig, folder: Path, *, kill_at: int = 0) -> TowerReport:
    """Trains, or goes on with what was broken off in the folder."""
    made = trainer(config, folder)
    made.kill_at = kill_at
    report = made.run(folder / "tensorboard")
    if is_first():
        (folder / "losses.json").write_text(json.dumps(report.losses))
        save_file(made.tower.state_dict(), folder / "tower.safetensors")
    return report


def main() -> None:
    """Runs the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    config = CONFIG.with_values(dict(text.split("=", 1) for text in arguments.set))
    with processes(config):
        train(config, arguments.folder, kill_at=arguments.kill_at)


if __name__ == "__main__":
    main()
