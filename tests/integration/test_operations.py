"""What operators and backends do to a running shop: models, catalogue, identities, recovery, features, and an empty shop."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psycopg
import pytest
import redis

from concord import Concord, error_details, user
from concord.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    features_pb2,
    features_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    recommendation_pb2,
    recommendation_pb2_grpc,
)
from concord.v1.common_pb2 import Action, ChannelIdentity, FeatureStatus, Money, Subject
from features.bundle import ENCODER, MANIFEST, Manifest, read_bundle, write_manifest
from features.models import publish
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.integration.serving import served


@dataclass
class Running:
    settings: ServerSettings
    web: Concord
    app: Concord
    wire: grpc.aio.Channel


@pytest.fixture(scope="module")
async def running(live: ServerSettings) -> AsyncIterator[Running]:
    async with (
        served(live) as address,
        Concord(address, channel="web", timeout=10.0) as web,
        Concord(address, channel="app", timeout=10.0) as app,
        grpc.aio.insecure_channel(address) as wire,
    ):
        yield Running(live, web, app, wire)


def second_bundle(bundle: Path, folder: Path, version: str) -> Manifest:
    """The same model under another name: enough to tell which of two answered."""
    shutil.copytree(bundle, folder)
    manifest = read_bundle(folder).model_copy(update={"model_version": version})
    write_manifest(folder, manifest)
    return manifest


async def test_activation_and_roll_back_switch_every_answer(running: Running, bundle: Path, tmp_path: Path) -> None:
    models = models_pb2_grpc.ModelServiceStub(running.wire)
    before = await running.web.recommend("nobody", surface="home", limit=5)
    with psycopg.connect(running.settings.postgres_dsn) as connection:
        publish(connection, tmp_path / "b" if second_bundle(bundle, tmp_path / "b", "second-1") else tmp_path, running.settings.models_base)
    activated = await models.ActivateModel(models_pb2.ActivateModelRequest(model_version="second-1"), timeout=20)
    assert activated.previous_model_version == before.versions.model_version
    during = await running.app.recommend("nobody", surface="home", limit=5)
    assert during.versions.model_version == "second-1"
    listed = await models.ListModels(models_pb2.ListModelsRequest(), timeout=5)
    assert (listed.models[0].model_version, listed.models[0].active) == ("second-1", True)
    await models.ActivateModel(models_pb2.ActivateModelRequest(model_version=before.versions.model_version), timeout=20)
    after = await running.web.recommend("nobody", surface="home", limit=5)
    assert after.versions.model_version == before.versions.model_version
    assert after.slate_id == before.slate_id  # the slate of before still stands


@pytest.mark.parametrize("damage", ["bit flip", "truncated", "missing file", "not onnx"])
async def test_a_damaged_bundle_is_refused_and_the_old_model_answers(running: Running, bundle: Path, tmp_path: Path, damage: str) -> None:
    version = f"damaged-{damage.replace(' ', '-')}"
    second_bundle(bundle, tmp_path / "b", version)
    with psycopg.connect(running.settings.postgres_dsn) as connection:
        publish(connection, tmp_path / "b", running.settings.models_base)
    stored = Path(running.settings.models_base.removeprefix("file://")) / version / ENCODER
    content = bytearray(stored.read_bytes())
    if damage == "bit flip":
        content[len(content) // 2] ^= 1
        stored.write_bytes(content)
    elif damage == "truncated":
        stored.write_bytes(content[: len(content) // 2])
    elif damage == "missing file":
        stored.unlink()
    else:
        stored.write_text("this is text")
    before = await running.web.recommend("nobody", surface="home", limit=5)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await models_pb2_grpc.ModelServiceStub(running.wire).ActivateModel(
            models_pb2.ActivateModelRequest(model_version=version), timeout=20
        )
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error_details(refused.value).reason == "BUNDLE_INVALID"
    after = await running.web.recommend("nobody", surface="home", limit=5)
    assert after.items == before.items


async def test_a_model_never_published_is_not_found(running: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await models_pb2_grpc.ModelServiceStub(running.wire).ActivateModel(
            models_pb2.ActivateModelRequest(model_version="never"), timeout=5
        )
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert error_details(refused.value).reason == "MODEL_UNKNOWN"


async def test_a_graph_that_computes_something_else_is_caught_by_golden_outputs(bundle: Path, tmp_path: Path) -> None:
    import numpy as np

    from features.bundle import GOLDEN, BundleError, checksums
    from server.inference.model import load_model

    shutil.copytree(bundle, tmp_path / "b")
    golden = dict(np.load(tmp_path / "b" / GOLDEN))
    golden["ranker_scores"] = golden["ranker_scores"] + 0.01
    np.savez(tmp_path / "b" / GOLDEN, **golden)
    manifest = read_bundle(bundle).model_copy(update={"files": dict(checksums(tmp_path / "b"))})
    write_manifest(tmp_path / "b", manifest)
    assert (tmp_path / "b" / MANIFEST).exists()
    with pytest.raises(BundleError, match="scores differs from the golden output"):
        load_model(tmp_path / "b", provider="cpu", threads=1)


async def test_a_new_item_enters_the_index_and_is_encoded(running: Running) -> None:
    catalog = catalog_pb2_grpc.CatalogServiceStub(running.wire)
    item = catalog_pb2.Item(
        item_id="NEW-1", title="Brand new ceramic coffee mug", category="kitchen/coffee", price=Money(currency_code="USD", units=9)
    )
    answer = await catalog.UpsertItems(catalog_pb2.UpsertItemsRequest(items=[item]), timeout=10)
    assert answer.redescribed_count == 1
    async with asyncio.timeout(10):
        while (await running.web.recommend("nobody", surface="home")).versions.index_version <= answer.index_version:
            await asyncio.sleep(0.05)
    similar = await running.web.similar("NEW-1", limit=5)
    assert len(similar.items) == 5
    again = await catalog.UpsertItems(catalog_pb2.UpsertItemsRequest(items=[item]), timeout=10)
    assert (again.redescribed_count, again.offer_changed_count) == (0, 0)
    found = await catalog.GetItems(catalog_pb2.GetItemsRequest(item_ids=["NEW-1", "none"]), timeout=5)
    assert found.items[0].title == item.title
    assert list(found.not_found_item_ids) == ["none"]


async def test_linking_two_channels_makes_one_customer(running: Running) -> None:
    web = await running.web.record(running.web.event("cookie-7", "view", item_id="a"), running.web.event("cookie-7", "view", item_id="b"))
    app = await running.app.record(running.app.event("app-7", "purchase", item_id="c", quantity=1, value=3.0))
    separate = {web.tokens[0].user_id, app.tokens[0].user_id}
    assert len(separate) == 2
    linked = await running.app.link("app-7", Subject(identity=ChannelIdentity(channel="web", channel_user_id="cookie-7")))
    assert linked.user_id in separate
    for client, token in ((running.web, web.tokens[0]), (running.app, app.tokens[0])):
        customer = "cookie-7" if client is running.web else "app-7"
        profile = await client.profile(customer, consistency_token=token.consistency_token)
        assert profile.user_id == linked.user_id
        assert {b.item_id for b in profile.recent_behaviours} == {"a", "b", "c"}
        assert profile.user_version > max(web.tokens[0].user_version, app.tokens[0].user_version)
    # The id that was merged away still names the customer.
    loser = (separate - {linked.user_id}).pop()
    answer = await running.web.recommend(user(loser), surface="home", limit=3)
    assert answer.user_id == linked.user_id
    again = await running.app.link("app-7", Subject(identity=ChannelIdentity(channel="web", channel_user_id="cookie-7")))
    assert again.user_id == linked.user_id
    more = await running.web.record(running.web.event(user(loser), "view", item_id="d"))
    assert more.tokens[0].user_id == linked.user_id


async def test_linking_an_identity_nobody_has_met_changes_no_version(running: Running) -> None:
    recorded = await running.web.record(running.web.event("solo-1", "view", item_id="a"))
    linked = await running.app.link("solo-app-1", user(recorded.tokens[0].user_id))
    assert (linked.user_id, linked.user_version, linked.merged_user_id) == (recorded.tokens[0].user_id, 1, "")
    assert (await running.app.profile("solo-app-1")).user_id == linked.user_id
    strangers = await running.app.link("solo-app-2", Subject(identity=ChannelIdentity(channel="web", channel_user_id="solo-web-2")))
    assert (strangers.user_version, strangers.merged_user_id) == (0, "")
    assert (await running.web.profile("solo-web-2")).user_id == strangers.user_id


async def test_an_outbox_entry_is_recovered(running: Running) -> None:
    recorded = await running.web.record(running.web.event("lost-1", "view", item_id="a"))
    owner = recorded.tokens[0].user_id
    client = redis.Redis.from_url(running.settings.redis_url)
    key = next(key for key in client.keys("*") if owner.encode() in key and not key.startswith(b"concord:"))
    await asyncio.sleep(0.3)  # the entry of the write itself is removed in the background
    client.delete(key)
    with psycopg.connect(running.settings.postgres_dsn) as connection:
        connection.execute("INSERT INTO online_outbox VALUES (%s, 1, now() - interval '1 minute')", [owner])
    async with asyncio.timeout(10):
        while not client.exists(key):
            await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        while _outbox(running.settings, owner):
            await asyncio.sleep(0.05)


def _outbox(settings: ServerSettings, owner: str) -> int:
    with psycopg.connect(settings.postgres_dsn) as connection:
        row = connection.execute("SELECT count(*) FROM online_outbox WHERE user_id = %s", [owner]).fetchone()
    return int(row[0]) if row else 0


async def test_one_bad_event_is_rejected_and_the_rest_is_stored(running: Running) -> None:
    good = running.web.event("mixed-1", "view", item_id="a")
    bad = running.web.event("mixed-1", "view", item_id="")
    unknown = running.web.event(user("u-none"), "view", item_id="a")
    answer = await running.web.record(good, bad, unknown)
    assert [bool(result.reason) for result in answer.results] == [False, True, True]
    assert answer.results[1].reason == "ITEM_ID_REQUIRED"
    assert answer.results[2].reason == "SUBJECT_UNKNOWN"
    assert [token.user_version for token in answer.tokens] == [1]


async def test_stream_events_acknowledges_in_order(running: Running) -> None:
    stub = events_pb2_grpc.EventServiceStub(running.wire)
    whom = Subject(identity=ChannelIdentity(channel="web", channel_user_id="stream-1"))

    async def requests() -> AsyncIterator[events_pb2.StreamEventsRequest]:
        for sequence in range(1, 21):
            event = events_pb2.Event(subject=whom, channel="web", action=Action.ACTION_VIEW, item_id=f"i{sequence}")
            yield events_pb2.StreamEventsRequest(sequence=sequence, events=[event])

    answers = [answer async for answer in stub.StreamEvents(requests(), timeout=20)]
    assert [answer.sequence for answer in answers] == list(range(1, 21))
    assert (await running.web.profile("stream-1")).user_version == 20


async def test_online_features_by_service_and_by_name(running: Running) -> None:
    stub = features_pb2_grpc.FeatureServiceStub(running.wire)
    recorded = await running.web.record(running.web.event("feat-1", "view", item_id="a"))
    row = features_pb2.EntityRow(user_id=recorded.tokens[0].user_id, consistency_token=recorded.tokens[0].consistency_token)
    absent = features_pb2.EntityRow(user_id="nobody-at-all")
    answer = await stub.GetOnlineFeatures(
        features_pb2.GetOnlineFeaturesRequest(feature_service="profile_v1", entities=[row, absent]), timeout=5
    )
    at = list(answer.feature_names).index("user_activity:version")
    assert answer.rows[0].results[at].value.int64_value == 1
    assert answer.rows[0].results[at].status == FeatureStatus.FEATURE_STATUS_PRESENT
    assert answer.rows[1].results[at].status == FeatureStatus.FEATURE_STATUS_MISSING
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stub.GetOnlineFeatures(features_pb2.GetOnlineFeaturesRequest(feature_service="none", entities=[row]), timeout=5)
    assert error_details(unknown.value).reason == "FEATURE_SERVICE_UNKNOWN"


async def test_bad_requests_name_the_field(running: Running) -> None:
    stub = recommendation_pb2_grpc.RecommendationServiceStub(running.wire)
    whom = Subject(identity=ChannelIdentity(channel="web", channel_user_id="x"))
    cases = {
        "channel": recommendation_pb2.RecommendRequest(subject=whom, channel="fax", surface="home"),
        "subject": recommendation_pb2.RecommendRequest(channel="web", surface="home"),
        "limit": recommendation_pb2.RecommendRequest(subject=whom, channel="web", surface="home", limit=1000),
        "surface": recommendation_pb2.RecommendRequest(subject=whom, channel="web", surface="moon"),
        "page_token": recommendation_pb2.RecommendRequest(subject=whom, channel="web", surface="home", page_token="?"),
        "consistency_token": recommendation_pb2.RecommendRequest(subject=whom, channel="web", surface="home", consistency_token="?"),
    }
    for field, request in cases.items():
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Recommend(request, timeout=5)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error_details(refused.value).field.startswith(field), field
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Recommend(
            recommendation_pb2.RecommendRequest(subject=Subject(user_id="nobody"), channel="web", surface="home"), timeout=5
        )
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_empty_shop_answers_sensibly(new_shop: NewShop) -> None:
    settings = new_shop()
    async with (
        served(settings) as address,
        Concord(address, channel="web", timeout=10.0) as web,
        grpc.aio.insecure_channel(address) as wire,
    ):
        empty = await web.recommend("someone", surface="home")
        assert list(empty.items) == []
        assert "NO_ACTIVE_MODEL" in empty.degraded_reasons
        items = [catalog_pb2.Item(item_id=f"i{k}", title=f"thing {k}", price=Money(currency_code="EUR", units=k + 1)) for k in range(3)]
        await catalog_pb2_grpc.CatalogServiceStub(wire).UpsertItems(catalog_pb2.UpsertItemsRequest(items=items), timeout=10)
        async with asyncio.timeout(10):
            while len((await web.recommend("someone", surface="home")).items) < 3:
                await asyncio.sleep(0.05)
        recorded = await web.record(web.event("someone", "view", item_id="i2"))
        assert recorded.tokens[0].user_version == 1
        answer = await web.recommend("someone", surface="home")
        assert answer.degraded
        assert answer.versions.user_version == 1
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await web.similar("i1")
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
