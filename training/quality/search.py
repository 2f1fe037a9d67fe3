"""Known-item search over Amazon Beauty's titles: words, meaning, and both together, with and without the customer.

The set has no queries, so they are made of titles, each with the title's item as its one right answer: two to four of its words in
another order, without its first word (mostly the brand), with a typo, or with a word said otherwise. They are weak: nobody typed
them, and another item is often as right. What they can show is which way of searching finds a thing again.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from features.item_table import FloatArray
from features.lexical import Field, LexicalIndex, words
from features.search import Matches, SearchWeights, find_matches
from training.encode import pretrained_vectors
from training.metrics import ndcg, recall
from training.quality.next_item import load
from training.quality.result import QualityResult

KINDS = ("words", "no_brand", "typo", "synonym")
# Words for other words, in both directions where the set has both. Written down before anything was measured.
SYNONYMS = {
    "acne": "pimple",
    "aging": "wrinkle",
    "blush": "rouge",
    "clipper": "trimmer",
    "cologne": "perfume",
    "cosmetic": "makeup",
    "creme": "cream",
    "cleanser": "wash",
    "deodorant": "antiperspirant",
    "dryer": "blowdryer",
    "exfoliating": "peeling",
    "extensions": "weave",
    "eyeliner": "eye pencil",
    "eyeshadow": "eye makeup",
    "face": "facial",
    "facial": "face",
    "fragrance": "scent",
    "hydrating": "moisturizing",
    "kit": "set",
    "lacquer": "polish",
    "lipstick": "lip color",
    "lotion": "cream",
    "makeup": "cosmetics",
    "masque": "mask",
    "men": "male",
    "moisturizer": "lotion",
    "moisturizing": "hydrating",
    "natural": "organic",
    "organic": "natural",
    "parfum": "perfume",
    "perfume": "fragrance",
    "razor": "shaver",
    "repair": "restoring",
    "scrub": "exfoliator",
    "serum": "concentrate",
    "set": "kit",
    "shaver": "razor",
    "straightener": "flat iron",
    "sunscreen": "sunblock",
    "toilette": "cologne",
    "travel": "portable",
    "tweezers": "hair plucker",
    "whitening": "brightening",
    "wig": "hairpiece",
    "women": "ladies",
    "wrinkle": "aging",
}
_FILLERS = frozenset(["the", "and", "for", "with", "of", "in", "a", "an", "to", "by", "oz", "ounce", "ounces", "fl", "fluid", "ml", "pack"])
_QUERIES, _CUSTOMERS, _RECENT, _SHOWN = 4_000, 2_000, 10, 10
_MEANINGS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_PERSONALS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Query:
    """A query whose one right answer is the item ``row``; ``history`` are items its customer has, the newest last."""

    text: str
    kind: str
    row: int
    history: tuple[int, ...] = ()


def known_item_query(title: str, kind: str, rng: random.Random) -> str:
    """Returns a query of a kind for a title, empty where the title does not hold enough for one."""
    said = [word for word in dict.fromkeys(words(title)) if len(word) > 1 and word not in _FILLERS and not word.isdigit()]
    known = said[1:] if kind == "no_brand" else said
    if len(known) < 3:
        return ""
    chosen = rng.sample(known, rng.randint(2, min(4, len(known))))
    if kind == "typo":
        return _misspelt(chosen, rng)
    if kind == "synonym":
        return _said_otherwise(chosen, known, rng)
    return " ".join(chosen)


def _misspelt(chosen: list[str], rng: random.Random) -> str:
    long = [place for place, word in enumerate(chosen) if len(word) >= 5 and word.isascii() and word.isalpha()]
    if not long:
        return ""
    place = rng.choice(long)
    word = chosen[place]
    at = rng.randrange(1, len(word) - 1)
    chosen[place] = rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + rng.choice(_LETTERS) + word[at + 1 :],
        )
    )
    return " ".join(chosen)


def _said_otherwise(chosen: list[str], known: Sequence[str], rng: random.Random) -> str:
    can = [word for word in known if word in SYNONYMS and not set(SYNONYMS[word].split()) & set(known)]
    if not can:
        return ""
    word = rng.choice(can)
    kept = [other for other in chosen if other != word][:3]
    return " ".join([*kept, SYNONYMS[word]])


def known_item_queries(titles: Sequence[str], count: int, rng: random.Random) -> list[Query]:
    """Returns ``count`` queries about random items, as many of each kind."""
    found: list[Query] = []
    while len(found) < count:
        kind, row = KINDS[len(found) % len(KINDS)], rng.randrange(len(titles))
        if text := known_item_query(titles[row], kind, rng):
            found.append(Query(text, kind, row))
    return found


def customers_queries(titles: Sequence[str], histories: Sequence[Sequence[int]], count: int, rng: random.Random) -> list[Query]:
    """Returns queries of customers for the last item they bought: one or two of its words, which many items have."""
    found: list[Query] = []
    for place in rng.sample(range(len(histories)), len(histories)):
        *before, row = histories[place]
        said = [word for word in dict.fromkeys(words(titles[row])) if len(word) > 2 and word not in _FILLERS and not word.isdigit()]
        if len(said) >= 3 and before:
            found.append(Query(" ".join(rng.sample(said[1:], rng.randint(1, 2))), "customer", row, tuple(before[-_RECENT:])))
        if len(found) == count:
            break
    return found


class Engine:
    """Searches titles by words and by a pretrained encoder, with the scoring that the server uses."""

    def __init__(self, titles: Sequence[str], vectors: FloatArray) -> None:
        self.lexical = LexicalIndex([Field(titles)], k1=0.3, b=0.5)
        self._vectors = vectors

    def relevance(self, query: Query) -> FloatArray:
        """Returns float32[n] of the words the query was taken for."""
        return self.lexical.relevance(self.lexical.corrected(query.text).terms)

    def find(self, relevance: FloatArray, vector: FloatArray | None, *, query: Query, weights: SearchWeights) -> Matches:
        """Finds items; the customer's vector is the mean of those of what they have."""
        customer = self._vectors[list(query.history)].mean(axis=0) if query.history else None
        if customer is not None:
            customer = (customer / max(float(np.linalg.norm(customer)), 1e-9)).astype(np.float32)
        return find_matches(relevance, self._vectors, query=vector, customer=customer, index=None, weights=weights)


def run(data: Path, *, seed: int, items: int = 0, queries: int = _QUERIES, customers: int = _CUSTOMERS) -> QualityResult:
    """Measures searches; constants are compared on one half of the queries and those that the server has reported on the other.

    Args:
        data: folder of the set.
        seed: of the queries.
        items: search only the first so many; 0: all.
        queries: queries without a customer.
        customers: queries with one.
    """
    started = time.perf_counter()
    shop = load(data)
    titles = shop.titles[: items or len(shop.titles)]
    rng = random.Random(seed)
    asked = known_item_queries(titles, queries, rng)
    histories = [rows.tolist() for rows in shop.rows if rows.max() < len(titles)]
    asked += customers_queries(titles, histories, customers, rng)
    engine = Engine(titles, pretrained_vectors(titles))
    vectors = pretrained_vectors([engine.lexical.corrected(query.text).text or query.text for query in asked], tokens=32)
    known, personal = list(range(queries)), list(range(queries, len(asked)))
    tuned, tested = known[: queries // 2], known[queries // 2 :]
    tuned_personal, tested_personal = personal[: len(personal) // 2], personal[len(personal) // 2 :]
    judge = _Judge(engine, asked, vectors)
    served = SearchWeights()
    tried = {str(w): judge.means(tuned, weights=replace(served, meaning=w)) for w in _MEANINGS}
    tasted = {str(w): judge.means(tuned_personal, weights=replace(served, personal=w)) for w in _PERSONALS}
    ways = {
        "lexical": judge.means(tested, weights=served, read=False),
        "semantic": judge.means(tested, weights=served, lexical=False),
        "fused": judge.means(tested, weights=served),
        "impersonal": judge.means(tested_personal, weights=replace(served, personal=0.0)),
        "personal": judge.means(tested_personal, weights=served),
    }
    by_kind = {
        kind: {
            "lexical": judge.means([k for k in tested if asked[k].kind == kind], weights=served, read=False),
            "semantic": judge.means([k for k in tested if asked[k].kind == kind], weights=served, lexical=False),
            "fused": judge.means([k for k in tested if asked[k].kind == kind], weights=served),
        }
        for kind in KINDS
    }
    return QualityResult(
        rankings={asked[k].text: [shop.items[row] for row in judge.ranked(k, weights=served)[:20]] for k in tested},
        validation={f"{measure}_meaning_{weight}": value for weight, means in tried.items() for measure, value in means.items()},
        details={
            "weights": asdict(served),
            "queries": len(asked),
            "examples": {kind: [query.text for query in asked if query.kind == kind][:5] for kind in (*KINDS, "customer")},
            "validation_meaning": tried,
            "validation_personal": tasted,
            "test_by_kind": by_kind,
            "test": {f"{way}_{measure}": value for way, means in ways.items() for measure, value in means.items()},
        },
        seconds=time.perf_counter() - started,
    )


class _Judge:
    """Ranks queries and averages how early their item comes."""

    def __init__(self, engine: Engine, asked: Sequence[Query], vectors: FloatArray) -> None:
        self._engine = engine
        self._asked = asked
        self._vectors = vectors
        self._relevance = [engine.relevance(query) for query in asked]

    def ranked(self, place: int, *, weights: SearchWeights, read: bool = True, lexical: bool = True) -> list[int]:
        """Returns the rows found for a query; not ``read``: by its words alone, not ``lexical``: by its meaning alone."""
        relevance = self._relevance[place] if lexical else np.zeros_like(self._relevance[place])
        found = self._engine.find(relevance, self._vectors[place] if read else None, query=self._asked[place], weights=weights)
        return [int(row) for row in found.rows]

    def means(self, places: Sequence[int], *, weights: SearchWeights, read: bool = True, lexical: bool = True) -> dict[str, float]:
        """Returns recall@10 and NDCG@10; of one right answer the former is the share of queries that find it."""
        scores = []
        for place in places:
            ranked, wanted = self.ranked(place, weights=weights, read=read, lexical=lexical), {self._asked[place].row}
            scores.append((recall(ranked, wanted, _SHOWN), ndcg(ranked, wanted, _SHOWN)))
        found = np.mean(scores, axis=0) if scores else np.zeros(2)
        return {"recall_at_10": float(found[0]), "ndcg_at_10": float(found[1])}
