"""Between protobuf messages and domain values, without judging either: money, times, answers, items, features, models."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from concord.v1 import catalog_pb2, common_pb2, events_pb2, features_pb2, models_pb2, profile_pb2, recommendation_pb2
from features.behaviour import ACTIONS, Behaviour
from features.candidates import Source
from features.catalogue import Item
from features.layout import FeatureValue, Status
from features.models import ModelVersion
from server import tokens
from server.domain import Answer, CustomerProfile, EventOutcome, ShownItem, Stored, Token, Versions

MICROS = 1_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

ACTION_NAMES: Mapping[int, str] = {common_pb2.Action.Value(f"ACTION_{name.upper()}"): name for name in ACTIONS}
_ACTION_VALUES = {name: value for value, name in ACTION_NAMES.items()}
RELATION_NAMES: Mapping[int, str] = {
    catalog_pb2.RELATION_KIND_COMPLEMENT: "complement",
    catalog_pb2.RELATION_KIND_SUBSTITUTE: "substitute",
    catalog_pb2.RELATION_KIND_SAME_SERIES: "same_series",
}
_EVENT_STATUS = {
    Stored.STORED: events_pb2.EVENT_STATUS_STORED,
    Stored.DUPLICATE: events_pb2.EVENT_STATUS_DUPLICATE,
    Stored.REJECTED: events_pb2.EVENT_STATUS_REJECTED,
}
_FEATURE_STATUS = {
    Status.PRESENT: common_pb2.FEATURE_STATUS_PRESENT,
    Status.MISSING: common_pb2.FEATURE_STATUS_MISSING,
    Status.STALE: common_pb2.FEATURE_STATUS_STALE,
}
# Strongest reason first: what is about this customer stands before what is true for everybody.
_REASONS = (
    (Source.COLLABORATIVE, recommendation_pb2.REASON_CODE_BOUGHT_TOGETHER),
    (Source.VECTOR | Source.RECENT, recommendation_pb2.REASON_CODE_SIMILAR_TO_RECENT),
    (Source.RELATION, recommendation_pb2.REASON_CODE_COMPLEMENT),
    (Source.NEW, recommendation_pb2.REASON_CODE_NEW_ARRIVAL),
    (Source.POPULAR, recommendation_pb2.REASON_CODE_POPULAR),
)


def micros_of(money: common_pb2.Money) -> int:
    """Returns an amount in millionths; exact for every Money the contract allows."""
    return money.units * MICROS + money.nanos // 1_000


def money_of(micros: int | None, currency: str) -> common_pb2.Money | None:
    """Returns an amount in millionths as Money, None for no amount."""
    if micros is None:
        return None
    units, rest = divmod(micros, MICROS)
    return common_pb2.Money(currency_code=currency, units=units, nanos=rest * 1_000)


def datetime_of(stamp: Timestamp) -> datetime:
    """Returns a timestamp as an aware UTC time, cut to microseconds."""
    return EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1_000)


def timestamp_of(moment: datetime | None) -> Timestamp | None:
    """Returns an aware time as a Timestamp, None for no time."""
    if moment is None:
        return None
    since = moment - EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1_000)


def token_of(token: Token | None) -> str:
    """Returns the text of a token, empty for none."""
    return "" if token is None else tokens.encode(token)


def user_token(token: Token) -> events_pb2.UserToken:
    """Returns a token with its parts in the clear."""
    return events_pb2.UserToken(user_id=token.user_id, user_version=token.version, consistency_token=tokens.encode(token))


def event_result(event_id: str, outcome: EventOutcome) -> events_pb2.EventResult:
    """Returns what became of the event with the given id."""
    return events_pb2.EventResult(
        event_id=event_id,
        status=_EVENT_STATUS[outcome.status],
        user_id=outcome.user_id,
        reason=outcome.reason,
        field=outcome.field,
        message=outcome.message,
    )


def versions(value: Versions) -> common_pb2.Versions:
    """Returns the versions of an answer."""
    return common_pb2.Versions(
        user_version=value.user_version,
        model_version=value.model_version,
        index_version=value.index_version,
        offer_version=value.offer_version,
    )


def recommended_item(item: ShownItem) -> recommendation_pb2.RecommendedItem:
    """Returns an item in its place for a customer."""
    return recommendation_pb2.RecommendedItem(
        item_id=item.item_id,
        title=item.title,
        category=item.category,
        brand=item.brand,
        image_ref=item.image_ref,
        score=item.score,
        price=money_of(item.price_micros, item.currency),
        in_stock=item.in_stock,
        position=item.position,
        reason_codes=_reasons(item),
    )


def similar_item(item: ShownItem) -> recommendation_pb2.SimilarItem:
    """Returns an item with its score as similarity."""
    return recommendation_pb2.SimilarItem(
        item_id=item.item_id,
        title=item.title,
        category=item.category,
        brand=item.brand,
        image_ref=item.image_ref,
        similarity=item.score,
        price=money_of(item.price_micros, item.currency),
        in_stock=item.in_stock,
    )


def _reasons(item: ShownItem) -> list[recommendation_pb2.ReasonCode]:
    first = [recommendation_pb2.REASON_CODE_NEW_CUSTOMER] if item.newcomer else []
    return first + [reason for source, reason in _REASONS if item.sources & source]


def stage_timings(answer: Answer) -> list[recommendation_pb2.StageTiming]:
    """Returns how long each stage took, in the order they ran."""
    return [recommendation_pb2.StageTiming(stage=stage, duration=_duration(seconds)) for stage, seconds in answer.stages.items()]


def _duration(seconds: float) -> Duration:
    whole, nanos = divmod(round(seconds * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=nanos)


def item_message(item: Item) -> catalog_pb2.Item:
    """Returns an item of the catalogue."""
    return catalog_pb2.Item(
        item_id=item.item_id,
        title=item.title,
        text=item.text,
        category=item.category,
        brand=item.brand,
        price=money_of(item.price_micros, item.currency),
        stock=item.stock,
        channels=item.channels,
        image_ref=item.image_ref,
        attributes=item.attributes,
        listed_at=timestamp_of(item.listed_at),
    )


def feature_result(value: FeatureValue) -> features_pb2.FeatureResult:
    """Returns a feature value with its status; a missing one has neither value nor time."""
    missing = value.status is Status.MISSING
    return features_pb2.FeatureResult(
        value=None if missing else _feature_value(value.value),
        status=_FEATURE_STATUS[value.status],
        event_timestamp=None if missing else timestamp_of(value.event_timestamp),
    )


def _feature_value(value: Any) -> features_pb2.FeatureValue:
    """Chooses the kind by the Python type; bool stands before int because it is one."""
    for kind, name in ((bool, "bool"), (str, "string"), (int, "int64"), (float, "double"), (bytes, "bytes")):
        if isinstance(value, kind):
            return features_pb2.FeatureValue(**{f"{name}_value": value})
    return _feature_list(value)


def _feature_list(values: Sequence[Any]) -> features_pb2.FeatureValue:
    """An empty list has no element to tell its type by; it is sent as a list of texts without elements."""
    first = values[0] if values else ""
    if isinstance(first, bool):
        return features_pb2.FeatureValue(bool_list_value=features_pb2.BoolList(values=values))
    if isinstance(first, int):
        return features_pb2.FeatureValue(int64_list_value=features_pb2.Int64List(values=values))
    if isinstance(first, float):
        return features_pb2.FeatureValue(double_list_value=features_pb2.DoubleList(values=values))
    return features_pb2.FeatureValue(string_list_value=features_pb2.StringList(values=values))


def model_message(model: ModelVersion, loaded: set[str]) -> models_pb2.ModelVersion:
    """Returns a published model and whether this replica holds it."""
    return models_pb2.ModelVersion(
        model_version=model.model_version,
        uri=model.uri,
        published_at=timestamp_of(model.published_at),
        activated_at=timestamp_of(model.activated_at),
        active=model.active,
        metrics=model.manifest["metrics"],
        feature_service=model.manifest["contract"]["feature_service"],
        base_model=model.manifest["base_model"],
        loaded=model.model_version in loaded,
    )


def behaviour_message(behaviour: Behaviour) -> profile_pb2.Behaviour:
    """Returns one behaviour; its text is cut to 160 characters."""
    seconds, micros = divmod(behaviour.occurred_at, MICROS)
    return profile_pb2.Behaviour(
        item_id=behaviour.item_id,
        action=_ACTION_VALUES[behaviour.action],
        channel=behaviour.channel,
        occurred_at=Timestamp(seconds=seconds, nanos=micros * 1_000),
        text=behaviour.text[:160],
    )


def profile_features(profile: Mapping[str, FeatureValue]) -> profile_pb2.ProfileFeatures:
    """Returns the slow-moving features of a customer; with MISSING status every other field has its default."""
    known = profile.get("event_count")
    if known is None or known.status is Status.MISSING:
        return profile_pb2.ProfileFeatures(status=common_pb2.FEATURE_STATUS_MISSING)
    value = {name: feature.value for name, feature in profile.items() if feature.status is not Status.MISSING}
    return profile_pb2.ProfileFeatures(
        status=_FEATURE_STATUS[known.status],
        event_timestamp=timestamp_of(known.event_timestamp),
        event_count=value.get("event_count"),
        purchase_count=value.get("purchase_count"),
        purchase_value=value.get("purchase_value"),
        price_band=_price_band(value),
        top_categories=_shares(value, "top_categories", "top_category_shares"),
        top_brands=_shares(value, "top_brands", "top_brand_shares"),
        top_channels=_shares(value, "channel_names", "channel_shares"),
    )


def _price_band(value: Mapping[str, Any]) -> profile_pb2.PriceBand | None:
    if "price_mean" not in value:
        return None
    return profile_pb2.PriceBand(low=value.get("price_low"), mean=value["price_mean"], high=value.get("price_high"))


def _shares(value: Mapping[str, Any], names: str, shares: str) -> list[profile_pb2.Share]:
    pairs = zip(value.get(names, ()), value.get(shares, ()), strict=True)
    return [profile_pb2.Share(name=name, share=share) for name, share in sorted(pairs, key=lambda pair: (-pair[1], pair[0]))]


def profile_message(profile: CustomerProfile) -> profile_pb2.GetProfileResponse:
    """Returns a customer's whole profile."""
    count = profile.counters.get
    newest = profile.activity.newest
    return profile_pb2.GetProfileResponse(
        user_id=profile.user_id,
        user_version=profile.user_version,
        consistency_token=tokens.encode(Token(profile.user_id, profile.user_version)),
        identities=[common_pb2.ChannelIdentity(channel=channel, channel_user_id=name) for channel, name in sorted(profile.identities)],
        recent_behaviours=[behaviour_message(behaviour) for behaviour in profile.activity.behaviours],
        counters=profile_pb2.ActivityCounters(
            view_7d_count=count("views_7d", 0),
            cart_7d_count=count("carts_7d", 0),
            purchase_28d_count=count("purchases_28d", 0),
            search_7d_count=count("searches_7d", 0),
        ),
        features=profile_features(profile.profile),
        activity_status=common_pb2.FEATURE_STATUS_PRESENT,  # profiles are read at a version, never from a lagging copy
        as_of=timestamp_of(EPOCH + timedelta(microseconds=newest)) if newest else None,
    )
