"""Questions to the public FAQ: does the right article come up, is what no article answers refused, are hand-overs right.

The questions are our own (``faq_questions.jsonl``): 112 paraphrases, one or two of each of the 104 questions, written by hand from
the questions alone, before any retrieval was run, in other words where there were any; and 60 questions about the world at large, which
no shop's FAQ answers. Even rows, and every other world question, are the validation half: the share of the cosine and the curve of
confidence were chosen there. The other half is reported. Many rows of the FAQ ask nearly the same (restocking stands there four times),
so recall is told twice: strictly, and counting an article whose answer says nearly the same.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pandas as pd
from sklearn.linear_model import LogisticRegression

from features.article_search import FUSED, LEXICAL, ArticleIndex, Calibration, Fusion, Hit
from features.articles import Article
from features.item_table import FloatArray
from features.lexical import analyse
from training.encode import pretrained_vectors
from training.quality.result import QualityResult
from training.text import base_name

FILE = "ecommerce_faq.parquet"
_ROWS = 104  # of the file the questions were written for
_TOKENS = 96  # read of a passage or question: as much as the shop's own models read of behaviours
_TOP = 3
_ALIKE = 0.6  # of two answers' words, shared: then they say nearly the same
_CONFIDENCE = 0.5  # the server's default, CONCORD_ASSISTANT_MIN_CONFIDENCE
_ENCODER = Fusion(1.0, FUSED.calibration)


@dataclass(frozen=True)
class Question:
    """A question; ``row`` is the FAQ's that it was written from, None for one that no FAQ answers. ``validation`` tells its half."""

    text: str
    row: int | None
    validation: bool


def run(data: Path, *, seed: int) -> QualityResult:
    """Measures retrieval and hand-over with the packaged encoder as it is; nothing is random, so every seed gives the same.

    Raises:
        FileNotFoundError: the set is not there.
        ValueError: it is another set than the questions were written for.
    """
    began = time.monotonic()
    index, questions = faq_index(data / FILE), read_questions()
    texts = index.texts()
    index = index.with_vectors(dict(zip(texts, pretrained_vectors(list(texts.values()), tokens=_TOKENS), strict=True)))
    vectors = pretrained_vectors([question.text for question in questions], tokens=_TOKENS)
    alike = _alike([passage.text for passage in index.passages])
    validation = _measured(index, questions, vectors, alike, validation=True)
    test = _measured(index, questions, vectors, alike, validation=False)
    curve = _curve(index, questions, vectors)
    details: dict[str, object] = {
        "set": "faq",
        "seed": seed,
        "encoder": base_name(""),
        "questions": {"paraphrases": sum(q.row is not None for q in questions), "of the world": sum(q.row is None for q in questions)},
        "semantic_share": FUSED.semantic,
        "calibration": {"in use": [FUSED.calibration.slope, FUSED.calibration.offset], "fitted again": [curve.slope, curve.offset]},
        "test": {name: round(value, 4) for name, value in test.items()},
    }
    return QualityResult({}, validation, details, time.monotonic() - began)


def faq_index(path: Path) -> ArticleIndex:
    """Returns the FAQ as articles, as ``concord articles import --mapping faq`` makes them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {path.parent}")
    frame = pd.read_parquet(path)
    if len(frame) != _ROWS:
        raise ValueError(f"{path.name} has {len(frame)} rows, and the questions were written for {_ROWS}")
    rows = zip(frame["question"], frame["answer"], strict=True)
    return ArticleIndex([Article(f"{k:03d}", question, answer) for k, (question, answer) in enumerate(rows)])


def read_questions() -> list[Question]:
    """Reads our questions, each with its half: a row's by its number, a question of the world by its place among these."""
    found: list[Question] = []
    world = 0
    for line in files(__package__).joinpath("faq_questions.jsonl").read_text("utf-8").splitlines():
        given = json.loads(line)
        row = given["row"]
        found.append(Question(given["text"], row, (world if row is None else row) % 2 == 0))
        world += row is None
    return found


def _measured(
    index: ArticleIndex, questions: Sequence[Question], vectors: FloatArray, alike: Sequence[frozenset[int]], *, validation: bool
) -> dict[str, float]:
    half = [(question, vector) for question, vector in zip(questions, vectors, strict=True) if question.validation is validation]
    asked = [(question, vector) for question, vector in half if question.row is not None]
    figures: dict[str, float] = {"questions": len(asked), "out_of_scope": len(half) - len(asked)}
    for name, fusion in (("", FUSED), ("bm25_", LEXICAL), ("encoder_", _ENCODER)):
        found = [(question.row, _rows(index.search(question.text, vector, limit=_TOP, fusion=fusion))) for question, vector in asked]
        figures[f"{name}recall_at_1"] = _share([row == rows[0] for row, rows in found])
        figures[f"{name}recall_at_3"] = _share([row in rows for row, rows in found])
        figures[f"{name}recall_at_3_alike"] = _share([bool(alike[row or 0] & set(rows)) for row, rows in found])
    return figures | _handovers(index, half, alike)


def _handovers(index: ArticleIndex, half: Sequence[tuple[Question, FloatArray]], alike: Sequence[frozenset[int]]) -> dict[str, float]:
    """Returns how often questions of the world are refused, answers are right, and a person is called for a reason."""
    right, sure, world = [], [], []
    for question, vector in half:
        (best,) = index.search(question.text, vector, limit=1)
        right.append(question.row is not None and _rows([best])[0] in alike[question.row])
        sure.append(best.confidence >= _CONFIDENCE)
        world.append(question.row is None)
    answered = [ok for ok, yes in zip(right, sure, strict=True) if yes]
    handed = [not ok for ok, yes in zip(right, sure, strict=True) if not yes]
    return {
        "refused_out_of_scope": _share([not yes for yes, of_world in zip(sure, world, strict=True) if of_world]),
        "answered": _share([yes for yes, of_world in zip(sure, world, strict=True) if not of_world]),
        "answer_precision": _share(answered),
        "handover_precision": _share(handed),
    }


def _curve(index: ArticleIndex, questions: Sequence[Question], vectors: FloatArray) -> Calibration:
    """Fits the curve of confidence on the validation half: the best article's score against whether it is the one meant."""
    scores, right = [], []
    for question, vector in zip(questions, vectors, strict=True):
        if question.validation:
            (best,) = index.search(question.text, vector, limit=1)
            scores.append([best.score])
            right.append(question.row == _rows([best])[0])
    fitted = LogisticRegression(C=1e6).fit(scores, right)
    return Calibration(round(float(fitted.coef_[0, 0]), 2), round(float(fitted.intercept_[0]), 2))


def _alike(answers: Sequence[str]) -> list[frozenset[int]]:
    """Returns for each answer those that say nearly the same, itself among them: by the words they share (Jaccard)."""
    words = [set(analyse(answer)) for answer in answers]
    return [frozenset(k for k, other in enumerate(words) if len(one & other) >= _ALIKE * len(one | other)) for one in words]


def _rows(hits: Sequence[Hit]) -> list[int]:
    return [int(hit.article.article_id) for hit in hits]


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(1, len(flags))
