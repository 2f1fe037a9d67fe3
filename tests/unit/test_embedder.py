"""From texts to vectors over a real bundle: the bits of single runs in any company, limits, nothing to read, models that change."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from features.signals import CollaborativeWeights
from server.domain import Embedded, EmbedQuery, Purpose
from server.errors import OverloadedError, PreconditionError
from server.inference.batching import Sharing
from server.inference.model import LoadedModel, load_model
from server.metrics import Metrics
from server.recommend.computing import Computing
from server.recommend.snapshot import Snapshot
from server.recommend.standing import Standings
from server.understand.embedder import Embedder
from server.understand.text_runs import TextRuns
from tests.unit.bundles import write_bundle
from tests.unit.tables import table

WORDS = ("title", "text", "viewed", "bought", *(f"i{k:03d}" for k in range(10)))


@dataclass
class Fleet:
    """Stands at a model, or at none."""

    model: LoadedModel | None

    async def of_nobody(self) -> Any:
        return SimpleNamespace(snapshot=Snapshot(self.model, table(1), np.zeros((1, 0), np.float32), CollaborativeWeights.empty(1)))


class Arithmetic:
    """An encoder whose rows depend on nothing but their own tokens: what goes wrong on the way to it or back shows in the bits."""

    def __init__(self, words: int) -> None:
        self._vectors = np.random.default_rng(3).standard_normal((words, 16)).astype(np.float32)

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        sign = 1 if outputs == ["item_vector"] else -1
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        sums = [sign * self._vectors[ids[mask == 1]].sum(axis=0) for ids, mask in pairs]
        return [np.stack([total / np.linalg.norm(total) for total in sums])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder, table(10))
    loaded = load_model(folder, provider="cpu", threads=1)
    return replace(loaded, encoder=cast("Any", Arithmetic(loaded.tokenizer.get_vocab_size())), sharing=Sharing.ANY_LENGTH)


class Room:
    """An embedder over two threads, with what it counted; ``fleet.model`` is the active one."""

    def __init__(self, model: LoadedModel | None, *, waiting: int = 512) -> None:
        self.fleet = Fleet(model)
        self.registry = CollectorRegistry()
        standings = cast("Standings", self.fleet)
        self.computing = Computing(threads=2, waiting=8)
        self.runs = TextRuns(self.computing, batches=2, waiting=waiting, metrics=Metrics(self.registry))
        self.embedder = Embedder(standings, self.runs)

    async def ask(self, *texts: str, purpose: Purpose = Purpose.ITEM, max_tokens: int = 0) -> Embedded:
        return await self.embedder.embed(EmbedQuery(texts, purpose, max_tokens))

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def texts(count: int, *, seed: int = 1) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(1, 30))) for _ in range(count)]


def bits(embedded: Embedded) -> list[bytes]:
    return [b"" if one.vector is None else one.vector.tobytes() for one in embedded.embeddings]


def alone(model: LoadedModel, some: Sequence[str]) -> list[bytes]:
    return [model.item_vector(text).tobytes() for text in some]


@pytest.mark.parametrize("sharing", list(Sharing))
async def test_sixty_four_callers_get_the_bits_of_single_runs(model: LoadedModel, sharing: Sharing) -> None:
    room, asked = Room(replace(model, sharing=sharing), waiting=640), texts(640)
    answers = await asyncio.gather(*(room.ask(*asked[k::64]) for k in range(64)))
    for k, answer in enumerate(answers):
        assert bits(answer) == alone(model, asked[k::64])
    runs, ran = room.count("concord_encode_batch_texts_count"), room.count("concord_encode_batch_texts_sum")
    assert ran == 640
    assert (runs == 640) == (sharing is Sharing.NONE)


async def test_both_purposes_at_once_keep_to_their_heads(model: LoadedModel) -> None:
    room, asked = Room(model), texts(40)
    items, users = await asyncio.gather(room.ask(*asked), room.ask(*asked, purpose=Purpose.USER))
    assert bits(items) == alone(model, asked)
    whole = [model.tokens(text, model.manifest.user_tokens).ids for text in asked]
    assert bits(users) == [model.text_vectors([ids], "user_vector")[0].tobytes() for ids in whole]
    assert bits(items) != bits(users)


async def test_a_text_is_read_as_far_as_the_model_or_the_caller_says(model: LoadedModel) -> None:
    room, long = Room(model), " ".join(["title"] * 100)
    (item,), (user,) = (await room.ask(long)).embeddings, (await room.ask(long, purpose=Purpose.USER)).embeddings
    assert [(one.token_count, one.truncated) for one in (item, user)] == [(16, True), (24, True)]
    (short,), (vast,) = (await room.ask(long, max_tokens=5)).embeddings, (await room.ask(long, max_tokens=512)).embeddings
    assert (short.token_count, short.truncated, vast.token_count) == (5, True, 16)
    (whole,) = (await room.ask("title text")).embeddings
    assert (whole.token_count, whole.truncated) == (2, False)


async def test_where_there_is_nothing_to_read_there_is_no_vector_and_the_others_are_answered(model: LoadedModel) -> None:
    answer = await Room(model).ask("", "title", " \t\n", "text")
    assert [(one.vector is None, one.token_count) for one in answer.embeddings] == [(True, 0), (False, 1), (True, 0), (False, 1)]
    assert bits(answer)[1::2] == alone(model, ["title", "text"])
    nothing = await Room(model).ask("", "")
    assert [one.vector for one in nothing.embeddings] == [None, None]


async def test_an_answer_is_one_models_and_says_which(model: LoadedModel) -> None:
    other = replace(model, manifest=model.manifest.model_copy(update={"model_version": "m2"}))
    room, asked = Room(model), texts(30)
    first = asyncio.ensure_future(room.ask(*asked))
    await asyncio.sleep(0)
    room.fleet.model = other
    answers = [await first, await room.ask(*asked)]
    assert [answer.model_version for answer in answers] == ["m1", "m2"]
    assert bits(answers[0]) == bits(answers[1]) == alone(model, asked)


async def test_without_an_active_model_the_state_is_at_fault() -> None:
    with pytest.raises(PreconditionError) as caught:
        await Room(None).ask("title")
    assert caught.value.reason == "NO_ACTIVE_MODEL"


async def test_more_than_may_wait_is_turned_away(model: LoadedModel) -> None:
    room = Room(model, waiting=3)
    with pytest.raises(OverloadedError) as caught:
        await room.ask(*texts(4))
    assert caught.value.reason == "ENCODE_QUEUE_FULL"
    assert room.runs.waiting_count == 0
    assert len((await room.ask(*texts(3))).embeddings) == 3


async def test_stages_are_told(model: LoadedModel) -> None:
    room = Room(model)
    await room.ask("title", "text")
    assert [room.count("concord_encode_stage_seconds_count", stage=stage) for stage in ("tokenize", "encode")] == [1, 1]


async def test_texts_of_nobody_who_stayed_are_not_encoded(model: LoadedModel) -> None:
    room = Room(model)
    for _ in range(2):  # both threads are taken
        await room.computing._gate.enter()
    leaving = [asyncio.ensure_future(room.ask(*texts(5, seed=k))) for k in range(4)]
    while room.runs.waiting_count < 20:
        await asyncio.sleep(0.001)
    for call in leaving:
        call.cancel()
    await asyncio.wait(leaving)
    for _ in range(2):
        room.computing._gate.leave()
    assert bits(await room.ask("title")) == alone(model, ["title"])
    assert room.count("concord_encode_batch_texts_sum") == 1
