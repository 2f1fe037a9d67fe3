"""Online features of any Feast feature service or list, read straight from Feast's Redis layout."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import psycopg
import structlog

from features.activity import ACTIVITY_VIEW, PROFILE_VIEW
from features.layout import FeatureValue, LayoutError, Status, ViewLayout, decode_value, entity_key
from features.registry import Registry
from server.database import ONLINE_AWAY, OnlineClient
from server.domain import EntityKey, Subject
from server.errors import InvalidRequestError, NotFoundError, UnavailableError
from server.ingest.identities import Identities, Known
from server.online.breaker import CircuitBreaker
from server.online.states import MergedError, UserStates, patiently
from server.online.wire import Command

_log = structlog.get_logger(__name__)
# A state that is lost between two reads is looked for again; more than a few times means that Redis keeps nothing.
_LOOKS = 4
# Lists of names whose plans are kept; a shop has a few feature services.
_MOST_PLANS = 1_000
USER = "user_id"
# Versions: that of a customer whom nobody knows, for whom MISSING is the answer; and one that no state has.
_NOBODY, _SOMEBODY_ELSE = -1, 2**63


@dataclass(frozen=True)
class FeatureRow:
    """Features of one entity: ``view:feature`` to its value and status, in the order asked for."""

    values: Mapping[str, FeatureValue]


@dataclass(frozen=True)
class _Plan:
    """What to ask Redis for, worked out once for a list of names.

    Attributes:
        refs: the names in the order asked for.
        views: by join key, the views that hold them, narrowed to what is asked for.
        fields: by join key, the hash fields to ask for; a customer's begin with the version.
        places: where each name stands among the values of all views, one after the other.
    """

    refs: tuple[str, ...]
    views: Mapping[str, tuple[ViewLayout, ...]]
    fields: Mapping[str, tuple[bytes, ...]]
    places: tuple[int, ...]

    def version(self, replies: Sequence[Sequence[bytes | None]]) -> int:
        """Returns the version of a customer's state, -1 without one; 0 where no customer is asked for."""
        for join_key, reply in zip(self.fields, replies, strict=True):
            if join_key == USER:
                return -1 if not reply[0] else int(decode_value(reply[0]))
        return 0

    def row(self, replies: Sequence[Sequence[bytes | None]], now: datetime) -> FeatureRow:
        """Reads an entity's replies, one for each join key."""
        flat: list[FeatureValue] = []
        for (join_key, views), reply in zip(self.views.items(), replies, strict=True):
            start = 1 if join_key == USER else 0
            for view in views:
                end = start + len(view.hash_fields)
                flat += view.values(reply[start:end], now)
                start = end
        return FeatureRow(dict(zip(self.refs, map(flat.__getitem__, self.places), strict=True)))


@dataclass
class _Wanted:
    """One entity to read, and the version its customer must have at least; below 0 for nobody at all."""

    user_id: str
    item_id: str
    version: int = 0


class FeatureReader:
    """Reads features by plans: one HMGET per entity and join key, all in one pipeline, so no row mixes two writes."""

    def __init__(
        self,
        client: OnlineClient,
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
        self._plans: dict[tuple[str, ...], _Plan] = {}
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
        plan = self._plans.get(names) or self._plan(names)
        for position, entity in enumerate(entities):
            _require_ids(plan, position, entity)
        certain = self._states.certain
        try:
            rows = await self._online(plan, entities)
        except ONLINE_AWAY:
            return [await self._recorded(plan, entity) for entity in entities]
        return rows if certain and self._states.certain else [_doubted(plan, row) for row in rows]

    async def _online(self, plan: _Plan, entities: Sequence[EntityKey]) -> list[FeatureRow]:
        """Reads all entities in one round trip; customers found too old, lost, merged or unknown are seen to, and all read again."""
        wanted = [_Wanted(entity.user_id, entity.item_id) for entity in entities]
        if USER in plan.views:
            for one, entity in zip(wanted, entities, strict=True):
                one.version = await self._minimum(entity)
        for _ in range(_LOOKS):
            replies = await self._look(plan, wanted)
            late = [k for k, (one, reply) in enumerate(zip(wanted, replies, strict=True)) if plan.version(reply) < one.version]
            if not late:
                now = self._now()
                return [plan.row(reply, now) for reply in replies]
            for k in late:
                wanted[k].user_id, wanted[k].version = await self._user(entities[k])
        raise UnavailableError("the online store does not keep what is written", reason="ONLINE_STORE_UNAVAILABLE")

    async def _minimum(self, entity: EntityKey) -> int:
        """Returns the version a customer's state must have at least: 0 is the first there is, so that none at all is too old."""
        try:
            minimum = await self._identities.minimum_version(entity.user_id, entity.token)
        except MergedError:
            return _SOMEBODY_ELSE
        return max(minimum, self._states.shown.of(entity.user_id))

    async def _look(self, plan: _Plan, wanted: Sequence["_Wanted"]) -> list[list[Any]]:
        """Returns for each entity the replies of its join keys."""
        commands: list[Command] = []
        for one in wanted:
            for join_key, fields in plan.fields.items():
                key = entity_key(join_key, one.user_id if join_key == USER else one.item_id, self._project)
                commands.append(("HMGET", key, *fields))
        async with self._breaker.call():
            replies = await self._client.wire.ask(commands)
        width = len(plan.fields)
        return [replies[at : at + width] for at in range(0, len(replies), width)]

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
            self._plans = {}

    async def _service_refs(self, service: str) -> tuple[str, ...]:
        if service not in self._registry.services:  # it may be new since the last look
            self._registry, self._plans = await asyncio.to_thread(self._read_registry), {}
        if (found := self._registry.services.get(service)) is None:
            raise NotFoundError("no such feature service", reason="FEATURE_SERVICE_UNKNOWN", field="feature_service")
        return tuple(feature.ref for feature in found.features)

    def _plan(self, refs: tuple[str, ...]) -> _Plan:
        views: dict[str, dict[str, list[str]]] = {}
        for ref in refs:
            name, _, feature = ref.partition(":")
            layout = self._registry.layouts.get(name)
            if layout is None and name in self._registry.on_demand:
                raise InvalidRequestError("features", f"{ref} is computed at request time and not read from the online store")
            if layout is None or feature not in layout.features:
                raise NotFoundError(f"no online feature {ref!r}", reason="FEATURE_UNKNOWN", field="features")
            views.setdefault(layout.join_key, {}).setdefault(name, []).append(feature)
        narrowed = {key: tuple(self._registry.layouts[name].only(asked) for name, asked in found.items()) for key, found in views.items()}
        fields = {
            key: ((self._version_field,) if key == USER else ()) + tuple(field for view in found for field in view.hash_fields)
            for key, found in narrowed.items()
        }
        order = [f"{view.name}:{feature}" for found in narrowed.values() for view in found for feature in view.features]
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        plan = self._plans[refs] = _Plan(refs, narrowed, fields, tuple(order.index(ref) for ref in refs))
        return plan

    async def _user(self, entity: EntityKey) -> tuple[str, int]:
        """Makes sure Redis holds the customer as new as the token; returns who they are after merges, and the version it holds."""

        async def act(known: Known) -> tuple[str, int]:
            minimum = await self._identities.minimum_version(known.user_id, entity.token)
            features = await self._states.at_least(known.user_id, minimum, now=self._now())
            return known.user_id, features[ACTIVITY_VIEW]["version"].value

        try:
            return await self._identities.following(Subject(user_id=entity.user_id), Known(entity.user_id), act)
        except NotFoundError:
            return entity.user_id, _NOBODY


def _require_ids(plan: _Plan, position: int, entity: EntityKey) -> None:
    ids = {"user_id": entity.user_id, "item_id": entity.item_id}
    for join_key in plan.views:
        if not ids.get(join_key):
            raise InvalidRequestError(f"entities[{position}].{join_key}", "is required by the features asked for")


def _doubted(plan: _Plan, row: FeatureRow) -> FeatureRow:
    """Says of a customer's values that they are stale: Redis may lag behind what other replicas have shown."""
    views = {view.name for view in plan.views.get("user_id", ())}
    return FeatureRow(
        {
            ref: value._replace(status=Status.STALE) if value.status is Status.PRESENT and ref.partition(":")[0] in views else value
            for ref, value in row.values.items()
        }
    )
