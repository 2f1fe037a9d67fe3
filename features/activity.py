"""Online user state recomputed from PostgreSQL: one statement reads it, one script writes it if it is newer.

State is never patched: whoever recomputes, however often and in whatever order, the newest user_version wins and equal
versions have equal bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from features.behaviour import BEHAVIOUR_COLUMNS, Activity, behaviours_of
from features.layout import FeatureValue, ViewLayout, entity_key, hash_field
from features.ranking import Profile

ACTIVITY_VIEW = "user_activity"
PROFILE_VIEW = "user_profile"

# Beside Feast's fields a customer's hash holds these. A persona merged into another customer has the first three and no features;
# a forgotten one has nothing but the last, for as long as work in flight could still bring something back.
MERGED_FIELD = "_concord:merged"
MARKER_VERSION_FIELD = "_concord:version"
MEMBERSHIP_FIELD = "_concord:membership"
FORGOTTEN_FIELD = "_concord:forgotten"

# A state without this feature was written by a release that kept actions as names and nothing of ratings: it reads as none at all,
# is older than any other, whatever its version, and what it held under the earlier name goes when it is replaced.
FORM_FEATURE = "recent_action_codes"
_FORM_FIELD, _EARLIER_FIELD = (
    "".join(f"\\{octet:03}" for octet in hash_field(f"{ACTIVITY_VIEW}:{name}")) for name in (FORM_FEATURE, "recent_actions")
)

# One statement, so one snapshot: version, membership and behaviours can never be of different moments. A merged persona has a
# row that names its survivor and no behaviours; an unknown one has none.
READ_STATE = """
SELECT u.user_id, to_jsonb(p.*) - 'user_id' - 'event_timestamp' AS profile, p.event_timestamp AS profile_timestamp,
       k.merged_into, k.membership, k.version AS user_version, a.*
FROM unnest(%s::text[]) AS u (user_id)
JOIN users k ON k.user_id = u.user_id
LEFT JOIN LATERAL user_activity_at(u.user_id, 'infinity') a ON k.merged_into IS NULL
LEFT JOIN LATERAL (
    SELECT * FROM user_profile p WHERE p.user_id = u.user_id ORDER BY p.event_timestamp DESC LIMIT 1
) p ON k.merged_into IS NULL
"""

# Customers that Redis holds at these versions; one that has moved on since stays. A row that somebody holds is about to move on:
# waiting for it, against a writer that waits for another row, was a deadlock and 1 s of both a few times in 100,000 events.
CAUGHT_UP = """
DELETE FROM online_outbox o USING (
    SELECT user_id FROM online_outbox JOIN unnest(%s::text[], %s::bigint[]) AS s (user_id, held) USING (user_id)
    WHERE version <= held FOR UPDATE OF online_outbox SKIP LOCKED
) c WHERE o.user_id = c.user_id
"""

# Compare-and-set on the version inside Feast's own serialized Value (tag 0x20 = int64_val, then a varint), or on that of a marker.
# ARGV: version, version field, membership, survivor ("" for a customer of its own), number of activity pairs, activity pairs...,
# number of profile pairs, profile pairs (time field first), or without a profile the names of its fields.
# Within a membership the profile is only filled in when the hash has none: a materialization may have written a newer one
# meanwhile. With another membership it is that of other events, and is replaced.
# HSET comes first: Redis looks at its memory limit before a script's first write only, and a full Redis must refuse whole states.
WRITE_STATE = f"""
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
local offered, membership, merged, pairs = tonumber(ARGV[1]), ARGV[3], ARGV[4], tonumber(ARGV[5])
local seen = redis.call(
    'HMGET', KEYS[1], ARGV[2], '{MARKER_VERSION_FIELD}', '{MEMBERSHIP_FIELD}', '{FORGOTTEN_FIELD}', ARGV[7 + 2 * pairs], '{_FORM_FIELD}')
if seen[4] then return -1 end
local current = math.max(version_of(seen[6] and seen[1]), tonumber(seen[2] or '-1'))
local regrouped = (seen[3] or '0') ~= membership
if current < offered then
    if merged ~= '' then
        redis.call('DEL', KEYS[1])
        redis.call('HSET', KEYS[1], '{MERGED_FIELD}', merged, '{MARKER_VERSION_FIELD}', ARGV[1], '{MEMBERSHIP_FIELD}', membership)
        return offered
    end
    redis.call('HSET', KEYS[1], '{MEMBERSHIP_FIELD}', membership, unpack(ARGV, 6, 5 + 2 * pairs))
    redis.call('HDEL', KEYS[1], '{MERGED_FIELD}', '{MARKER_VERSION_FIELD}')
    if seen[1] and not seen[6] then redis.call('HDEL', KEYS[1], '{_EARLIER_FIELD}') end
    if regrouped and seen[5] and ARGV[6 + 2 * pairs] == '0' then redis.call('HDEL', KEYS[1], unpack(ARGV, 7 + 2 * pairs, #ARGV)) end
    current = offered
elseif regrouped or merged ~= '' then
    return current
end
if ARGV[6 + 2 * pairs] ~= '0' and (regrouped or not seen[5]) then
    redis.call('HSET', KEYS[1], unpack(ARGV, 7 + 2 * pairs, #ARGV))
end
return current
"""


_HEAD = 5  # arguments before the pairs


@dataclass(frozen=True)
class UserState:
    """A customer's state as recomputed from PostgreSQL, ready to be written: key and arguments of WRITE_STATE.

    ``merged_into`` names the survivor when the persona is no customer of its own; what is written then is only a marker.
    """

    user_id: str
    version: int
    key: bytes
    arguments: tuple[bytes | int | str, ...]
    merged_into: str = ""


class UserStateCodec:
    """Turns rows of READ_STATE into WRITE_STATE calls, and replies of HMGET into domain values."""

    def __init__(self, layouts: Mapping[str, ViewLayout], project: str) -> None:
        self.activity = layouts[ACTIVITY_VIEW]
        self.profile = layouts[PROFILE_VIEW]
        self.project = project
        self.version_field, self.form_field = (
            self.activity.fields[self.activity.features.index(name)] for name in ("version", FORM_FEATURE)
        )
        self.hash_fields = (*self.activity.hash_fields, *self.profile.hash_fields)

    def key(self, user_id: str) -> bytes:
        """Returns the Redis key of a customer's hash."""
        return entity_key(self.activity.join_key, user_id, self.project)

    def state(self, row: Mapping[str, Any]) -> UserState:
        """Encodes one row of READ_STATE (as a mapping)."""
        user_id, merged_into = row["user_id"], row["merged_into"] or ""
        version = row["user_version"] if merged_into else row["version"]
        pairs = [] if merged_into else _flatten(self.activity.encode(row, row["event_timestamp"]))
        names = (self.profile.timestamp_field, *self.profile.fields)
        if row["profile"] is None:
            profile: list[bytes | int] = [0, *names]
        else:
            encoded = self.profile.encode(row["profile"], row["profile_timestamp"])
            profile = [len(encoded), *_flatten({name: encoded[name] for name in names})]
        head = (version, self.version_field, row["membership"], merged_into, len(pairs) // 2)
        return UserState(user_id, version, self.key(user_id), (*head, *pairs, *profile), merged_into)

    def activity_of(self, state: UserState, now: datetime) -> Activity | None:
        """Returns the activity that a state writes, as whoever reads it from Redis would; None of a merged persona."""
        count = state.arguments[_HEAD - 1]
        assert isinstance(count, int)
        pairs = state.arguments[_HEAD : _HEAD + 2 * count]
        written = dict(zip(pairs[::2], pairs[1::2], strict=True))
        replies = cast("list[bytes | None]", [written.get(name) for name in self.activity.hash_fields])
        return activity_of(self.activity.decode(replies, now))

    def decode(self, replies: Sequence[bytes | None], now: datetime) -> dict[str, dict[str, FeatureValue]]:
        """Reads the reply of HMGET over ``hash_fields``: features by view and name."""
        cut = len(self.activity.hash_fields)
        return {ACTIVITY_VIEW: self.activity.decode(replies[:cut], now), PROFILE_VIEW: self.profile.decode(replies[cut:], now)}


def is_whole(features: Mapping[str, FeatureValue]) -> bool:
    """Whether the decoded ``user_activity`` view is a state of this release's form, and not one of an earlier release, or none."""
    return features["version"].value is not None and features[FORM_FEATURE].value is not None


def activity_of(features: Mapping[str, FeatureValue]) -> Activity | None:
    """Builds the activity from the decoded ``user_activity`` view, None when the customer has no online state of this form."""
    if not is_whole(features):
        return None
    return Activity(
        version=features["version"].value,
        behaviours=behaviours_of(*(features[name].value or () for name in BEHAVIOUR_COLUMNS)),
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
