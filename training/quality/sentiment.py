"""Sentiment of reviews, English and Chinese: classifiers beside TF-IDF on the same split, and what clauses say of aspects."""

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from torch.nn import Module

from features.aspects import mentions
from features.item_table import FloatArray
from training.classifier_export import TrainedClassifier
from training.metrics import area_under_curve
from training.quality.result import QualityResult
from training.reviews import CLOTHING, SHOPPING, TEST, Reviews, read_reviews
from training.sentiment import SentimentConfig, train_sentiment
from training.sentiment_baseline import baseline
from training.text import tokenize
from training.text_classifier import predict

UTTERANCES = "bitext_21k_intents_sentiment.parquet"
# Of the utterances these say how the customer feels; the others ask for something.
_FELT = ("complaint", "review", "payment_issue", "registration_problems")
_LEAST_MENTIONS = 100
_ASKED = 2_000


def run(data: Path, *, seed: int) -> QualityResult:
    """Trains on both sets and measures on reviews held out by their hash; the test part is looked at once, by the finished model.

    Raises:
        FileNotFoundError: a set is not in the folder.
    """
    started = time.monotonic()
    figures: dict[str, float] = {}
    details: dict[str, object] = {}
    for name in (CLOTHING, SHOPPING):
        reviews = read_reviews(data / name)
        trained = train_sentiment(reviews, SentimentConfig().seeded(seed))
        figures |= {f"{reviews.language}_{key}": value for key, value in trained.metrics.items()}
        figures |= {f"{reviews.language}_tfidf_{key}": value for key, value in baseline(reviews).items()}
        details[f"{reviews.language}_auc_by_aspect"] = by_aspect(trained, reviews)
        details[f"{reviews.language}_auc_by_group"] = by_group(trained, reviews)
        details[f"{reviews.language}_settings"] = trained.settings
        if reviews.language == "en" and (data / UTTERANCES).is_file():
            figures["en_questions_neutral"] = questions_neutral(trained, data / UTTERANCES)
    return QualityResult({}, {}, details | {"test": figures}, time.monotonic() - started)


def scores(trained: TrainedClassifier, texts: list[str]) -> FloatArray:
    """Returns float32[n], the score of each text, -1 to 1."""
    shares = _shares(trained, texts)
    return np.asarray(shares[:, -1] - shares[:, 0], np.float32)


def by_aspect(trained: TrainedClassifier, reviews: Reviews) -> dict[str, dict[str, float]]:
    """Returns, of each aspect that enough test reviews name, how well the mean score of its clauses tells what the author recommends.

    That is a weak measure, for the verdict is on the whole and not on the aspect: where it is far above one half, the clauses say
    something.
    """
    rows = reviews.rows(TEST)
    clauses = [
        (row, one.aspect, reviews.texts[row][one.start : one.end]) for row in rows for one in mentions(reviews.texts[row], reviews.language)
    ]
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (row, aspect, _), score in zip(clauses, scores(trained, [text for _, _, text in clauses]).tolist(), strict=True):
        found[aspect][row].append(score)
    result = {}
    for aspect, said in sorted(found.items()):
        if len(said) >= _LEAST_MENTIONS:
            means = np.array([np.mean(each) for each in said.values()], np.float32)
            result[aspect] = {"reviews": len(said), "auc": round(area_under_curve(means, reviews.positive[list(said)]), 4)}
    return result


def by_group(trained: TrainedClassifier, reviews: Reviews) -> dict[str, float]:
    """Returns the AUC of each group that enough test reviews are of."""
    rows = reviews.rows(TEST)
    said, groups = scores(trained, [reviews.texts[row] for row in rows]), np.array([reviews.groups[row] for row in rows])
    names, counts = np.unique(groups, return_counts=True)
    kept = names[counts >= _LEAST_MENTIONS]
    return {str(name): round(area_under_curve(said[groups == name], reviews.positive[rows[groups == name]]), 4) for name in kept}


def questions_neutral(trained: TrainedClassifier, path: Path) -> float:
    """Returns the share of customers' questions that are judged neutral; all wordings are another shop's than those trained on."""
    frame = pd.read_parquet(path, columns=["utterance", "intent"])
    asked = frame.loc[~frame["intent"].isin(_FELT), "utterance"].drop_duplicates().sample(_ASKED, random_state=0)
    return float((_shares(trained, asked.tolist()).argmax(1) == trained.labels.index("neutral")).mean())


def _shares(trained: TrainedClassifier, texts: list[str]) -> FloatArray:
    model: Module = trained.model
    logits = predict(model, tokenize(trained.tokenizer, texts, trained.tokens), len(trained.labels)) / trained.temperature
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(shares / shares.sum(1, keepdims=True), np.float32)
