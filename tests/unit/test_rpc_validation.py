"""The validation layer over a real server: for each rule of the contract, the field and reason a violation is answered with."""

import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from concord.v1 import catalog_pb2, common_pb2, features_pb2, identity_pb2, models_pb2, profile_pb2, recommendation_pb2, understanding_pb2
from server import tokens
from server.domain import EntityKey, ItemFilter, RecommendQuery, Subject, Token
from tests.edge import Edge, refusal, serving
from tests.fakes import Script

USER = common_pb2.Subject(user_id="u1")
TOKEN = tokens.encode(Token("u1", 3))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def edge() -> AsyncIterator[Edge]:
    async with serving() as running:
        yield running


def identity(channel: str = "web", channel_user_id: str = "a") -> common_pb2.ChannelIdentity:
    return common_pb2.ChannelIdentity(channel=channel, channel_user_id=channel_user_id)


def money(units: int = 1, nanos: int = 0, currency_code: str = "EUR") -> common_pb2.Money:
    return common_pb2.Money(currency_code=currency_code, units=units, nanos=nanos)


def recommend(**changes: Any) -> recommendation_pb2.RecommendRequest:
    return recommendation_pb2.RecommendRequest(**{"subject": USER, "channel": "web", "surface": "home"} | changes)


def rank(**changes: Any) -> recommendation_pb2.RankItemsRequest:
    return recommendation_pb2.RankItemsRequest(**{"subject": USER, "channel": "web", "surface": "home", "item_ids": ["i"]} | changes)


def similar(**changes: Any) -> recommendation_pb2.SimilarItemsRequest:
    return recommendation_pb2.SimilarItemsRequest(**{"item_id": "i", "channel": "web"} | changes)


def wanted(**conditions: Any) -> recommendation_pb2.RecommendRequest:
    return recommend(filter=recommendation_pb2.ItemFilter(**conditions))


def item(**changes: Any) -> catalog_pb2.UpsertItemsRequest:
    return catalog_pb2.UpsertItemsRequest(
        items=[catalog_pb2.Item(item_id="ok", title="t"), catalog_pb2.Item(**{"item_id": "i", "title": "t"} | changes)]
    )


def relation(**changes: Any) -> catalog_pb2.UpsertItemsRequest:
    base = {"item_id": "i", "related_item_id": "j", "kind": catalog_pb2.RELATION_KIND_COMPLEMENT}
    return catalog_pb2.UpsertItemsRequest(relations=[catalog_pb2.ItemRelation(**base | changes)])


def features(**changes: Any) -> features_pb2.GetOnlineFeaturesRequest:
    if "feature_refs" in changes:
        changes["features"] = features_pb2.FeatureList(feature_refs=changes.pop("feature_refs"))
    else:
        changes.setdefault("feature_service", "profile_v1")
    return features_pb2.GetOnlineFeaturesRequest(**{"entities": [features_pb2.EntityRow(user_id="u")]} | changes)


def no_selection() -> features_pb2.GetOnlineFeaturesRequest:
    return features_pb2.GetOnlineFeaturesRequest(entities=[features_pb2.EntityRow(user_id="u")])


def link(**changes: Any) -> identity_pb2.LinkIdentitiesRequest:
    return identity_pb2.LinkIdentitiesRequest(**{"identity": identity(), "subject": USER} | changes)


def intent(**changes: Any) -> understanding_pb2.DetectIntentRequest:
    return understanding_pb2.DetectIntentRequest(**{"channel": "web", "text": "t"} | changes)


def embed(**changes: Any) -> understanding_pb2.EmbedTextRequest:
    base = {"channel": "web", "texts": ["t"], "purpose": understanding_pb2.EMBEDDING_PURPOSE_ITEM}
    return understanding_pb2.EmbedTextRequest(**base | changes)


def analyze(**changes: Any) -> understanding_pb2.AnalyzeSentimentRequest:
    return understanding_pb2.AnalyzeSentimentRequest(**{"channel": "web", "texts": ["t"]} | changes)


METHODS = {
    recommendation_pb2.RecommendRequest: "RecommendationService/Recommend",
    recommendation_pb2.RankItemsRequest: "RecommendationService/RankItems",
    recommendation_pb2.SimilarItemsRequest: "RecommendationService/SimilarItems",
    catalog_pb2.UpsertItemsRequest: "CatalogService/UpsertItems",
    catalog_pb2.GetItemsRequest: "CatalogService/GetItems",
    catalog_pb2.ListItemsRequest: "CatalogService/ListItems",
    features_pb2.GetOnlineFeaturesRequest: "FeatureService/GetOnlineFeatures",
    identity_pb2.ResolveIdentityRequest: "IdentityService/ResolveIdentity",
    identity_pb2.LinkIdentitiesRequest: "IdentityService/LinkIdentities",
    profile_pb2.GetProfileRequest: "ProfileService/GetProfile",
    models_pb2.ActivateModelRequest: "ModelService/ActivateModel",
    understanding_pb2.EmbedTextRequest: "UnderstandingService/EmbedText",
    understanding_pb2.DetectIntentRequest: "UnderstandingService/DetectIntent",
    understanding_pb2.AnalyzeSentimentRequest: "UnderstandingService/AnalyzeSentiment",
}

VIOLATIONS: list[tuple[Message, str, str]] = [
    # who
    (recommend(subject=None), "subject", "is required: a user_id or an identity"),
    (recommend(subject=common_pb2.Subject()), "subject", "is required: a user_id or an identity"),
    (recommend(subject=common_pb2.Subject(user_id="")), "subject.user_id", "is required"),
    (recommend(subject=common_pb2.Subject(user_id="u" * 129)), "subject.user_id", "must have at most 128 characters"),
    (recommend(subject=common_pb2.Subject(user_id="u\0")), "subject.user_id", "must not contain NUL (U+0000)"),
    (recommend(subject=common_pb2.Subject(identity=identity(channel="fax"))), "subject.identity.channel", "must be a registered channel"),
    (recommend(subject=common_pb2.Subject(identity=identity("web", ""))), "subject.identity.channel_user_id", "is required"),
    (
        recommend(subject=common_pb2.Subject(identity=identity("web", "x" * 257))),
        "subject.identity.channel_user_id",
        "must have at most 256 characters",
    ),
    (profile_pb2.GetProfileRequest(), "subject", "is required: a user_id or an identity"),
    (identity_pb2.ResolveIdentityRequest(), "identity.channel_user_id", "is required"),
    (identity_pb2.ResolveIdentityRequest(identity=identity("")), "identity.channel", "is required: a registered channel"),
    (link(subject=None), "subject", "is required: a user_id or an identity"),
    (link(identity=identity("fax")), "identity.channel", "must be a registered channel"),
    # where
    (recommend(channel=""), "channel", "is required: a registered channel"),
    (recommend(channel="Web"), "channel", "must be a registered channel"),
    (recommend(surface="moon"), "surface", "must be a registered surface"),
    (rank(surface=""), "surface", "is required: a registered surface"),
    (rank(channel="web "), "channel", "must be a registered channel"),
    (similar(channel="fax"), "channel", "must be a registered channel"),
    # pages and tokens
    (recommend(limit=-1), "limit", "must be 1 to 100, or 0 for 10"),
    (recommend(limit=101), "limit", "must be 1 to 100, or 0 for 10"),
    (similar(limit=2**31 - 1), "limit", "must be 1 to 100, or 0 for 10"),
    (recommend(page_token="p" * 1025), "page_token", "must have at most 1024 characters"),
    (recommend(consistency_token="c1.x"), "consistency_token", "must be a token returned by this service, unchanged"),
    (recommend(consistency_token="c" * 1025), "consistency_token", "must have at most 1024 characters"),
    (rank(consistency_token="x"), "consistency_token", "must be a token returned by this service, unchanged"),
    (
        profile_pb2.GetProfileRequest(subject=USER, consistency_token="x"),
        "consistency_token",
        "must be a token returned by this service, unchanged",
    ),
    (catalog_pb2.ListItemsRequest(page_size=1001), "page_size", "must be 1 to 1000, or 0 for 100"),
    (catalog_pb2.ListItemsRequest(page_token="l1."), "page_token", "must be a token returned by this service, unchanged"),
    (catalog_pb2.ListItemsRequest(page_token="aTE"), "page_token", "must be a token returned by this service, unchanged"),
    (catalog_pb2.ListItemsRequest(category="c" * 201), "category", "must have at most 200 characters"),
    # texts
    (embed(channel=""), "channel", "is required: a registered channel"),
    (embed(texts=[]), "texts", "must have 1 to 128 elements"),
    (embed(texts=["t"] * 129), "texts", "must have 1 to 128 elements"),
    (embed(texts=["t", "t" * 10_001]), "texts[1]", "must have at most 10000 characters"),
    (embed(texts=["t" * 10_000] * 10 + ["t"]), "texts", "must have at most 100,000 characters together"),
    (embed(texts=["a\0b"]), "texts[0]", "must not contain NUL (U+0000)"),
    (embed(purpose=0), "purpose", "is required: a known purpose"),
    (embed(purpose=7), "purpose", "is required: a known purpose"),
    (intent(channel=""), "channel", "is required: a registered channel"),
    (intent(text="t" * 10_001), "text", "must have at most 10000 characters"),
    (intent(text="a\0b"), "text", "must not contain NUL (U+0000)"),
    (intent(top_k=-1), "top_k", "must be 1 to 100, or 0 for 3"),
    (intent(top_k=101), "top_k", "must be 1 to 100, or 0 for 3"),
    (embed(max_tokens=2), "max_tokens", "must be 3 to 512, or 0 for the model's own limit"),
    (embed(max_tokens=-1), "max_tokens", "must be 3 to 512, or 0 for the model's own limit"),
    (embed(max_tokens=513), "max_tokens", "must be 3 to 512, or 0 for the model's own limit"),
    (analyze(channel=""), "channel", "is required: a registered channel"),
    (analyze(texts=[]), "texts", "must have 1 to 128 elements"),
    (analyze(texts=["t"] * 129), "texts", "must have 1 to 128 elements"),
    (analyze(texts=["t", "t" * 10_001]), "texts[1]", "must have at most 10000 characters"),
    (analyze(texts=["t" * 10_000] * 10 + ["t"]), "texts", "must have at most 100,000 characters together"),
    (analyze(texts=["a\0b"]), "texts[0]", "must not contain NUL (U+0000)"),
    # lists of ids
    (recommend(context_item_ids=["i"] * 21), "context_item_ids", "must have at most 20 elements"),
    (recommend(context_item_ids=["i", ""]), "context_item_ids[1]", "is required"),
    (rank(item_ids=[]), "item_ids", "must have 1 to 500 elements"),
    (rank(item_ids=["i"] * 501), "item_ids", "must have 1 to 500 elements"),
    (rank(item_ids=["i", "i" * 129]), "item_ids[1]", "must have at most 128 characters"),
    (similar(item_id=""), "item_id", "is required"),
    (catalog_pb2.GetItemsRequest(), "item_ids", "must have 1 to 500 elements"),
    # filters
    (wanted(categories=["c"] * 51), "filter.categories", "must have at most 50 elements"),
    (wanted(brands=["b", "b" * 201]), "filter.brands[1]", "must have at most 200 characters"),
    (wanted(exclude_item_ids=["i"] * 501), "filter.exclude_item_ids", "must have at most 500 elements"),
    (wanted(min_price=money(currency_code="eur")), "filter.min_price.currency_code", "must be three upper-case letters"),
    (wanted(min_price=money(currency_code="EUR\n")), "filter.min_price.currency_code", "must be three upper-case letters"),
    (wanted(max_price=money(units=-1)), "filter.max_price.units", "must be 0 to 9,000,000,000,000"),
    (wanted(max_price=money(nanos=1)), "filter.max_price.nanos", "must be 0 to 999,999,000 and a multiple of 1,000"),
    (wanted(max_price=money(nanos=-1_000)), "filter.max_price.nanos", "must be 0 to 999,999,000 and a multiple of 1,000"),
    (wanted(min_price=money(), max_price=money(currency_code="USD")), "filter.max_price.currency_code", "must be that of min_price"),
    (wanted(min_price=money(2), max_price=money(1)), "filter.max_price", "must not be below min_price"),
    # items
    (catalog_pb2.UpsertItemsRequest(), "items", "is required where there are no relations"),
    (catalog_pb2.UpsertItemsRequest(items=[catalog_pb2.Item()] * 1001), "items", "must have at most 1000 elements"),
    (catalog_pb2.UpsertItemsRequest(relations=[catalog_pb2.ItemRelation()] * 10_001), "relations", "must have at most 10000 elements"),
    (item(item_id=""), "items[1].item_id", "is required"),
    (item(title=""), "items[1].title", "is required"),
    (item(title="t" * 501), "items[1].title", "must have at most 500 characters"),
    (item(text="t" * 10_001), "items[1].text", "must have at most 10000 characters"),
    (item(text="a\0b"), "items[1].text", "must not contain NUL (U+0000)"),
    (item(category="c" * 201), "items[1].category", "must have at most 200 characters"),
    (item(brand="c" * 201), "items[1].brand", "must have at most 200 characters"),
    (item(image_ref="c" * 2001), "items[1].image_ref", "must have at most 2000 characters"),
    (item(price=common_pb2.Money()), "items[1].price.currency_code", "must be three upper-case letters"),
    (item(price=money(units=2**63 - 1)), "items[1].price.units", "must be 0 to 9,000,000,000,000"),
    (item(stock=-1), "items[1].stock", "must be at least 0"),
    (item(channels=["web", "fax"]), "items[1].channels[1]", "must be a registered channel"),
    (item(channels=["web", "web"]), "items[1].channels[1]", "must not be named twice"),
    (item(attributes={str(n): "" for n in range(51)}), "items[1].attributes", "must have at most 50 elements"),
    (item(attributes={"": "v"}), "items[1].attributes key", "is required"),
    (item(attributes={"k" * 65: "v"}), "items[1].attributes key", "must have at most 64 characters"),
    (item(attributes={"k": "v" * 1001}), "items[1].attributes[k]", "must have at most 1000 characters"),
    (item(listed_at=Timestamp(seconds=-1)), "items[1].listed_at", "must be in the years 1970 to 9998"),
    (item(listed_at=Timestamp(seconds=253402300799)), "items[1].listed_at", "must be in the years 1970 to 9998"),
    (item(listed_at=Timestamp(seconds=2**63 - 1)), "items[1].listed_at", "must be in the years 1970 to 9998"),
    (item(listed_at=Timestamp(nanos=-1)), "items[1].listed_at", "must have nanos from 0 to 999,999,999"),
    (relation(item_id=""), "relations[0].item_id", "is required"),
    (relation(related_item_id="i"), "relations[0].related_item_id", "must differ from item_id"),
    (relation(kind=0), "relations[0].kind", "is required: a known kind of relation"),
    (relation(kind=77), "relations[0].kind", "is required: a known kind of relation"),
    (relation(weight=1.1), "relations[0].weight", "must be 0 to 1"),
    (relation(weight=-0.1), "relations[0].weight", "must be 0 to 1"),
    (relation(weight=math.nan), "relations[0].weight", "must be finite"),
    # features
    (no_selection(), "selection", "is required: a feature_service or features"),
    (features(feature_service=""), "feature_service", "is required"),
    (features(feature_refs=[]), "features.feature_refs", "must have 1 to 200 elements"),
    (features(feature_refs=["v:f"] * 201), "features.feature_refs", "must have 1 to 200 elements"),
    (features(feature_refs=["v:f", "v"]), "features.feature_refs[1]", "must have the form view:feature"),
    (features(feature_refs=["v:f", "v:f"]), "features.feature_refs[1]", "must not be named twice"),
    (features(entities=[]), "entities", "must have 1 to 500 elements"),
    (features(entities=[features_pb2.EntityRow()]), "entities[0]", "must name a user_id or an item_id"),
    (features(entities=[features_pb2.EntityRow(user_id="u" * 129)]), "entities[0].user_id", "must have at most 128 characters"),
    (features(entities=[features_pb2.EntityRow(item_id="\0")]), "entities[0].item_id", "must not contain NUL (U+0000)"),
    (
        features(entities=[features_pb2.EntityRow(user_id="u", consistency_token="x")]),
        "entities[0].consistency_token",
        "must be a token returned by this service, unchanged",
    ),
    # models
    (models_pb2.ActivateModelRequest(), "model_version", "is required"),
    (models_pb2.ActivateModelRequest(model_version="m", on_unready=9), "on_unready", "must be one of ActivationPolicy"),
    (models_pb2.ActivateModelRequest(model_version="m", wait=Duration(seconds=-1)), "wait", "must be 0 to 3600 seconds"),
    (models_pb2.ActivateModelRequest(model_version="m", wait=Duration(seconds=3601)), "wait", "must be 0 to 3600 seconds"),
    (models_pb2.ActivateModelRequest(model_version="m", wait=Duration(nanos=10**9)), "wait", "must be 0 to 3600 seconds"),
]


@pytest.mark.parametrize(("request_", "field", "rule"), VIOLATIONS, ids=lambda value: value if isinstance(value, str) else "")
async def test_a_violation_names_field_and_rule_and_reaches_no_service(edge: Edge, request_: Message, field: str, rule: str) -> None:
    calls = [len(fake.calls) for fake in vars(edge.fakes).values() if isinstance(fake, Script)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.raw(f"/concord.v1.{METHODS[type(request_)]}", request_.SerializeToString())
    refused = refusal(caught.value)
    assert (refused.code, refused.field, refused.rule) == (grpc.StatusCode.INVALID_ARGUMENT, field, rule)
    assert (refused.message, refused.domain) == (f"{field}: {rule}", "concord")
    assert calls == [len(fake.calls) for fake in vars(edge.fakes).values() if isinstance(fake, Script)]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (recommend(channel="fax"), "CHANNEL_UNKNOWN"),
        (recommend(subject=common_pb2.Subject(identity=identity("fax"))), "CHANNEL_UNKNOWN"),
        (recommend(surface="moon"), "SURFACE_UNKNOWN"),
        (recommend(subject=None), "SUBJECT_REQUIRED"),
        (recommend(consistency_token="x"), "INVALID_TOKEN"),
        (recommend(limit=-1), "INVALID_FIELD"),
    ],
)
async def test_reasons_programs_rely_on(edge: Edge, request_: Message, reason: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.raw(f"/concord.v1.{METHODS[type(request_)]}", request_.SerializeToString())
    assert refusal(caught.value).reason == reason


@pytest.mark.parametrize(
    "request_",
    [
        recommend(),
        recommend(limit=100, subject=common_pb2.Subject(user_id="一" * 128)),
        rank(item_ids=[f"i{n}" for n in range(500)]),
        wanted(min_price=money(9_000_000_000_000, 999_999_000), categories=["c"] * 50),
        item(title="t" * 500, text="t" * 10_000, stock=2**63 - 1, channels=["web", "app"], attributes={"k" * 64: "v" * 1000}),
        item(listed_at=Timestamp(seconds=0)),
        relation(),
        features(entities=[features_pb2.EntityRow(user_id="u", item_id="i", consistency_token=TOKEN)] * 500),
        features(feature_refs=[f"v:f{n}" for n in range(200)]),
        link(subject=common_pb2.Subject(identity=identity("store", "x" * 256))),
        embed(texts=["t" * 10_000] * 10, max_tokens=512),
        embed(texts=[""] * 128, max_tokens=3),
        intent(text=""),
        intent(text="t" * 10_000, top_k=100),
        analyze(texts=["t" * 10_000] * 10),
        analyze(texts=[""] * 128),
    ],
)
async def test_what_the_contract_allows_is_allowed(edge: Edge, request_: Message) -> None:
    await edge.raw(f"/concord.v1.{METHODS[type(request_)]}", request_.SerializeToString())


async def test_a_recommend_request_is_read_whole(edge: Edge) -> None:
    request = recommend(
        subject=common_pb2.Subject(identity=identity("store", "card-7")),
        limit=7,
        page_token="p",
        context_item_ids=["b", "a", "b"],
        filter=recommendation_pb2.ItemFilter(
            categories=["c"], brands=["x"], min_price=money(1, 500_000_000), max_price=money(2), in_stock_only=True, exclude_item_ids=["i"]
        ),
        consistency_token=TOKEN,
        skip_exposure_logging=True,
    )
    await edge.raw("/concord.v1.RecommendationService/Recommend", request.SerializeToString())
    assert edge.fakes.recommender.calls[-1] == RecommendQuery(
        subject=Subject(channel="store", channel_user_id="card-7"),
        channel="web",
        surface="home",
        limit=7,
        page_token="p",
        context_item_ids=("a", "b"),
        filters=ItemFilter(frozenset({"c"}), frozenset({"x"}), 1_500_000, 2_000_000, "EUR", True, frozenset({"i"})),
        token=Token("u1", 3),
        log_exposure=False,
    )


async def test_defaults_are_filled_in(edge: Edge) -> None:
    await edge.raw("/concord.v1.RecommendationService/Recommend", recommend().SerializeToString())
    query = edge.fakes.recommender.calls[-1]
    assert (query.limit, query.token, query.filters, query.log_exposure) == (10, None, ItemFilter(), True)
    await edge.raw("/concord.v1.CatalogService/UpsertItems", relation().SerializeToString())
    assert edge.fakes.catalog.calls[-1][1][0].weight == 1.0


async def test_entities_keep_their_tokens(edge: Edge) -> None:
    request = features(entities=[features_pb2.EntityRow(user_id="u1", consistency_token=TOKEN)])
    await edge.raw("/concord.v1.FeatureService/GetOnlineFeatures", request.SerializeToString())
    assert edge.fakes.features.calls[-1] == ("profile_v1", (), (EntityKey(user_id="u1", token=Token("u1", 3)),))


async def test_channels_are_those_of_the_settings() -> None:
    async with serving(channels=("kiosk",), surfaces=("wall",)) as shop:
        await shop.raw("/concord.v1.RecommendationService/Recommend", recommend(channel="kiosk", surface="wall").SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError):
            await shop.raw("/concord.v1.RecommendationService/Recommend", recommend(channel="web", surface="wall").SerializeToString())


async def test_an_unknown_identity_is_created_only_if_asked(edge: Edge) -> None:
    request = identity_pb2.ResolveIdentityRequest(identity=identity("app", "new"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.raw("/concord.v1.IdentityService/ResolveIdentity", request.SerializeToString())
    assert (refusal(caught.value).code, refusal(caught.value).reason) == (grpc.StatusCode.NOT_FOUND, "IDENTITY_UNKNOWN")
    request.create_if_missing = True
    raw = await edge.raw("/concord.v1.IdentityService/ResolveIdentity", request.SerializeToString())
    created = identity_pb2.ResolveIdentityResponse.FromString(raw)
    assert created.created
    assert tokens.decode(created.consistency_token, "") == Token(created.user_id, 0)


async def test_a_link_answers_the_survivor_and_whom_it_took_in(edge: Edge) -> None:
    linked = identity_pb2.LinkIdentitiesResponse.FromString(
        await edge.raw("/concord.v1.IdentityService/LinkIdentities", link().SerializeToString())
    )
    assert (linked.user_id, linked.user_version, linked.merged_user_id) == ("u1", 9, "u2")
    assert edge.fakes.graph.calls[-1] == (Subject(channel="web", channel_user_id="a"), Subject(user_id="u1"), True)
