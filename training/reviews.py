"""Reviews with their verdicts, as sentiment is learned from: a file, its language, and a split that is the same in every run."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from features.language import LANGUAGES, Language, language_of
from training.metrics import BoolArray

CLOTHING, SHOPPING = "womens_clothing_reviews.parquet", "online_shopping_10_cats.parquet"
TRAIN, VALIDATION, TEST = 0, 1, 2
_STARS = 5
_TOLD_BY = 1_000  # texts that a file's language is told by


class ReviewDataError(Exception):
    """A file holds no reviews to learn from; the message says what is missing."""


@dataclass(frozen=True)
class Reviews:
    """n texts and what their authors thought.

    Attributes:
        language: ``en`` or ``zh``: what most of them are written in.
        texts: of the reviews.
        positive: bool[n], the author recommends it.
        stars: int64[n], 1 to 5; None where the file has no ratings.
        groups: what each is about (a category), for figures by group; empty where the file does not say.
        parts: int64[n]: TRAIN, VALIDATION or TEST.
    """

    language: Language
    texts: Sequence[str]
    positive: BoolArray
    stars: npt.NDArray[np.int64] | None
    groups: Sequence[str]
    parts: npt.NDArray[np.int64]

    def rows(self, part: int) -> npt.NDArray[np.int64]:
        """Returns the rows of a part."""
        return np.flatnonzero(self.parts == part)


def read_reviews(path: Path) -> Reviews:
    """Reads a Parquet, CSV or JSON lines file.

    Columns: ``Review Text``, ``Title``, ``Rating`` and ``Recommended IND`` (Women's Clothing E-Commerce Reviews); ``review``, ``label``
    and ``cat`` (online_shopping_10_cats); or ``text`` with ``rating`` (1 to 5) or ``label`` (0 or 1), and ``group`` where there are
    any. Empty texts and rows without a verdict are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ReviewDataError: it has other columns, values out of range, a language other than English and Chinese, or too few of a verdict.
    """
    frame = _frame(path)
    found = set(frame.columns)
    stars: pd.Series | None = None
    if {"Review Text", "Rating", "Recommended IND"} <= found:
        titles = frame["Title"].fillna("").str.strip() if "Title" in found else [""] * len(frame)
        texts = [". ".join(filter(None, pair)) for pair in zip(titles, frame["Review Text"].fillna("").str.strip(), strict=True)]
        stars, positive, groups = frame["Rating"], frame["Recommended IND"] == 1, frame.get("Class Name")
    elif {"review", "label"} <= found:
        texts, positive, groups = frame["review"].fillna("").tolist(), frame["label"], frame.get("cat")
    elif "text" in found and "rating" in found:
        texts, stars, positive, groups = frame["text"].fillna("").tolist(), frame["rating"], frame["rating"] >= 4, frame.get("group")
    elif {"text", "label"} <= found:
        texts, positive, groups = frame["text"].fillna("").tolist(), frame["label"], frame.get("group")
    else:
        raise ReviewDataError(f"{path.name}: needs the columns text and rating, or text and label")
    texts = [text.replace("\ufeff", "").strip() for text in texts]  # one file of the web begins its cells with byte order marks
    verdicts = positive if stars is None else stars
    kept = [k for k, known in enumerate(verdicts.notna()) if known and texts[k]]
    return _reviews(path, [texts[k] for k in kept], positive.iloc[kept], stars, groups, kept)


def _reviews(
    path: Path, texts: Sequence[str], positive: pd.Series, stars: pd.Series | None, groups: pd.Series | None, kept: Sequence[int]
) -> Reviews:
    rated = None if stars is None else stars.iloc[kept].to_numpy(np.int64)
    if rated is not None and not ((rated >= 1) & (rated <= _STARS)).all():
        raise ReviewDataError(f"{path.name}: ratings must be 1 to {_STARS}")
    if not positive.isin([0, 1]).all():
        raise ReviewDataError(f"{path.name}: labels must be 0 or 1")
    languages = Counter(map(language_of, texts[:_TOLD_BY]))
    language = max(LANGUAGES, key=lambda each: languages[each])
    if not languages[language]:
        raise ReviewDataError(f"{path.name}: holds no texts in {' or '.join(LANGUAGES)}")
    sure = positive.to_numpy(np.bool_)
    parts = split(texts)
    for part in (TRAIN, VALIDATION, TEST):
        if len(set(sure[parts == part])) < 2:
            raise ReviewDataError(f"{path.name}: {len(texts)} reviews are too few to train, validate and test on both verdicts")
    named = [] if groups is None else groups.iloc[kept].fillna("").astype(str).tolist()
    return Reviews(language, texts, sure, rated, named, parts)


def split(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Returns the part of each text by its hash, 8 : 1 : 1: the same in every run, and equal texts in one part."""
    tenths = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 for text in texts]
    return np.array([{8: VALIDATION, 9: TEST}.get(tenth, TRAIN) for tenth in tenths], np.int64)


def _frame(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_json(path, lines=True) if path.suffix in (".jsonl", ".json") else pd.read_csv(path)
