"""A text classifier: a BERT and a linear head over its mean token vector."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

from features.item_table import FloatArray
from training.model import mean_pool
from training.text import Tokens

_BATCH = 64


class TextClassifier(nn.Module):
    """Logistic regression on the unit mean token vector of a BERT."""

    def __init__(self, encoder: PreTrainedModel, labels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(int(encoder.config.hidden_size), labels)
        self.dropout = nn.Dropout(dropout)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns unit vectors float32[b, h] of texts int64[b, l]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return normalize(mean_pool(hidden, attention_mask), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns logits float32[b, labels] of texts int64[b, l]."""
        scores: Tensor = self.head(self.dropout(self.pool(input_ids, attention_mask)))
        return scores


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


def fit_head(classifier: TextClassifier, vectors: FloatArray, answers: Sequence[int], *, strength: float = 10.0) -> None:
    """Fits the head alone by logistic regression on unit vectors float32[n, h] of the encoder as it is; each label must occur.

    ``strength`` is the inverse of the penalty on the weights.
    """
    model = LogisticRegression(C=strength, max_iter=500).fit(vectors, np.asarray(answers))
    weights, biases = model.coef_, model.intercept_
    if len(weights) == 1:  # of two labels scikit-learn gives the second one's margin
        weights, biases = np.concatenate([-weights, weights]) / 2, np.concatenate([-biases, biases]) / 2
    with torch.no_grad():
        classifier.head.weight.copy_(torch.from_numpy(weights))
        classifier.head.bias.copy_(torch.from_numpy(biases))


def fit_temperature(logits: FloatArray, answers: Sequence[int]) -> float:
    """Returns what logits float32[n, labels] are to be divided by for the least log loss on ``answers`` (Guo et al., 2017).

    The least of 200 values from 0.05 to 20, spread evenly on a logarithmic scale.
    """
    scores, wanted = torch.from_numpy(np.asarray(logits, np.float32)), torch.as_tensor(answers, dtype=torch.int64)
    values = np.geomspace(0.05, 20.0, 200)
    return float(min(values, key=lambda value: float(cross_entropy(scores / value, wanted))))
