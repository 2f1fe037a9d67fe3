"""Explanation: of an answer that is not what its versions give, what it is instead."""

from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np

from server.audit.report import Answered, Violation
from server.audit.store import AuditStore
from server.audit.workshop import Inputs, Workshop, shows
from server.recommend.slate import Slate
from server.recommend.snapshot import Snapshot

_CHECKS = {"journal": "replay", "probe": "replay", "redis": "state"}
# Each costs a computation or the loading of a model, and what is wrong with many slates is mostly one thing.
_MODELS, _EPOCHS, _VERSIONS, _PROFILES = 5, 4, 4, 4
_SLATES = 40


class Explainer:
    """Tries what could have gone wrong, cheapest first; what nothing explains was tampered with."""

    def __init__(self, workshop: Workshop, store: AuditStore) -> None:
        self._workshop = workshop
        self._store = store
        self._known: dict[str, Violation] = {}

    def violation(self, kind: str, answer: Answered, *, expected: str, seen: str, item_id: str = "") -> Violation:
        """Returns a violation about an answer."""
        return Violation(
            kind,
            _CHECKS[answer.source],
            expected,
            seen,
            customer=answer.user_id,
            slate_id=answer.slate_id,
            item_id=item_id,
            channel=answer.channel,
            replica=answer.replica,
        )

    async def explain(self, answer: Answered, slate: Slate, snapshot: Snapshot, inputs: Inputs) -> Violation:
        """Names the difference between an answer and the slate its versions give."""
        if slate.slate_id == answer.slate_id:
            return self._differing_place("shown_differs", answer, slate, snapshot)
        known = self._known.get(answer.slate_id)
        if known is None:
            known = await self._cause(answer, slate, snapshot, inputs)
            self._known[answer.slate_id] = known
        return replace(known, channel=answer.channel, replica=answer.replica, check=_CHECKS[answer.source])

    async def _cause(self, answer: Answered, slate: Slate, snapshot: Snapshot, inputs: Inputs) -> Violation:
        scores = {snapshot.table.ids[row]: score for row, score in zip(slate.rows, slate.scores, strict=True)}
        rescored = [item for item, score in zip(answer.item_ids, answer.scores, strict=True) if scores.get(item) != np.float32(score)]
        # Where every item keeps its own score only the order, or a part not shown, was changed: no other input does that.
        if answer.item_ids and rescored and len(self._known) < _SLATES:
            async for kind, what, other, given in self._others(answer, snapshot, inputs):
                if shows(await self._workshop.slate(answer, other, given), other, answer):
                    expected = f"what {_named(answer)} gives"
                    return self.violation(kind, answer, expected=expected, seen=f"exactly what {what} gives")
        return self._differing_place("tampered_slate", answer, slate, snapshot)

    async def _others(self, answer: Answered, snapshot: Snapshot, inputs: Inputs) -> AsyncIterator[tuple[str, str, Snapshot, Inputs]]:
        """Yields what else the answer may have been computed from: (kind, in words, snapshot, inputs)."""
        for model in [*await self._store.models(), ""][: _MODELS + 1]:
            if model != answer.model_version:
                other = await self._workshop.snapshot(model, answer.index_version)
                if other is not None:
                    yield "second_model", f"model {model or '(none)'}", other, inputs
        epochs = sorted(await self._workshop.epochs(), key=lambda epoch: abs(epoch - answer.index_version))
        for epoch in [e for e in epochs if e != answer.index_version][:_EPOCHS]:
            other = await self._workshop.snapshot(answer.model_version, epoch)
            given = await self._workshop.inputs(answer.user_id, answer.user_version, epoch)
            if other is not None and given is not None:
                yield "other_catalogue", f"index epoch {epoch}", other, given
        for at, profile in (await self._workshop.profiles(answer.user_id))[:_PROFILES]:
            if at != inputs.profile_at:
                yield "other_features", f"the profile of {at:%Y-%m-%d %H:%M}", snapshot, replace(inputs, profile=profile, profile_at=at)
        newest = (await self._store.customers([answer.user_id])).get(answer.user_id)
        nearby = [answer.user_version - 1, answer.user_version + 1, answer.user_version - 2, newest.version if newest else 0]
        for version in dict.fromkeys(v for v in nearby[:_VERSIONS] if newest and 0 <= v <= newest.version):
            activity = await self._workshop.activity(answer.user_id, version)
            if activity is not None and version != answer.user_version:
                yield "other_state", f"user_version {version}", snapshot, replace(inputs, activity=activity)

    def _differing_place(self, kind: str, answer: Answered, slate: Slate, snapshot: Snapshot) -> Violation:
        """Describes the first shown place that differs."""
        for place, item, score in zip(answer.positions, answer.item_ids, answer.scores, strict=True):
            inside = 0 <= place < len(slate.rows)
            due, points = (snapshot.table.ids[slate.rows[place]], slate.scores[place]) if inside else ("nothing", np.float32(0))
            if (item, np.float32(score)) != (due, points):
                return self.violation(
                    kind, answer, expected=f"place {place}: {due} at {points!s}", seen=f"{item} at {np.float32(score)!s}", item_id=item
                )
        expected, seen = f"slate {slate.slate_id}", f"slate {answer.slate_id}, whose shown items are right: it differs where nobody looked"
        return self.violation(kind, answer, expected=expected, seen=seen)


def _named(answer: Answered) -> str:
    model = answer.model_version or "(none)"
    return f"model {model}, index epoch {answer.index_version}, user_version {answer.user_version}"
