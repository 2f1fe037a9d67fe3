"""Judging texts: each by the classifier of its language, alone or in company alike, and clauses as the texts they are."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from features.aspects import mentions
from server.errors import OverloadedError, PreconditionError
from server.inference.model import LoadedModel, load_model
from server.metrics import Metrics
from server.recommend.computing import Computing
from server.understand.opinions import UNJUDGED, Judgement, Leaning
from server.understand.sentiment import Sentiments
from server.understand.text_runs import TextRuns
from tests.unit.bundles import write_bundle
from tests.unit.tables import table

LABELS = {"sentiment_en": ("negative", "neutral", "positive"), "sentiment_zh": ("negative", "neutral", "positive")}
ENGLISH = "viewed title, the price searched. text"


class Graph:
    """Says of a text what its tokens' numbers come to, and nothing of its company."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.default_rng(seed).standard_normal((100, 3)).astype(np.float32)

    def run(self, _outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        return [np.stack([self._words[ids[mask == 1]].sum(0) for ids, mask in pairs])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder, table(10), classifiers=LABELS)
    loaded = load_model(folder, provider="cpu", threads=1)
    made = {name: replace(one, session=Graph(seed)) for seed, (name, one) in enumerate(loaded.classifiers.items())}
    return replace(loaded, classifiers=made)


def room(model: LoadedModel, *, waiting: int = 512) -> Sentiments:
    async def current() -> LoadedModel:
        return model

    runs = TextRuns(Computing(threads=2, waiting=8), batches=2, waiting=waiting, metrics=Metrics(CollectorRegistry()))
    return Sentiments(current, runs)


def expected(model: LoadedModel, language: str, text: str) -> Judgement:
    classifier = model.classifiers[f"sentiment_{language}"]
    (shares,) = classifier.probabilities([classifier.tokens(text).ids])
    place = int(shares.argmax())
    return Judgement(Leaning(classifier.spec.labels[place]), float(shares[-1]) - float(shares[0]), float(shares[place]))


async def test_each_text_is_judged_by_the_classifier_of_its_language(model: LoadedModel) -> None:
    texts = [ENGLISH, "标题", "نص", "title", "😀"]
    analyzed = await room(model).analyze(texts)
    assert analyzed.model_version == model.model_version
    assert [one.language for one in analyzed.sentiments] == ["en", "zh", None, "en", None]
    assert [one.judgement for one in analyzed.sentiments] == [
        expected(model, "en", ENGLISH), expected(model, "zh", "标题"), UNJUDGED, expected(model, "en", "title"), UNJUDGED,
    ]  # fmt: skip
    assert (await room(model).judge(texts)).sentiments == tuple(replace(one, aspects=()) for one in analyzed.sentiments)


async def test_a_clause_is_judged_as_a_text_of_its_own(model: LoadedModel) -> None:
    both = "price text, viewed quality and price text"
    whole, split = (await room(model).analyze(["price text", both])).sentiments
    assert whole.aspects == ((mentions("price text", "en")[0], whole.judgement),)
    assert [(mention.aspect, judgement) for mention, judgement in split.aspects] == [
        ("price", expected(model, "en", "price text")),
        ("quality", expected(model, "en", "viewed quality and price text")),
        ("price", expected(model, "en", "viewed quality and price text")),
    ]


async def test_company_changes_nothing(model: LoadedModel) -> None:
    texts = [" ".join(np.random.default_rng(k).choice(["title", "price", "viewed", "size,", "text."], 7)) for k in range(12)]
    alone = [(await room(model).analyze([text])).sentiments[0] for text in texts]
    crowd = room(model)
    answers = await asyncio.gather(*(crowd.analyze(texts) for _ in range(10)))
    assert [answer.sentiments for answer in answers] == [tuple(alone)] * 10


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param(" \t\n", id="space"),
        pytest.param("\x01\x02\x7f\u200b", id="control characters"),
        pytest.param("😍👍🏽👨‍👩‍👧", id="emoji only"),
        pytest.param("مقاس جيد \u202eabc\u202c סגול", id="right to left"),
        pytest.param("очень хорошо", id="another script"),
        pytest.param("12 34 !!", id="no letters"),
    ],
)
async def test_what_is_in_no_language_is_not_judged(model: LoadedModel, text: str) -> None:
    before, odd, after = (await room(model).analyze(["title", text, "title"])).sentiments
    assert (odd.judgement, odd.language, odd.aspects) == (UNJUDGED, None, ())
    assert before == after == (await room(model).analyze(["title"])).sentiments[0]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("price " * 1_666, id="10,000 characters"),
        pytest.param("title\x01\x02 price", id="control characters around a word"),
        pytest.param('<b onclick="alert(1)">price</b>', id="HTML"),
        pytest.param("'; DROP TABLE users; -- price", id="SQL"),
        pytest.param("title 价格 title title title", id="mixed scripts"),
    ],
)
async def test_odd_texts_are_judged_like_any_other(model: LoadedModel, text: str) -> None:
    (one,) = (await room(model).analyze([text])).sentiments
    assert one.judgement == expected(model, one.language, text)
    assert one.truncated == (len(text) > 1_000)


async def test_a_call_of_the_most_clauses_fits_the_queue(model: LoadedModel) -> None:
    """128 texts of 16 clauses are 2,048 runs, and 512 may wait."""
    analyzed = await room(model).analyze([f"title {k}. " + "price title, size text. " * 8 for k in range(128)])
    assert {len(one.aspects) for one in analyzed.sentiments} == {16}
    with pytest.raises(OverloadedError):
        await room(model, waiting=4).analyze(["title"] * 5)


async def test_a_model_of_one_language_leaves_the_other_unjudged(model: LoadedModel) -> None:
    one = replace(model, classifiers={"sentiment_en": model.classifiers["sentiment_en"]})
    english, chinese = (await room(one).analyze(["title", "价格很好"])).sentiments
    assert english.judgement.leaning is not Leaning.UNJUDGED
    assert (chinese.judgement, chinese.language, chinese.aspects) == (UNJUDGED, "zh", ())


async def test_a_model_without_any_is_the_states_fault(model: LoadedModel) -> None:
    bare = room(replace(model, classifiers={}))
    for call in (bare.analyze(["title"]), bare.judge(["title"])):
        with pytest.raises(PreconditionError) as caught:
            await call
        assert caught.value.reason == "NO_SENTIMENT_MODEL"
