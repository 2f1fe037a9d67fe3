"""The names a catalogue goes by, and where a text says them: items by the words of their titles, brands and categories by theirs."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from features.item_table import FloatArray, IntArray, ItemTable
from features.lexical import analyse
from server.understand.patterns import Span, overlap

# A title is named when what a text says of it is this share of what the title says, rare words weighing more.
ITEM_COVERAGE = 0.6
_ITEMS = 5  # named by one text at the most, the best covered ones
_CATEGORIES = 10  # that share a part of their path, such as a department's
_GAP = 3  # words between two words of one title at the most
_PIECES = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_UNSPACED = re.compile(r"[\u4e00-\u9fff]{2,}")
_ID = re.compile(r"[\w-]{3,128}")
_PATH = re.compile(r"\s*[/>|]\s*")


class Word(NamedTuple):
    """A term of a text and where the word it comes from stands."""

    term: str
    span: Span


class Named(NamedTuple):
    """A name that a text says.

    Attributes:
        span: from its first word to behind its last.
        value: the item id, brand or category, as the catalogue writes it.
        confidence: share of the name's weight that was said, in (0, 1].
    """

    span: Span
    value: str
    confidence: float


def words_of(text: str) -> list[Word]:
    """Returns the terms of a text as ``features.lexical`` reads them, and where they stand.

    The pieces of a run of letters that the analyser cuts (Chinese, "500ml") all stand where the run does, or where they are found
    in it.
    """
    found: list[Word] = []
    for match in _PIECES.finditer(text):
        at, folded = match.start(), match[0].casefold()
        for term in analyse(match[0]):
            place = folded.find(term) if len(folded) == len(match[0]) else -1
            span = (at + place, at + place + len(term)) if place >= 0 and not term.isascii() else match.span()
            found.append(Word(term, span))
    return found


class Names(NamedTuple):
    """Names of one kind, and what the catalogue calls what each of them means.

    Attributes:
        by_terms: by their terms.
        unspaced: those written in Chinese alone, of two characters at least, as they are written, the longest first.
    """

    by_terms: Mapping[tuple[str, ...], tuple[str, ...]]
    unspaced: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class CatalogueNames:
    """Of one index epoch.

    Attributes:
        ids: of n items.
        codes: of terms that titles have.
        starts, rows: the rows of term c are ``rows[starts[c]:starts[c + 1]]``, ascending.
        rarity: float32[terms], logarithm of n by how many titles have it, and of its own.
        weights: float32[n], the summed rarity of each title's terms.
        brands, categories: their names.
    """

    ids: tuple[str, ...]
    codes: Mapping[str, int]
    starts: IntArray
    rows: IntArray
    rarity: FloatArray
    weights: FloatArray
    brands: Names
    categories: Names

    @classmethod
    def of(cls, table: ItemTable) -> "CatalogueNames":
        """Reads the names of a table: 0.1 ms an item."""
        postings: dict[str, list[int]] = {}
        for row, title in enumerate(table.titles):
            for term in dict.fromkeys(analyse(title)):
                postings.setdefault(term, []).append(row)
        counts = np.array([len(rows) for rows in postings.values()], np.int32)
        rows = np.array([row for rows in postings.values() for row in rows], np.int32)
        rarity = np.log1p(len(table) / np.maximum(counts, 1)).astype(np.float32)
        weights = np.bincount(rows, np.repeat(rarity, counts), minlength=len(table)).astype(np.float32)
        return cls(
            ids=table.ids,
            codes={term: code for code, term in enumerate(postings)},
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            rows=rows,
            rarity=rarity,
            weights=weights,
            brands=_names((brand, brand) for brand in sorted(set(table.brand_names) - {""})),
            categories=_names((part, name) for name in sorted(set(table.category_names) - {""}) for part in (name, *_PATH.split(name))),
        )

    @cached_property
    def _id_words(self) -> dict[str, str]:
        """Item ids with a digit among them, as people write them: such a word is nothing else."""
        return {item.casefold(): item for item in self.ids if any(c.isdigit() for c in item) and any(c.isalpha() for c in item)}

    def items(self, text: str, words: Sequence[Word]) -> list[Named]:
        """Returns the items a text names: by their id, or by words of their title that stand near each other.

        Best first, then by row; of equally well named ones five, so "the red mug" names every red mug of that name.
        """
        ids = self._id_words
        named = [Named(match.span(), ids[match[0].casefold()], 1.0) for match in _ID.finditer(text) if match[0].casefold() in ids]
        said = [(word, self.codes[word.term]) for word in words if word.term in self.codes]
        distinct = sorted({code for _, code in said})
        if not distinct:
            return named
        rows = np.concatenate([self.rows[self.starts[code] : self.starts[code + 1]] for code in distinct])
        shares = np.repeat(self.rarity[distinct], [self.starts[code + 1] - self.starts[code] for code in distinct])
        candidates, places = np.unique(rows, return_inverse=True)
        coverage = np.bincount(places, shares) / self.weights[candidates]
        able = np.flatnonzero(coverage >= ITEM_COVERAGE)
        best = able[np.argsort(-coverage[able], kind="stable")][: _ITEMS * 4]
        named += [found for place in best.tolist() if (found := self._together(int(candidates[place]), words))]
        kept: list[Named] = []
        for one in sorted(named, key=lambda one: -one.confidence):
            if not any(_covers(better, one) for better in kept):
                kept.append(one)
        return kept[:_ITEMS]

    def _together(self, row: int, words: Sequence[Word]) -> Named | None:
        """Returns where the words of a title stand nearest to each other, if what stands there covers enough of it."""
        best: Named | None = None
        run: list[int] = []
        for place, word in enumerate(words):
            code = self.codes.get(word.term)
            if code is None or not self._has(code, row):
                continue
            if run and place - run[-1] > _GAP:
                run = []
            run.append(place)
            covered = sum(float(self.rarity[code]) for code in sorted({self.codes[words[at].term] for at in run}))
            share = min(covered / float(self.weights[row]), 1.0)
            if share >= ITEM_COVERAGE and (best is None or share > best.confidence):
                best = Named((words[run[0]].span[0], word.span[1]), self.ids[row], share)
        return best

    def _has(self, code: int, row: int) -> bool:
        rows = self.rows[self.starts[code] : self.starts[code + 1]]
        at = int(np.searchsorted(rows, row))
        return at < len(rows) and int(rows[at]) == row

    def brands_in(self, text: str, words: Sequence[Word]) -> list[Named]:
        """Returns the brands a text names, by all of their words in order; of overlapping names the longest."""
        return _spoken(text, words, self.brands)

    def categories_in(self, text: str, words: Sequence[Word]) -> list[Named]:
        """Returns the categories a text names, whole or by a part of their path; several where they share that part."""
        return _spoken(text, words, self.categories)


NO_NAMES = CatalogueNames(
    ids=(),
    codes={},
    starts=np.zeros(1, np.int32),
    rows=np.zeros(0, np.int32),
    rarity=np.zeros(0, np.float32),
    weights=np.zeros(0, np.float32),
    brands=Names({}, {}),
    categories=Names({}, {}),
)
"""Of a catalogue without items."""


def _covers(better: Named, one: Named) -> bool:
    """Returns whether a better named item leaves nothing of another: the same one, or the same words of a longer name."""
    within = better.span[0] <= one.span[0] and one.span[1] <= better.span[1]
    return better.value == one.value or (within and better.confidence > one.confidence)


def _names(names: Iterable[tuple[str, str]]) -> Names:
    by_terms: dict[tuple[str, ...], list[str]] = defaultdict(list)
    unspaced: dict[str, list[str]] = defaultdict(list)
    for said, value in names:
        terms = tuple(analyse(said))
        for found, key in ((by_terms, terms), *(((unspaced, said),) if _UNSPACED.fullmatch(said) else ())):
            if key and value not in found[key]:
                found[key].append(value)
    longest_first = sorted(unspaced, key=lambda name: (-len(name), name))
    return Names(
        {terms: tuple(values[:_CATEGORIES]) for terms, values in by_terms.items()},
        {name: tuple(unspaced[name][:_CATEGORIES]) for name in longest_first},
    )


def _spoken(text: str, words: Sequence[Word], names: Names) -> list[Named]:
    found = _spelt(words, names.by_terms)
    # Where words are cut depends on what stands beside them (绿田有什么), so that Chinese names are looked for as they are written.
    for name, values in names.unspaced.items():
        start = text.find(name)
        if start >= 0 and not any(overlap((start, start + len(name)), one.span) for one in found):
            found += [Named((start, start + len(name)), value, 1.0) for value in values]
    return found


def _spelt(words: Sequence[Word], names: Mapping[tuple[str, ...], tuple[str, ...]]) -> list[Named]:
    longest = max(map(len, names), default=0)
    terms, found, place = [word.term for word in words], [], 0
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            if values := names.get(tuple(terms[place : place + length])):
                span = (words[place].span[0], words[place + length - 1].span[1])
                found += [Named(span, value, 1.0) for value in values]
                place += length - 1
                break
        place += 1
    return found
