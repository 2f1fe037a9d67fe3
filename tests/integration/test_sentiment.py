"""Sentiment from end to end: trained on reviews, carried by the bundle, the same in every channel, and in the profile."""

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psycopg
import pytest

from concord import Concord, error_details
from concord.v1 import common_pb2, understanding_pb2
from concord.v1.profile_pb2 import CustomerSentiment
from concord.v1.understanding_pb2 import AnalyzeSentimentResponse
from features.bundle import Manifest
from features.materialize import materialize
from server.settings import ServerSettings
from tests.integration import serving
from tests.integration.fixtures import NewShop
from tests.integration.replicas import query
from tests.unit import made_reviews

if TYPE_CHECKING:
    from training.run import TrainResult

POSITIVE, NEGATIVE = understanding_pb2.SENTIMENT_LABEL_POSITIVE, understanding_pb2.SENTIMENT_LABEL_NEGATIVE
UNJUDGED = understanding_pb2.SENTIMENT_LABEL_UNJUDGED
PRAISE, BLAME = "lovely great perfect soft", "awful broken terrible faded"


@pytest.fixture(scope="module")
def judging(trained: "tuple[ServerSettings, TrainResult]", tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A bundle with sentiment classifiers of both languages, trained on made reviews in seconds."""
    from training.run import export
    from training.sentiment import SentimentConfig
    from training.sentiment_run import run

    small = SentimentConfig(tokens=24, width=16, filters=16, buckets=1 << 12)
    small = replace(small, loop=replace(small.loop, epochs=4, learning_rate=5e-3))
    folder = tmp_path_factory.mktemp("reviews")
    files = [made_reviews.write(folder, "en", 700, rated=True), made_reviews.write(folder, "zh", 500, rated=False)]
    runs = [run(file, small, folder / "classifiers") for file in files]
    out = tmp_path_factory.mktemp("judging")
    return out, export(trained[0], trained[1].run_dir, out, classifiers=[one.folder for one in runs])


@pytest.fixture(scope="module")
def shop(new_shop: NewShop, judging: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    settings = new_shop().model_copy(update={"judge_seconds": 0.05})
    serving.fill(settings, tmp_path_factory.mktemp("sample"))
    serving.deploy(settings, judging[0])
    return settings


@pytest.fixture(scope="module")
async def address(shop: ServerSettings) -> AsyncIterator[str]:
    async with serving.served(shop) as at:
        yield at


@pytest.fixture(scope="module")
async def concord(address: str) -> AsyncIterator[Concord]:
    async with Concord(address, channel="web", timeout=30.0) as client:
        yield client


def labels(answer: AnalyzeSentimentResponse) -> list[int]:
    return [one.label for one in answer.sentiments]


async def test_the_bundle_carries_what_was_trained(judging: tuple[Path, Manifest]) -> None:
    manifest = judging[1]
    assert {name: one.labels for name, one in manifest.classifiers.items()} == {
        "sentiment_en": ("negative", "neutral", "positive"),
        "sentiment_zh": ("negative", "neutral", "positive"),
    }
    assert manifest.classifiers["sentiment_en"].metrics["auc"] > 0.85
    assert "tfidf_auc" in manifest.classifiers["sentiment_zh"].metrics


async def test_praise_and_blame_in_both_languages(concord: Concord, judging: tuple[Path, Manifest]) -> None:
    answer = await concord.sentiment(PRAISE, BLAME, "很好喜欢满意漂亮", "太差失望破损垃圾", "привет")
    assert labels(answer) == [POSITIVE, NEGATIVE, POSITIVE, NEGATIVE, UNJUDGED]
    assert [one.language for one in answer.sentiments] == ["en", "en", "zh", "zh", ""]
    scores = [one.score for one in answer.sentiments]
    assert all(-1 <= score <= 1 for score in scores)
    assert min(scores[0], scores[2]) > 0.3 > -0.3 > max(scores[1], scores[3])
    assert all(0 < one.confidence <= 1 for one in answer.sentiments[:4])
    assert (answer.sentiments[4].score, answer.sentiments[4].confidence) == (0, 0)
    assert answer.model_version == judging[1].model_version
    long = (await concord.sentiment("很好" * 40, "很好" * 4)).sentiments
    assert [one.truncated for one in long] == [True, False]


async def test_aspects_have_the_sentiment_of_their_clause(concord: Concord) -> None:
    text = "lovely great perfect color, awful terrible awful shipping"
    (one,) = (await concord.sentiment(text)).sentiments
    assert [(aspect.aspect, aspect.term, text[aspect.start : aspect.end]) for aspect in one.aspects] == [
        ("colour", "color", "lovely great perfect color"),
        ("delivery", "shipping", "awful terrible awful shipping"),
    ]
    assert [aspect.label for aspect in one.aspects] == [POSITIVE, NEGATIVE]
    alone = [(await concord.sentiment(text[aspect.start : aspect.end])).sentiments[0] for aspect in one.aspects]
    assert [(aspect.score, aspect.confidence) for aspect in one.aspects] == [(each.score, each.confidence) for each in alone]


async def test_every_channel_gets_the_same_bytes(address: str, concord: Concord) -> None:
    texts = [*(text for text, _ in made_reviews.texts("en", 40, seed=9)), *(text for text, _ in made_reviews.texts("zh", 40, seed=9))]
    expected = await concord.sentiment(*texts)
    async with Concord(address, channel="store", timeout=30.0) as store:
        singles = await asyncio.gather(*(store.sentiment(text) for text in texts))
        assert (await store.sentiment(*texts)).SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    assert [answer.sentiments[0] for answer in singles] == list(expected.sentiments)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        pytest.param("", "", id="empty"),
        pytest.param("x" * 10_000, "en", id="10,000 characters"),
        pytest.param("好" * 10_000, "zh", id="10,000 Chinese characters"),
        pytest.param("\x01\x02\x7f", "", id="control characters"),
        pytest.param("mug\x01\x02\x7f\u200b\u202e", "en", id="control characters around a word"),
        pytest.param("Red mug 红色杯子 красная кружка κούπα", "", id="mixed scripts"),
        pytest.param("كوب أحمر \u202eabc\u202c ספל אדום", "", id="right to left"),
        pytest.param("🛒👩‍👩‍👧‍👦🎉", "", id="emoji only"),
        pytest.param("<b onclick=\"alert(1)\">mug</b><script>fetch('//x')</script>", "en", id="HTML"),
        pytest.param("'; DROP TABLE users; -- \\' OR 1=1", "en", id="SQL"),
        pytest.param("\ud7ff\U0010ffff\ufffd", "", id="the ends of Unicode"),
    ],
)  # fmt: skip
async def test_odd_texts_have_a_defined_answer(concord: Concord, text: str, language: str) -> None:
    before, odd, after = (await concord.sentiment(PRAISE, text, PRAISE)).sentiments
    assert before == after
    assert odd.language == language
    assert (odd.label == UNJUDGED) == (not language)


@pytest.mark.parametrize(
    ("texts", "field"), [(("mug\0",), "texts[0]"), (("mug", "x" * 10_001), "texts[1]"), (("mug",) * 129, "texts"), ((), "texts")]
)
async def test_what_breaks_a_rule_is_refused_by_name(concord: Concord, texts: tuple[str, ...], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await concord.sentiment(*texts)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_details(caught.value).field == field


async def test_the_command_line_asks_a_server(address: str, concord: Concord) -> None:
    text = "lovely great perfect price"
    words = [sys.executable, "-m", "cli.main", "sentiment", text, "привет", "--channel", "store", "--server", address]
    done = await asyncio.to_thread(subprocess.run, words, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (one,) = (await concord.sentiment(text)).sentiments
    lines = [line for line in done.stdout.splitlines() if "price" in line or "привет" in line]
    assert [part.strip() for part in lines[0].split("│")[1:-1]] == [
        text, "en", "positive", f"{one.score:+.2f}", f"{one.confidence:.2f}", f"price {one.score:+.2f}",
    ]  # fmt: skip
    assert [part.strip() for part in lines[1].split("│")[1:-1]] == ["привет", "", "unjudged", "+0.00", "0.00", ""]


async def judged(settings: ServerSettings, user_id: str, count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(30):
        while True:
            rows = query(settings, "SELECT language, score, model_version FROM event_sentiments WHERE user_id = %s ORDER BY score", user_id)
            if len(rows) == count:
                return rows
            await asyncio.sleep(0.05)


async def test_what_a_customer_says_in_one_channel_is_in_the_profile_that_all_see(
    address: str, concord: Concord, shop: ServerSettings, judging: tuple[Path, Manifest]
) -> None:
    name = uuid.uuid4().hex
    said = [concord.event(name, "review", item_id="i1", text=PRAISE), concord.event(name, "message", text=BLAME)]
    answer = await concord.record(*said, concord.event(name, "message", text="привет"), concord.event(name, "search", text=PRAISE))
    user_id = answer.tokens[0].user_id
    rows = await judged(shop, user_id, 3)
    assert [(row["language"], row["model_version"]) for row in rows] == [
        ("en", judging[1].model_version), ("en", judging[1].model_version), ("", judging[1].model_version),
    ]  # fmt: skip
    told = (await concord.sentiment(BLAME, PRAISE)).sentiments
    assert [row["score"] for row in rows] == [told[0].score, told[1].score, None]
    assert not (await concord.profile(name)).features.HasField("sentiment")
    await asyncio.to_thread(materialize, shop)
    async with Concord(address, channel="store", timeout=30.0) as store:
        profile = await store.profile(common_pb2.Subject(user_id=user_id))
    mean = (told[0].score + told[1].score) / 2
    assert profile.features.sentiment.text_count == 2
    assert profile.features.sentiment.mean_score == pytest.approx(mean)
    assert profile.features.sentiment.last_score in (told[0].score, told[1].score)
    assert profile.features.sentiment == (await concord.profile(name)).features.sentiment != CustomerSentiment()


def test_the_command_judges_a_history_that_no_server_has(new_shop: NewShop, judging: tuple[Path, Manifest], tmp_path: Path) -> None:
    settings = new_shop()
    serving.fill(settings, tmp_path)
    serving.deploy(settings, judging[0])
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute(
            "INSERT INTO events (user_id, event_id, channel, action, text, occurred_at) "
            "SELECT user_id, gen_random_uuid(), 'web', 'review', %s, now() FROM users WHERE merged_into IS NULL",
            [PRAISE],
        )
        counted = "SELECT count(*) FROM events WHERE action IN ('review', 'message') AND text <> ''"
        ((said,),) = connection.execute(counted).fetchall()
    names = {"CONCORD_POSTGRES_DSN": settings.postgres_dsn, "CONCORD_REDIS_URL": settings.redis_url, "CONCORD_DATA_DIR": str(tmp_path)}

    def judge(*options: str) -> str:
        words = [sys.executable, "-m", "cli.main", "judge", *options]
        done = subprocess.run(words, env=os.environ | names, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    version = judging[1].model_version
    assert judge() == f"{said} reviews and messages judged by {version}"
    assert judge() == f"0 reviews and messages judged by {version}"
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute("UPDATE event_sentiments SET model_version = 'older', score = -0.125")
    assert judge("--again") == f"{said} reviews and messages judged by {version}"
    assert query(settings, "SELECT count(*) AS n FROM event_sentiments WHERE score IS DISTINCT FROM -0.125") == [{"n": said}]


async def test_a_model_without_such_a_classifier_is_the_states_fault(live: ServerSettings) -> None:
    async with serving.served(live) as address, Concord(address, channel="web", timeout=10.0) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.sentiment("mug")
    assert (caught.value.code(), error_details(caught.value).reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_SENTIMENT_MODEL")
