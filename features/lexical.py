"""Words of texts and BM25 over documents: what search, articles and entity linking mean by "these words occur there".

Shared by training and serving. Equal documents and queries give equal bits: every sum runs in the order of the query's terms.
"""

import re
import threading
import unicodedata
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import Stemmer
from rapidfuzz import process
from rapidfuzz.distance import OSA
from tokenizers import Regex, pre_tokenizers

from features.bm25_import import bm25s
from features.item_table import FloatArray

# Of scripts that put no space between words: Han, which a dictionary cuts, and those of which pairs of characters are indexed.
_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
_PARTS = re.compile(f"[{_HAN}]+|[{_UNSPACED}]+|\\d+|[^{_HAN}{_UNSPACED}\\d]+")
_HAS_HAN = re.compile(f"[{_HAN}]")
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
# Letters, digits and the marks that belong to them: Python's \w takes no vowel sign of Hindi or Thai for part of a word.
_WORDS = pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}\p{M}]+"), "removed")
# Dropped, not split at: accents and Arabic vowel signs, apostrophes (women's, l'oréal), soft hyphens, and what only directs layout.
_DROPPED = re.compile("[\u0300-\u036f\u064b-\u0652'\u2019\xad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_STEMMERS = threading.local()  # a stemmer is not safe to share between threads

# A word of up to 7 letters may differ by one edit from what it is taken for, a longer one by two; a shorter one is left alone.
_LEAST_LETTERS, _TWO_EDITS_FROM, _MOST_LETTERS = 4, 8, 32
# Words of a query that are looked up among misspelt ones: each compares itself with those of about its length, 1 ms of 100,000.
_MOST_CORRECTED = 8
_REMEMBERED = 4_096  # queries, at some 500 bytes each


def words(text: str, *, overlapping: bool = True) -> list[str]:
    """Returns the words of a text as they are compared: compatibility forms, case, accents and layout marks make no difference.

    Chinese is cut by a dictionary (jieba), Japanese kana, Thai, Lao, Khmer and Burmese into pairs of characters. Digits stand
    apart from letters: "500ml" and "500 ml" are the same two words.

    Args:
        text: any text.
        overlapping: whether a long Chinese word comes after the shorter ones in it, so that either is found; False: each
            character is in one word.
    """
    return _words(_plain(text), overlapping=overlapping)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", _DROPPED.sub("", unicodedata.normalize("NFKD", text).casefold()))


def _words(plain: str, *, overlapping: bool = True) -> list[str]:
    found: list[str] = []
    for piece, _ in _WORDS.pre_tokenize_str(plain):
        if piece.isascii() and piece.isalpha():
            found.append(piece)
        else:
            for part in _PARTS.findall(piece):
                found += _cut(part, overlapping=overlapping)
    return found


def analyse(text: str) -> list[str]:
    """Returns the terms of a text, in order: its words, those in Latin letters by their English (Snowball) stem."""
    return [_term(word) for word in words(text)]


class Field(NamedTuple):
    """One part of n documents: its text in each of them, and how many times an occurrence there counts."""

    texts: Sequence[str]
    weight: int = 1


class Correction(NamedTuple):
    """A query as its words were understood.

    Attributes:
        text: what was searched for instead, empty where every word was left as it is.
        terms: to search for.
    """

    text: str
    terms: list[str]


class LexicalIndex:
    """BM25 over n documents of several weighted fields (BM25F with one length for all of them). Safe to ask from many threads."""

    def __init__(self, fields: Sequence[Field], *, k1: float = 1.2, b: float = 0.75) -> None:
        """Builds the index.

        Args:
            fields: of the same n documents each.
            k1: how much it counts that a word stands there more than once; as Lucene has it by default, as is ``b``.
            b: how much a long document's words count less, 0 to 1.
        """
        numbers: dict[str, int] = {}
        seen: Counter[str] = Counter()
        documents: list[array[int]] = []
        for parts in zip(*(field.texts for field in fields), strict=True):
            document = array("i")
            for part, field in zip(parts, fields, strict=True):
                here = words(part)
                seen.update(here)
                # A word that counts three times is one that stands there three times: so BM25 takes fields by weight.
                document.extend([numbers.setdefault(_term(word), len(numbers)) for word in here] * field.weight)
            documents.append(document)
        self._count = len(documents)
        self._numbers = numbers
        self._postings = bm25s.BM25(k1=k1, b=b, method="lucene")
        if numbers:
            self._postings.index((documents, numbers), create_empty_token=False, show_progress=False)
            frequencies = np.diff(self._postings.scores["indptr"])
            self._rarity = np.log1p((self._count - frequencies + 0.5) / (frequencies + 0.5)).astype(np.float32)
        self._unknown = float(np.log1p((self._count + 0.5) / 0.5))
        self._by_length: dict[int, list[str]] = {}
        for word in sorted(seen):
            if _is_written_in_letters(word):
                self._by_length.setdefault(len(word), []).append(word)
        self._seen = seen

    def __len__(self) -> int:
        return self._count

    def __contains__(self, term: str) -> bool:
        """Says whether any document has the term."""
        return term in self._numbers

    def scores(self, terms: Sequence[str]) -> FloatArray:
        """Returns float32[n]: the BM25 score of each document, 0 where none of the terms occurs. A repeated term counts once."""
        known = [self._numbers[term] for term in dict.fromkeys(terms) if term in self._numbers]
        if not known:
            return np.zeros(self._count, np.float32)
        found: FloatArray = self._postings.get_scores_from_ids(known)
        return found

    def relevance(self, terms: Sequence[str]) -> FloatArray:
        """Returns float32[n], 0 to 1: the score as a share of the most that any document could have.

        A term weighs what it says (its inverse document frequency), and an unknown one as much as one of a single document: so it
        hangs on query and document alone, never on what else was found.
        """
        return self.scores(terms) / np.float32(max(self.most(terms), 1e-9))

    def most(self, terms: Sequence[str]) -> float:
        """Returns what the score of these terms stays below, whatever the document."""
        return sum(float(self._rarity[self._numbers[t]]) if t in self._numbers else self._unknown for t in dict.fromkeys(terms))

    @cached_property
    def corrected(self) -> Callable[[str], Correction]:
        """Reads a query; those asked for last are remembered: an answer asks again what its computation has asked.

        The index is known weakly there: held in a circle with its own memory, it would stay until Python looks for circles.
        """
        index = weakref.proxy(self)
        return lru_cache(_REMEMBERED)(lambda text: index.correct(text))

    def correct(self, text: str) -> Correction:
        """Reads a query; a word that no document has is taken for the nearest that some has, if one is near enough.

        Words of 4 to 7 letters may differ by one edit (a letter more, less or other, or two neighbours swapped), longer ones by two.
        Of equally near ones that with the same first letter, then the more frequent is taken. A word that is two known words
        written together is those. Shorter words, numbers and Chinese are left alone, as is what follows the first 8 unknown words.
        """
        plain = _plain(text)
        given = _words(plain)
        unknown = [word for word in dict.fromkeys(given) if _term(word) not in self._numbers and _is_written_in_letters(word)]
        meant = {word: taken for word in unknown[:_MOST_CORRECTED] if (taken := self._taken_for(word)) != [word]}
        for word, taken in meant.items():
            plain = re.sub(rf"(?<![^\W\d_]){word}(?![^\W\d_])", " ".join(taken), plain)
        understood = [known for word in given for known in meant.get(word, [word])]
        return Correction(" ".join(plain.split()) if meant else "", [_term(word) for word in understood])

    def _taken_for(self, word: str) -> list[str]:
        if near := self._nearest(word, 1):
            return [near]
        if both := self._two_words(word):
            return both
        near = self._nearest(word, 2) if len(word) >= _TWO_EDITS_FROM else ""
        return [near or word]

    def _nearest(self, word: str, edits: int) -> str:
        found: list[tuple[float, bool, int, str]] = []
        for length in range(len(word) - edits, len(word) + edits + 1):
            near = process.extract(word, self._by_length.get(length, ()), scorer=OSA.distance, score_cutoff=edits, limit=None)
            found += [(distance, known[0] != word[0], -self._seen[known], known) for known, distance, _ in near]
        return min(found)[3] if found else ""

    def _two_words(self, word: str) -> list[str]:
        splits = [(word[:k], word[k:]) for k in range(3, len(word) - 2)]
        known = [(min(self._seen[a], self._seen[b]), a, b) for a, b in splits if self._seen[a] and self._seen[b]]
        return list(max(known)[1:]) if known else []


def _is_written_in_letters(word: str) -> bool:
    """True for what can be misspelt by a letter, and is long enough to be told apart all the same."""
    return _LEAST_LETTERS <= len(word) <= _MOST_LETTERS and word.isalpha() and not _HAS_HAN.match(word)


def _cut(part: str, *, overlapping: bool) -> Iterator[str]:
    if _HAS_HAN.match(part):
        import rjieba  # here: 32 MB of dictionary that a shop without Chinese never loads

        yield from rjieba.cut_for_search(part) if overlapping else rjieba.cut(part)
    elif len(part) > 1 and _IS_UNSPACED.match(part):
        yield from (part[k : k + 2] for k in range(len(part) - 1))
    else:
        yield part


@lru_cache(maxsize=65_536)
def _term(word: str) -> str:
    """Remembered: a catalogue repeats its words, and a stem takes 0.5 µs."""
    if not word.isascii() or not word.isalpha():
        return word
    stemmer = getattr(_STEMMERS, "english", None)
    if stemmer is None:
        stemmer = _STEMMERS.english = Stemmer.Stemmer("english", 0)
    return str(stemmer.stemWord(word))
