"""Known-item search by words, by meaning and by both, with and without the customer, on two sets that have no queries of their own.

- ``titles``: Amazon Beauty's titles, and queries made of them: two to four words of a title in another order, without its first word
  (mostly the brand), with a typo, or with a word said otherwise.
- ``reviews``: what customers wrote of clothes. An item is its class and some of its reviews; the query is the title and the first
  sentence of a review of it that was held out: other people's words.

Both are weak: nobody typed them, and another item is often as right as the one that counts. What they can show is which way of
searching finds a thing again.
"""

import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from features.item_table import FloatArray
from features.lexical import Field, LexicalIndex, words
from features.search import SearchWeights, find_matches
from training.encode import pretrained_vectors
from training.metrics import ndcg, recall
from training.quality.next_item import load
from training.quality.result import QualityResult

REVIEWS = "womens_clothing_reviews.parquet"
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
_FILLERS = frozenset(("the", "and", "for", "with", "of", "in", "a", "an", "to", "by", "oz", "ounce", "ounces", "fl", "fluid", "ml", "pack"))
_QUERIES, _CUSTOMERS, _RECENT, _SHOWN = 3_000, 1_500, 10, 10
_HELD_OUT, _KEPT_TITLES, _KEPT_TEXTS, _TEXT_CHARS, _QUERY_WORDS = 2, 12, 4, 120, 25
_MEANINGS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
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
    said = _said(title)
    known = said[1:] if kind == "no_brand" else said
    if len(known) < 3:
        return ""
    chosen = rng.sample(known, rng.randint(2, min(4, len(known))))
    if kind == "typo":
        return _misspelt(chosen, rng)
    if kind == "synonym":
        return _said_otherwise(chosen, known, rng)
    return " ".join(chosen)


def _said(title: str) -> list[str]:
    """Returns what a title says, each word once: no fillers, letters or numbers."""
    return [word for word in dict.fromkeys(words(title)) if len(word) > 1 and word not in _FILLERS and not word.isdigit()]


def _misspelt(chosen: list[str], rng: random.Random) -> str:
    long = [place for place, word in enumerate(chosen) if len(word) >= 5 and word.isascii() and word.isalpha()]
    if not long:
        return ""
    place = rng.choice(long)
    word = chosen[place]
    at = rng.randrange(1, len(word) - 1)
    left_out, swapped = word[:at] + word[at + 1 :], word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    chosen[place] = rng.choice((left_out, swapped, word[:at] + rng.choice(_LETTERS) + word[at + 1 :]))
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
        said = _said(titles[row])
        if len(said) >= 3 and before:
            found.append(Query(" ".join(rng.sample(said[1:], rng.randint(1, 2))), "customer", row, tuple(before[-_RECENT:])))
        if len(found) == count:
            break
    return found


def reviewed_items(reviews: pd.DataFrame, rng: random.Random) -> tuple[list[str], list[Query]]:
    """Returns a text for each item with four reviews or more, and a query for each review that is not in it."""
    texts: list[str] = []
    asked: list[Query] = []
    for _, rows in reviews[reviews["Review Text"].fillna("").str.len() > 0].groupby("Clothing ID"):
        if len(rows) < 2 + _HELD_OUT:
            continue
        order = rng.sample(range(len(rows)), len(rows))
        titles, said = rows["Title"].fillna("").tolist(), rows["Review Text"].tolist()
        held, kept = order[:_HELD_OUT], order[_HELD_OUT:]
        asked += [Query(_query_of(titles[k], said[k]), "review", len(texts)) for k in held]
        parts = [str(rows["Class Name"].iloc[0]), *(titles[k] for k in kept[:_KEPT_TITLES])]
        texts.append(". ".join(part for part in [*parts, *(said[k][:_TEXT_CHARS] for k in kept[:_KEPT_TEXTS])] if part))
    rng.shuffle(asked)
    return texts, asked


def _query_of(title: str, text: str) -> str:
    sentence = re.split(r"(?<=[.!?])\s+|\r?\n", text.strip())[0]
    return " ".join(f"{title} {sentence}".split()[:_QUERY_WORDS])


class Bench:
    """Searches texts for queries by a pretrained encoder and the scoring that the server uses, and averages how early items come."""

    def __init__(self, texts: Sequence[str], asked: Sequence[Query], *, tokens: int) -> None:
        """Reads and encodes everything once; ``tokens`` of each text."""
        self._asked = asked
        lexical = LexicalIndex([Field(texts)], k1=0.3, b=0.5)
        meant = [lexical.correct(query.text) for query in asked]
        self._relevance = [lexical.relevance(one.terms) for one in meant]
        self._items = pretrained_vectors(texts, tokens=tokens)
        self._queries = pretrained_vectors([one.text or query.text for one, query in zip(meant, asked, strict=True)], tokens=48)

    def ranked(self, place: int, *, weights: SearchWeights, read: bool = True, lexical: bool = True) -> list[int]:
        """Returns the rows found for a query; not ``read``: by its words alone, not ``lexical``: by its meaning alone."""
        relevance = self._relevance[place] if lexical else np.zeros_like(self._relevance[place])
        history = list(self._asked[place].history)
        found = find_matches(
            relevance,
            self._items,
            query=self._queries[place] if read else None,
            customer=_unit(self._items[history].mean(axis=0)) if history else None,
            index=None,
            weights=weights,
        )
        return [int(row) for row in found.rows]

    def means(self, places: Sequence[int], *, weights: SearchWeights, read: bool = True, lexical: bool = True) -> dict[str, float]:
        """Returns recall@10 and NDCG@10; of one right answer the former is the share of queries that find it."""
        scores = []
        for place in places:
            ranked, wanted = self.ranked(place, weights=weights, read=read, lexical=lexical), {self._asked[place].row}
            scores.append((recall(ranked, wanted, _SHOWN), ndcg(ranked, wanted, _SHOWN)))
        found = np.mean(scores, axis=0) if scores else np.zeros(2)
        return {"recall_at_10": float(found[0]), "ndcg_at_10": float(found[1])}

    def ways(self, places: Sequence[int], weights: SearchWeights) -> dict[str, dict[str, float]]:
        """Returns the means of each way of searching."""
        return {
            "lexical": self.means(places, weights=weights, read=False),
            "semantic": self.means(places, weights=weights, lexical=False),
            "fused": self.means(places, weights=weights),
        }


def run(
    data: Path, *, seed: int, items: int = 0, queries: int = _QUERIES, customers: int = _CUSTOMERS, weights: SearchWeights | None = None
) -> QualityResult:
    """Measures searches with the server's constants on half of the queries; on the other half constants were compared.

    Args:
        data: folder of the sets.
        seed: of the queries.
        items: search only the first so many titles and reviewed items; 0: all.
        queries: queries made of titles.
        customers: queries with a customer.
        weights: other constants than the server's.

    Raises:
        FileNotFoundError: a file of the sets is not in the folder.
    """
    started = time.perf_counter()
    served = weights or SearchWeights()
    if not (data / REVIEWS).is_file():
        raise FileNotFoundError(f"{REVIEWS} is not in {data}")
    shop = load(data)
    titles = shop.titles[: items or len(shop.titles)]
    rng = random.Random(seed)
    made = known_item_queries(titles, queries, rng)
    personal = customers_queries(titles, [rows.tolist() for rows in shop.rows if rows.max() < len(titles)], customers, rng)
    written, reviewed = reviewed_items(pd.read_parquet(data / REVIEWS), rng)
    written = written[: items or len(written)]
    reviewed = [query for query in reviewed if query.row < len(written)]
    by_title, by_review = Bench(titles, [*made, *personal], tokens=64), Bench(written, reviewed, tokens=128)
    sets = {"titles": (by_title, range(len(made))), "reviews": (by_review, range(len(reviewed)))}
    with_customer = range(len(made), len(made) + len(personal))
    tried = {
        name: {str(w): bench.means(_first(asked), weights=replace(served, meaning=w)) for w in _MEANINGS}
        for name, (bench, asked) in sets.items()
    }
    tasted = {str(w): by_title.means(_first(with_customer), weights=replace(served, personal=w)) for w in _PERSONALS}
    found = {name: bench.ways(_second(asked), served) for name, (bench, asked) in sets.items()}
    taste = {
        "impersonal": by_title.means(_second(with_customer), weights=replace(served, personal=0.0)),
        "personal": by_title.means(_second(with_customer), weights=served),
    }
    kinds = {kind: by_title.ways([k for k in _second(range(len(made))) if made[k].kind == kind], served) for kind in KINDS}
    return QualityResult(
        rankings={made[k].text: [shop.items[row] for row in by_title.ranked(k, weights=served)[:20]] for k in _second(range(len(made)))},
        validation={},
        details={
            "weights": asdict(served),
            "queries": {"titles": len(made), "reviews": len(reviewed), "customers": len(personal)},
            "examples": {query.kind: query.text for query in (*made[: len(KINDS)], *personal[:1], *reviewed[:1])},
            "validation_by_meaning_weight": tried,
            "validation_by_personal_weight": tasted,
            "test_by_kind_of_title_query": kinds,
            "test": {
                **_flat("", _average(list(found.values()))),
                **{key: value for name, ways in found.items() for key, value in _flat(f"{name}_", ways).items()},
                **_flat("", taste),
            },
        },
        seconds=time.perf_counter() - started,
    )


def _first(places: range) -> range:
    return places[: len(places) // 2]


def _second(places: range) -> range:
    return places[len(places) // 2 :]


def _unit(vector: FloatArray) -> FloatArray:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-9), np.float32)


def _average(sets: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Returns the mean over the sets, each counting once."""
    return {
        way: {measure: float(np.mean([found[way][measure] for found in sets])) for measure in measures} for way, measures in sets[0].items()
    }


def _flat(prefix: str, ways: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{prefix}{way}_{measure}": value for way, measures in ways.items() for measure, value in measures.items()}
