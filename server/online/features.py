"""Online features of any Feast feature service or list, read straight from Feast's Redis layout."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import psycopg
import structlog
from redis.asyncio import Redis

from features.activity import ACTIVITY_VIEW, PROFILE_VIEW
from features.layout import FeatureValue, LayoutError, Status, ViewLayout, decode_value, entity_key
from features.registry import Registry
from server.database import ONLINE_AWAY
from server.domain import EntityKey, Subject
from server.errors import InvalidRequestError, NotFoundError, UnavailableError
from server.ingest.identities import Identities, Known
from server.online.breaker import CircuitBreaker
from server.online.states import MergedError, UserStates, patiently

_log = structlog.get_logger(__name__)
# A state that is lost between two reads is looked for again; more than a few times means that Redis keeps nothing.
_LOOKS = 3


@dataclass(frozen=True)
class FeatureRow:
    """Features of one entity: ``view:feature`` to its value and status, in the order asked for."""

    values: Mapping[str, FeatureValue]


@dataclass(frozen=True)
class _Plan:
    """What to ask Redis for: the names in order, and the views that hold them by join key."""

    refs: tuple[str, ...]
    views: Mapping[str, tuple[ViewLayout, ...]]


class FeatureReader:
    """Reads features by plans: one HMGET per entity and join key, all in one pipeline, so no row mixes two writes."""

    def __init__(
        self,
        client: Redis,
        breaker: CircuitBreaker,
        states: UserStates,
        identities: Identities,
        *,
        registry: Registry,
        read_registry: Callable[[], Registry],
        project: str,
        now: Callable[[], datetime],
    ) -> None:
        self._client = client
        self._breaker = breaker
        self._states = states
        self._identities = identities
        self._registry = registry
        self._read_registry = read_registry
        activity = registry.layouts[ACTIVITY_VIEW]
        self._version_field = activity.fields[activity.features.index("version")]
        self._project = project
        self._now = now

    async def read(self, *, service: str, refs: Sequence[str], entities: Sequence[EntityKey]) -> list[FeatureRow]:
        """Returns the features of each entity, for a feature service or for ``view:feature`` names.

        Raises:
            NotFoundError: the registry has no such service, view or feature.
            InvalidRequestError: a feature is computed at request time, or an entity lacks the id a view needs.
            StaleStateError: the state an entity's token asks for does not exist (yet).
            UnavailableError: Redis is away, and PostgreSQL does not keep these features in their online form, or what it holds
                may not be shown yet.
        """
        names = tuple(refs) or await self._service_refs(service)
        plan = self._plan(names)
        for position, entity in enumerate(entities):
            _require_ids(plan, position, entity)
        certain = self._states.certain
        try:
            rows = await self._online(plan, entities)
        except ONLINE_AWAY:
            return [await self._recorded(plan, entity) for entity in entities]
        return rows if certain and self._states.certain else [_doubted(plan, row) for row in rows]

    async def _online(self, plan: _Plan, entities: Sequence[EntityKey]) -> list[FeatureRow]:
        for _ in range(_LOOKS):
            if (rows := await self._look(plan, entities)) is not None:
                return rows
        raise UnavailableError("the online store does not keep what is written", reason="ONLINE_STORE_UNAVAILABLE")

    async def _look(self, plan: _Plan, entities: Sequence[EntityKey]) -> list[FeatureRow] | None:
        """Returns the rows; None where a customer's state was lost, or merged away, after it was found to be new enough."""
        users = [await self._user(entity) if "user_id" in plan.views else ("", 0) for entity in entities]
        pipeline = self._client.pipeline(transaction=False)
        for (user_id, _), entity in zip(users, entities, strict=True):
            ids = {"user_id": user_id, "item_id": entity.item_id}
            for join_key, views in plan.views.items():
                fields = [self._version_field, *(field for view in views for field in view.hash_fields)]
                pipeline.hmget(entity_key(join_key, ids[join_key], self._project), fields)  # type: ignore[arg-type]
        async with self._breaker.call():
            replies = await pipeline.execute()
        width = len(plan.views)
        rows = []
        for k, (_, version) in enumerate(users):
            found = dict(zip(plan.views, replies[k * width : (k + 1) * width], strict=True))
            if version and _version_of(found["user_id"]) < version:
                return None
            rows.append(_row(plan, [reply[1:] for reply in found.values()], self._now()))
        return rows

    async def _recorded(self, plan: _Plan, entity: EntityKey) -> FeatureRow:
        """Recomputes the views of a customer that the server itself writes; others exist online only."""
        if any(ref.partition(":")[0] not in {ACTIVITY_VIEW, PROFILE_VIEW} for ref in plan.refs):
            raise UnavailableError("these features can only be read online, and Redis is away", reason="ONLINE_STORE_UNAVAILABLE")
        user_id = entity.user_id
        try:
            minimum = await self._identities.minimum_version(user_id, entity.token)
            features = await patiently(lambda: self._states.recorded_at_least(user_id, minimum, now=self._now()))
        except MergedError as merged:
            return await self._recorded(plan, replace(entity, user_id=merged.survivor))
        except NotFoundError:
            return FeatureRow({ref: FeatureValue(None, Status.MISSING, None) for ref in plan.refs})
        parts = [ref.partition(":") for ref in plan.refs]
        return FeatureRow({ref: features[view][name] for ref, (view, _, name) in zip(plan.refs, parts, strict=True)})

    async def run(self, pause_seconds: float) -> None:
        """Looks at the Feast registry again every so often, off the event loop: new views are served without a restart."""
        while True:
            await asyncio.sleep(pause_seconds)
            try:
                self._registry = await asyncio.to_thread(self._read_registry)
            except (psycopg.Error, LayoutError) as error:
                _log.warning("the Feast registry cannot be followed; serving what it said last", error=type(error).__name__)

    async def _service_refs(self, service: str) -> tuple[str, ...]:
        if service not in self._registry.services:  # it may be new since the last look
            self._registry = await asyncio.to_thread(self._read_registry)
        if (found := self._registry.services.get(service)) is None:
            raise NotFoundError("no such feature service", reason="FEATURE_SERVICE_UNKNOWN", field="feature_service")
        return tuple(feature.ref for feature in found.features)

    def _plan(self, refs: tuple[str, ...]) -> _Plan:
        views: dict[str, dict[str, ViewLayout]] = {}
        for ref in refs:
            name, _, feature = ref.partition(":")
            layout = self._registry.layouts.get(name)
            if layout is None and name in self._registry.on_demand:
                raise InvalidRequestError("features", f"{ref} is computed at request time and not read from the online store")
            if layout is None or feature not in layout.features:
                raise NotFoundError(f"no online feature {ref!r}", reason="FEATURE_UNKNOWN", field="features")
            views.setdefault(layout.join_key, {})[name] = layout
        return _Plan(refs, {join_key: tuple(found.values()) for join_key, found in views.items()})

    async def _user(self, entity: EntityKey) -> tuple[str, int]:
        """Makes sure Redis holds the customer as new as the token; returns who they are after merges, and the version it holds."""

        async def act(known: Known) -> tuple[str, int]:
            minimum = await self._identities.minimum_version(known.user_id, entity.token)
            features = await self._states.at_least(known.user_id, minimum, now=self._now())
            return known.user_id, features[ACTIVITY_VIEW]["version"].value

        try:
            return await self._identities.following(Subject(user_id=entity.user_id), Known(entity.user_id), act)
        except NotFoundError:
            return entity.user_id, 0  # nobody of that id: MISSING is the answer


def _require_ids(plan: _Plan, position: int, entity: EntityKey) -> None:
    ids = {"user_id": entity.user_id, "item_id": entity.item_id}
    for join_key in plan.views:
        if not ids.get(join_key):
            raise InvalidRequestError(f"entities[{position}].{join_key}", "is required by the features asked for")


def _version_of(reply: Sequence[bytes | None]) -> int:
    version = None if reply[0] is None else decode_value(reply[0])
    return -1 if version is None else int(version)


def _doubted(plan: _Plan, row: FeatureRow) -> FeatureRow:
    """Says of a customer's values that they are stale: Redis may lag behind what other replicas have shown."""
    views = {view.name for view in plan.views.get("user_id", ())}
    return FeatureRow(
        {
            ref: replace(value, status=Status.STALE) if value.status is Status.PRESENT and ref.partition(":")[0] in views else value
            for ref, value in row.values.items()
        }
    )


def _row(plan: _Plan, replies: Sequence[Sequence[bytes | None]], now: datetime) -> FeatureRow:
    decoded: dict[str, FeatureValue] = {}
    for reply, views in zip(replies, plan.views.values(), strict=True):
        start = 0
        for view in views:
            values = view.decode(reply[start : start + len(view.hash_fields)], now)
            decoded |= {f"{view.name}:{name}": value for name, value in values.items()}
            start += len(view.hash_fields)
    return FeatureRow({ref: decoded[ref] for ref in plan.refs})
