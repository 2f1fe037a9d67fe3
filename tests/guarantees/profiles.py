"""The runs for whole profiles: one writer pushing back to back against readers, and every interleaving of writers.

Both views of a customer carry one counter. A read that shows two counters is torn: it mixes two pushes.
"""

import asyncio
import contextlib
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
from feast import FeatureStore

from features.activity import ACTIVITY_VIEW, PROFILE_VIEW, UserState, UserStateCodec
from features.registry import load_registry
from features.store import feature_store
from server.database import OnlineClient, redis_breaker, redis_client
from server.online.breaker import CircuitBreaker
from server.online.store import OnlineStore
from server.settings import ServerSettings
from tests.guarantees.rules import Finding

USER = "whole-profile"
_START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Pair:
    """The counters one read saw in the two views; None where the view was missing."""

    activity: int | None
    profile: int | None


_NOBODY = Pair(None, None)


def whole(pairs: Sequence[Pair], rule: str = "whole profiles, none torn") -> Finding:
    """No read mixes two pushes."""
    finding = Finding(rule)
    for pair in pairs:
        finding.checked += 1
        if pair.activity != pair.profile:
            finding.broken(pair)
    return finding


def row(codec: UserStateCodec, user: str, version: int) -> dict[str, Any]:
    """Returns what PostgreSQL would say of a customer at ``version``, the counter in both views."""
    at = _START + timedelta(seconds=version)
    activity, profile = (
        {name: _value(dtype, version) for name, dtype in zip(view.features, view.dtypes, strict=True)}
        for view in (codec.activity, codec.profile)
    )
    whose = {"user_id": user, "version": version, "user_version": version, "membership": 0, "merged_into": None}
    return activity | whose | {"event_timestamp": at, "profile": profile, "profile_timestamp": at}


def _value(dtype: str, version: int) -> Any:
    one: Any = float(version) if "Float" in dtype else str(version) if "String" in dtype else version
    return [one] if dtype.startswith("Array") else one


class ServerPath:
    """The server's own writes and reads of one customer."""

    def __init__(self, client: OnlineClient, codec: UserStateCodec, breaker: CircuitBreaker) -> None:
        self.client = client
        self.codec = codec
        self.online = OnlineStore(client, codec, breaker)

    def state(self, user: str, version: int) -> UserState:
        """Returns the encoded state at ``version``."""
        return self.codec.state(row(self.codec, user, version))

    async def push(self, user: str, version: int) -> None:
        """Writes all views."""
        await self.online.write_users([self.state(user, version)])

    async def lose(self, user: str) -> None:
        """Redis loses the customer."""
        await self.client.delete(self.codec.key(user))

    async def read(self, user: str) -> Pair:
        """Reads all views."""
        features = await self.online.user_features(user, _START)
        return Pair(features[ACTIVITY_VIEW]["views_7d"].value, features[PROFILE_VIEW]["purchase_count"].value)

    async def version(self, user: str) -> int | None:
        """Reads the version."""
        features = await self.online.user_features(user, _START)
        version: int | None = features[ACTIVITY_VIEW]["version"].value
        return version


@contextlib.asynccontextmanager
async def server_path(settings: ServerSettings) -> Any:
    """Yields a connection of its own to the shop's Redis."""
    layouts = (await asyncio.to_thread(load_registry, settings)).layouts
    client = redis_client(settings)
    breaker = redis_breaker(settings, client, lambda _is_open: None)
    try:
        yield ServerPath(client, UserStateCodec(layouts, settings.project), breaker)
    finally:
        await client.aclose()


async def push_and_read(settings: ServerSettings, *, reads: int, readers: int = 4) -> list[Pair]:
    """One writer pushes all views back to back, after each push of a losing Redis anew; readers read all views.

    A profile that stands is left to materialization, so the customer is lost before each push: the views come and go together.
    """
    async with server_path(settings) as writer, contextlib.AsyncExitStack() as stack:
        others = [await stack.enter_async_context(server_path(settings)) for _ in range(readers)]
        pairs: list[Pair] = []

        async def push() -> None:
            version = 0
            while len(pairs) < reads:
                version += 1
                await writer.push(USER, version)
                await writer.lose(USER)

        async def read(path: ServerPath) -> None:
            while len(pairs) < reads:
                pair = await path.read(USER)
                if pair != _NOBODY:
                    pairs.append(pair)

        await asyncio.gather(push(), *(read(path) for path in others))
    return pairs


def feast_push_and_read(settings: ServerSettings, *, reads: int) -> list[Pair]:
    """The same with plain Feast on the same Redis: one write call per view, one read call over both views."""
    store = feature_store(settings)
    codec = UserStateCodec(load_registry(settings).layouts, settings.project)
    user = f"{USER}-feast"
    over = threading.Event()
    writer = threading.Thread(target=_feast_pushes, args=(feature_store(settings), codec, user, over))
    writer.start()
    refs = [f"{ACTIVITY_VIEW}:views_7d", f"{PROFILE_VIEW}:purchase_count"]
    pairs: list[Pair] = []
    try:
        while len(pairs) < reads:
            with _silent():
                answer = store.get_online_features(features=refs, entity_rows=[{"user_id": user}]).to_dict()
            pair = Pair(answer["views_7d"][0], answer["purchase_count"][0])
            if None not in (pair.activity, pair.profile):  # before the first push of both
                pairs.append(pair)
    finally:
        over.set()
        writer.join()
    return pairs


def _feast_pushes(store: FeatureStore, codec: UserStateCodec, user: str, over: threading.Event) -> None:
    version = 0
    while not over.is_set():
        version += 1
        values = row(codec, user, version)
        stamp = values["event_timestamp"]
        for view, columns in ((ACTIVITY_VIEW, values), (PROFILE_VIEW, values["profile"])):
            names = codec.activity.features if view == ACTIVITY_VIEW else codec.profile.features
            frame = pd.DataFrame([{name: columns[name] for name in names} | {"user_id": user, "event_timestamp": stamp}])
            with _silent():
                store.write_to_online_store(view, frame)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Feast and pandas warn of their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


async def interleave(settings: ServerSettings, *, rounds: int, seed: int, progress: Callable[[int], None] = lambda _: None) -> Finding:
    """Two to four writers, each with versions of its own in any order, delayed and repeated: the newest must win every time.

    After every single write the version may not be lower than before it; at the end the bytes are those of the newest state.
    """
    finding = Finding("the newest event wins in every interleaving")
    dice = random.Random(seed)
    async with server_path(settings) as first, server_path(settings) as second:
        paths = (first, second)
        for number in range(rounds):
            user = f"{USER}-{seed}-{number}"
            highest = dice.randrange(3, 9)
            writes = [version for version in range(1, highest + 1) for _ in range(dice.choice((1, 1, 2)))]
            dice.shuffle(writes)
            newest = 0
            # In pairs at once, as two replicas do, or one after the other.
            while writes:
                together = [writes.pop() for _ in range(min(len(writes), dice.choice((1, 2))))]
                await asyncio.gather(*(path.push(user, version) for path, version in zip(paths, together, strict=False)))
                newest = max(newest, *together)
                seen = await first.version(user)
                finding.checked += 1
                if seen != newest:
                    finding.broken(f"round {number}: version {seen} after {newest} was written", together)
            await _compare(first, user, highest, finding)
            await first.lose(user)
            progress(number + 1)
    return finding


async def _compare(path: ServerPath, user: str, version: int, finding: Finding) -> None:
    """The activity that stands must be byte for byte that of ``version``."""
    values = row(path.codec, user, version)
    expected: Mapping[Any, Any] = path.codec.activity.encode(values, values["event_timestamp"])
    standing = await path.client.hgetall(path.codec.key(user))
    finding.checked += 1
    if any(standing.get(name) != value for name, value in expected.items()):
        finding.broken(f"the bytes are not those of version {version}", user)
