"""The online store under audit: customers' state byte by byte, committed slates, and the fleet's pointers."""

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from features.activity import UserStateCodec
from features.layout import decode_timestamp, decode_value
from server.audit.report import Answered, AuditReport, Violation
from server.audit.store import AuditStore
from server.audit.workshop import Workshop
from server.online.store import Fleet, OnlineStore
from server.recommend.slate import Place, Slate, SlateFlag, decode_slate

_NEARBY = 4


class OnlineAudit:
    """Compares what Redis holds with what PostgreSQL gives for the very versions Redis names."""

    def __init__(self, client: Redis, codec: UserStateCodec, online: OnlineStore, *, store: AuditStore, workshop: Workshop) -> None:
        self._client = client
        self._codec = codec
        self._store = store
        self._workshop = workshop
        self._online = online

    async def states(self, user_ids: Sequence[str], report: AuditReport) -> None:
        """Checks the state of customers: equal to the byte to that of its version, and how far that is behind."""
        stale = report.staleness
        for user_id in user_ids:
            # Redis first: PostgreSQL commits before Redis is written, so it holds whatever was seen here.
            replies = await self._client.hmget(self._codec.key(user_id), list(self._codec.hash_fields))  # type: ignore[misc, arg-type]
            seen = dict(zip(self._codec.hash_fields, replies, strict=True))
            customer = (await self._store.customers([user_id])).get(user_id)
            if customer is None or customer.merged_into:
                continue
            if seen[self._codec.version_field] is None or seen[self._codec.form_field] is None:
                report.states["absent"] += 1
                continue
            version = decode_value(seen[self._codec.version_field])
            stale.customers_checked += 1
            stale.customers_lagging += version < customer.version
            stale.versions_behind = max(stale.versions_behind, customer.version - version)
            if version < customer.regrouped_version:
                report.states["regrouped"] += 1
                continue
            violation = await self._state(user_id, seen, version=version, newest=customer.version)
            report.states[violation.kind if violation else "equal"] += 1
            if violation:
                report.violations.append(violation)

    async def _state(self, user_id: str, seen: Mapping[bytes, bytes | None], *, version: int, newest: int) -> Violation | None:
        if version > newest:
            return _violation("future_state", user_id, expected=f"at most user_version {newest}", seen=f"user_version {version}")
        due = await self._activity(user_id, version)
        wrong = [field for field, value in due.items() if seen[field] != value]
        if wrong:
            names = ", ".join(self._name(field) for field in wrong)
            mixed = [field for field in wrong if field != self._codec.version_field]
            for other in [v for k in range(1, _NEARBY) for v in (version - k, version + k) if 0 <= v <= newest]:
                there = await self._activity(user_id, other)
                if all(seen[field] == there[field] for field in mixed):
                    expected = f"every field of user_version {version}"
                    return _violation("torn_state", user_id, expected=expected, seen=f"user_version {other}'s {names}")
            return _violation("tampered_state", user_id, expected=f"the bytes of user_version {version}", seen=f"other bytes in {names}")
        return await self._profile(user_id, seen)

    async def _activity(self, user_id: str, version: int) -> dict[bytes, bytes]:
        row = (await self._store.activities([(user_id, version)]))[user_id, version]
        return self._codec.activity.encode(row, row["event_timestamp"])

    async def _profile(self, user_id: str, seen: Mapping[bytes, bytes | None]) -> Violation | None:
        layout = self._codec.profile
        stamp = seen[layout.timestamp_field]
        if stamp is None:
            return None
        at = decode_timestamp(stamp)
        row: Mapping[str, Any] | None = next((r for r in await self._store.profiles(user_id) if r["event_timestamp"] == at), None)
        if row is None:
            expected = "a profile snapshot that PostgreSQL holds"
            return _violation("tampered_state", user_id, expected=expected, seen=f"one of {at:%Y-%m-%d %H:%M:%S.%f}")
        wrong = [field for field, value in layout.encode(row, at).items() if seen[field] != value]
        names = ", ".join(self._name(field) for field in wrong)
        expected = f"the bytes of the profile of {at:%Y-%m-%d %H:%M:%S}"
        return _violation("tampered_state", user_id, expected=expected, seen=f"other bytes in {names}") if wrong else None

    def _name(self, field: bytes) -> str:
        for view in (self._codec.activity, self._codec.profile):
            if field in view.fields:
                return f"{view.name}:{view.features[view.fields.index(field)]}"
        return field.decode()

    async def slates(self, user_ids: Sequence[str], asked: Sequence[Answered], *, surfaces: Sequence[str]) -> list[Answered]:
        """Returns the committed slates of customers, and of those nobody has met, as answers to be replayed.

        A slot holds only a digest of its context items or query, so such slates are read where a logged answer names those. Those of
        customers nobody has met lie under a key for each place: they are read on ``surfaces`` and where a logged answer was given.
        """
        places = {(a.user_id, a.place) for a in asked}
        named_places = {(user_id, place.digest): place for user_id, place in places if place.digest}
        keys = {(user_id, self._online.slates_key(user_id)) for user_id in user_ids}
        nobodys = {place for user_id, place in places if not user_id} | {Place(surface) for surface in surfaces}
        keys |= {("", self._online.slates_key("", place.slot("", 0))) for place in nobodys}
        found = []
        for user_id, key in sorted(keys):
            standing: Mapping[bytes, bytes] = await self._client.hgetall(key)  # type: ignore[misc]
            for slot, raw in standing.items():
                named = slot.decode(errors="replace").split("|")
                if len(named) != 4 or not named[3].isdecimal():  # no slot, so nobody is answered with it: a marker of an erasure
                    continue
                surface, digest, model_version, index = named
                place = named_places.get((user_id, digest)) if digest else Place(surface)
                slate = decode_slate(raw, user_id, slot.decode())
                snapshot = await self._workshop.snapshot(model_version, int(index))
                if place is not None and slate is not None and snapshot is not None:
                    place = place._replace(surface=surface)
                    found.append(_committed(user_id, place, slate, ids=snapshot.table.ids, model_version=model_version, index=int(index)))
        return found

    async def pointers(self, report: AuditReport) -> None:
        """Compares the pointers in Redis with PostgreSQL; behind is staleness, ahead is forged."""
        seen = (await self._online.read("", "")).fleet
        fleet = await self._store.fleet()
        if seen is None:
            report.notes.append("Redis holds no pointers: it was emptied, or no replica runs")
            return
        report.staleness.offers_behind = max(fleet.offer_version - seen.offer_version, 0)
        report.staleness.index_behind = max(fleet.index_version - seen.index_version, 0)
        for name, ahead in _ahead(seen, fleet).items():
            expected, found = (f"{name} {getattr(fleet, name)} at most, as in PostgreSQL", f"{name} {getattr(seen, name)}")
            if ahead:
                report.violations.append(Violation("forged_pointer", "pointers", expected, found))
        if seen.activation == fleet.activation and seen.model_version != fleet.model_version:
            expected = f"model {fleet.model_version or '(none)'}, activation {fleet.activation}"
            report.violations.append(Violation("second_model", "pointers", expected, f"model {seen.model_version or '(none)'} in Redis"))


def _ahead(seen: Fleet, fleet: Fleet) -> dict[str, bool]:
    return {name: getattr(seen, name) > getattr(fleet, name) for name in ("activation", "index_version", "offer_version")}


def _committed(user_id: str, place: Place, slate: Slate, *, ids: Sequence[str], model_version: str, index: int) -> Answered:
    return Answered(
        source="redis",
        user_id=user_id,
        slate_id=slate.slate_id,
        channel="",
        surface=place.surface,
        context_item_ids=place.context_item_ids,
        query=place.query,
        user_version=slate.user_version,
        model_version=model_version,
        index_version=index,
        offer_version=0,
        as_of=slate.as_of,
        item_ids=tuple(ids[row] if 0 <= row < len(ids) else f"(row {row})" for row in slate.rows),
        positions=tuple(range(len(slate.rows))),
        scores=tuple(float(score) for score in slate.scores),
        stale=SlateFlag.PROFILE_STALE in slate.flags,
    )


def _violation(kind: str, user_id: str, *, expected: str, seen: str) -> Violation:
    return Violation(kind, "state", expected, seen, customer=user_id)
