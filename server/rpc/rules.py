"""What a request's fields are held to: every limit of the contract, and one small function per kind of rule."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from concord.v1.common_pb2 import Money
from features.search import normalized_query
from server.errors import InvalidRequestError
from server.rpc.translate import datetime_of, micros_of

T = TypeVar("T")

# Characters.
ID_CHARS = 128
CHANNEL_USER_ID_CHARS = 256
TOKEN_CHARS = 1024
EVENT_TEXT_CHARS = 2_000
QUERY_CHARS = 500
PREFIX_CHARS = 100
TITLE_CHARS = 500
DESCRIPTION_CHARS = 10_000
LABEL_CHARS = 200  # categories and brands
IMAGE_REF_CHARS = 2_000
BODY_CHARS = 50_000  # of an article
URL_CHARS = 2_000
LANGUAGE_CHARS = 35  # the longest tag that BCP 47 asks to make room for
ATTRIBUTE_KEY_CHARS = 64
ATTRIBUTE_VALUE_CHARS = 1_000
# Elements of one request.
EVENTS = 500
ITEMS = 1_000
RELATIONS = 10_000
ITEM_IDS = 500
ARTICLES = 200
TAGS = 50
CONTEXT_ITEMS = 20
FILTER_LABELS = 50
FEATURE_REFS = 200
ENTITIES = 500
ATTRIBUTES = 50
TEXTS = 128
TEXT_CHARS, TEXTS_CHARS = 10_000, 100_000  # to be encoded: of one, and of a request's together, 0.1 s of tokenizing
TOP_K, DEFAULT_TOP_K = 100, 3
LEAST_TOKENS, MOST_TOKENS = 3, 512  # one between the model's two marks; what a BERT has positions for
ACTIVATION_WAIT_SECONDS, DEFAULT_ACTIVATION_WAIT_SECONDS = 3600.0, 30.0
# Pages.
LIMIT, DEFAULT_LIMIT = 100, 10
PAGE_SIZE, DEFAULT_PAGE_SIZE = 1_000, 100
SUGGESTIONS, DEFAULT_SUGGESTIONS = 20, 8
# Amounts and times.
MONEY_UNITS = 9_000_000_000_000
EVENT_NUMBER = 9e12  # one absurd value or quantity must not make a customer's sums overflow for ever
FUTURE = timedelta(hours=1)
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(9998, 12, 31, 23, 59, 59, tzinfo=UTC)

_CURRENCY = re.compile(r"^[A-Z]{3}\Z")
_FEATURE_REF = re.compile(r"^[^:\s]+:[^:\s]+\Z")
_EARLIEST_SECOND, _LATEST_SECOND = 0, int(LATEST.timestamp())


def text(value: str, field: str, *, most: int, least: int = 0, too_long: str = "INVALID_FIELD") -> str:
    """Checks length in characters (``too_long`` is the reason given) and that there is no NUL, which PostgreSQL cannot store."""
    if len(value) < least:
        raise InvalidRequestError(field, "is required")
    if len(value) > most:
        raise InvalidRequestError(field, f"must have at most {most} characters", reason=too_long)
    if "\0" in value:
        raise InvalidRequestError(field, "must not contain NUL (U+0000)")
    return value


def query(value: str, field: str) -> str:
    """Checks what was searched for and returns it normalized; control characters and spaces alone are nothing."""
    plain = normalized_query(text(value, field, most=QUERY_CHARS, too_long="TEXT_TOO_LONG"))
    return text(plain, field, most=len(plain), least=1)


def identifier(value: str, field: str, *, most: int = ID_CHARS) -> str:
    """Checks a required id: 1 to ``most`` characters."""
    return text(value, field, most=most, least=1)


def identifiers(values: Sequence[str], field: str, *, most: int, least: int = 0) -> tuple[str, ...]:
    """Checks a list of ids and their number."""
    count(values, field, most=most, least=least)
    return tuple(identifier(value, f"{field}[{index}]") for index, value in enumerate(values))


def labels(values: Sequence[str], field: str) -> frozenset[str]:
    """Checks the categories or brands of a filter."""
    count(values, field, most=FILTER_LABELS)
    return frozenset(text(value, f"{field}[{index}]", most=LABEL_CHARS) for index, value in enumerate(values))


def count(values: Collection[object], field: str, *, most: int, least: int = 0) -> None:
    """Checks the number of elements."""
    if not least <= len(values) <= most:
        raise InvalidRequestError(field, f"must have {least} to {most} elements" if least else f"must have at most {most} elements")


def page(value: int, field: str, *, most: int, default: int) -> int:
    """Checks a page size; 0 means the default."""
    if not 0 <= value <= most:
        raise InvalidRequestError(field, f"must be 1 to {most}, or 0 for {default}")
    return value or default


def number(value: float, field: str, *, least: float = -math.inf, most: float = math.inf, reason: str = "INVALID_FIELD") -> float:
    """Checks that a number is finite and within inclusive bounds."""
    if not math.isfinite(value):
        raise InvalidRequestError(field, "must be finite", reason=reason)
    if not least <= value <= most:
        bounds = f"at least {least:g}" if math.isinf(most) else f"{least:g} to {most:g}"
        raise InvalidRequestError(field, f"must be {bounds}", reason=reason)
    return value


def member(value: str, field: str, *, of: Collection[str], kind: str) -> str:
    """Checks that a name is registered in the settings; ``kind`` (channel, surface) names it in rule and reason."""
    if value not in of:
        rule = f"must be a registered {kind}" if value else f"is required: a registered {kind}"
        raise InvalidRequestError(field, rule, reason=f"{kind.upper()}_UNKNOWN")
    return value


def choice(value: int, field: str, *, of: Mapping[int, T]) -> T:
    """Checks that the number of an enum's value is one this release knows."""
    if value not in of:
        raise InvalidRequestError(field, "must be a known value")
    return of[value]


def each_once(values: Iterable[str], field: str) -> None:
    """Checks that nothing is named twice."""
    seen: set[str] = set()
    for index, value in enumerate(values):
        if value in seen:
            raise InvalidRequestError(f"{field}[{index}]", "must not be named twice")
        seen.add(value)


def moment(value: Timestamp, field: str, *, reason: str = "INVALID_FIELD") -> datetime:
    """Checks that a timestamp is well-formed and in the years 1970 to 9998; it is cut to microseconds."""
    if not _EARLIEST_SECOND <= value.seconds <= _LATEST_SECOND:
        raise InvalidRequestError(field, "must be in the years 1970 to 9998", reason=reason)
    if not 0 <= value.nanos < 1_000_000_000:
        raise InvalidRequestError(field, "must have nanos from 0 to 999,999,999", reason=reason)
    return datetime_of(value)


def seconds(value: Duration, field: str, *, most: float) -> float:
    """Checks that a duration is well-formed and 0 to ``most`` seconds long."""
    if not 0 <= value.nanos < 1_000_000_000 or not 0 <= value.seconds + value.nanos / 1e9 <= most:
        raise InvalidRequestError(field, f"must be 0 to {most:g} seconds")
    return value.seconds + value.nanos / 1e9


def price(value: Money, field: str) -> int:
    """Checks an amount of money and returns it in millionths of its currency."""
    if not _CURRENCY.match(value.currency_code):
        raise InvalidRequestError(f"{field}.currency_code", "must be three upper-case letters")
    if not 0 <= value.units <= MONEY_UNITS:
        raise InvalidRequestError(f"{field}.units", f"must be 0 to {MONEY_UNITS:,}")
    if not 0 <= value.nanos < 1_000_000_000 or value.nanos % 1_000:
        raise InvalidRequestError(f"{field}.nanos", "must be 0 to 999,999,000 and a multiple of 1,000")
    return micros_of(value)


def feature_ref(value: str, field: str) -> str:
    """Checks that a feature is named as ``view:feature``."""
    if not _FEATURE_REF.match(value):
        raise InvalidRequestError(field, "must have the form view:feature")
    return value
