"""Where an update starts: the trained weights a bundle carries, moved onto today's catalogue, and old labels mixed among the new."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from training.checkpoint import Trained, new_model
from training.config import TrainConfig
from training.dataset import Split
from training.events import EventLog, Micros
from training.labels import Label, Labels, choose_labels
from training.ranker import Ranker
from training.text import load_tokenizer

# Tensors with a row per item, by the end of their names.
_PER_ITEM = ("residual.weight", "warm")


@dataclass(frozen=True)
class Origin:
    """Trained weights and what they have learned from.

    Attributes:
        trained: the model.
        ranker_start: its tower trained on visits strictly before this, microseconds of Unix time.
        cut: its ranker trained on visits strictly before this.
    """

    trained: Trained
    ranker_start: Micros
    cut: Micros


@dataclass(frozen=True)
class WarmStart:
    """What makes a run an update.

    Attributes:
        version: the published model it starts from.
        origin: that model's weights.
        split: the update's own periods; none begins before the origin's.
        replay_fraction: share of visits that the origin's tower knows already among those the tower trains on; in [0, 1).
    """

    version: str
    origin: Origin
    split: Split
    replay_fraction: float

    def labels(self, log: EventLog, config: TrainConfig) -> Labels:
        """Returns the update's labels; those of the tower are visits it has not seen, and a replay of older ones.

        Only the tower gets a replay: on visits that the tower was trained on, the ranker would learn to trust its memory.

        Raises:
            TrainingDataError: there is no label to train the tower or the ranker on.
        """
        everything = choose_labels(log, self.split, replace(config, tower_labels=max(len(log), 1)))
        rng = np.random.default_rng(config.seed)
        tower = with_replay(
            everything.tower, since=self.origin.ranker_start, fraction=self.replay_fraction, limit=config.tower_labels, rng=rng
        )
        return replace(everything, tower=tower)


def with_replay(labels: Sequence[Label], *, since: Micros, fraction: float, limit: int, rng: np.random.Generator) -> list[Label]:
    """Returns the labels from ``since`` on and a random sample of the earlier ones, in order of time.

    Args:
        labels: in order of time.
        since: where the new labels begin.
        fraction: wanted share of earlier labels in the result, in [0, 1); there may be too few of them.
        limit: labels in the result at the most; of the new ones the newest are kept.
        rng: draws the sample, without replacement.
    """
    new = [label for label in labels if label.time >= since]
    old = labels[: len(labels) - len(new)]
    new = new[-max(round(limit * (1.0 - fraction)), 1) :]
    wanted = min(round(len(new) * fraction / (1.0 - fraction)), len(old), limit - len(new))
    replayed = [old[row] for row in np.sort(rng.choice(len(old), wanted, replace=False))] if wanted else []
    return [*replayed, *new]


def grown(trained: Trained, item_ids: Sequence[str], config: TrainConfig) -> Trained:
    """Returns a copy over another catalogue: known items keep their residual, new ones start without, removed ones are dropped.

    Raises:
        ValueError: ``config`` asks for a network of another shape.
    """
    tower, ranker = new_model(config, len(item_ids)), Ranker(config.ranker_hidden, dropout=config.ranker_dropout)
    rows = {item: row for row, item in enumerate(trained.item_ids)}
    kept = [(row, rows[item]) for row, item in enumerate(item_ids) if item in rows]
    old, fresh = trained.tower.state_dict(), tower.state_dict()
    moved = dict(old)
    for name in [name for name in fresh if name.endswith(_PER_ITEM) and name in old]:
        moved[name] = fresh[name].clone()
        moved[name][[new for new, _ in kept]] = old[name][[row for _, row in kept]]
    _same_shapes(fresh, moved)
    _same_shapes(ranker.state_dict(), trained.ranker.state_dict())
    tower.load_state_dict(moved)
    ranker.load_state_dict(trained.ranker.state_dict())
    return Trained(config, tower.eval(), trained.tokenizer, ranker.eval(), tuple(item_ids))


def _same_shapes(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    left, right = ({name: tuple(value.shape) for name, value in tensors.items()} for tensors in (wanted, given))
    if other := sorted(name for name in {*left, *right} if left.get(name) != right.get(name)):
        raise ValueError(f"an update keeps the shape of the network it starts from; the configuration changes {', '.join(other[:3])}")


def save_origin(origin: Origin, path: Path) -> None:
    """Writes the one file an update needs.

    Tensors that are still the pretrained model's are left out: with two of MiniLM's six layers trained and
    4,000 items that leaves 21 of 98 MB.
    """
    trained = origin.trained
    base = new_model(trained.config, len(trained.item_ids)).state_dict()
    own = {name: value for name, value in trained.tower.state_dict().items() if not value.equal(base[name])}
    tensors = {f"tower.{name}": value.contiguous() for name, value in own.items()}
    tensors |= {f"ranker.{name}": value.contiguous() for name, value in trained.ranker.state_dict().items()}
    metadata = {
        "config": json.dumps(trained.config.record()),
        "item_ids": json.dumps(list(trained.item_ids)),
        "periods": json.dumps({"ranker_start": origin.ranker_start, "cut": origin.cut}),
        "base": _digest({name: value for name, value in base.items() if name not in own}),
    }
    path.write_bytes(save(tensors, metadata))  # not save_file, whose files only their owner may read: servers verify this one


def load_origin(path: Path) -> Origin:
    """Reads what ``save_origin`` wrote.

    Raises:
        ValueError: the pretrained model has changed since, or the file is of a release with other settings.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    config = TrainConfig.from_record(json.loads(metadata["config"]), path.name)
    item_ids = tuple(json.loads(metadata["item_ids"]))
    tower, ranker = new_model(config, len(item_ids)), Ranker(config.ranker_hidden)
    own, base = _part(tensors, "tower."), tower.state_dict()
    if metadata["base"] != _digest({name: value for name, value in base.items() if name not in own}):
        raise ValueError(f"{path.name}: the pretrained model {config.base_model!r} is not the one it was trained from")
    tower.load_state_dict({**base, **own})
    ranker.load_state_dict(_part(tensors, "ranker."))
    trained = Trained(config, tower.eval(), load_tokenizer(config.base_model), ranker.eval(), item_ids)
    return Origin(trained, **json.loads(metadata["periods"]))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of names and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
