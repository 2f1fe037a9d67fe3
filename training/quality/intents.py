"""Bitext's customer-service intents: trained on the templates of 2020, tested on 21,787 utterances in other words.

Nothing is chosen on the test file: temperature and threshold come from held-out groups of wordings of the training file.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from features.item_table import FloatArray
from training.classifier_export import TrainedClassifier
from training.config import TrainConfig
from training.intent import measured, probabilities, train_intents
from training.quality.result import QualityResult
from training.text import tokenize
from training.text_classifier import predict
from training.utterances import Utterances, mistyped, read_utterances

TRAIN, TEST = "bitext_2020_intents.parquet", "bitext_21k_intents_sentiment.parquet"
_REVIEWS, _TITLES, _CHINESE = "womens_clothing_reviews.parquet", "amazon_beauty_items.parquet", "online_shopping_10_cats.parquet"
_RENAMED = {"check_invoices": "check_invoice"}
_STRANGERS = 2_000  # sentences of reviews that are learned from and choose the threshold
_SAMPLE = 1_000  # of test utterances for robustness and few-shot, and of each kind of text out of scope
PARTS = ("fine_tuning", "names", "out_of_scope")


def run(data: Path, *, seed: int, examples: int | None = None, without: frozenset[str] = frozenset()) -> QualityResult:
    """Trains on one file and tests on the other.

    Args:
        data: folder of the sets.
        seed: of every random choice.
        examples: utterances of an intent that there are, for few-shot, tested on a part of the test file; None: all of them.
        without: parts left out, of PARTS: ``fine_tuning`` trains the head alone on the pretrained encoder, ``names`` begins and
            trains without the labels' names, ``out_of_scope`` without texts that are none of the intents' business.

    Raises:
        FileNotFoundError: a set is not there; the message names it.
    """
    began = time.monotonic()
    rng = np.random.default_rng([seed, 7])
    known, asked = read_utterances(data / TRAIN), _test_utterances(data / TEST)
    if examples:
        known, asked = _few(known, examples, rng), asked.of(_sample(len(asked), rng))
    learned, strange = _strangers(data, rng)
    config = replace(TrainConfig.intent(), seed=seed)
    if examples:
        config = replace(config, epochs=max(config.epochs, 1_600 // len(known)))
    if "fine_tuning" in without:
        config = replace(config, trainable_layers=0)
    trained = train_intents(known, [] if "out_of_scope" in without else learned, config=config, names="names" not in without)
    labels = list(trained.labels)
    shares = _shares(trained, asked.texts)
    figures = measured(shares, [labels.index(intent) for intent in asked.intents])
    if not examples:
        figures |= _robustness(trained, asked.of(_sample(len(asked), rng)), seed)
        figures |= _scope(trained, shares, strange)
    figures |= _baseline(known, asked)
    details: dict[str, object] = {
        "set": "intents",
        "seed": seed,
        "without": sorted(without),
        "examples": examples,
        "utterances": len(known),
        "tested": len(asked),
        "temperature": round(trained.temperature, 3),
        "threshold": trained.threshold,
        "config": trained.settings,
        "test": figures,
    }
    validation = {name.removeprefix("validation_"): value for name, value in trained.metrics.items() if name.startswith("validation_")}
    return QualityResult({}, validation, details, time.monotonic() - began)


def _test_utterances(path: Path) -> Utterances:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {path.parent}")
    frame = pd.read_parquet(path, columns=["utterance", "intent"])
    return Utterances(tuple(frame["utterance"]), tuple(frame["intent"].replace(_RENAMED)))


def _strangers(data: Path, rng: np.random.Generator) -> tuple[list[str], dict[str, list[str]]]:
    """Returns texts out of scope to learn from, and others by where they come from: the same set, another one, another language."""
    sentences: list[str] = []
    for text in _column(data / _REVIEWS, "Review Text"):
        sentences += [part.strip() for part in text.split(".") if len(part.split()) >= 4]
    sentences = [sentences[row] for row in rng.permutation(len(sentences))[: _STRANGERS + _SAMPLE].tolist()]
    half = min(_STRANGERS, len(sentences) // 2)
    titles, chinese = _column(data / _TITLES, "title"), _column(data / _CHINESE, "review")
    return sentences[:half], {
        "reviews": sentences[half:],
        "titles": [titles[row] for row in _sample(len(titles), rng)],
        "chinese": [chinese[row] for row in _sample(len(chinese), rng)],
    }


def _column(path: Path, name: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {path.parent}")
    return [text for text in pd.read_parquet(path, columns=[name])[name].dropna().astype(str) if text.strip()]


def _sample(count: int, rng: np.random.Generator) -> list[int]:
    return sorted(rng.permutation(count)[:_SAMPLE].tolist())


def _few(known: Utterances, examples: int, rng: np.random.Generator) -> Utterances:
    rows: list[int] = []
    intents = np.array(known.intents)
    for intent in sorted(set(known.intents)):
        rows += rng.permutation(np.flatnonzero(intents == intent))[:examples].tolist()
    return known.of(sorted(rows))


def _shares(trained: TrainedClassifier, texts: Sequence[str]) -> FloatArray:
    logits = predict(trained.model, tokenize(trained.tokenizer, texts, trained.tokens), len(trained.labels))
    return probabilities(logits, trained.temperature)


def _robustness(trained: TrainedClassifier, asked: Utterances, seed: int) -> dict[str, float]:
    """Returns the accuracy on a part of the test file as it is, with two words of each text mistyped, and in capitals."""
    dice, labels = random.Random(seed), list(trained.labels)
    answers = np.array([labels.index(intent) for intent in asked.intents])
    forms = {
        "sample": list(asked.texts),
        "typos": [_two_typos(text, dice) for text in asked.texts],
        "upper": [text.upper() for text in asked.texts],
    }
    return {f"accuracy_{name}": float((_shares(trained, texts).argmax(1) == answers).mean()) for name, texts in forms.items()}


def _two_typos(text: str, dice: random.Random) -> str:
    words = text.split()
    for at in dice.sample(range(len(words)), min(2, len(words))):
        words[at] = mistyped(words[at], dice)
    return " ".join(words)


def _scope(trained: TrainedClassifier, shares: FloatArray, strange: dict[str, list[str]]) -> dict[str, float]:
    """Returns the share of test utterances that are in scope, and of texts out of scope that are not, with the area under the curve."""
    threshold, known = trained.threshold or 0.0, shares.max(1)
    figures = {"accepted": float((known >= threshold).mean())}
    for name, texts in strange.items():
        seen = _shares(trained, texts).max(1)
        figures[f"refused_{name}"] = float((seen < threshold).mean())
        figures[f"auc_{name}"] = float(roc_auc_score(np.repeat([1, 0], [len(known), len(seen)]), np.concatenate([known, seen])))
    return figures


def _baseline(known: Utterances, asked: Utterances) -> dict[str, float]:
    """Returns what words and pairs of words with logistic regression reach on the same files."""
    words = TfidfVectorizer(sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1_000).fit(words.fit_transform(known.texts), known.intents)
    labels = list(model.classes_)
    shares = np.asarray(model.predict_proba(words.transform(asked.texts)), np.float32)
    found = measured(shares, [labels.index(intent) for intent in asked.intents])
    return {f"tfidf_{name}": found[name] for name in ("accuracy", "macro_f1")}
