"""The sequence tower of a shop: vocabularies, windows with their texts, training, and validation on the very path that serves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from features.behaviour import Activity
from features.item_table import ItemTable
from features.sequence import BehaviourSequence, SequenceSpec, action_read, behaviour_sequence
from training.config import TrainConfig
from training.dataset import TrainingDataError
from training.labels import Label
from training.sequence import SequenceTower
from training.sequence_fit import fit, step_count
from training.sequence_model import SequenceModel, TextReader, read_sequences, sequence_config, text_vectors, texts_of
from training.text import load_encoder, load_tokenizer, tokenize
from training.tracking import Tracker
from training.train import TowerReport, mean_ndcg
from training.windows import Window, WindowSet


@dataclass(frozen=True)
class SequenceData:
    """Windows to train on and labels to validate on, each with the activity joined for it."""

    windows: Sequence[Window]
    activities: Sequence[Activity]
    validation: Sequence[Label]
    validation_activities: Sequence[Activity]


def train_model(
    table: ItemTable, data: SequenceData, *, config: TrainConfig, tracker: Tracker
) -> tuple[SequenceModel, Tokenizer, TowerReport]:
    """Trains a sequence tower over the table's items and searches of the windows.

    Raises:
        TrainingDataError: no window has anything to foresee.
    """
    started = time.monotonic()
    spec, tokenizer = spec_of(data.activities, config), load_tokenizer(config.base_model)
    windows, validation = (
        [behaviour_sequence(activity, table.rows, spec) for activity in activities]
        for activities in (data.activities, data.validation_activities)
    )
    texts = texts_of(windows)
    examples = WindowSet(data.windows, windows, queries={text: len(table) + place for place, text in enumerate(texts)})
    if not len(examples):
        raise TrainingDataError("no visits with something before them to train the tower on: too few events")
    torch.manual_seed(config.seed)
    reader = TextReader(load_encoder(config.base_model, dropout=0.0))
    items = text_vectors(reader, tokenize(tokenizer, table.texts, config.item_tokens), "item texts")
    reader.centre.copy_(items.mean(0))
    queries = text_vectors(reader, tokenize(tokenizer, texts, config.item_tokens), "searches and messages")
    steps = step_count(len(examples), config.sequence_batch_size, epochs=config.sequence_epochs, max_steps=config.max_steps)
    settings = sequence_config(
        config,
        spec,
        # Averaged over about half an epoch, for a small shop's whole run may be shorter than 1,000 steps.
        ema_decay=min(0.999, 1 - 1 / (1 + step_count(len(examples), config.sequence_batch_size) / 2)),
        warmup_steps=min(200, steps // 10),
    )
    torch.manual_seed(config.seed)
    tower = SequenceTower(settings, reader.around_centre(items), examples.known(len(table)), queries=queries)
    validate = _validation(reader, tokenizer, validation, labels=data.validation, spec=spec, config=config)
    untrained = validate(tower.eval())
    tracker.scalar("validation/ndcg_at_10", untrained, 0)
    history, taken = fit(
        tower,
        examples.draw,
        validate=validate,
        observe=tracker.scalar,
        max_steps=config.max_steps,
        time_budget_s=config.time_budget_s,
    )
    return SequenceModel(reader, tower, spec).eval(), tokenizer, TowerReport(taken, time.monotonic() - started, max(history), untrained)


def spec_of(activities: Sequence[Activity], config: TrainConfig) -> SequenceSpec:
    """Returns how behaviours are written out: a name that the training has not met is unknown, for its embedding would be noise."""
    behaviours = [behaviour for activity in activities for behaviour in activity.behaviours]
    return SequenceSpec(
        length=config.sequence_length,
        text_count=config.sequence_texts,
        actions=tuple(sorted({action_read(behaviour) for behaviour in behaviours})),
        channels=tuple(sorted({behaviour.channel for behaviour in behaviours} - {""})),
    )


def _validation(
    reader: TextReader,
    tokenizer: Tokenizer,
    sequences: Sequence[BehaviourSequence],
    *,
    labels: Sequence[Label],
    spec: SequenceSpec,
    config: TrainConfig,
) -> Callable[[SequenceTower], float]:
    """Returns a function from a tower to its NDCG@10 on the labels; what does not change with the tower is computed once."""
    readable = [place for place, sequence in enumerate(sequences) if len(sequence)]
    sequences, labels = [sequences[place] for place in readable], [labels[place] for place in readable]
    texts = texts_of(sequences)
    raw = text_vectors(reader, tokenize(tokenizer, texts, config.item_tokens), "validation texts")

    @torch.inference_mode()
    def validate(tower: SequenceTower) -> float:
        known = dict(zip(texts, tower.text_vectors(raw).numpy(), strict=True))
        vectors = tower.item_vectors().numpy()
        return mean_ndcg(read_sequences(tower, sequences, spec=spec, vectors=vectors, texts=known), vectors, labels)

    return validate
