"""How a text that somebody is typing may go on: phrases of titles, categories and brands, each with the items that have it."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rapidfuzz import process
from rapidfuzz.distance import OSA

from features.bm25_import import bm25s
from features.item_table import IntArray, ItemTable
from features.lexical import words

_PHRASE_WORDS = 3  # phrases of titles have up to three words
_LEAST_ITEMS = 2  # and stand in at least two of them: what is in one alone is found by its first words
_LEAST_TYPED = 4  # letters of a word, from which on one of them may be wrong
_LAST = "\U0010ffff"
_FILLERS = frozenset(bm25s.stopwords.STOPWORDS_EN)


class CompletionKind(Enum):
    """What a completion is."""

    PHRASE = "phrase"
    CATEGORY = "category"
    BRAND = "brand"


class Completion(NamedTuple):
    """One way to go on: the whole text to search for, and what it is."""

    text: str
    kind: CompletionKind


class _Found(NamedTuple):
    """Completions of a kind: the key of each, which is its words, and the rows of the items that have it, one after the other."""

    keys: list[str]
    completions: list[Completion]
    counts: IntArray
    rows: IntArray


class Completions:
    """Completions of one epoch's items, the most popular first. Equal tables give equal ones; safe to ask from many threads."""

    def __init__(self, table: ItemTable) -> None:
        """Collects phrases of up to three words that two titles have, and every category and brand."""
        names = [_names(table.category_names, CompletionKind.CATEGORY), _names(table.brand_names, CompletionKind.BRAND)]
        found = [*names, *_phrases(table.titles, {key for one in names for key in one.keys})]
        keys = [key for one in found for key in one.keys]
        completions = [completion for one in found for completion in one.completions]
        order = sorted(range(len(keys)), key=lambda k: (keys[k], completions[k].kind.value, completions[k].text))
        self._keys = [keys[k] for k in order]
        self._completions = [completions[k] for k in order]
        counts = np.concatenate([one.counts for one in found]).astype(np.int64)
        before, counts = np.cumsum(counts) - counts, counts[order]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        places = np.repeat(before[order] - self._starts[:-1], counts) + np.arange(self._starts[-1])
        self._rows = np.concatenate([one.rows for one in found])[places]
        # An item counts once, and more the more popular it is. Summed in order, in float64: equal on any processor.
        owner = np.repeat(np.arange(len(keys)), counts)
        self._weights = np.bincount(owner, weights=1.0 + table.popularity_score[self._rows], minlength=len(keys))
        self._words = sorted({word for key in self._keys for word in key.split(" ")})
        self._is_phrase = np.array([completion.kind is CompletionKind.PHRASE for completion in self._completions], np.bool_)
        self._categories = [k for k, completion in enumerate(self._completions) if completion.kind is CompletionKind.CATEGORY]
        self._beginnings: dict[int, list[str]] = {}

    def complete(self, prefix: str, limit: int, offered: Callable[[int], bool]) -> list[Completion]:
        """Returns up to ``limit`` ways to go on from a prefix.

        Where too few go on from the whole, the last words of it do, after what stands before them; where nothing does, its last
        word is taken for one that differs by a letter. A prefix without a word goes on to the categories.

        Args:
            prefix: what has been typed.
            limit: completions at the most.
            offered: says whether the item of a row may be shown; a completion needs one that may.
        """
        typed = words(prefix, overlapping=False)
        if not typed:
            return self._best(np.array(self._categories, np.int64), limit, offered)
        found = self._after(typed, limit, offered)
        if not found:
            for meant in self._meant(typed[-1]):
                found += self._after([*typed[:-1], meant], limit - len(found), offered)
        return found[:limit]

    def _after(self, typed: Sequence[str], limit: int, offered: Callable[[int], bool]) -> list[Completion]:
        """Completes all words typed, then all but the first, and so on; words before them stay, and must be words of a phrase."""
        found: dict[Completion, None] = {}
        for start in range(len(typed)):
            head, key = typed[:start], " ".join(typed[start:])
            if len(found) >= limit or not all(map(self._is_word, head)):
                break
            places = np.arange(bisect_left(self._keys, key), bisect_right(self._keys, key + _LAST))
            if head:  # a phrase may follow other words; a category or brand stands by itself
                places = places[self._is_phrase[places]]
            for completion in self._best(places, limit, offered):
                text = _joined([*head, completion.text]) if head else completion.text
                found.setdefault(Completion(text, completion.kind))
        return list(found)[:limit]

    def _best(self, places: npt.NDArray[np.int64], limit: int, offered: Callable[[int], bool]) -> list[Completion]:
        chosen: list[Completion] = []
        for place in places[np.argsort(-self._weights[places], kind="stable")].tolist():
            if len(chosen) >= limit:
                break
            if any(map(offered, self._rows[self._starts[place] : self._starts[place + 1]].tolist())):
                chosen.append(self._completions[place])
        return chosen

    def _is_word(self, word: str) -> bool:
        place = bisect_left(self._words, word)
        return place < len(self._words) and self._words[place] == word

    def _meant(self, typed: str) -> list[str]:
        """Returns beginnings of words that differ from what was typed by one edit, those with the same first letter first."""
        if len(typed) < _LEAST_TYPED or not typed.isalpha():
            return []
        near = process.extract(typed, self._beginnings_of(len(typed)), scorer=OSA.distance, score_cutoff=1, limit=None)
        return [meant for _, meant in sorted((meant[0] != typed[0], meant) for meant, _, _ in near)]

    def _beginnings_of(self, length: int) -> list[str]:
        known = self._beginnings.get(length)
        if known is None:
            known = self._beginnings[length] = sorted({word[:length] for word in self._words if len(word) >= length and word.isalpha()})
        return known


def _joined(parts: Sequence[str]) -> str:
    """Joins words as they are written: with a space, but none between two Chinese ones."""
    text = parts[0]
    for before, after in pairwise(parts):
        text += after if _is_wide(before[-1]) and _is_wide(after[0]) else f" {after}"
    return text


def _is_wide(character: str) -> bool:
    return character >= "\u2e80"


def _names(names: Sequence[str], kind: CompletionKind) -> _Found:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    keyed = [(key, name) for name in sorted(rows) if (key := " ".join(words(name, overlapping=False)))]
    listed = [rows[name] for _, name in keyed]
    counts = np.array([len(one) for one in listed], np.int32)
    return _Found([key for key, _ in keyed], [Completion(name, kind) for _, name in keyed], counts, _flat(listed))


def _flat(listed: Sequence[Sequence[int]]) -> IntArray:
    return np.array([row for one in listed for row in one], np.int32)


def _phrases(titles: Sequence[str], named: Collection[str]) -> list[_Found]:
    """Counts runs of words as whole numbers: of 100,000 titles as tuples of texts they would take 500 MB.

    Args:
        titles: of the items.
        named: keys that are those of a name already.
    """
    number: dict[str, int] = {}
    said, lengths = array("q"), array("q")
    for title in titles:
        here = words(title, overlapping=False)
        said.extend(number.setdefault(word, len(number) + 1) for word in here)
        said.append(0)  # stands between titles, and at the end as often as a phrase may look ahead: no phrase crosses it
        lengths.append(len(here) + 1)
    said.extend([0] * _PHRASE_WORDS)
    vocabulary = list(number)
    flat, owner = np.array(said, np.int64), np.repeat(np.arange(len(titles), dtype=np.int32), np.array(lengths, np.int64))
    code, whole = np.zeros(len(owner), np.int64), np.ones(len(owner), np.bool_)
    found: list[_Found] = []
    for length in range(1, _PHRASE_WORDS + 1):
        following = flat[length - 1 : length - 1 + len(owner)]
        whole &= following > 0
        code = code * (len(vocabulary) + 1) + following
        found.append(_frequent(code[whole], owner[whole], vocabulary, length=length, named=named))
    return found


def _frequent(code: npt.NDArray[np.int64], owner: IntArray, vocabulary: Sequence[str], *, length: int, named: Collection[str]) -> _Found:
    order = np.lexsort((owner, code))
    code, owner = code[order], owner[order]
    fresh = np.ones(len(code), np.bool_)
    fresh[1:] = (code[1:] != code[:-1]) | (owner[1:] != owner[:-1])  # a title that says it twice counts once
    codes, counts = np.unique(code[fresh], return_counts=True)
    keys: list[str] = []
    completions: list[Completion] = []
    kept = np.zeros(len(codes), np.bool_)
    for k in np.flatnonzero(counts >= _LEAST_ITEMS).tolist():
        phrase = [vocabulary[digit - 1] for digit in _digits(int(codes[k]), len(vocabulary) + 1, length)]
        key = " ".join(phrase)
        if _is_worth_it(phrase) and key not in named:
            text = _joined(phrase)
            kept[k] = True
            keys.append(key)
            completions.append(Completion(key if text == key else text, CompletionKind.PHRASE))
    return _Found(keys, completions, counts[kept].astype(np.int32), owner[fresh][np.repeat(kept, counts)])


def _digits(code: int, base: int, length: int) -> list[int]:
    digits = []
    for _ in range(length):
        code, digit = divmod(code, base)
        digits.append(digit)
    return digits[::-1]


def _is_worth_it(phrase: Sequence[str]) -> bool:
    """A phrase begins and ends with more than a letter, a number or a filler: not "of 12", not "shampoo for"."""
    ends = (phrase[0], phrase[-1])
    return all(len(word) > 1 + word.isascii() and not word.isdigit() and word not in _FILLERS for word in ends)
