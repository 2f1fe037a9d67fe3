"""The online store: one round trip reads a customer's version, the committed slate and the fleet's pointers together."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from features.activity import FORGOTTEN_FIELD, MEMBERSHIP_FIELD, WRITE_STATE, UserState, UserStateCodec
from features.layout import FeatureValue, decode_value
from server.database import OnlineClient
from server.errors import unknown_customer
from server.online.breaker import CircuitBreaker
from server.online.wire import Argument, Command, Script

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _never() -> bool:
    return False


class Fleet(NamedTuple):
    """The versions all replicas agree on; ``activation`` counts moves of the model pointer, so that it has an order."""

    model_version: str
    activation: int
    index_version: int
    offer_version: int


class Standing(NamedTuple):
    """What one round trip saw. ``user_version`` is None when the customer has no online state, ``fleet`` after Redis was lost.

    Attributes:
        membership: how often the customer had been regrouped when the state was computed; identities resolved to it at a
            lower count may belong to somebody else now.
    """

    user_version: int | None
    slate: bytes | None
    fleet: Fleet | None
    now: datetime
    membership: int = 0


# Set-if-absent under (slot, user_version), by Redis's own clock. A slate is "<user_version>:<expires at, ms>:" and its payload.
# A standing slate of the same or a newer user_version is returned instead of the offered one. Slates of older versions can
# never be asked for again, so they make room first; 128 slots per customer is far above (surfaces × contexts) in one version.
# A forgotten customer's hash refuses: a computation that was under way when they were forgotten leaves no trace.
_COMMIT = Script(f"""
if redis.call('HEXISTS', KEYS[1], '{FORGOTTEN_FIELD}') == 1 then return false end
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
""")

# Everything gives way to a marker that expires: until then no script writes here.
_ERASE = Script(f"""
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], '{FORGOTTEN_FIELD}', '1')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
""")

# Each pointer only moves forward: the model by its activation number, index and offers by themselves.
_POINT = Script("""
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
""")
_WRITE = Script(WRITE_STATE)


class OnlineStore:
    """Reads and writes Redis for the request path. Scripts touch keys of one customer only; every call passes the breaker.

    Args:
        client: connected to the shop's Redis database.
        codec: encodes customers' states.
        breaker: refuses calls while Redis is away.
        forgotten_seconds: how long a forgotten customer's keys refuse writes; above any deadline, so that nothing in flight
            comes after it.

    Attributes:
        is_dead: says whether the other replicas may think this one dead.
    """

    def __init__(self, client: OnlineClient, codec: UserStateCodec, breaker: CircuitBreaker, *, forgotten_seconds: float = 60.0) -> None:
        self._client = client
        self._codec = codec
        self._breaker = breaker
        self.is_dead: Callable[[], bool] = _never
        self._forgotten_ms = int(forgotten_seconds * 1000)
        self._fleet_key = f"concord:{codec.project}:fleet"

    @property
    def behind(self) -> bool:
        """True while Redis is just back, or refuses writes, and may lag behind what was answered from PostgreSQL meanwhile."""
        return self._breaker.behind

    @property
    def unwatched(self) -> bool:
        """True while the other replicas may not know that this one reads Redis, and so may show what Redis does not hold."""
        return self.is_dead()

    @property
    def certain(self) -> bool:
        """True while Redis holds all that any replica has shown. Asked before and after a look: both must say so."""
        return not self.behind and not self.unwatched

    @property
    def relied_on(self) -> bool:
        """What this replica tells the others: that they must show nothing which Redis does not hold."""
        return self._breaker.relied_on

    def doubt(self) -> None:
        """Has what Redis holds caught up anew before it is ``certain`` again."""
        self._breaker.doubt()

    async def confirm(self) -> None:
        """Catches up now instead of at the next probe."""
        await self._breaker.attempt()

    def slates_key(self, user_id: str, slot: str = "") -> str:
        """Returns the key of a customer's slates.

        The empty user id is everybody whom nobody has met, so it has a key for each surface and context of ``slot``: in one hash
        the 128 slots would be gone after as many product pages, and every newcomer's slate with them.
        """
        if user_id:
            return f"concord:{self._codec.project}:slates:{user_id}"
        return f"concord:{self._codec.project}:newcomers:{slot.rsplit('|', 2)[0]}"

    async def read(self, user_id: str, slot: str) -> Standing:
        """Reads version and grouping, slate in ``slot``, pointers and Redis's time in one round trip."""
        commands: list[Command] = [
            ("HMGET", self._codec.key(user_id), self._codec.version_field, MEMBERSHIP_FIELD),
            ("HGET", self.slates_key(user_id, slot), slot),
            ("HMGET", self._fleet_key, "model", "activation", "index", "offer"),
            ("TIME",),
        ]
        async with self._breaker.call(in_time=True):
            (version, membership), slate, fleet, (seconds, micros) = await self._client.wire.ask(commands)
        return Standing(
            user_version=None if version is None else decode_value(version),
            slate=slate,
            fleet=None if None in fleet else Fleet(fleet[0].decode(), int(fleet[1]), int(fleet[2]), int(fleet[3])),
            now=_EPOCH + timedelta(seconds=int(seconds), microseconds=int(micros)),
            membership=int(membership or 0),
        )

    async def commit(self, user_id: str, slot: str, *, user_version: int, payload: bytes, ttl_seconds: float) -> bytes:
        """Commits a slate if none stands for this version; returns the one that stands now.

        Raises:
            NotFoundError: the customer was forgotten meanwhile.
        """
        arguments: list[Argument] = [slot, user_version, int(ttl_seconds * 1000), payload]
        async with self._breaker.call():
            (standing,) = await self._client.wire.run(_COMMIT, [_COMMIT.on(self.slates_key(user_id, slot), *arguments)])
        if standing is None:
            raise unknown_customer()
        found: bytes = standing
        return found

    async def point(self, fleet: Fleet) -> None:
        """Moves the fleet's pointers forward; a pointer that is already further stays."""
        arguments: list[Argument] = [fleet.model_version, fleet.activation, fleet.index_version, fleet.offer_version]
        async with self._breaker.call():
            await self._client.wire.run(_POINT, [_POINT.on(self._fleet_key, *arguments)])

    async def point_offers(self, offer_version: int) -> None:
        """Moves only the offers' pointer forward: prices do not wait for a model that cannot be loaded."""
        async with self._breaker.call():
            await self._client.wire.run(_POINT, [_POINT.on(self._fleet_key, "", -1, -1, offer_version)])

    async def user_features(self, user_id: str, now: datetime) -> dict[str, dict[str, FeatureValue]]:
        """Reads all views of a customer with one command, so that no read mixes two writes."""
        async with self._breaker.call(in_time=True):
            (replies,) = await self._client.wire.ask([("HMGET", self._codec.key(user_id), *self._codec.hash_fields)])
        return self._codec.decode(replies, now)

    async def write_users(self, states: Sequence[UserState]) -> None:
        """Writes recomputed customers, each if it is newer than what stands; merged personas keep a marker and no slates."""
        commands: list[Command] = []
        for state in states:
            commands.append(_WRITE.on(state.key, *state.arguments))
            if state.merged_into:
                commands.append(("DEL", self.slates_key(state.user_id)))
        async with self._breaker.call():
            await self._client.writes.run(_WRITE, commands)

    async def erase_users(self, user_ids: Sequence[str]) -> None:
        """Erases state and slates of customers that no longer exist, and keeps work in flight from writing them again."""
        keys = [key for user_id in user_ids for key in (self._codec.key(user_id), self.slates_key(user_id))]
        async with self._breaker.call():
            await self._client.writes.run(_ERASE, [_ERASE.on(key, self._forgotten_ms) for key in keys])
