"""Between protobuf values and domain values where several services need it: money, times, tokens, versions, names."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from concord.v1 import catalog_pb2, common_pb2, understanding_pb2
from features.behaviour import ACTIONS
from features.layout import Status
from server import tokens
from server.domain import Purpose, Token, Versions

MICROS = 1_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

ACTION_NAMES: Mapping[int, str] = {common_pb2.Action.Value(f"ACTION_{name.upper()}"): name for name in ACTIONS}
RELATION_NAMES: Mapping[int, str] = {
    catalog_pb2.RELATION_KIND_COMPLEMENT: "complement",
    catalog_pb2.RELATION_KIND_SUBSTITUTE: "substitute",
    catalog_pb2.RELATION_KIND_SAME_SERIES: "same_series",
}
PURPOSES: Mapping[int, Purpose] = {
    understanding_pb2.EMBEDDING_PURPOSE_ITEM: Purpose.ITEM,
    understanding_pb2.EMBEDDING_PURPOSE_USER: Purpose.USER,
}
FEATURE_STATUS = {
    Status.PRESENT: common_pb2.FEATURE_STATUS_PRESENT,
    Status.MISSING: common_pb2.FEATURE_STATUS_MISSING,
    Status.STALE: common_pb2.FEATURE_STATUS_STALE,
}


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


def timestamp_of_micros(micros: int) -> Timestamp:
    """Returns microseconds of Unix time as a Timestamp."""
    seconds, rest = divmod(micros, MICROS)
    return Timestamp(seconds=seconds, nanos=rest * 1_000)


def set_duration(duration: Duration, seconds: float) -> None:
    """Sets a Duration to seconds, rounded to nanoseconds."""
    duration.seconds, duration.nanos = divmod(round(seconds * 1e9), 1_000_000_000)


def token_text(token: Token | None) -> str:
    """Returns a token as callers see it, empty for none."""
    return "" if token is None else tokens.encode(token)


def versions_message(versions: Versions) -> common_pb2.Versions:
    """Returns the versions of an answer."""
    return common_pb2.Versions(
        user_version=versions.user_version,
        model_version=versions.model_version,
        index_version=versions.index_version,
        offer_version=versions.offer_version,
    )
