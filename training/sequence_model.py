"""The sequence tower beside the text encoder: items, searches and messages become vectors, behaviours over them a customer."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from features.behaviour import Activity
from features.item_table import FloatArray, ItemTable
from features.sequence import TOWER_INPUTS, BehaviourSequence, SequenceSpec, behaviour_sequence, tower_inputs
from training.config import TrainConfig
from training.model import Tower, mean_pool
from training.progress import bar
from training.sequence import SequenceConfig, SequenceTower
from training.text import Tokens, tokenize

_BATCH = 64


class TextReader(nn.Module):
    """A text encoder that stays as it is; its unit vectors are taken around a centre.

    Texts of one trade share most of their direction, so the centre (float32[t]) is the mean of the shop's items; it starts at zero.
    """

    centre: Tensor

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.register_buffer("centre", torch.zeros(int(encoder.config.hidden_size)))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns float32[b, t], unit vectors of texts int64[b, l]."""
        pooled = mean_pool(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        return self.around_centre(normalize(pooled, dim=-1))

    def around_centre(self, vectors: Tensor) -> Tensor:
        """Returns float32[b, t], the directions of vectors as seen from the centre."""
        return normalize(vectors - self.centre, dim=-1)


class SequenceModel(Tower):
    """A text reader whose vectors a sequence tower maps into the space of items and reads there."""

    def __init__(self, reader: TextReader, tower: SequenceTower, spec: SequenceSpec) -> None:
        super().__init__()
        self.reader = reader
        self.tower = tower
        self.spec = spec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tower.identity.weight.device

    @property
    def vector_size(self) -> int:
        """Components of a vector, and of a pooled text."""
        return self.tower.config.width

    def pool(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns float32[b, d], texts int64[b, l] mapped into the space of items, not yet of unit length."""
        return self.tower.mapped(self.reader(ids, mask))

    def item_vector(self, pooled: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns unit item vectors, float32[b, d]; without ``rows`` those of items never seen, of searches and of messages."""
        return self.tower.finished(pooled if rows is None else self.tower.identity(rows) * self.tower.known[rows] + pooled)

    def user_vector(self, pooled: Tensor) -> Tensor:
        """Returns unit user vectors, float32[b, d], of somebody of whom one search is all that is known."""
        count = pooled.shape[0]  # len() would fix the batch size of the exported graph
        ids = torch.tensor([_ids_of_a_search(self.spec)]).expand(count, 1, 3)
        filled = torch.ones(count, 1, dtype=torch.bool)
        return self.tower.read(self.item_vector(pooled)[:, None], filled, ids)[:, -1]


def _ids_of_a_search(spec: SequenceSpec) -> tuple[int, int, int]:
    return (spec.actions.index("search") + 1 if "search" in spec.actions else 0), 0, 0


class ExportedTower(nn.Module):
    """What the server runs on the inputs of ``features.sequence.tower_inputs``."""

    def __init__(self, tower: SequenceTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, vectors: Tensor, actions: Tensor, channels: Tensor, gaps: Tensor, length: Tensor) -> Tensor:
        """Returns user_vector float32[b, d] of vectors float32[b, l, d], ids int64[b, l] and length int64[b]."""
        places = torch.arange(vectors.shape[1], device=vectors.device)
        filled = places >= vectors.shape[1] - length[:, None]
        return self.tower.read(vectors, filled, torch.stack([actions, channels, gaps], dim=-1))[:, -1]


def sequence_config(config: TrainConfig, spec: SequenceSpec, *, ema_decay: float = 0.0, warmup_steps: int = 0) -> SequenceConfig:
    """Returns the tower's settings: those of the run, the vocabularies of the spec, and what depends on the length of the run."""
    return SequenceConfig(
        width=config.sequence_width,
        layers=config.sequence_layers,
        heads=config.sequence_heads,
        max_length=spec.length,
        dropout=config.sequence_dropout,
        input_dropout=config.sequence_input_dropout,
        identity_dropout=config.sequence_identity_dropout,
        label_smoothing=config.sequence_label_smoothing,
        epochs=config.sequence_epochs,
        patience=config.patience,
        batch_size=config.sequence_batch_size,
        learning_rate=config.sequence_learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=warmup_steps,
        ema_decay=ema_decay,
        seed=config.seed,
        positions=False,
        contexts=(len(spec.actions) + 1, len(spec.channels) + 1, len(spec.gap_seconds) + 2),
        context_dropout=0.1,
        temperature=config.temperature,
    )


@torch.no_grad()  # not inference mode: training takes them as input
def text_vectors(reader: TextReader, tokens: Tokens, stage: str) -> Tensor:
    """Returns float32[n, t]: the reader's vectors of n texts, each as in a single run to rounding."""
    vectors = torch.zeros(len(tokens), len(reader.centre))
    for rows in bar(list(tokens.batches(_BATCH, padded=False)), stage):
        vectors[rows] = reader(*tokens.pad(rows))
    return vectors


def texts_of(sequences: Sequence[BehaviourSequence]) -> list[str]:
    """Returns the distinct searches and messages of sequences, in alphabetical order."""
    return sorted({text for sequence in sequences for text in sequence.texts if text})


@torch.inference_mode()
def sequence_vectors(
    model: SequenceModel, tokenizer: Tokenizer, activities: Sequence[Activity], *, table: ItemTable, vectors: FloatArray, item_tokens: int
) -> FloatArray:
    """Returns float32[n, d]: unit user vectors, as the server computes them; zero for a customer with nothing to read.

    Args:
        model: trained or in training; in inference mode meanwhile.
        tokenizer: of the model's encoder.
        activities: of n customers.
        table: the items.
        vectors: float32[items, d], their unit vectors by the same model.
        item_tokens: searches and messages are truncated to these many tokens.
    """
    sequences = [behaviour_sequence(activity, table.rows, model.spec) for activity in activities]
    texts = texts_of(sequences)
    raw = text_vectors(model.reader, tokenize(tokenizer, texts, item_tokens), "searches and messages")
    known = dict(zip(texts, model.tower.text_vectors(raw).numpy(), strict=True))
    return read_sequences(model.tower, sequences, spec=model.spec, vectors=vectors, texts=known)


@torch.inference_mode()
def read_sequences(
    tower: SequenceTower,
    sequences: Sequence[BehaviourSequence],
    *,
    spec: SequenceSpec,
    vectors: FloatArray,
    texts: Mapping[str, FloatArray],
) -> FloatArray:
    """Returns float32[n, d]: unit user vectors of sequences, zero for an empty one; ``texts`` are the vectors of what was written."""
    exported = ExportedTower(tower).eval()
    users = np.zeros((len(sequences), tower.config.width), np.float32)
    readable = [place for place, sequence in enumerate(sequences) if len(sequence)]
    for start in range(0, len(readable), _BATCH):
        places = readable[start : start + _BATCH]
        inputs = [tower_inputs(sequences[k], sequences[k].vectors(vectors, texts.__getitem__), spec) for k in places]
        columns = [torch.from_numpy(np.concatenate([one[name] for one in inputs])) for name in TOWER_INPUTS]
        users[places] = exported(*columns).numpy()
    return users
