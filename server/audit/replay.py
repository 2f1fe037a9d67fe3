"""Replay: the slate behind an answer computed again from PostgreSQL, and compared bit by bit."""

from collections.abc import Callable, Sequence

from server.audit.explain import Explainer
from server.audit.report import Answered, Outcome, Replayed
from server.audit.store import AuditStore, Customer
from server.audit.workshop import Workshop, shows

Progress = Callable[[str, int, int], None]


class Replayer:
    """Replays answers and names the differences."""

    def __init__(self, store: AuditStore, workshop: Workshop) -> None:
        self._store = store
        self._workshop = workshop
        self._explainer = Explainer(workshop, store)

    async def replay(self, answers: Sequence[Answered], progress: Progress = lambda _s, _d, _t: None) -> list[Replayed]:
        """Replays every answer; answers of one slate share the computation."""
        customers = await self._store.customers(answer.user_id for answer in answers if answer.user_id)
        await self._workshop.prepare([(a.user_id, a.user_version) for a in answers if a.user_id in customers])
        results = []
        for done, answer in enumerate(answers, start=1):
            results.append(await self._replay(answer, customers.get(answer.user_id)))
            progress("replay", done, len(answers))
        return results

    async def _replay(self, answer: Answered, customer: Customer | None) -> Replayed:
        if len(answer.positions) != len(answer.item_ids):
            return Replayed(answer, Outcome.NOT_REPLAYABLE, "logged_by_older_release")
        if answer.user_id and customer is None:
            return Replayed(answer, Outcome.NOT_REPLAYABLE, "customer_forgotten")
        if customer and customer.merged_into:
            return Replayed(answer, Outcome.NOT_REPLAYABLE, "customer_regrouped")
        if customer and answer.user_version > customer.version:
            seen = f"user_version {answer.user_version}"
            violation = self._explainer.violation("future_state", answer, expected=f"at most user_version {customer.version}", seen=seen)
            return Replayed(answer, Outcome.DIFFERS, violation=violation)
        snapshot = await self._workshop.snapshot(answer.model_version, answer.index_version)
        if snapshot is None:
            return Replayed(answer, Outcome.NOT_REPLAYABLE, "model_or_epoch_gone")
        inputs = await self._workshop.inputs(answer.user_id, answer.user_version, answer.index_version)
        assert inputs is not None  # the customer exists
        slate = await self._workshop.slate(answer, snapshot, inputs)
        items = tuple(snapshot.table.ids[row] for row in slate.rows)
        if slate.slate_id == answer.slate_id and shows(slate, snapshot, answer):
            return Replayed(answer, Outcome.EQUAL, slate_items=items)
        if set(answer.degraded_reasons) - {"NO_ACTIVE_MODEL"}:
            return Replayed(answer, Outcome.NOT_REPLAYABLE, "degraded_answer")
        if customer and answer.user_version < customer.regrouped_version:
            return Replayed(answer, Outcome.NOT_REPLAYABLE, "customer_regrouped")
        violation = await self._explainer.explain(answer, slate, snapshot, inputs)
        return Replayed(answer, Outcome.DIFFERS, violation=violation, slate_items=items)
