"""Online user state recomputed from PostgreSQL: one statement reads it, one script writes it if it is newer.

State is never patched: whoever recomputes, however often and in whatever order, the newest user_version wins and equal
versions have equal bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from features.behaviour import Activity, Behaviour
from features.layout import FeatureValue, ViewLayout, entity_key
from features.ranking import Profile

ACTIVITY_VIEW = "user_activity"
PROFILE_VIEW = "user_profile"

# One statement, so one snapshot: version and behaviours can never be of different moments. Merged customers have no row.
READ_STATE = """
SELECT u.user_id, to_jsonb(p.*) - 'user_id' - 'event_timestamp' AS profile, p.event_timestamp AS profile_timestamp, a.*
FROM unnest(%s::text[]) AS u (user_id)
JOIN users k ON k.user_id = u.user_id AND k.merged_into IS NULL
CROSS JOIN LATERAL user_activity_at(u.user_id, 'infinity') a
LEFT JOIN LATERAL (
    SELECT * FROM user_profile p WHERE p.user_id = u.user_id ORDER BY p.event_timestamp DESC LIMIT 1
) p ON true
"""

# Compare-and-set on the version inside Feast's own serialized Value (tag 0x20 = int64_val, then a varint).
# ARGV: version, version field, number of activity pairs, activity pairs..., profile time field, profile pairs...
# The profile is only filled in when the hash has none: a materialization may have written a newer one meanwhile.
WRITE_STATE = """
local function version_of(raw)
    if not raw or #raw < 2 or raw:byte(1) ~= 0x20 then return -1 end
    local value, scale = 0, 1
    for i = 2, #raw do
        local b = raw:byte(i)
        value = value + (b % 128) * scale
        if b < 128 then break end
        scale = scale * 128
    end
    return value
end
local offered, field, pairs = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local current = version_of(redis.call('HGET', KEYS[1], field))
local stop = 3 + 2 * pairs
if current < offered then
    redis.call('HSET', KEYS[1], unpack(ARGV, 4, stop))
    current = offered
end
if #ARGV > stop + 1 and redis.call('HEXISTS', KEYS[1], ARGV[stop + 1]) == 0 then
    redis.call('HSET', KEYS[1], unpack(ARGV, stop + 2, #ARGV))
end
return current
"""


@dataclass(frozen=True)
class UserState:
    """A customer's state as recomputed from PostgreSQL, ready to be written: key and arguments of WRITE_STATE."""

    user_id: str
    version: int
    key: bytes
    arguments: tuple[bytes | int, ...]


class UserStateCodec:
    """Turns rows of READ_STATE into WRITE_STATE calls, and replies of HMGET into domain values."""

    def __init__(self, layouts: Mapping[str, ViewLayout], project: str) -> None:
        self.activity = layouts[ACTIVITY_VIEW]
        self.profile = layouts[PROFILE_VIEW]
        self.project = project
        self.version_field = self.activity.fields[self.activity.features.index("version")]
        self.hash_fields = (*self.activity.hash_fields, *self.profile.hash_fields)

    def key(self, user_id: str) -> bytes:
        """Returns the Redis key of a customer's hash."""
        return entity_key(self.activity.join_key, user_id, self.project)

    def state(self, row: Mapping[str, Any]) -> UserState:
        """Encodes one row of READ_STATE (as a mapping)."""
        pairs = _flatten(self.activity.encode(row, row["event_timestamp"]))
        arguments: list[bytes | int] = [row["version"], self.version_field, len(pairs) // 2, *pairs]
        if row["profile"] is not None:
            profile = self.profile.encode(row["profile"], row["profile_timestamp"])
            arguments += [self.profile.timestamp_field, *_flatten(profile)]
        return UserState(row["user_id"], row["version"], self.key(row["user_id"]), tuple(arguments))

    def decode(self, replies: Sequence[bytes | None], now: datetime) -> dict[str, dict[str, FeatureValue]]:
        """Reads the reply of HMGET over ``hash_fields``: features by view and name."""
        cut = len(self.activity.hash_fields)
        return {ACTIVITY_VIEW: self.activity.decode(replies[:cut], now), PROFILE_VIEW: self.profile.decode(replies[cut:], now)}


def activity_of(features: Mapping[str, FeatureValue]) -> Activity | None:
    """Builds the activity from the decoded ``user_activity`` view, None when the customer has no online state."""
    if features["version"].value is None:
        return None
    columns = [features[name].value or [] for name in ("recent_items", "recent_actions", "recent_channels", "recent_times", "recent_texts")]
    return Activity(
        version=features["version"].value,
        behaviours=tuple(Behaviour(*row) for row in zip(*columns, strict=True)),
        purchased_items=tuple(features["purchased_items"].value or ()),
        purchased_days=tuple(features["purchased_days"].value or ()),
    )


def profile_of(features: Mapping[str, FeatureValue]) -> Profile:
    """Builds what the ranker reads from the decoded ``user_profile`` view."""

    def number(name: str, absent: float) -> float:
        value = features[name].value
        return absent if value is None else float(value)

    nan = float("nan")
    return Profile(number("purchase_count", 0.0), number("price_mean", nan), number("price_low", nan), number("price_high", nan))


def _flatten(mapping: Mapping[bytes, bytes]) -> list[bytes]:
    return [part for pair in mapping.items() for part in pair]
