"""Labelled utterances: read from a file, told apart by wording, thinned out to different ones, and worded otherwise."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans

from features.item_table import FloatArray

OUT_OF_SCOPE = "out_of_scope"
"""The intent of an utterance that is none of the others' business."""

GROUPS = 5  # of wording, of each intent
_LEAST = 2 * GROUPS  # utterances of an intent that can be divided by wording
_TEXT_COLUMNS = ("text", "utterance", "query", "message", "question")
_INTENT_COLUMNS = ("intent", "label")
_PLACEHOLDER = re.compile(r"\{\{\s*([^{}]{1,64}?)\s*\}\}")
_FILLINGS = {"order": "#{number}", "invoice": "#{number}", "amount": "${price}", "price": "${price}", "refund": "${price}"}
_NEIGHBOURS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


class UtteranceError(Exception):
    """A file of utterances cannot be learned from; the message says why."""


@dataclass(frozen=True)
class Utterances:
    """n texts with the intent of each."""

    texts: tuple[str, ...]
    intents: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def of(self, rows: Sequence[int]) -> "Utterances":
        """Returns some of them."""
        return Utterances(tuple(self.texts[row] for row in rows), tuple(self.intents[row] for row in rows))


def read_utterances(path: Path) -> Utterances:
    """Reads a Parquet, CSV or JSON-lines file with a text and an intent in each row; rows without either are left out.

    The columns are called ``text`` (or utterance, query, message, question) and ``intent`` (or label). Equal texts but for their case
    count once.

    Raises:
        UtteranceError: there is no such column, or nothing to learn from: fewer than two intents.
        FileNotFoundError: there is no such file.
    """
    frame = _frame(path)
    texts, intents = (_column(frame, names, path) for names in (_TEXT_COLUMNS, _INTENT_COLUMNS))
    known: dict[str, tuple[str, str]] = {}
    for text, intent in zip(texts, intents, strict=True):
        if text and intent:
            known.setdefault(text.casefold(), (text, intent))
    found = Utterances(*(tuple(part) for part in zip(*known.values(), strict=True))) if known else Utterances((), ())
    if len(set(found.intents) - {OUT_OF_SCOPE}) < 2:
        raise UtteranceError(f"{path.name} holds utterances of fewer than two intents")
    return found


def read_texts(path: Path) -> list[str]:
    """Reads the texts of such a file, whatever its intents; each once.

    Raises:
        UtteranceError: it has no column of texts.
        FileNotFoundError: there is no such file.
    """
    return list(dict.fromkeys(filter(None, _column(_frame(path), _TEXT_COLUMNS, path))))


def _frame(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        if path.suffix in (".parquet", ".pq"):
            return pd.read_parquet(path)
        if path.suffix in (".jsonl", ".ndjson"):
            return pd.read_json(path, lines=True, dtype=False)
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise UtteranceError(f"{path.name} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def _column(frame: pd.DataFrame, names: Sequence[str], path: Path) -> list[str]:
    name = next((name for name in names if name in frame.columns), None)
    if name is None:
        raise UtteranceError(f"{path.name} has no column {' or '.join(names)}")
    return [" ".join(value.split()) if isinstance(value, str) else "" for value in frame[name]]


def name_texts(label: str) -> list[str]:
    """Returns an intent's name as people would say it: ``track_order`` is "track order", "I want to track order" and so on."""
    words = " ".join(re.split(r"[_\W]+", label)).strip()
    return [words, f"I want to {words}", f"how can I {words}?", f"help me {words}", f"can you {words} for me?"]


def wording_groups(vectors: FloatArray, answers: Sequence[int], *, seed: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Divides each label's texts by wording, so that what is held out is worded unlike what is learned.

    A random part of templated utterances is no test: TF-IDF has 0.996 on one and 0.66 on people's own wording (docs/LOG.md).

    Args:
        vectors: float32[n, h], what a pretrained encoder makes of the texts.
        answers: label of each.
        seed: of the clustering.

    Returns:
        int64[n], 0 to 4: the cluster of each text among those of its label; -1 where a label has fewer than ten.
    """
    groups, wanted = np.full(len(answers), -1, np.int64), np.asarray(answers)
    for label in np.unique(wanted):
        rows = np.flatnonzero(wanted == label)
        if len(rows) >= _LEAST:
            groups[rows] = KMeans(GROUPS, n_init=3, random_state=seed).fit_predict(vectors[rows])
    return groups


def different(vectors: FloatArray, count: int, *, rng: np.random.Generator) -> list[int]:
    """Returns ``count`` rows of unit vectors float32[n, h] that are as unlike as can be: each next one is the farthest from those taken.

    (Gonzalez, 1985, begun at random.) Of a template's hundred forms it takes few.
    """
    taken = [int(rng.integers(len(vectors)))] if len(vectors) else []
    nearest = vectors @ vectors[taken[0]] if taken else np.zeros(0, np.float32)
    while len(taken) < min(count, len(vectors)):
        nearest[taken[-1]] = np.inf
        taken.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, vectors @ vectors[taken[-1]])
    return taken


class Rewording:
    """Says a text a little otherwise, at random: words dropped, the beginning left out, letters mistyped, placeholders filled."""

    def __init__(self, seed: int, *, drop: float = 0.1, beginning: float = 0.1, typos: float = 0.06) -> None:
        """Prepares it.

        Args:
            seed: of the choices.
            drop: share of words left out of every other text.
            beginning: share of texts that lose up to half of their beginning ("can you help me …").
            typos: share of words with a mistyped letter.
        """
        self._dice = random.Random(seed)
        self._drop, self._beginning, self._typos = drop, beginning, typos

    def __call__(self, text: str) -> str:
        """Returns another form of a text, never an empty one."""
        dice, words = self._dice, filled(text, self._dice).split()
        if len(words) > 4 and dice.random() < self._beginning:
            words = words[dice.randrange(1, len(words) // 2 + 1) :]
        if len(words) > 3 and dice.random() < 0.5:
            words = [word for word in words if dice.random() >= self._drop] or words
        return " ".join(mistyped(word, dice) if dice.random() < self._typos else word for word in words)


def mistyped(word: str, dice: random.Random) -> str:
    """Returns a word of four letters or more with one left out, doubled, swapped with the next, or hit on a neighbouring key."""
    if len(word) < 4:
        return word
    at, kind = dice.randrange(1, len(word) - 1), dice.randrange(4)
    before, here, after = word[:at], word[at], word[at + 1 :]
    if kind == 0:
        return before + after
    if kind == 1:
        return before + here + here + after
    if kind == 2:
        return before + after[0] + here + after[1:]
    return before + dice.choice(list(_keys_near(here.lower())) or [here]) + after


def _keys_near(letter: str) -> Iterator[str]:
    for row in _NEIGHBOURS:
        at = row.find(letter)
        yield from (row[k] for k in (at - 1, at + 1) if at >= 0 and 0 <= k < len(row))


def filled(text: str, dice: random.Random) -> str:
    """Returns a text with its ``{{Order Number}}`` and the like filled in; what no filling is known for keeps its name."""

    def value(match: re.Match[str]) -> str:
        pattern = next((filling for word, filling in _FILLINGS.items() if word in match[1].lower()), match[1])
        return pattern.format(number=dice.randint(1_000, 99_999_999), price=f"{dice.randint(1, 300)}.{dice.randint(0, 99):02d}")

    return _PLACEHOLDER.sub(value, text)
