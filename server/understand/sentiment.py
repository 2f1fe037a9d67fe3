"""How positive texts are, and what they say of which aspects: the language by its letters, then the classifier for it."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from features.aspects import Mention, mentions
from features.language import LANGUAGES, Language, language_of
from server.errors import PreconditionError
from server.inference.model import LoadedModel
from server.understand.classifiers import Classification, Classifiers
from server.understand.opinions import UNJUDGED, Analyzed, Judgement, Leaning, TextSentiment
from server.understand.text_runs import TextRuns

CLASSIFIERS = {language: f"sentiment_{language}" for language in LANGUAGES}
# Clauses classified at a time: a call has up to 2,048 of them, and a queue of 512 is for all calls.
_AT_ONCE = 128


class Sentiments:
    """Judges texts with the active model; what is said of one depends on it and on the model alone.

    Args:
        model: returns the model that answers now.
        runs: where texts are read and classified.
    """

    def __init__(self, model: Callable[[], Awaitable[LoadedModel]], runs: TextRuns) -> None:
        self._model = model
        self._runs = runs
        self._classifiers = Classifiers(runs)

    async def analyze(self, texts: Sequence[str]) -> Analyzed:
        """Returns what texts and their clauses say.

        Raises:
            PreconditionError: no model is active, or the active one has no sentiment classifier.
            OverloadedError: too many texts wait.
            UnavailableError: the active model cannot be loaded here.
        """
        model, whole = await self._whole(texts)
        found = await self._runs.read(partial(_mentions, texts, whole))
        said = {k: {(0, len(texts[k])): one.judgement} for k, one in enumerate(whole)}
        for language, name in CLASSIFIERS.items():
            rows = [k for k, one in enumerate(whole) if one.language == language]
            clauses = dict.fromkeys((k, m.start, m.end) for k in rows for m in found[k] if (m.start, m.end) not in said[k])
            for part in _parts(list(clauses)):
                results = await self._classifiers.classify(model, name, [texts[k][start:end] for k, start, end in part])
                for (k, start, end), one in zip(part, results, strict=True):
                    said[k][start, end] = _judgement(one)
        sentiments = tuple(
            replace(one, aspects=tuple((mention, said[k][mention.start, mention.end]) for mention in found[k]))
            for k, one in enumerate(whole)
        )
        return Analyzed(sentiments, model.model_version)

    async def judge(self, texts: Sequence[str]) -> Analyzed:
        """Returns what texts say on the whole, without their aspects; raises as ``analyze``."""
        model, whole = await self._whole(texts)
        return Analyzed(tuple(whole), model.model_version)

    async def require_model(self) -> LoadedModel:
        """Returns the model that judges.

        Raises:
            PreconditionError: no model is active, or the active one has no sentiment classifier.
            UnavailableError: the active model cannot be loaded here.
        """
        model = await self._model()
        if not any(name in model.classifiers for name in CLASSIFIERS.values()):
            told = "the active model has no sentiment classifier: train one, export, publish and activate"
            raise PreconditionError(told, reason="NO_SENTIMENT_MODEL")
        return model

    async def _whole(self, texts: Sequence[str]) -> tuple[LoadedModel, list[TextSentiment]]:
        model = await self.require_model()
        languages = await self._runs.read(partial(_languages, texts))
        whole = [TextSentiment(UNJUDGED, language) for language in languages]
        for language, name in CLASSIFIERS.items():
            rows = [k for k, spoken in enumerate(languages) if spoken == language and name in model.classifiers]
            found = await self._classifiers.classify(model, name, [texts[k] for k in rows]) if rows else []
            for k, one in zip(rows, found, strict=True):
                whole[k] = TextSentiment(_judgement(one), language, truncated=one.truncated)
        return model, whole


def _judgement(found: Classification) -> Judgement:
    if found.probabilities is None:
        return UNJUDGED
    ((label, confidence),) = found.top(1)
    share = dict(zip(found.labels, found.probabilities.tolist(), strict=True))
    return Judgement(Leaning(label), share[Leaning.POSITIVE.value] - share[Leaning.NEGATIVE.value], confidence)


def _parts(clauses: Sequence[tuple[int, int, int]]) -> Iterator[Sequence[tuple[int, int, int]]]:
    for start in range(0, len(clauses), _AT_ONCE):
        yield clauses[start : start + _AT_ONCE]


def _languages(texts: Sequence[str]) -> list[Language | None]:
    return [language_of(text) for text in texts]


def _mentions(texts: Sequence[str], whole: Sequence[TextSentiment]) -> list[list[Mention]]:
    """Returns what each text names; nothing where it was not judged."""
    pairs = zip(texts, whole, strict=True)
    return [mentions(text, one.language) if one.language and one.judgement is not UNJUDGED else [] for text, one in pairs]
