"""One training of a sentiment classifier from file to folder, beside its baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from features.bundle import Classifier
from training.classifier_export import write_classifier
from training.reviews import CLOTHING, SHOPPING, VALIDATION, Reviews, read_reviews
from training.sentiment import SentimentConfig, train_sentiment
from training.sentiment_baseline import baseline

_GOLDEN_TEXTS = 8


@dataclass(frozen=True)
class SentimentRun:
    """What a training left: the classifier's name, its folder, and what its manifest entry will say."""

    name: str
    folder: Path
    classifier: Classifier


def review_files(data: Path) -> list[Path]:
    """Returns ``data`` if it is a file, else the review files known by name in that folder.

    Raises:
        FileNotFoundError: there are none.
    """
    if data.is_file():
        return [data]
    found = [data / name for name in (CLOTHING, SHOPPING) if (data / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{data}: neither a file nor a folder with {CLOTHING} or {SHOPPING}")
    return found


def run(path: Path, config: SentimentConfig, root: Path, *, now: datetime | None = None) -> SentimentRun:
    """Trains on a file of reviews and writes the classifier into ``root/sentiment_<language>/<time>``.

    Raises:
        FileNotFoundError, ReviewDataError: as ``training.reviews.read_reviews``.
        ParityError: ONNX Runtime does not reproduce the model.
    """
    reviews = read_reviews(path)
    trained = train_sentiment(reviews, config)
    beside = {f"tfidf_{name}": value for name, value in baseline(reviews).items()}
    trained.metrics.update(beside)
    name = f"sentiment_{reviews.language}"
    folder = root / name / f"{now or datetime.now(UTC):%Y%m%dT%H%M%S}"
    return SentimentRun(name, folder, write_classifier(folder, name, trained, golden_texts(reviews)))


def golden_texts(reviews: Reviews) -> Sequence[str]:
    """Returns validation reviews from the shortest to the longest."""
    texts = sorted((reviews.texts[row] for row in reviews.rows(VALIDATION)), key=lambda text: (len(text), text))
    return [texts[place] for place in np.linspace(0, len(texts) - 1, _GOLDEN_TEXTS).astype(int)]
