"""What the sentiment classifiers say of texts, as values."""

from dataclasses import dataclass
from enum import Enum

from features.aspects import Mention
from features.language import Language


class Leaning(Enum):
    """Which way a text leans; the value is a classifier's label for it, empty where none judges."""

    UNJUDGED = ""
    NEGATIVE = "negative"
    NEUTRAL = "neutral"
    POSITIVE = "positive"


@dataclass(frozen=True)
class Judgement:
    """What a classifier makes of a text or a clause: score -1 to 1, confidence 0 to 1; both 0 where it is unjudged."""

    leaning: Leaning
    score: float
    confidence: float


UNJUDGED = Judgement(Leaning.UNJUDGED, 0.0, 0.0)


@dataclass(frozen=True)
class TextSentiment:
    """A text as a whole, the language it is in (None: one that is not judged), and what its clauses say of which aspects.

    ``truncated`` says that it went on behind what the classifier read.
    """

    judgement: Judgement
    language: Language | None
    aspects: tuple[tuple[Mention, Judgement], ...] = ()
    truncated: bool = False


@dataclass(frozen=True)
class Analyzed:
    """One sentiment a text, in order, and the model that judged."""

    sentiments: tuple[TextSentiment, ...]
    model_version: str
