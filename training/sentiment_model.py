"""What reads a review: a small convolution over word pieces or characters, or a pretrained BERT, under one head of verdicts."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC, Lowercase, Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from training.model import mean_pool
from training.text import load_encoder

UNKNOWN = "[UNK]"
_MARKS = {"[PAD]": 0, UNKNOWN: 1, "[CLS]": 2, "[SEP]": 3}
_PRIME = 1_000_003  # runs of three ids below 2^20 stay within 63 bits
_SPREAD = 0.1  # standard deviation of embeddings before the first step


LABELS = ("negative", "neutral", "positive")


@dataclass(frozen=True)
class Verdicts:
    """What a review can say, and what it counts as.

    Attributes:
        count: outcomes that a model tells apart.
        groups: the outcomes that each of ``LABELS`` stands for.
    """

    count: int
    groups: tuple[tuple[int, ...], ...]

    def labels(self, outcomes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the label that each outcome counts as, by its place in ``LABELS``."""
        places = {outcome: place for place, group in enumerate(self.groups) for outcome in group}
        return np.array([places[outcome] for outcome in outcomes.tolist()], np.int64)


STARS = Verdicts(5, ((0, 1), (2,), (3, 4)))
SIDES = Verdicts(3, ((0,), (1,), (2,)))


class WindowNet(nn.Module):
    """Embeddings, one layer over each token and its neighbours, and of that the maximum and the mean over the text.

    A product of matrices over windows, not a convolution of the library: that is what the towers run too, and what was measured to
    give the same bits in any batch. 0.4 million parameters where BERT has 22, so that every clause of a text can be read by itself.
    """

    def __init__(self, vocabulary: int, *, width: int, filters: int, window: int, dropout: float, unknown: int, lost: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=_SPREAD)
        self.window = nn.Linear(width * window, filters)
        self.dropout = nn.Dropout(dropout)
        self.size = 2 * filters
        self._reach, self._unknown, self._lost = window, unknown, lost

    def begin_with(self, vectors: Tensor) -> None:
        """Starts the embeddings as the principal components of pretrained ones, float32[vocabulary, h]."""
        centred = vectors - vectors.mean(0)
        left, strength, _ = torch.linalg.svd(centred, full_matrices=False)
        components = (left * strength)[:, : self.embedding.embedding_dim]
        with torch.no_grad():
            self.embedding.weight.copy_(components / components.std() * _SPREAD)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns float32[b, size] of texts int64[b, l]."""
        if self.training and self._lost:  # some words go missing, so that none is relied on alone
            gone = torch.rand(input_ids.shape, device=input_ids.device) < self._lost
            input_ids = input_ids.masked_fill(gone & (attention_mask == 1), self._unknown)
        kept = attention_mask.unsqueeze(-1).to(torch.float32)
        embedded = self.embedding(input_ids) * kept
        before = self._reach // 2
        padded = pad(embedded, (0, 0, before, self._reach - 1 - before))
        length = embedded.shape[1]
        windows = torch.cat([padded[:, k : k + length] for k in range(self._reach)], dim=2)
        found = torch.relu(self.window(windows)) * kept  # never below zero, so padding is no maximum
        pooled: Tensor = self.dropout(torch.cat([found.amax(1), mean_pool(found, attention_mask)], dim=1))
        return pooled


class PretrainedNet(nn.Module):
    """A pretrained BERT of any language, by path or name; a text is the mean of its token vectors."""

    def __init__(self, base_model: str, *, dropout: float) -> None:
        super().__init__()
        self.encoder: PreTrainedModel = load_encoder(base_model, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.size = int(self.encoder.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns float32[b, size] of texts int64[b, l]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled: Tensor = self.dropout(mean_pool(hidden, attention_mask))
        return pooled


class Phrases(nn.Module):
    """A regression over tokens and runs of neighbouring tokens, whose weights are looked up by hash.

    What a text gets is the sum of its phrases' weights, over the square root of their number.
    """

    weights: Tensor
    bias: Tensor

    def __init__(self, outcomes: int, *, longest: int, buckets: int) -> None:
        super().__init__()
        self.longest, self.buckets = longest, buckets
        self.register_buffer("weights", torch.zeros(buckets, outcomes))
        self.register_buffer("bias", torch.zeros(outcomes))

    def places(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the place of each phrase's weights, int64[b, p], and which of the phrases are there, int64[b, p]."""
        run, whole = input_ids, attention_mask
        places, kept = [run % self.buckets], [whole]
        for more in range(1, self.longest):
            run = run[:, :-1] * _PRIME + input_ids[:, more:]
            whole = attention_mask[:, more:]
            places.append(run % self.buckets)
            kept.append(whole)
        return torch.cat(places, 1), torch.cat(kept, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns logits float32[b, outcomes] of texts int64[b, l]."""
        padded = (pad(input_ids, (0, self.longest - 1)), pad(attention_mask, (0, self.longest - 1)))
        places, kept = self.places(*padded)
        summed: Tensor = mean_pool(self.weights[places], kept) * kept.sum(1, keepdim=True).to(torch.float32).sqrt()
        logits: Tensor = summed + self.bias
        return logits


class SentimentModel(nn.Module):
    """A reader of texts under a head of verdicts, and beside it what phrases alone say."""

    shares: Tensor

    def __init__(self, reader: WindowNet | PretrainedNet, phrases: Phrases, verdicts: Verdicts) -> None:
        super().__init__()
        self.reader, self.phrases, self.verdicts = reader, phrases, verdicts
        self.head = nn.Linear(reader.size, verdicts.count)
        # The reader learns alone: beside phrases that were fitted to the same texts it would find little left to learn.
        self.register_buffer("shares", torch.tensor([1.0, 0.0]))

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns what the reader alone says: logits float32[b, verdicts.count] of texts int64[b, l]."""
        logits: Tensor = self.head(self.reader(input_ids, attention_mask))
        return logits

    def outcomes(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns logits float32[b, verdicts.count] of texts int64[b, l]."""
        logits: Tensor = self.shares[0] * self.read(input_ids, attention_mask) + self.shares[1] * self.phrases(input_ids, attention_mask)
        return logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns logits float32[b, labels]: the probability of a label is that of the outcomes it stands for."""
        outcomes = self.outcomes(input_ids, attention_mask)
        return torch.stack([outcomes[:, list(group)].logsumexp(1) for group in self.verdicts.groups], dim=1)


def character_tokenizer(texts: Iterable[str], *, most: int = 6_000, least: int = 2) -> Tokenizer:
    """Returns a tokenizer of characters, for languages that put no space between words.

    It knows the ``most`` frequent characters of the texts that occur ``least`` times, in their compatibility form (NFKC) and lower
    case; space says nothing.
    """
    tokenizer = Tokenizer(WordLevel(dict(_MARKS), unk_token=UNKNOWN))
    tokenizer.normalizer = Sequence([NFKC(), Lowercase(), Replace(Regex(r"\s+"), "")])
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    known = sorted((character for character, count in counts.items() if count >= least), key=lambda each: (-counts[each], each))
    tokenizer.model = WordLevel(_MARKS | {character: len(_MARKS) + k for k, character in enumerate(known[:most])}, unk_token=UNKNOWN)
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    ends = [(mark, _MARKS[mark]) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer
