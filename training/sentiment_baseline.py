"""What sentiment classifiers are measured beside: logistic regression over TF-IDF, of words or of characters."""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from features.item_table import FloatArray
from training.metrics import area_under_curve
from training.reviews import TEST, TRAIN, VALIDATION, Reviews
from training.sentiment import label_of, macro_f1

# Inverse strengths of the penalty, of which the validation reviews choose.
_STRENGTHS = (1.0, 3.0, 10.0)
_MOST_TERMS = 300_000
_ITERATIONS, _TOLERANCE = 300, 1e-3


def baseline(reviews: Reviews) -> dict[str, float]:
    """Fits on the training part, chooses the penalty on the validation part, and returns the metrics of the test part.

    They are those of ``training.sentiment.train_sentiment`` without calibration: one regression for recommended or not (``auc``), one for
    the label, and with ratings one for the stars.
    """
    vectors = _vectors(reviews)
    rows = {part: reviews.rows(part) for part in (TRAIN, VALIDATION, TEST)}
    recommended = _fit(vectors, reviews.positive.astype(np.int64), rows)
    figures = {"auc": area_under_curve(_chances(recommended, vectors[rows[TEST]]), reviews.positive[rows[TEST]])}
    if reviews.stars is None:
        return figures | {"accuracy": float((recommended.predict(vectors[rows[TEST]]) == reviews.positive[rows[TEST]]).mean())}
    label = _fit(vectors, label_of(reviews), rows).predict(vectors[rows[TEST]])
    wanted, given = label_of(reviews)[rows[TEST]], reviews.stars[rows[TEST]]
    stars = _fit(vectors, reviews.stars, rows).predict(vectors[rows[TEST]])
    return figures | {
        "accuracy": float((label == wanted).mean()),
        "macro_f1": macro_f1(label, wanted),
        "rating_accuracy": float((stars == given).mean()),
        "rating_mae": float(np.abs(stars - given).mean()),
    }


def _vectors(reviews: Reviews) -> sp.csr_matrix:
    """Returns TF-IDF of words and pairs of words, or where no space parts them of one to three characters, fitted on the training part."""
    if reviews.language == "zh":
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=3, sublinear_tf=True, max_features=_MOST_TERMS)
    else:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=_MOST_TERMS)
    vectorizer.fit([reviews.texts[row] for row in reviews.rows(TRAIN)])
    return sp.csr_matrix(vectorizer.transform(reviews.texts))


def _fit(vectors: sp.csr_matrix, wanted: npt.NDArray[np.int64], rows: dict[int, npt.NDArray[np.int64]]) -> LogisticRegression:
    fitted = [
        LogisticRegression(C=c, max_iter=_ITERATIONS, tol=_TOLERANCE).fit(vectors[rows[TRAIN]], wanted[rows[TRAIN]]) for c in _STRENGTHS
    ]
    held, answers = vectors[rows[VALIDATION]], wanted[rows[VALIDATION]]
    return max(fitted, key=lambda model: float(np.log(_of(model, held, answers) + 1e-12).mean()))


def _of(model: LogisticRegression, vectors: sp.csr_matrix, answers: npt.NDArray[np.int64]) -> FloatArray:
    """Returns the probability that the model gives each answer."""
    places = np.searchsorted(model.classes_, answers)
    shares: FloatArray = model.predict_proba(vectors)
    return shares[np.arange(len(answers)), places]


def _chances(model: LogisticRegression, vectors: sp.csr_matrix) -> FloatArray:
    chances: FloatArray = model.predict_proba(vectors)[:, 1]
    return chances
