"""Vectors of many texts from a tower in inference mode."""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from features.behaviour import Activity
from features.item_table import FloatArray, ItemTable
from training.config import TrainConfig
from training.model import Tower, TwoTower
from training.progress import bar
from training.text import Tokens, activity_texts, load_encoder, load_tokenizer, tokenize

_BATCH = 64


@torch.inference_mode()
def pools(tower: Tower, tokens: Tokens, stage: str, *, padded: bool = True) -> Tensor:
    """Returns the pooled encoder outputs float32[n, h] of n texts, on the processor wherever the tower is.

    Without padding a batch holds texts of one length, so that each equals the server's single run to rounding.
    """
    was_training = tower.training
    tower.eval()
    result = torch.zeros(len(tokens), tower.vector_size)
    for rows in bar(list(tokens.batches(_BATCH, padded=padded)), stage):
        ids, mask = tokens.pad(rows)
        result[rows] = tower.pool(ids.to(tower.device), mask.to(tower.device)).cpu()
    tower.train(was_training)
    return result


def pretrained_vectors(texts: Sequence[str], *, base_model: str = "", tokens: int = 64) -> FloatArray:
    """Returns float32[n, h]: unit vectors of texts by a pretrained encoder as it is; ``tokens`` are read of each text."""
    tower = TwoTower(load_encoder(base_model, dropout=0.0), 0, temperature=1.0)
    pooled = pools(tower, tokenize(load_tokenizer(base_model), texts, tokens), "text vectors")
    return np.asarray(normalize(pooled, dim=-1).numpy(), np.float32)


@torch.inference_mode()
def user_vectors(
    tower: Tower, tokenizer: Tokenizer, activities: Sequence[Activity], *, table: ItemTable, config: TrainConfig
) -> FloatArray:
    """Returns float32[n, d]: unit user vectors, zero for a customer with nothing to read."""
    texts = activity_texts(activities, table, config.behaviour_limit)
    readable = [row for row, text in enumerate(texts) if text]
    vectors = np.zeros((len(texts), tower.vector_size), np.float32)
    tokens = tokenize(tokenizer, [texts[row] for row in readable], config.user_tokens)
    vectors[readable] = tower.user_vector(pools(tower, tokens, "user vectors")).numpy()
    return vectors


@torch.inference_mode()
def item_vectors(tower: Tower, tokens: Tokens, rows: Sequence[int | None]) -> FloatArray:
    """Returns float32[n, d]: final item vectors; ``rows`` are the items' residuals, None for items never seen in training."""
    pooled = pools(tower, tokens, "item vectors", padded=False)
    vectors = tower.item_vector(pooled)
    known = [place for place, row in enumerate(rows) if row is not None]
    residuals = torch.tensor([row for row in rows if row is not None], dtype=torch.int64)
    vectors[known] = tower.item_vector(pooled[known], residuals)
    return np.asarray(vectors.numpy(), np.float32)
