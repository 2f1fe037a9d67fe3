"""What a search finds: items that have the words and items near in meaning, in one order. Shared by training and serving."""

import unicodedata
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.behaviour import ACTIVITY_LENGTH, Activity
from features.candidates import Source
from features.item_table import FloatArray, IntArray
from features.retrieval import VectorArray, VectorIndex, exact_scores, vector_scores
from features.scores import Scores

SEARCH_SIZE = 500
"""Items a search finds at the most: fifty pages of ten."""

# Of a customer's newest behaviours: fewer than are kept, so that a few searches more push none of them out.
_BEHAVIOURS = ACTIVITY_LENGTH - 10
# A tenth of those found is said to suit the customer: a cosine's size hangs on the encoder, its place among others does not.
_SUITS = 10


@dataclass(frozen=True)
class SearchWeights:
    """How words, meaning and taste add up; see ServerSettings for what a shop sets, docs/LOG.md for the figures.

    Attributes:
        meaning: of the cosine of query and item, where the share of the query's words that an item has counts 1.
        personal: of the cosine of customer and item, likewise.
        least_relevance: share of the query's words, by what they say, below which an item has not been found by them.
        least_similarity: cosine below which it has not been found by its meaning.
    """

    meaning: float = 0.3
    personal: float = 0.2
    least_relevance: float = 0.15
    least_similarity: float = 0.45


class Matches(NamedTuple):
    """Rows found, best first, ties by row: int32[k], float32[k] and uint8[k] bit sets of Source; k is at most SEARCH_SIZE."""

    rows: IntArray
    scores: FloatArray
    sources: npt.NDArray[np.uint8]


def normalized_query(text: str) -> str:
    """Returns a query as it is told apart from others: case, compatibility forms, control characters and spacing do not count."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(character) == "Cc" else character for character in plain).split())


def before_search(activity: Activity, query: str) -> Activity:
    """Returns the activity as it was before the customer searched for this (a normalized query), once or several times in a row.

    A search is recorded while it is answered: so whether its own event is in the state already makes no difference to the answer.
    """
    behaviours = activity.behaviours
    own = 0
    while own < len(behaviours) and behaviours[own].action == "search" and normalized_query(behaviours[own].text) == query:
        own += 1
    return replace(activity, behaviours=behaviours[own : own + _BEHAVIOURS])


def find_matches(
    relevance: FloatArray,
    vectors: VectorArray,
    *,
    query: FloatArray | None,
    customer: FloatArray | None,
    index: VectorIndex | None,
    weights: SearchWeights,
) -> Matches:
    """Finds items and puts them in order. An item's score depends on it, the query and the customer, never on what else was found.

    Args:
        relevance: float32[n], 0 to 1, of LexicalIndex.
        vectors: unit vectors of n items.
        query: float32[d], the query's unit vector; None where no model reads it: words alone decide.
        customer: float32[d], the customer's unit vector; None for one of whom nothing is known.
        index: of the vectors of a large catalogue.
        weights: how it adds up.
    """
    nobody = np.zeros(len(relevance), np.bool_)
    by_words = _above(Scores.of_all(relevance), weights.least_relevance)
    rows = np.array(by_words.best(SEARCH_SIZE, excluded=nobody), np.int32)
    if query is not None:
        near = _above(vector_scores(vectors, query, index), weights.least_similarity)
        rows = np.union1d(rows, np.array(near.best(SEARCH_SIZE, excluded=nobody), np.int32))
    scores = relevance[rows].copy()
    sources = np.where(by_words.at(rows) > 0, int(Source.LEXICAL), 0).astype(np.uint8)
    if query is not None:
        similarity = exact_scores(vectors, rows, query)
        scores += np.float32(weights.meaning) * similarity
        sources[similarity >= weights.least_similarity] |= int(Source.SEMANTIC)
    if customer is not None and weights.personal and len(rows):
        taste = exact_scores(vectors, rows, customer)
        scores += np.float32(weights.personal) * taste
        place = max(len(rows) // _SUITS, 1)
        sources[taste >= np.partition(taste, -place)[-place]] |= int(Source.VECTOR)
    order = np.lexsort((rows, -scores))[:SEARCH_SIZE]
    return Matches(rows[order], scores[order], sources[order])


def _above(scores: Scores, least: float) -> Scores:
    kept = scores.values >= np.float32(least)
    return Scores(scores.count, scores.rows[kept], scores.values[kept])
