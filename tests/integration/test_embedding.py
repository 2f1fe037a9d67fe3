"""EmbedText over a real server and a really trained encoder: bits of single runs in a crowd, odd texts, the active model."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest

from concord import Concord, error_details
from concord.v1.understanding_pb2 import EmbedTextResponse
from features.item_table import FloatArray
from server.inference.batching import Sharing
from server.inference.model import LoadedModel, load_model
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.integration.serving import served

WORDS = ("red", "enamel", "mug", "linen", "towel", "viewed", "bought", "where", "is", "my", "order", "unbelievably", "绿茶", "مرحبا", "🛒")


@pytest.fixture(scope="module")
def model(bundle: Path) -> LoadedModel:
    """The model that the server answers with, opened once more with a server's default of two threads."""
    return load_model(bundle, provider="cpu", threads=2)


@pytest.fixture(scope="module")
async def concord(live: ServerSettings) -> AsyncIterator[Concord]:
    async with served(live) as address, Concord(address, channel="web", timeout=30.0) as client:
        yield client


def alone(model: LoadedModel, text: str, purpose: str) -> FloatArray:
    limit = model.manifest.item_tokens if purpose == "item" else model.manifest.user_tokens
    return model.text_vectors([model.tokens(text, limit).ids], f"{purpose}_vector")[0]


def bits(answer: EmbedTextResponse) -> list[bytes]:
    return [np.array(one.vector, np.float32).tobytes() for one in answer.embeddings]


def sentences(count: int) -> list[str]:
    dice = random.Random(11)
    return [" ".join(dice.choices(WORDS, k=dice.randint(1, 40))) for _ in range(count)]


def test_this_encoder_may_batch_and_pad(model: LoadedModel) -> None:
    """Else the tests below would show nothing: texts would run alone."""
    assert model.sharing is Sharing.ANY_LENGTH


@pytest.mark.parametrize("output", ["item_vector", "user_vector"])
def test_no_length_and_no_padding_changes_a_bit(model: LoadedModel, output: str) -> None:
    rng = np.random.default_rng(5)
    rows = [rng.integers(1_000, 20_000, length).tolist() for length in range(2, model.manifest.user_tokens + 1)]
    singles = [model.text_vectors([row], output)[0].tobytes() for row in rows]
    together = model.text_vectors(rows, output)
    assert [vector.tobytes() for vector in together] == singles


async def test_sixty_four_callers_get_exactly_the_bits_of_single_runs(concord: Concord, model: LoadedModel) -> None:
    asked = sentences(64 * 6)

    async def caller(number: int) -> None:
        purpose = "user" if number % 4 == 0 else "item"
        for text in asked[number::64]:
            answer = await concord.embed(text, purpose=purpose)
            assert bits(answer) == [alone(model, text, purpose).tobytes()], text
            assert answer.model_version == model.model_version

    await asyncio.gather(*(caller(number) for number in range(64)))
    assert bits(await concord.embed(*asked[:128])) == [alone(model, text, "item").tobytes() for text in asked[:128]]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x" * 10_000, id="10,000 characters"),
        pytest.param("mug\x01\x02\x7f\u200b\u202e", id="control characters around a word"),
        pytest.param("Red mug 红色杯子 красная кружка κούπα", id="mixed scripts"),
        pytest.param("كوب أحمر \u202eabc\u202c ספל אדום", id="right to left"),
        pytest.param("🛒👩‍👩‍👧‍👦🎉", id="emoji only"),
        pytest.param("<b onclick=\"alert(1)\">mug</b><script>fetch('//x')</script>", id="HTML"),
        pytest.param("'; DROP TABLE users; -- \\' OR 1=1", id="SQL"),
        pytest.param("\ud7ff\U0010ffff\ufffd", id="the ends of Unicode"),
        pytest.param("%s %n {0} ${x} $(id)", id="formats"),
    ],
)
async def test_odd_texts_are_read_like_any_other(concord: Concord, model: LoadedModel, text: str) -> None:
    answer = await concord.embed("before", text, "after")
    assert bits(answer) == [alone(model, each, "item").tobytes() for each in ("before", text, "after")]
    odd = answer.embeddings[1]
    assert np.isclose(np.linalg.norm(odd.vector), 1, atol=1e-3)
    assert odd.token_count == len(model.tokens(text, model.manifest.item_tokens).ids) > 2
    assert odd.truncated == (len(model.tokenizer.encode(text).ids) > model.manifest.item_tokens)


@pytest.mark.parametrize("text", ["", "   ", "\t\n\r", "\x01\x02\x7f", "\u200b\u202e\u202c", "\ufffd"])
async def test_where_there_is_nothing_to_read_there_is_no_vector(concord: Concord, model: LoadedModel, text: str) -> None:
    answer = await concord.embed(text, "mug")
    assert [(len(one.vector), one.token_count) for one in answer.embeddings] == [(0, 0), (model.manifest.vector_size, 3)]


@pytest.mark.parametrize(
    ("texts", "field"),
    [(("mug\0",), "texts[0]"), (("mug", "x" * 10_001), "texts[1]"), (("mug",) * 129, "texts"), ((), "texts")],
)
async def test_what_breaks_a_rule_is_refused_by_name(concord: Concord, texts: Sequence[str], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await concord.embed(*texts)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_details(caught.value).field == field


async def test_until_a_model_is_active_the_state_is_at_fault(new_shop: NewShop) -> None:
    async with served(new_shop()) as address, Concord(address, channel="web", timeout=10.0) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.embed("mug")
    assert (caught.value.code(), error_details(caught.value).reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_ACTIVE_MODEL")
