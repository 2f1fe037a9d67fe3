"""A text classifier: a BERT whose mean token vector is compared with one direction for each label."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

from features.item_table import FloatArray
from training.model import mean_pool
from training.text import Tokens

_BATCH = 64


class TextClassifier(nn.Module):
    """Cosines of a text's vector with the labels' directions, times a learned scale, plus a bias.

    The cosines keep the geometry of the pretrained sentence space: with the labels' mean vectors for directions it classifies by the
    nearest class mean before the first step, and wordings that training never showed stay near those it did.
    """

    def __init__(self, encoder: PreTrainedModel, labels: int, *, scale: float = 16.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.directions = nn.Parameter(torch.randn(labels, int(encoder.config.hidden_size)))
        self.bias = nn.Parameter(torch.zeros(labels))
        self.scale = nn.Parameter(torch.tensor(scale))
        self.dropout = nn.Dropout(dropout)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns unit vectors float32[b, h] of texts int64[b, l]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return normalize(mean_pool(hidden, attention_mask), dim=-1)

    def scores(self, pooled: Tensor) -> Tensor:
        """Returns logits float32[b, labels] of unit vectors float32[b, h]."""
        cosines = normalize(self.dropout(pooled), dim=-1) @ normalize(self.directions, dim=-1).T
        return self.scale * cosines + self.bias

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns logits float32[b, labels] of texts int64[b, l]."""
        return self.scores(self.pool(input_ids, attention_mask))


@torch.inference_mode()
def predict(model: nn.Module, tokens: Tokens, outputs: int) -> FloatArray:
    """Returns float32[n, outputs]: what a model of ``forward(input_ids, attention_mask)`` says of n texts, without dropout."""
    was_training = model.training
    model.eval()
    result = np.zeros((len(tokens), outputs), np.float32)
    for rows in tokens.batches(_BATCH, padded=True):
        result[rows] = model(*tokens.pad(rows)).numpy()
    model.train(was_training)
    return result


def class_means(vectors: FloatArray, answers: Sequence[int], labels: int) -> FloatArray:
    """Returns float32[labels, h]: the unit mean vector of each label's texts; zero for a label without any."""
    sums = np.zeros((labels, vectors.shape[1]), np.float64)
    np.add.at(sums, np.asarray(answers), vectors)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.asarray(sums / np.where(lengths > 0, lengths, 1), np.float32)


def fit_temperature(logits: FloatArray, answers: Sequence[int]) -> float:
    """Returns what logits float32[n, labels] are to be divided by for the least log loss on ``answers`` (Guo et al., 2017).

    The least of 200 values from 0.05 to 20, spread evenly on a logarithmic scale.
    """
    scores, wanted = torch.from_numpy(np.asarray(logits, np.float32)), torch.as_tensor(answers, dtype=torch.int64)
    values = np.geomspace(0.05, 20.0, 200)
    return float(min(values, key=lambda value: float(cross_entropy(scores / value, wanted))))
