"""Which article answers a question: BM25 and the encoder's cosine, fused, and how likely the best one is the right one.

Shared by training (which measures it) and serving. A passage's score hangs on question, passage and vocabulary alone, never on what
else was found; equal articles, vectors and questions give equal bits.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from math import exp

import numpy as np

from features.articles import Article, Passage, passage_text, passages, text_hash
from features.item_table import FloatArray
from features.lexical import Field, LexicalIndex

# Texts that have nothing to do with each other. How alike an encoder finds them (its anisotropy: 0.1 for all-MiniLM-L6-v2, 0.9 for a
# small random one) is what alike means nothing for: cosines are counted from there.
_UNRELATED = (
    "The river froze early that winter.",
    "She tuned the violin before the concert.",
    "Volcanoes erupt when pressure builds below the crust.",
    "He parked the tractor behind the barn.",
    "The parliament voted on the new budget.",
    "Penguins huddle together to keep warm.",
    "A triangle has three corners.",
    "The goalkeeper saved the penalty.",
    "Yeast makes the dough rise.",
    "The telescope found a distant galaxy.",
    "My grandmother was born in a small village.",
    "The train to the coast was delayed by fog.",
)
# A title's words count three times: it is what the article is about, and of a question and its answer the question.
_TITLE_WEIGHT, _HEADING_WEIGHT = 3, 2


@dataclass(frozen=True)
class Calibration:
    """The logistic curve from a score to the probability that the passage answers the question.

    Fitted on the validation half of ``training/quality/faq_questions.jsonl``; see docs/assistant.md for how well it holds elsewhere.
    """

    slope: float
    offset: float

    def probability(self, score: float) -> float:
        """Returns 0 to 1."""
        return 1.0 / (1.0 + exp(-(self.slope * score + self.offset)))


@dataclass(frozen=True)
class Fusion:
    """How scores are made.

    Attributes:
        semantic: share of the cosine in the score, 0 to 1; the rest is the lexical relevance.
        calibration: of that score.
    """

    semantic: float
    calibration: Calibration


# Chosen on the validation half (`make quality SET=faq` prints the curve): see docs/LOG.md.
FUSED = Fusion(0.7, Calibration(15.7, -6.1))
LEXICAL = Fusion(0.0, Calibration(12.6, -4.1))  # while no model is active


@dataclass(frozen=True)
class Hit:
    """The best passage of an article for a question, its score, and the calibrated probability that it answers it."""

    article: Article
    passage: Passage
    score: float
    confidence: float


class ArticleIndex:
    """Passages of n articles in process, immutable. Safe to ask from many threads."""

    def __init__(self, articles: Sequence[Article]) -> None:
        """Builds the lexical side; the order of ``articles`` breaks ties."""
        cut = [(article, passage) for article in articles for passage in passages(article)]
        self.articles = tuple(article for article, _ in cut)
        self.passages = tuple(passage for _, passage in cut)
        headings = [passage.heading for passage in self.passages]
        fields = [Field(self._titles_read(), _TITLE_WEIGHT), Field(headings, _HEADING_WEIGHT)]
        self._lexical = LexicalIndex([*fields, Field([passage.text for passage in self.passages])])
        self._titles = self._bodies = np.zeros((len(cut), 0), np.float32)
        self._baseline = 0.0
        owners = [article.article_id for article in self.articles]
        self._starts = np.array([0, *(k for k, (a, b) in enumerate(pairwise(owners), start=1) if a != b)][: len(cut)], np.int64)

    def __len__(self) -> int:
        return len(self.passages)

    def texts(self) -> dict[str, str]:
        """Returns what the encoder reads, by content hash: titles, passages, and what cosines are counted from."""
        return {text_hash(text): text for text in (*self._titles_read(), *self._bodies_read(), *_UNRELATED)}

    def with_vectors(self, vectors: Mapping[str, FloatArray]) -> "ArticleIndex":
        """Returns the index with the unit vector of each of its ``texts``, float32[d]."""

        def rows(texts: Iterable[str]) -> FloatArray:
            return np.array([vectors[text_hash(text)] for text in texts], np.float32)

        other = copy(self)
        other._titles, other._bodies = rows(self._titles_read()), rows(self._bodies_read())
        unrelated = rows(_UNRELATED)
        pairs = unrelated @ unrelated.T
        # Rounded, so that it is the same whatever order a processor adds products up in.
        other._baseline = round(float(pairs[np.triu_indices(len(pairs), 1)].mean()), 3)
        return other

    def _titles_read(self) -> list[str]:
        return [article.title for article in self.articles]

    def _bodies_read(self) -> list[str]:
        return [passage_text(article.title, passage) for article, passage in zip(self.articles, self.passages, strict=True)]

    def scores(self, question: str, vector: FloatArray | None, fusion: Fusion) -> FloatArray:
        """Returns float32[p]: each passage's score; without a vector the cosine counts as 0."""
        terms = self._lexical.corrected(question).terms
        scores = np.float32(1.0 - fusion.semantic) * self._lexical.relevance(terms)
        if vector is not None and fusion.semantic:
            # A question may be like what the article is about, or like what the passage says: the better of the two counts.
            cosines = np.maximum(_products(self._titles, vector), _products(self._bodies, vector))
            scores = scores + np.float32(fusion.semantic) * (cosines - self._baseline) / max(1 - self._baseline, 1e-3)
        return np.asarray(scores, np.float32)

    def search(self, question: str, vector: FloatArray | None, *, limit: int, fusion: Fusion | None = None) -> list[Hit]:
        """Returns the best passages for a question, one an article, best first; equal scores by the articles' order.

        Args:
            question: in words.
            vector: float32[d], its unit vector; None where there is none, then words alone decide.
            limit: articles at most.
            fusion: by default FUSED with a vector, LEXICAL without.
        """
        if not len(self):
            return []
        fusion = fusion or (LEXICAL if vector is None else FUSED)
        scores = self.scores(question, vector, fusion)
        best = np.maximum.reduceat(scores, self._starts)
        hits = []
        for group in np.argsort(-best, kind="stable")[:limit].tolist():
            start = int(self._starts[group])
            end = int(self._starts[group + 1]) if group + 1 < len(self._starts) else len(self)
            row = start + int(np.argmax(scores[start:end]))
            score = float(scores[row])
            hits.append(Hit(self.articles[row], self.passages[row], score, fusion.calibration.probability(score)))
        return hits


def _products(vectors: FloatArray, vector: FloatArray) -> FloatArray:
    """Returns float32[p]: products whose bits do not hang on how many rows there are, as those of a matrix product do."""
    found: FloatArray = np.einsum("pd,d->p", vectors, vector)
    return found
