"""Online features of any Feast feature service or list, read straight from Feast's Redis layout."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from feast import FeatureStore
from feast.errors import FeatureServiceNotFoundException
from redis.asyncio import Redis

from features.layout import FeatureValue, Status, ViewLayout, entity_key, load_layouts
from server.errors import InvalidRequestError, NotFoundError
from server.online.states import UserStates


@dataclass(frozen=True)
class FeatureRow:
    """Features of one entity: ``view:feature`` to its value and status, in the order asked for."""

    entity_id: str
    values: Mapping[str, FeatureValue]


@dataclass(frozen=True)
class _Plan:
    """What to ask Redis for: a view per span of hash fields, and which features of it were asked for."""

    join_key: str
    refs: tuple[str, ...]
    views: tuple[ViewLayout, ...]

    @property
    def hash_fields(self) -> list[bytes]:
        return [field for view in self.views for field in view.hash_fields]


class FeatureReader:
    """Reads features by plans compiled once per service or list; one HMGET per entity, all entities in one pipeline."""

    def __init__(
        self,
        client: Redis,
        states: UserStates,
        store: FeatureStore,
        layouts: Mapping[str, ViewLayout],
        *,
        project: str,
        now: Callable[[], datetime],
    ) -> None:
        self._client = client
        self._states = states
        self._store = store
        self._layouts = dict(layouts)
        self._services: dict[str, tuple[str, ...]] = {}
        self._project = project
        self._now = now

    async def read(self, *, service: str, refs: Sequence[str], entities: Sequence[str]) -> list[FeatureRow]:
        """Returns the features of each entity, for a feature service or for ``view:feature`` names.

        Raises:
            NotFoundError: the registry has no such service, view or feature.
            InvalidRequestError: the features belong to different entities, or are computed at request time.
        """
        names = tuple(refs) or self._services.get(service) or await self._service_refs(service)
        plan = self._plan(names)
        rows = await self._fetch(plan, entities)
        if plan.join_key == "user_id":
            await self._rebuild_absent(rows)
            rows = await self._fetch(plan, entities)
        return rows

    async def refresh(self) -> None:
        """Looks at the Feast registry again, off the event loop, so that newly applied views are served without a restart."""
        self._layouts = await asyncio.to_thread(load_layouts, self._store)
        self._services = {}

    async def _service_refs(self, service: str) -> tuple[str, ...]:
        try:
            found = await asyncio.to_thread(self._store.get_feature_service, service)
        except FeatureServiceNotFoundException:
            raise NotFoundError("no such feature service", reason="FEATURE_SERVICE_UNKNOWN", field="feature_service") from None
        refs = tuple(f"{p.name_to_use()}:{f.name}" for p in found.feature_view_projections for f in p.features)
        self._services[service] = refs
        return refs

    def _plan(self, refs: tuple[str, ...]) -> _Plan:
        views: dict[str, ViewLayout] = {}
        for ref in refs:
            view, _, feature = ref.partition(":")
            layout = self._layouts.get(view)
            if layout is None or feature not in layout.features:
                raise NotFoundError(f"no online feature {ref!r}", reason="FEATURE_UNKNOWN", field="features")
            views[view] = layout
        keys = {layout.join_key for layout in views.values()}
        if len(keys) != 1:
            raise InvalidRequestError("features", "must all belong to one entity")
        return _Plan(keys.pop(), refs, tuple(views.values()))

    async def _fetch(self, plan: _Plan, entities: Sequence[str]) -> list[FeatureRow]:
        pipeline = self._client.pipeline(transaction=False)
        for entity in entities:
            pipeline.hmget(entity_key(plan.join_key, entity, self._project), plan.hash_fields)  # type: ignore[arg-type]
        replies = await pipeline.execute()
        now = self._now()
        return [FeatureRow(entity, _decode(plan, reply, now)) for entity, reply in zip(entities, replies, strict=True)]

    async def _rebuild_absent(self, rows: Sequence[FeatureRow]) -> None:
        """A customer with nothing online at all may just have lost it: PostgreSQL knows."""
        for row in rows:
            if all(value.status is Status.MISSING for value in row.values.values()):
                try:
                    await self._states.rebuild(row.entity_id)
                except NotFoundError:
                    continue  # nobody of that id: MISSING is the answer


def _decode(plan: _Plan, reply: Sequence[bytes | None], now: datetime) -> dict[str, FeatureValue]:
    decoded: dict[str, FeatureValue] = {}
    start = 0
    for view in plan.views:
        values = view.decode(reply[start : start + len(view.hash_fields)], now)
        decoded |= {f"{view.name}:{name}": value for name, value in values.items()}
        start += len(view.hash_fields)
    return {ref: decoded[ref] for ref in plan.refs}
