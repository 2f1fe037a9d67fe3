"""A run folder: configuration, weights and what the run measured, enough to evaluate or export it later."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from features.behaviour import Activity
from features.item_table import FloatArray, ItemTable
from features.sequence import SequenceSpec
from training.config import TrainConfig
from training.encode import item_vectors, user_vectors
from training.ensemble import Ensemble
from training.model import Tower, TwoTower
from training.ranker import Ranker
from training.sequence import SequenceTower
from training.sequence_model import SequenceModel, TextReader, sequence_config, sequence_vectors
from training.text import load_encoder, load_tokenizer, tokenize

_CONFIG, _RECORD, _TOWER, _RANKER = "config.json", "run.json", "tower.safetensors", "ranker.safetensors"
_SEQUENCE = "sequence.json"  # how a sequence tower reads behaviours


@dataclass(frozen=True)
class RunRecord:
    """What a run was and measured.

    Attributes:
        item_ids: the items that the tower's residuals belong to, in order.
        cut: end of the training period, microseconds of Unix time.
        metrics: on the holdout after the cut.
        steps, seconds: of the whole run: optimizer steps of the tower, wall-clock time.
        ranker_start: end of the tower's own training period, microseconds of Unix time; 0 in runs of releases that did not note it.
        warm_start: the model version whose weights the run began with; empty when it began with the pretrained model.
    """

    item_ids: tuple[str, ...]
    cut: int
    metrics: dict[str, float]
    steps: int
    seconds: float
    ranker_start: int = 0
    warm_start: str = ""


@dataclass(frozen=True)
class Trained:
    """A trained model with what is needed to apply it."""

    config: TrainConfig
    tower: Tower
    tokenizer: Tokenizer
    ranker: Ranker
    item_ids: Sequence[str]

    def item_vectors(self, table: ItemTable) -> FloatArray:
        """Returns float32[n, d]: the final vectors of a table's items, whatever table it was trained on."""
        residual = {item: row for row, item in enumerate(self.item_ids)}
        tokens = tokenize(self.tokenizer, table.texts, self.config.item_tokens)
        return item_vectors(self.tower, tokens, [residual.get(item) for item in table.ids])

    def user_vectors(self, activities: Sequence[Activity], table: ItemTable, vectors: FloatArray) -> FloatArray:
        """Returns float32[n, d]: unit user vectors, zero for a customer with nothing to read; ``vectors`` are the table's items'."""
        if isinstance(self.tower, SequenceModel):
            limit = self.config.item_tokens
            return sequence_vectors(self.tower, self.tokenizer, activities, table=table, vectors=vectors, item_tokens=limit)
        return user_vectors(self.tower, self.tokenizer, activities, table=table, config=self.config)


def new_model(config: TrainConfig, item_count: int) -> Tower:
    """Returns the untrained model that a run of this configuration ends with: one tower, or an ensemble that was not distilled."""
    if config.ensemble == 1 or config.distil_weight:
        return new_tower(config, item_count)
    return Ensemble([new_tower(config.member(number), item_count) for number in range(config.ensemble)])


def new_tower(config: TrainConfig, item_count: int) -> TwoTower:
    """Returns one untrained tower: pretrained BERT, identity heads, no residuals."""
    torch.manual_seed(config.seed)
    encoder = load_encoder(config.base_model, dropout=config.dropout)
    return TwoTower(encoder, item_count, temperature=config.temperature, label_smoothing=config.label_smoothing)


def _empty_sequence_model(config: TrainConfig, item_count: int, spec: SequenceSpec) -> SequenceModel:
    reader = TextReader(load_encoder(config.base_model, dropout=0.0))
    text = torch.zeros(item_count, len(reader.centre))
    return SequenceModel(reader, SequenceTower(sequence_config(config, spec), text, torch.zeros(item_count)), spec)


def save(trained: Trained, record: RunRecord, run_dir: Path) -> None:
    """Writes a run folder."""
    trained.config.save(run_dir / _CONFIG)
    if isinstance(trained.tower, SequenceModel):
        (run_dir / _SEQUENCE).write_text(trained.tower.spec.model_dump_json(indent=2) + "\n")
    save_file(trained.tower.state_dict(), run_dir / _TOWER)
    save_file(trained.ranker.state_dict(), run_dir / _RANKER)
    save_record(record, run_dir)


def save_record(record: RunRecord, run_dir: Path) -> None:
    """Writes what a run was and measured, into its folder."""
    (run_dir / _RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")


def load(run_dir: Path) -> tuple[Trained, RunRecord]:
    """Reads a run folder.

    Raises:
        FileNotFoundError: the folder is not a finished run.
    """
    record, config = load_record(run_dir), load_config(run_dir)
    count = len(record.item_ids)
    if config.tower == "sequence":
        spec = SequenceSpec.model_validate_json((run_dir / _SEQUENCE).read_bytes())
        tower: Tower = _empty_sequence_model(config, count, spec)
    else:
        tower = new_model(config, count)
    tower.load_state_dict(load_file(run_dir / _TOWER))
    ranker = Ranker(config.ranker_hidden)
    ranker.load_state_dict(load_file(run_dir / _RANKER))
    return Trained(config, tower.eval(), load_tokenizer(config.base_model), ranker.eval(), record.item_ids), record


def load_record(run_dir: Path) -> RunRecord:
    """Reads what a run was and measured.

    Raises:
        FileNotFoundError: the folder is not a finished run.
    """
    values = json.loads((run_dir / _RECORD).read_text())
    return RunRecord(**values | {"item_ids": tuple(values["item_ids"])})


def load_config(run_dir: Path) -> TrainConfig:
    """Reads a run's configuration.

    Raises:
        FileNotFoundError: the folder is not a run.
    """
    return TrainConfig.load(run_dir / _CONFIG)
