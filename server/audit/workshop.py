"""The workshop: slates computed as replicas compute them, from what PostgreSQL kept of snapshots, customers and profiles."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from features.behaviour import BEHAVIOUR_COLUMNS, Activity, behaviours_of
from features.bundle import BundleError
from features.ranking import Profile
from server.audit.report import Answered
from server.audit.store import AuditStore
from server.errors import ConcordError
from server.fleet import ModelLoader
from server.inference.model import LoadedModel
from server.recommend.compute import Policy, Ranked
from server.recommend.searching import compute_place
from server.recommend.slate import Slate, SlateFlag, decode_slate, encode_payload
from server.recommend.snapshot import Snapshot, SnapshotBuilder

_BATCH = 500


@dataclass(frozen=True)
class Inputs:
    """Everything a slate is a pure function of, besides the snapshot."""

    activity: Activity
    profile: Profile
    profile_at: datetime | None


class Workshop:
    """Computes slates as a replica does: from a snapshot, a customer's activity at a version and the profile of the epoch."""

    def __init__(self, store: AuditStore, load: ModelLoader, builder: SnapshotBuilder, policy: Policy) -> None:
        self._store = store
        self._load = load
        self._builder = builder
        self._policy = policy
        self._models: dict[str, LoadedModel] = {}
        self._snapshots: dict[tuple[str, int], Snapshot] = {}
        self._activities: dict[tuple[str, int], Activity] = {}
        self._profiles: dict[str, list[Mapping[str, Any]]] = {}
        self._ranked: dict[tuple[Any, ...], Ranked] = {}
        self._epochs: dict[int, datetime | None] | None = None

    async def snapshot(self, model_version: str, index_version: int) -> Snapshot | None:
        """Returns the snapshot, None when the model or the epoch is no longer (or never was) there."""
        key = (model_version, index_version)
        if key not in self._snapshots:
            if index_version and index_version not in await self.epochs():
                return None
            try:
                if model_version and model_version not in self._models:
                    self._models[model_version] = await self._load(model_version)
            except (ConcordError, BundleError):
                return None
            model = self._models[model_version] if model_version else None
            self._snapshots[key] = await self._builder.build(model, index_version)
        return self._snapshots[key]

    async def epochs(self) -> Mapping[int, datetime | None]:
        """Returns the feature snapshot time of every epoch."""
        if self._epochs is None:
            self._epochs = await self._store.epochs()
        return self._epochs

    async def prepare(self, wanted: Sequence[tuple[str, int]]) -> None:
        """Reads the activities of many customers at once; asking for them one by one costs a round trip each."""
        missing = [pair for pair in wanted if pair[0] and pair not in self._activities]
        for start in range(0, len(missing), _BATCH):
            for key, row in (await self._store.activities(missing[start : start + _BATCH])).items():
                self._activities[key] = activity_of_row(row)

    async def activity(self, user_id: str, user_version: int) -> Activity | None:
        """Returns a customer's activity at a version, None for one that does not exist."""
        if not user_id:
            return Activity(0)
        await self.prepare([(user_id, user_version)])
        return self._activities.get((user_id, user_version))

    async def profiles(self, user_id: str) -> list[tuple[datetime, Profile]]:
        """Returns a customer's profile snapshots, newest first."""
        if user_id not in self._profiles:
            self._profiles[user_id] = await self._store.profiles(user_id) if user_id else []
        return [(row["event_timestamp"], profile_of_row(row)) for row in self._profiles[user_id]]

    async def inputs(self, user_id: str, user_version: int, index_version: int) -> Inputs | None:
        """Returns what an epoch ranks a customer's version with; a customer its profile snapshot does not hold has an empty one."""
        activity = await self.activity(user_id, user_version)
        as_of = (await self.epochs()).get(index_version)
        profile = next((profile for at, profile in await self.profiles(user_id) if at == as_of), Profile())
        return None if activity is None else Inputs(activity, profile, as_of)

    async def slate(self, answer: Answered, snapshot: Snapshot, inputs: Inputs) -> Slate:
        """Computes the slate of an answer; its id is made of the answer's own customer, place, versions and time."""
        place = answer.place
        key = (answer.user_id, inputs.activity.version, inputs.profile_at, place, snapshot.model_version, snapshot.index_version)
        if key not in self._ranked:
            arguments = (snapshot, inputs.activity, inputs.profile, place, self._policy)
            self._ranked[key] = await asyncio.to_thread(compute_place, *arguments)
        ranked = self._ranked[key]
        # An answer is also called stale when an older slate had to do, so the slate's own flag may be either.
        stale = SlateFlag.PROFILE_STALE if answer.stale else SlateFlag(0)
        offered = [_slate(answer, ranked, ranked.flags | flag) for flag in (stale, SlateFlag(0))]
        return next((slate for slate in offered if slate.slate_id == answer.slate_id), offered[0])


def _slate(answer: Answered, ranked: Ranked, flags: SlateFlag) -> Slate:
    payload = encode_payload(ranked.rows, ranked.scores, ranked.sources, flags=flags, as_of=answer.as_of)
    slot = answer.place.slot(answer.model_version, answer.index_version)
    slate = decode_slate(b"%d:0:%s" % (answer.user_version, payload), answer.user_id, slot)
    assert slate is not None
    return slate


def shows(slate: Slate, snapshot: Snapshot, answer: Answered) -> bool:
    """Says whether what was shown stands in the slate at those places, with those very scores."""
    places = np.array(answer.positions, np.int64)
    if len(places) and (places.max() >= len(slate.rows) or places.min() < 0):
        return False
    shown = np.array(answer.scores, np.float32)
    items = tuple(snapshot.table.ids[row] for row in slate.rows[places])
    return items == answer.item_ids and slate.scores[places].tobytes() == shown.tobytes()


def activity_of_row(row: Mapping[str, Any]) -> Activity:
    """Builds the activity from a row of ``user_activity_at``."""
    return Activity(
        version=row["version"],
        behaviours=behaviours_of(*(row[name] for name in BEHAVIOUR_COLUMNS)),
        purchased_items=tuple(row["purchased_items"]),
        purchased_days=tuple(row["purchased_days"]),
    )


def profile_of_row(row: Mapping[str, Any]) -> Profile:
    """Builds what the ranker reads from a row of ``user_profile``; NULL prices are NaN, as online."""
    prices = (float("nan") if row[name] is None else row[name] for name in ("price_mean", "price_low", "price_high"))
    return Profile(float(row["purchase_count"]), *prices)
