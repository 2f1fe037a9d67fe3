"""Protobuf to domain and back: exact money and times, answers, profiles, features and models field by field."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from concord.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    common_pb2,
    features_pb2,
    features_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    profile_pb2,
    profile_pb2_grpc,
    recommendation_pb2,
    recommendation_pb2_grpc,
    understanding_pb2,
    understanding_pb2_grpc,
)
from features.catalogue import Item
from features.layout import Ages, Status
from features.models import OnUnready
from server.domain import EmbedQuery, FeatureTable, Purpose
from server.rpc import rules
from server.rpc.translate import datetime_of, micros_of, money_of, set_duration, timestamp_of, timestamp_of_micros
from server.understand.intents import IntentQuery
from tests.edge import serving
from tests.fakes import NOW, FakeCatalog, FakeFeatures, Fakes

SUBJECT = common_pb2.Subject(user_id="u1")


@given(st.integers(0, rules.MONEY_UNITS), st.integers(0, 999_999))
def test_money_survives_the_round_trip(units: int, micros: int) -> None:
    money = common_pb2.Money(currency_code="EUR", units=units, nanos=micros * 1_000)
    assert money_of(rules.price(money, "price"), "EUR") == money
    assert micros_of(money) == units * 1_000_000 + micros < 2**63


def test_no_amount_is_no_money() -> None:
    assert money_of(None, "") is None


@given(st.datetimes(rules.EARLIEST.replace(tzinfo=None), rules.LATEST.replace(tzinfo=None), timezones=st.just(UTC)))
def test_times_survive_the_round_trip(moment: datetime) -> None:
    stamp = timestamp_of(moment)
    assert stamp is not None
    assert datetime_of(stamp) == rules.moment(stamp, "occurred_at") == moment
    assert timestamp_of_micros((moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)) == stamp


def test_nanoseconds_are_cut() -> None:
    assert datetime_of(Timestamp(seconds=1, nanos=1_999)) == datetime(1970, 1, 1, 0, 0, 1, 1, tzinfo=UTC)
    set_duration(lasting := Duration(), 1.5)
    assert lasting == Duration(seconds=1, nanos=500_000_000)


async def test_an_answer_is_translated_field_by_field() -> None:
    async with serving() as edge:
        stub = recommendation_pb2_grpc.RecommendationServiceStub(edge.channel)
        answer = await stub.Recommend(recommendation_pb2.RecommendRequest(subject=SUBJECT, channel="web", surface="home"))
    assert [(item.item_id, item.position, item.score) for item in answer.items] == [("i1", 0, 1.0), ("i2", 1, 0.875)]
    assert answer.items[0].price == common_pb2.Money(currency_code="EUR", units=19, nanos=990_000_000)
    assert list(answer.items[0].reason_codes) == [
        recommendation_pb2.REASON_CODE_BOUGHT_TOGETHER,
        recommendation_pb2.REASON_CODE_POPULAR,
    ]
    assert list(answer.items[1].reason_codes) == [recommendation_pb2.REASON_CODE_NEW_CUSTOMER, recommendation_pb2.REASON_CODE_POPULAR]
    assert answer.versions == common_pb2.Versions(user_version=7, model_version="m1", index_version=3, offer_version=5)
    assert (answer.slate_id, answer.next_page_token, answer.user_id) == ("s1", "next", "u1")
    assert answer.degraded
    assert not answer.stale
    assert answer.consistency_token.startswith("c1.")
    assert answer.as_of.ToDatetime(UTC) == NOW
    assert [(timing.stage, timing.duration.nanos) for timing in answer.stage_timings] == [("features", 1_000_000), ("ranking", 2_500_000)]


async def test_rank_and_similar_pass_on_what_was_asked() -> None:
    async with serving() as edge:
        stub = recommendation_pb2_grpc.RecommendationServiceStub(edge.channel)
        await stub.RankItems(recommendation_pb2.RankItemsRequest(subject=SUBJECT, channel="app", surface="cart", item_ids=["b", "a", "b"]))
        similar = await stub.SimilarItems(recommendation_pb2.SimilarItemsRequest(item_id="i", channel="web"))
    rank, asked = edge.fakes.recommender.calls
    assert rank[1:] == ("app", "cart", ("b", "a"), None)
    assert asked[:3] == ("i", "web", 10)
    assert [item.similarity for item in similar.items] == [1.0, 0.875]


async def test_a_profile_is_translated_field_by_field() -> None:
    async with serving() as edge:
        profile = await profile_pb2_grpc.ProfileServiceStub(edge.channel).GetProfile(profile_pb2.GetProfileRequest(subject=SUBJECT))
    assert [identity.channel for identity in profile.identities] == ["app", "web"]
    assert profile.recent_behaviours[0].action == common_pb2.ACTION_SEARCH
    assert len(profile.recent_behaviours[0].text) == 160
    assert profile.as_of == Timestamp(seconds=1_700_000_000, nanos=123_456_000)
    assert profile.counters == profile_pb2.ActivityCounters(view_7d_count=3, purchase_28d_count=1, search_7d_count=1)
    assert profile.features.status == common_pb2.FEATURE_STATUS_PRESENT
    assert [(share.name, share.share) for share in profile.features.top_categories] == [("Kitchen", 0.75), ("Garden", 0.25)]
    assert not profile.features.top_brands
    assert profile.features.price_band == profile_pb2.PriceBand(low=10.5, mean=10.5, high=10.5)


def one_value(value: Any) -> FeatureTable:
    return FeatureTable({"v:f": [value]}, {"v": Ages([Status.STALE], [NOW])})


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("x", "string_value"),
        (2**63 - 1, "int64_value"),
        (0.5, "double_value"),
        (True, "bool_value"),
        (b"x", "bytes_value"),
        (["x"], "string_list_value"),
        ([1], "int64_list_value"),
        ([0.5], "double_list_value"),
        ([False], "bool_list_value"),
        ([], "string_list_value"),
    ],
)
async def test_feature_values_keep_their_kind(value: Any, kind: str) -> None:
    fakes = Fakes(features=FakeFeatures(table=one_value(value)))
    async with serving(fakes) as edge:
        answer = await features_pb2_grpc.FeatureServiceStub(edge.channel).GetOnlineFeatures(
            features_pb2.GetOnlineFeaturesRequest(feature_service="s", entities=[features_pb2.EntityRow(user_id="u")])
        )
    result = answer.rows[0].results[0]
    assert list(answer.feature_names) == ["v:f"]
    assert result.status == common_pb2.FEATURE_STATUS_STALE
    assert result.value.WhichOneof("kind") == kind
    sent = getattr(result.value, kind)
    assert (list(sent.values) if isinstance(value, list) else sent) == value


async def test_a_missing_feature_has_neither_value_nor_time() -> None:
    fakes = Fakes(features=FakeFeatures(table=one_value(None)))
    async with serving(fakes) as edge:
        answer = await features_pb2_grpc.FeatureServiceStub(edge.channel).GetOnlineFeatures(
            features_pb2.GetOnlineFeaturesRequest(
                features=features_pb2.FeatureList(feature_refs=["v:f"]), entities=[features_pb2.EntityRow(item_id="i")]
            )
        )
    assert answer.rows[0].results[0] == features_pb2.FeatureResult(status=common_pb2.FEATURE_STATUS_MISSING)
    assert fakes.features.calls[0][1] == ("v:f",)


async def test_features_of_several_entities_and_views_keep_their_places() -> None:
    """Rows of equal age are copies of one; asked twice, what was set in a copy must not have stayed in it."""
    late = NOW + timedelta(days=1)
    table = FeatureTable(
        {"b:x": [1, None, 3], "a:y": [None, "text", [0.5]], "b:z": [0.5, True, None]},
        {
            "a": Ages([Status.MISSING, Status.PRESENT, Status.PRESENT], [None, NOW, NOW]),
            "b": Ages([Status.PRESENT, Status.STALE, Status.PRESENT], [NOW, late, NOW]),
        },
    )
    fakes = Fakes(features=FakeFeatures(table=table))
    request = features_pb2.GetOnlineFeaturesRequest(feature_service="s", entities=[features_pb2.EntityRow(user_id="u")] * 3)
    async with serving(fakes) as edge:
        answers = [await features_pb2_grpc.FeatureServiceStub(edge.channel).GetOnlineFeatures(request) for _ in range(2)]
    present, stale = common_pb2.FEATURE_STATUS_PRESENT, common_pb2.FEATURE_STATUS_STALE
    missing = features_pb2.FeatureResult(status=common_pb2.FEATURE_STATUS_MISSING)

    def result(status: common_pb2.FeatureStatus.ValueType, at: datetime, **kind: Any) -> features_pb2.FeatureResult:
        return features_pb2.FeatureResult(value=features_pb2.FeatureValue(**kind), status=status, event_timestamp=timestamp_of(at))

    expected = [
        [result(present, NOW, int64_value=1), missing, result(present, NOW, double_value=0.5)],
        [missing, result(present, NOW, string_value="text"), result(stale, late, bool_value=True)],
        [
            result(present, NOW, int64_value=3),
            result(present, NOW, double_list_value=features_pb2.DoubleList(values=[0.5])),
            missing,
        ],
    ]
    for answer in answers:
        assert list(answer.feature_names) == ["b:x", "a:y", "b:z"]
        assert [list(row.results) for row in answer.rows] == expected


async def test_items_come_back_as_they_were_stored() -> None:
    item = catalog_pb2.Item(
        item_id="i1",
        title="'; DROP TABLE items; --",
        text="\u202eright to left 一致",
        price=common_pb2.Money(currency_code="EUR", units=5, nanos=10_000_000),
        stock=0,
        channels=["web", "store"],
        attributes={"k": "v"},
        listed_at=Timestamp(seconds=5),
    )
    async with serving() as edge:
        stub = catalog_pb2_grpc.CatalogServiceStub(edge.channel)
        stored = await stub.UpsertItems(catalog_pb2.UpsertItemsRequest(items=[item]))
        found = await stub.GetItems(catalog_pb2.GetItemsRequest(item_ids=["none", "i1", "i1"]))
    assert (stored.offer_version, stored.index_version, stored.index_pending) == (6, 2, True)
    assert list(found.items) == [item]
    assert list(found.not_found_item_ids) == ["none"]
    assert found.offer_version == 5


async def test_a_listing_goes_through_every_item_once() -> None:
    fakes = Fakes(catalog=FakeCatalog(items={f"i{n}": Item(f"i{n}", "t") for n in range(5)}))
    async with serving(fakes) as edge:
        stub = catalog_pb2_grpc.CatalogServiceStub(edge.channel)
        seen, token = [], ""
        for _ in range(3):
            page = await stub.ListItems(catalog_pb2.ListItemsRequest(page_size=2, page_token=token))
            seen += [item.item_id for item in page.items]
            token = page.next_page_token
    assert seen == ["i0", "i1", "i2", "i3", "i4"]
    assert token == ""


async def test_a_page_of_long_descriptions_ends_before_it_is_too_large_to_send() -> None:
    fakes = Fakes(catalog=FakeCatalog(items={f"i{n:03}": Item(f"i{n:03}", "t", "一" * 10_000) for n in range(200)}))
    async with serving(fakes) as edge:
        stub = catalog_pb2_grpc.CatalogServiceStub(edge.channel)
        first = await stub.ListItems(catalog_pb2.ListItemsRequest(page_size=200))
        second = await stub.ListItems(catalog_pb2.ListItemsRequest(page_size=200, page_token=first.next_page_token))
    assert 0 < len(first.items) < 200
    assert [item.item_id for item in (*first.items, *second.items)] == sorted(fakes.catalog.items)


async def test_models_are_translated_field_by_field() -> None:
    async with serving() as edge:
        stub = models_pb2_grpc.ModelServiceStub(edge.channel)
        models = (await stub.ListModels(models_pb2.ListModelsRequest())).models
        active = await stub.GetActiveModel(models_pb2.GetActiveModelRequest())
        moved = await stub.ActivateModel(models_pb2.ActivateModelRequest(model_version="m2"))
    assert [(model.model_version, model.active, model.loaded) for model in models] == [("m2", False, False), ("m1", True, True)]
    assert not models[0].HasField("activated_at")
    assert (active.model.metrics["ndcg_at_10"], active.model.feature_service, active.activation_count) == (0.25, "ranking_v1", 4)
    assert (moved.model_version, moved.previous_model_version, moved.activation_count) == ("m2", "m1", 5)


async def test_replicas_are_translated_field_by_field() -> None:
    async with serving() as edge:
        (replica,) = (await models_pb2_grpc.ModelServiceStub(edge.channel).ListReplicas(models_pb2.ListReplicasRequest())).replicas
    assert (replica.replica_id, replica.address, replica.live) == ("r1", "10.0.0.1:50051", True)
    assert (replica.model_version, replica.index_version, replica.config_fingerprint) == ("m1", 2, "c1")
    assert (replica.waits_for, replica.onnx_provider) == ("10.0.0.2:50051", "cpu")
    assert [(ready.model_version, list(ready.index_versions)) for ready in replica.ready] == [("m1", [1, 2])]
    assert dict(replica.failures) == {"m2": "BUNDLE_INVALID: no"}
    assert datetime_of(replica.seen_at) == datetime_of(replica.started_at) == NOW


@pytest.mark.parametrize(
    ("arguments", "deadline", "on_unready", "wait"),
    [
        ({}, 60.0, OnUnready.FAIL, (30.0, 30.0)),
        ({"wait": Duration(seconds=2, nanos=500_000_000)}, 60.0, OnUnready.FAIL, (2.5, 2.5)),
        (
            {"wait": Duration(seconds=50)},
            10.0,
            OnUnready.FAIL,
            (9.0, 9.9),
        ),  # within the deadline, with 0.3 s left to say who was late, by a clock 0.1 s coarse
        ({"on_unready": models_pb2.ACTIVATION_POLICY_WAIT}, 20.0, OnUnready.WAIT, (19.0, 19.9)),
        ({"on_unready": models_pb2.ACTIVATION_POLICY_WAIT}, None, OnUnready.WAIT, (4.7, 4.7)),  # the deadline the server sets
    ],
)
async def test_an_activation_waits_as_long_as_it_may(
    arguments: Any, deadline: float | None, on_unready: OnUnready, wait: tuple[float, float]
) -> None:
    async with serving() as edge:
        request = models_pb2.ActivateModelRequest(model_version="m2", **arguments)
        await models_pb2_grpc.ModelServiceStub(edge.channel).ActivateModel(request, timeout=deadline)
    ((version, policy, seconds),) = edge.fakes.models.calls
    assert (version, policy) == ("m2", on_unready)
    assert wait[0] <= seconds <= wait[1] + 1e-6


async def test_an_embedding_is_answered_whole() -> None:
    async with serving() as edge:
        answer = await understanding_pb2_grpc.UnderstandingServiceStub(edge.channel).EmbedText(
            understanding_pb2.EmbedTextRequest(
                channel="web", texts=["a red cup", " ", "long " * 300], purpose=understanding_pb2.EMBEDDING_PURPOSE_USER, max_tokens=9
            )
        )
    assert edge.fakes.embedder.calls == [EmbedQuery(("a red cup", " ", "long " * 300), Purpose.USER, 9)]
    assert answer.model_version == "m1"
    unit = [float(np.float32(0.6)), float(np.float32(0.8)), 0.0]
    assert [list(one.vector) for one in answer.embeddings] == [unit, [], unit]
    assert [(one.token_count, one.truncated) for one in answer.embeddings] == [(3, False), (0, False), (300, True)]


async def test_an_intent_is_answered_whole() -> None:
    async with serving() as edge:
        stub = understanding_pb2_grpc.UnderstandingServiceStub(edge.channel)
        answer = await stub.DetectIntent(understanding_pb2.DetectIntentRequest(channel="web", text="mug 19.99 2"))
        (most,) = (await stub.DetectIntent(understanding_pb2.DetectIntentRequest(channel="web", text="mug", top_k=1))).intents
    assert edge.fakes.intents.calls == [IntentQuery("mug 19.99 2", 3), IntentQuery("mug", 1)]
    assert [(one.name, one.probability) for one in answer.intents] == [("track_order", 0.875), ("get_refund", 0.125)]
    assert most.name == "track_order"
    item, price, quantity = answer.entities
    assert (item.kind, item.start, item.end, item.text) == (understanding_pb2.ENTITY_KIND_ITEM, 0, 3, "mug")
    assert (item.value, item.confidence, item.HasField("price")) == ("i1", 0.75, False)
    bound = understanding_pb2.PRICE_BOUND_MOST
    assert price.price == understanding_pb2.SpokenPrice(currency_code="EUR", units=19, nanos=990_000_000, bound=bound)
    assert (quantity.kind, quantity.quantity) == (understanding_pb2.ENTITY_KIND_QUANTITY, 2)
    told = (answer.in_scope, answer.token_count, answer.truncated, answer.model_version, answer.index_version)
    assert told == (True, 7, False, "m1", 3)


async def test_sentiments_are_answered_whole() -> None:
    texts = ["cheap 杯子", " ", "long " * 300]
    async with serving() as edge:
        answer = await understanding_pb2_grpc.UnderstandingServiceStub(edge.channel).AnalyzeSentiment(
            understanding_pb2.AnalyzeSentimentRequest(channel="web", texts=texts)
        )
    assert edge.fakes.sentiments.calls == [tuple(texts)]
    assert answer.model_version == "m1"
    positive, unjudged = understanding_pb2.SENTIMENT_LABEL_POSITIVE, understanding_pb2.SENTIMENT_LABEL_UNJUDGED
    assert [(one.label, one.score, one.confidence, one.language, one.truncated) for one in answer.sentiments] == [
        (positive, 0.75, 0.875, "en", False),
        (unjudged, 0.0, 0.0, "", False),
        (positive, 0.75, 0.875, "en", True),
    ]
    assert [list(one.aspects) for one in answer.sentiments] == [
        [understanding_pb2.AspectSentiment(aspect="price", term=word, start=0, end=len(word), label=positive, score=0.75, confidence=0.875)]
        if word
        else []
        for word in ("cheap", "", "long")
    ]
