"""The online store: one round trip reads a customer's version, the committed slate and the fleet's pointers together."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from redis.asyncio import Redis

from features.activity import WRITE_STATE, UserState, UserStateCodec
from features.layout import FeatureValue, decode_value
from server.online.breaker import CircuitBreaker

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Fleet:
    """The versions all replicas agree on; ``activation`` counts moves of the model pointer, so that it has an order."""

    model_version: str
    activation: int
    index_version: int
    offer_version: int


@dataclass(frozen=True)
class Standing:
    """What one round trip saw. ``user_version`` is None when the customer has no online state, ``fleet`` after Redis was lost."""

    user_version: int | None
    slate: bytes | None
    fleet: Fleet | None
    now: datetime


# Set-if-absent under (slot, user_version), by Redis's own clock. A slate is "<user_version>:<expires at, ms>:" and its payload.
# A standing slate of the same or a newer user_version is returned instead of the offered one. Slates of older versions can
# never be asked for again, so they make room first; 128 slots per customer is far above (surfaces × contexts) in one version.
_COMMIT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function head(raw)
    local version, expires = string.match(raw, '^(%d+):(%d+):')
    return tonumber(version), tonumber(expires)
end
local offered = tonumber(ARGV[2])
local standing = redis.call('HGET', KEYS[1], ARGV[1])
if standing then
    local version, expires = head(standing)
    if version > offered or (version == offered and expires > now) then return standing end
end
if redis.call('HLEN', KEYS[1]) >= 32 then
    local all = redis.call('HGETALL', KEYS[1])
    for i = 1, #all, 2 do
        local version, expires = head(all[i + 1])
        if version < offered or expires <= now or #all >= 256 then redis.call('HDEL', KEYS[1], all[i]) end
    end
end
local slate = ARGV[2] .. ':' .. string.format('%.0f', now + tonumber(ARGV[3])) .. ':' .. ARGV[4]
redis.call('HSET', KEYS[1], ARGV[1], slate)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return slate
"""

# Each pointer only moves forward: the model by its activation number, index and offers by themselves.
_POINT = """
local seen = redis.call('HMGET', KEYS[1], 'activation', 'index', 'offer')
local activation = tonumber(ARGV[2])
if activation >= 0 then
    if not seen[1] or tonumber(seen[1]) < activation then
        redis.call('HSET', KEYS[1], 'model', ARGV[1], 'activation', ARGV[2])
    end
    if not seen[2] or tonumber(seen[2]) < tonumber(ARGV[3]) then redis.call('HSET', KEYS[1], 'index', ARGV[3]) end
end
if not seen[3] or tonumber(seen[3]) < tonumber(ARGV[4]) then redis.call('HSET', KEYS[1], 'offer', ARGV[4]) end
return 1
"""


class OnlineStore:
    """Reads and writes Redis for the request path. Scripts touch keys of one customer only; every call passes the breaker."""

    def __init__(self, client: Redis, codec: UserStateCodec, breaker: CircuitBreaker) -> None:
        self._client = client
        self._codec = codec
        self._breaker = breaker
        self._fleet_key = f"concord:{codec.project}:fleet"
        self._commit: Any = client.register_script(_COMMIT)
        self._point: Any = client.register_script(_POINT)
        self._write: Any = client.register_script(WRITE_STATE)

    @property
    def behind(self) -> bool:
        """True while Redis is just back and may lag behind what was answered from PostgreSQL meanwhile."""
        return self._breaker.behind

    def slates_key(self, user_id: str) -> str:
        """Returns the key of a customer's slates; the empty user id is every customer without an identity."""
        return f"concord:{self._codec.project}:slates:{user_id}"

    async def read(self, user_id: str, slot: str) -> Standing:
        """Reads version, slate in ``slot``, pointers and Redis's time in one round trip."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hget(self._codec.key(user_id), self._codec.version_field)  # type: ignore[arg-type]
        pipeline.hget(self.slates_key(user_id), slot)
        pipeline.hmget(self._fleet_key, ["model", "activation", "index", "offer"])
        pipeline.time()
        async with self._breaker.call():
            version, slate, fleet, (seconds, micros) = await pipeline.execute()
        return Standing(
            user_version=None if version is None else decode_value(version),
            slate=slate,
            fleet=None if None in fleet else Fleet(fleet[0].decode(), int(fleet[1]), int(fleet[2]), int(fleet[3])),
            now=_EPOCH + timedelta(seconds=seconds, microseconds=micros),
        )

    async def commit(self, user_id: str, slot: str, *, user_version: int, payload: bytes, ttl_seconds: float) -> bytes:
        """Commits a slate if none stands for this version; returns the one that stands now."""
        arguments = [slot, user_version, int(ttl_seconds * 1000), payload]
        async with self._breaker.call():
            standing: bytes = await self._commit(keys=[self.slates_key(user_id)], args=arguments)
        return standing

    async def point(self, fleet: Fleet) -> None:
        """Moves the fleet's pointers forward; a pointer that is already further stays."""
        arguments = [fleet.model_version, fleet.activation, fleet.index_version, fleet.offer_version]
        async with self._breaker.call():
            await self._point(keys=[self._fleet_key], args=arguments)

    async def point_offers(self, offer_version: int) -> None:
        """Moves only the offers' pointer forward: prices do not wait for a model that cannot be loaded."""
        async with self._breaker.call():
            await self._point(keys=[self._fleet_key], args=["", -1, -1, offer_version])

    async def user_features(self, user_id: str, now: datetime) -> dict[str, dict[str, FeatureValue]]:
        """Reads all views of a customer with one command, so that no read mixes two writes."""
        async with self._breaker.call():
            replies = await self._client.hmget(self._codec.key(user_id), list(self._codec.hash_fields))  # type: ignore[misc, arg-type]
        return self._codec.decode(replies, now)

    async def write_users(self, states: Sequence[UserState]) -> None:
        """Writes recomputed customers, each if it is newer than what stands."""
        pipeline = self._client.pipeline(transaction=False)
        for state in states:
            await self._write(keys=[state.key], args=list(state.arguments), client=pipeline)
        async with self._breaker.call():
            await pipeline.execute()

    async def forget_users(self, user_ids: Sequence[str]) -> None:
        """Removes state and slates of customers that no longer exist on their own (merged away)."""
        for user_id in user_ids:
            pipeline = self._client.pipeline(transaction=False)
            pipeline.delete(self._codec.key(user_id))
            pipeline.delete(self.slates_key(user_id))
            async with self._breaker.call():
                await pipeline.execute()
