"""Online features of any Feast feature service or list, read straight from Feast's Redis layout."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any

import psycopg
import structlog

from features.activity import ACTIVITY_VIEW, FORM_FEATURE, PROFILE_VIEW
from features.layout import Ages, FeatureValue, LayoutError, Status, ViewLayout, column_decoder, entity_key
from features.registry import Registry
from server.database import ONLINE_AWAY, OnlineClient
from server.domain import EntityKey, FeatureTable, Subject
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
# A hash is read as a whole when at least this share of the fields the registry knows of is asked for. Redis looks for each field of
# HMGET from the start of a packed hash: 23 of 35 fields take it 8.0 µs, all of them by HGETALL 3.5.
_WHOLE_SHARE = 0.5
_versions = column_decoder("Int64")
USER = "user_id"
# Versions: that of a customer whom nobody knows, for whom MISSING is the answer; and one that no state has.
_NOBODY, _SOMEBODY_ELSE = -1, 2**63
_NOTHING = FeatureValue(None, Status.MISSING, None)

# What Redis holds: for each field of a lookup, one value an entity.
_Stored = Sequence[Sequence[bytes | None]]


class _Lookup:
    """What to ask Redis for of each entity of one join key.

    Attributes:
        join_key: whose values name the entities.
        views: those asked for, narrowed to their features asked for.
        fields: the hash fields to read: a customer's begin with the version and, where activity is asked for, what tells its form;
            then those of the views.
        whole: whether to read the whole hash instead of its fields one by one.
    """

    def __init__(self, join_key: str, views: tuple[ViewLayout, ...], fields: tuple[bytes, ...], *, whole: bool) -> None:
        self.join_key = join_key
        self.views = views
        self.fields = fields
        self.start = len(fields) - sum(len(view.hash_fields) for view in views)
        self.whole = whole
        self._names: list[bytes] = []
        self._pick = _picker(fields, ())

    def command(self, key: bytes) -> Command:
        """Returns what reads one hash; a single command, so no answer mixes two writes."""
        return ("HGETALL", key) if self.whole else ("HMGET", key, *self.fields)

    def columns(self, replies: Sequence[list[Any]]) -> _Stored:
        """Returns for each of ``fields`` what stands there, one value an entity."""
        return list(zip(*(map(self._picked, replies) if self.whole else replies), strict=True))

    def _picked(self, reply: list[Any]) -> tuple[bytes | None, ...]:
        """Picks the fields out of a whole hash: most hashes have the same fields in the same order as the one before."""
        if (names := reply[::2]) != self._names:
            self._names, self._pick = names, _picker(self.fields, tuple(names))
        reply.append(None)  # what is picked for a field that is not there
        return self._pick(reply)


@lru_cache(maxsize=1024)
def _picker(fields: tuple[bytes, ...], names: tuple[bytes, ...]) -> Callable[[list[Any]], tuple[bytes | None, ...]]:
    """Returns what picks fields out of names and values in turn, the last of which stands for a field that is not there."""
    places = {name: 2 * k + 1 for k, name in enumerate(names)}
    return itemgetter(*(places.get(field, -1) for field in fields))


@dataclass(frozen=True)
class _Plan:
    """How a list of names is read, worked out once.

    Attributes:
        refs: the names in the order asked for.
        lookups: one for each join key, the customers' first.
        places: where each name stands among the features of all views, one after the other.
    """

    refs: tuple[str, ...]
    lookups: tuple[_Lookup, ...]
    places: tuple[int, ...]

    @cached_property
    def of_customers(self) -> bool:
        """Whether values of customers are asked for."""
        return self.lookups[0].join_key == USER

    def versions(self, found: Sequence[_Stored]) -> list[int]:
        """Returns the version of each customer's state, -1 without one, or with one whose activity is of another release's form."""
        versions = _versions(found[0][0])
        forms = found[0][1] if self.lookups[0].start > 1 else versions
        return [-1 if version is None or form is None else version for version, form in zip(versions, forms, strict=True)]

    def table(self, found: Sequence[_Stored], now: datetime) -> FeatureTable:
        """Decodes what was found."""
        columns: list[list[Any]] = []
        ages: dict[str, Ages] = {}
        for lookup, stored in zip(self.lookups, found, strict=True):
            start = lookup.start
            for view in lookup.views:
                end = start + len(view.hash_fields)
                values, ages[view.name] = view.columns(stored[start:end], now)
                columns += values
                start = end
        return FeatureTable(dict(zip(self.refs, map(columns.__getitem__, self.places), strict=True)), ages)


class FeatureReader:
    """Reads features by plans: one command per entity and join key, all in one pipeline, so no entity's values mix two writes."""

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
        self._version_field, self._form_field = (activity.fields[activity.features.index(name)] for name in ("version", FORM_FEATURE))
        self._plans: dict[tuple[str, ...], _Plan] = {}
        self._project = project
        self._now = now

    async def read(self, *, service: str, refs: Sequence[str], entities: Sequence[EntityKey]) -> FeatureTable:
        """Returns features of one or more entities, for a feature service or for ``view:feature`` names.

        Raises:
            NotFoundError: the registry has no such service, view or feature.
            InvalidRequestError: a feature is computed at request time, or an entity lacks the id a view needs.
            StaleStateError: the state an entity's token asks for does not exist (yet).
            UnavailableError: Redis is away, and PostgreSQL does not keep these features in their online form, or what it holds
                may not be shown yet.
        """
        names = tuple(refs) or await self._service_refs(service)
        plan = self._plans.get(names) or self._plan(names)
        _require_ids(plan, entities)
        certain = self._states.certain
        try:
            table = await self._online(plan, entities)
        except ONLINE_AWAY:
            return _tabled(plan, [await self._recorded(plan, entity) for entity in entities])
        return table if certain and self._states.certain else _doubted(plan, table)

    async def _online(self, plan: _Plan, entities: Sequence[EntityKey]) -> FeatureTable:
        """Reads all entities in one round trip; customers found too old, lost, merged or unknown are seen to, and all read again."""
        users = [entity.user_id for entity in entities]
        items = [entity.item_id for entity in entities]
        if not plan.of_customers:
            return plan.table(await self._look(plan, users, items), self._now())
        least = [await self._minimum(entity) for entity in entities]
        for _ in range(_LOOKS):
            found = await self._look(plan, users, items)
            late = [k for k, version in enumerate(plan.versions(found)) if version < least[k]]
            if not late:
                return plan.table(found, self._now())
            for k in late:
                users[k], least[k] = await self._user(entities[k])
        raise UnavailableError("the online store does not keep what is written", reason="ONLINE_STORE_UNAVAILABLE")

    async def _minimum(self, entity: EntityKey) -> int:
        """Returns the version a customer's state must have at least: 0 is the first there is, so that none at all is too old."""
        try:
            minimum = await self._identities.minimum_version(entity.user_id, entity.token)
        except MergedError:
            return _SOMEBODY_ELSE
        return max(minimum, self._states.shown.of(entity.user_id))

    async def _look(self, plan: _Plan, users: Sequence[str], items: Sequence[str]) -> list[_Stored]:
        """Reads all lookups of all entities in one round trip."""
        commands = [
            lookup.command(entity_key(lookup.join_key, value, self._project))
            for lookup in plan.lookups
            for value in (users if lookup.join_key == USER else items)
        ]
        async with self._breaker.call():
            replies = await self._client.wire.ask(commands)
        count = len(users)
        return [lookup.columns(replies[k * count : (k + 1) * count]) for k, lookup in enumerate(plan.lookups)]

    async def _recorded(self, plan: _Plan, entity: EntityKey) -> dict[str, FeatureValue]:
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
            return dict.fromkeys(plan.refs, _NOTHING)
        parts = [ref.partition(":") for ref in plan.refs]
        return {ref: features[view][name] for ref, (view, _, name) in zip(plan.refs, parts, strict=True)}

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
        lookups = tuple(self._lookup(join_key, views[join_key]) for join_key in sorted(views, key=lambda name: name != USER))
        order = [f"{view.name}:{feature}" for lookup in lookups for view in lookup.views for feature in view.features]
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        plan = self._plans[refs] = _Plan(refs, lookups, tuple(order.index(ref) for ref in refs))
        return plan

    def _lookup(self, join_key: str, asked: Mapping[str, Collection[str]]) -> _Lookup:
        layouts = self._registry.layouts
        views = tuple(layouts[name].only(features) for name, features in asked.items())
        leading = ([self._version_field] if join_key == USER else []) + ([self._form_field] if ACTIVITY_VIEW in asked else [])
        fields = (*leading, *(field for view in views for field in view.hash_fields))
        known = sum(len(layout.hash_fields) for layout in layouts.values() if layout.join_key == join_key)
        return _Lookup(join_key, views, fields, whole=len(fields) >= _WHOLE_SHARE * known)

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


def _require_ids(plan: _Plan, entities: Sequence[EntityKey]) -> None:
    for lookup in plan.lookups:
        for position, entity in enumerate(entities):
            if not getattr(entity, lookup.join_key, ""):
                raise InvalidRequestError(f"entities[{position}].{lookup.join_key}", "is required by the features asked for")


def _tabled(plan: _Plan, rows: Sequence[Mapping[str, FeatureValue]]) -> FeatureTable:
    """Puts rows of customers together; a view is as old as any value it has."""
    ages = {}
    for view in plan.lookups[0].views:
        refs = [f"{view.name}:{feature}" for feature in view.features]
        known = [next((row[ref] for ref in refs if row[ref].value is not None), _NOTHING) for row in rows]
        ages[view.name] = Ages([value.status for value in known], [value.event_timestamp for value in known])
    return FeatureTable({ref: [row[ref].value for row in rows] for ref in plan.refs}, ages)


def _doubted(plan: _Plan, table: FeatureTable) -> FeatureTable:
    """Says of customers' values that they are stale: Redis may lag behind what other replicas have shown."""
    views = {view.name for lookup in plan.lookups if lookup.join_key == USER for view in lookup.views}
    return replace(table, ages={view: _stale(ages) if view in views else ages for view, ages in table.ages.items()})


def _stale(ages: Ages) -> Ages:
    return ages._replace(statuses=[Status.STALE if status is Status.PRESENT else status for status in ages.statuses])
