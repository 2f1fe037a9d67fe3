"""ProfileService: what is known about a customer."""

from collections.abc import Mapping
from typing import Any

from concord.v1 import common_pb2, profile_pb2, profile_pb2_grpc
from features.behaviour import Behaviour
from features.layout import FeatureValue, Status
from server import tokens
from server.domain import CustomerProfile, Token
from server.rpc.interceptor import Context
from server.rpc.ports import Profiles
from server.rpc.translate import FEATURE_STATUS, timestamp_of, timestamp_of_micros
from server.rpc.validation import Validator

_TEXT_CHARS = 160


class ProfileServicer(profile_pb2_grpc.ProfileServiceServicer):
    """Reads customers' profiles."""

    def __init__(self, profiles: Profiles, validator: Validator) -> None:
        self._profiles = profiles
        self._validator = validator

    async def GetProfile(self, request: profile_pb2.GetProfileRequest, _context: Context) -> profile_pb2.GetProfileResponse:
        """Returns a customer's identities, recent behaviour, counters and profile features."""
        subject = self._validator.subject(request.subject, "subject")
        token = self._validator.token(request.consistency_token, "consistency_token")
        return _profile(await self._profiles.read(subject, token=token))


def _profile(profile: CustomerProfile) -> profile_pb2.GetProfileResponse:
    count = profile.counters
    newest = profile.activity.newest
    return profile_pb2.GetProfileResponse(
        user_id=profile.user_id,
        user_version=profile.user_version,
        consistency_token=tokens.encode(Token(profile.user_id, profile.user_version)),
        identities=[common_pb2.ChannelIdentity(channel=channel, channel_user_id=name) for channel, name in sorted(profile.identities)],
        recent_behaviours=[_behaviour(behaviour) for behaviour in profile.activity.behaviours],
        counters=profile_pb2.ActivityCounters(
            view_7d_count=count.get("views_7d"),
            cart_7d_count=count.get("carts_7d"),
            purchase_28d_count=count.get("purchases_28d"),
            search_7d_count=count.get("searches_7d"),
        ),
        features=_features(profile.profile),
        activity_status=common_pb2.FEATURE_STATUS_PRESENT,  # a profile is read at a version, never from a lagging copy
        as_of=timestamp_of_micros(newest) if newest else None,
    )


def _behaviour(behaviour: Behaviour) -> profile_pb2.Behaviour:
    return profile_pb2.Behaviour(
        item_id=behaviour.item_id,
        action=f"ACTION_{behaviour.action.upper()}",
        channel=behaviour.channel,
        occurred_at=timestamp_of_micros(behaviour.occurred_at),
        text=behaviour.text[:_TEXT_CHARS],
    )


def _features(profile: Mapping[str, FeatureValue]) -> profile_pb2.ProfileFeatures:
    """Every column of the view is written together, so one of them says whether and when all were."""
    known = profile.get("event_count")
    if known is None or known.status is Status.MISSING:
        return profile_pb2.ProfileFeatures(status=common_pb2.FEATURE_STATUS_MISSING)
    value = {name: feature.value for name, feature in profile.items()}
    return profile_pb2.ProfileFeatures(
        status=FEATURE_STATUS[known.status],
        event_timestamp=timestamp_of(known.event_timestamp),
        event_count=value["event_count"],
        purchase_count=value.get("purchase_count"),
        purchase_value=value.get("purchase_value"),
        price_band=_price_band(value),
        top_categories=_shares(value, "top_categories", "top_category_shares"),
        top_brands=_shares(value, "top_brands", "top_brand_shares"),
        top_channels=_shares(value, "channel_names", "channel_shares"),
        sentiment=_sentiment(value),
    )


def _price_band(value: Mapping[str, Any]) -> profile_pb2.PriceBand | None:
    if value.get("price_mean") is None:
        return None
    return profile_pb2.PriceBand(low=value.get("price_low"), mean=value["price_mean"], high=value.get("price_high"))


def _sentiment(value: Mapping[str, Any]) -> profile_pb2.CustomerSentiment | None:
    if not value.get("sentiment_count"):
        return None
    return profile_pb2.CustomerSentiment(
        text_count=value["sentiment_count"], mean_score=value.get("sentiment_mean"), last_score=value.get("sentiment_last")
    )


def _shares(value: Mapping[str, Any], names: str, shares: str) -> list[profile_pb2.Share]:
    pairs = zip(value.get(names) or (), value.get(shares) or (), strict=True)
    return [profile_pb2.Share(name=name, share=share) for name, share in sorted(pairs, key=lambda pair: (-pair[1], pair[0]))]
