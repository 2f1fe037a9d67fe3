"""The sequence tower on a real shop: trained from the feature store, exported, published, activated, and served to every channel."""

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psycopg
import pytest

from concord import Concord, user
from concord.v1.recommendation_pb2 import RecommendResponse
from features.bundle import Manifest, read_bundle
from server.inference.model import load_model
from server.settings import ServerSettings
from tests.integration import serving
from tests.integration.fixtures import NewShop
from training import checkpoint
from training.config import TrainConfig
from training.dataset import join_customers, open_shop
from training.events import to_micros
from training.run import TrainResult, evaluate, export, train

CHANNELS = ("web", "app", "mini_program", "messaging", "store")


@pytest.fixture(scope="module")
def trained(new_shop: NewShop, tmp_path_factory: pytest.TempPathFactory) -> tuple[ServerSettings, TrainResult]:
    settings = new_shop()
    serving.fill(settings, tmp_path_factory.mktemp("sample"))
    return settings, train(settings, replace(TrainConfig.tiny(), tower="sequence", evaluation_users=0, sequence_epochs=4, max_steps=0))


@pytest.fixture(scope="module")
def bundle(trained: tuple[ServerSettings, TrainResult], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    settings, result = trained
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return folder, export(settings, result.run_dir, folder)


@pytest.fixture(scope="module")
async def clients(trained: tuple[ServerSettings, TrainResult], bundle: tuple[Path, Manifest]) -> AsyncIterator[dict[str, Concord]]:
    """A client per channel, spread over two replicas that answer with the tower."""
    settings = trained[0]
    serving.deploy(settings, bundle[0])
    async with serving.served(settings) as first, serving.served(settings) as second:
        made = {channel: Concord(second if k % 2 else first, channel=channel, timeout=10.0) for k, channel in enumerate(CHANNELS)}
        for client in made.values():
            await client.__aenter__()
        yield made
        for client in made.values():
            await client.__aexit__()


def customers(settings: ServerSettings, count: int) -> list[str]:
    query = "SELECT user_id FROM users WHERE version > 20 ORDER BY user_id LIMIT %s"
    with psycopg.connect(settings.postgres_dsn) as connection:
        return [row[0] for row in connection.execute(query, [count])]


async def everywhere(clients: dict[str, Concord], customer: str) -> list[RecommendResponse]:
    return list(await asyncio.gather(*(client.recommend(user(customer), surface="home", limit=100) for client in clients.values())))


def test_evaluating_the_run_again_gives_its_figures(trained: tuple[ServerSettings, TrainResult]) -> None:
    settings, result = trained
    again = evaluate(settings, result.run_dir)
    for name in ("ndcg_at_10", "tower_ndcg_at_10", "collaborative_ndcg_at_10"):
        assert math.isclose(again[name], result.metrics[name], abs_tol=1e-6), name
    assert result.metrics["ndcg_at_10"] > 3 * max(result.metrics["popularity_ndcg_at_10"], 0.01)
    assert result.metrics["tower_validation_ndcg_at_10"] > result.metrics["untrained_tower_validation_ndcg_at_10"]


def test_the_bundle_is_of_the_sequence_tower(bundle: tuple[Path, Manifest]) -> None:
    folder, manifest = bundle
    assert read_bundle(folder) == manifest
    assert manifest.tower == manifest.settings["tower"] == "sequence"
    assert manifest.sequence is not None
    assert {"purchase", "search", "view"} <= set(manifest.sequence.actions)
    assert len(manifest.sequence.channels) >= 3
    assert max(manifest.parity.values()) < 1e-4


def test_what_the_server_reads_online_is_what_training_joined(
    trained: tuple[ServerSettings, TrainResult], bundle: tuple[Path, Manifest]
) -> None:
    """From the feature store's point-in-time rows to the vector: PyTorch on one side, the bundle's graphs on the other."""
    settings, result = trained
    model, run = load_model(bundle[0], provider="cpu", threads=1), checkpoint.load(result.run_dir)[0]
    shop = open_shop(settings)
    keys = [(name, to_micros(serving.NOW)) for name in customers(settings, 8)]
    activities = [joined.activity for joined in join_customers(shop.store, keys).values()]
    assert any(not behaviour.item_id and behaviour.text for activity in activities for behaviour in activity.behaviours)
    expected = run.user_vectors(activities, shop.table, model.item_vectors)
    for activity, vector in zip(activities, expected, strict=True):
        seen = model.user_vector(activity, shop.table, model.item_vectors)
        assert seen is not None
        assert np.abs(seen - vector).max() < 1e-5


async def test_all_channels_and_replicas_answer_the_same(trained: tuple[ServerSettings, TrainResult], clients: dict[str, Concord]) -> None:
    shown = []
    for customer in customers(trained[0], 6):
        answers = await everywhere(clients, customer)
        common = set.intersection(*({item.item_id for item in answer.items} for answer in answers))
        lists = [[(item.item_id, item.score) for item in answer.items if item.item_id in common] for answer in answers]
        assert len(lists[0]) >= 50
        assert all(other == lists[0] for other in lists)
        assert len({answer.slate_id for answer in answers}) == 1
        assert not any(answer.degraded_reasons for answer in answers)
        shown.append(tuple(lists[0]))
    assert len(set(shown)) == len(shown)


async def test_a_search_in_one_channel_changes_the_answer_in_every_other(
    trained: tuple[ServerSettings, TrainResult], clients: dict[str, Concord]
) -> None:
    """A text has no weight in the history: only the tower reads it, on whichever replica comes first."""
    customer = customers(trained[0], 1)[0]
    before = (await everywhere(clients, customer))[0]
    recorded = await clients["messaging"].record(clients["messaging"].event(user(customer), "search", text="a warm blanket for the baby"))
    token = recorded.tokens[0].consistency_token
    after = await asyncio.gather(
        *(client.recommend(user(customer), surface="home", limit=100, consistency_token=token) for client in clients.values())
    )
    assert len({answer.slate_id for answer in after}) == 1
    scores = [{item.item_id: item.score for item in answer.items} for answer in (before, after[0])]
    common = scores[0].keys() & scores[1].keys()
    assert any(scores[0][item] != scores[1][item] for item in common)
