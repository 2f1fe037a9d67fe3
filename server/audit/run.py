"""One audit from beginning to end: what to look at, the checks in turn, and the report they fill in."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import product

from server.audit.offers import OfferAudit
from server.audit.online import OnlineAudit
from server.audit.probes import Prober
from server.audit.replay import Progress, Replayer
from server.audit.report import Answered, AuditReport, Violation
from server.audit.store import AuditStore
from server.audit.workshop import Workshop

# An answer that was under way when the model moved may still carry the old one: a deadline's worth.
_SWITCH = timedelta(seconds=5)


@dataclass(frozen=True)
class Scope:
    """What a run looks at.

    Attributes:
        since: logged answers from this time on.
        last: at most this many of them, the newest of each channel in turn.
        channel: only of this channel; empty means all.
        customers: how many customers to probe and whose online state to compare.
        surfaces: where to probe them.
    """

    since: datetime
    last: int
    channel: str
    customers: int
    surfaces: Sequence[str]


class Audit:
    """The checks of one run over the stores of one shop."""

    def __init__(self, store: AuditStore, workshop: Workshop, online: OnlineAudit, offers: OfferAudit, *, rules: str) -> None:
        self._store = store
        self._replayer = Replayer(store, workshop)
        self._online = online
        self._offers = offers
        self._rules = rules

    async def run(self, scope: Scope, report: AuditReport, *, prober: Prober | None, progress: Progress) -> None:
        """Runs every check; findings go into ``report``."""
        logged = await self._store.exposures(since=scope.since, channel=scope.channel, last=scope.last)
        customers = await self._store.sample(scope.customers)
        live = await self._probe(customers, scope, report, prober=prober, progress=progress) if prober else []
        committed = await self._online.slates(customers, logged, surfaces=scope.surfaces)
        replays = await self._replayer.replay([*logged, *live, *committed], progress)
        report.replayed(replays)
        await self._offers.shown([*logged, *live], report)
        await self._offers.left_out(replays, report)
        await self._offers.catalogue(live, report)
        await self._online.states(customers, report)
        await self._online.pointers(report)
        await self._models(logged, report)
        for replica in await self._store.replicas():
            if replica.config != self._rules:
                expected, seen = f"rules {self._rules}, those of this audit's settings", f"rules {replica.config}"
                report.violations.append(Violation("config_differs", "replicas", expected, seen, replica=replica.address))
        report.staleness.answer_seconds = await self._store.staleness([answer for answer in logged if answer.user_id])
        report.staleness.outbox_size, report.staleness.outbox_seconds = await self._store.outbox()

    async def _probe(
        self, customers: Sequence[str], scope: Scope, report: AuditReport, *, prober: Prober, progress: Progress
    ) -> list[Answered]:
        before = await self._store.fleet()
        answers = []
        questions = list(product(customers, scope.surfaces))
        for done, (customer, surface) in enumerate(questions, start=1):
            answers += await prober.probe(customer, surface, report)
            progress("probe", done, len(questions))
        report.probed_customers = len(customers)
        if (await self._store.fleet()).activation == before.activation:
            report.violations += _of_another_model(answers, before.model_version)
        return answers

    async def _models(self, logged: Sequence[Answered], report: AuditReport) -> None:
        """Finds logged answers of another model than the one active when they were given (since its last activation)."""
        active = (await self._store.fleet()).model_version
        since = (await self._store.models()).get(active)
        if since is not None:
            late = [a for a in logged if a.answered_at and a.answered_at > since + _SWITCH]
            report.violations += _of_another_model(late, active)


def _of_another_model(answers: Sequence[Answered], active: str) -> list[Violation]:
    found: dict[tuple[str, str, str], Violation] = {}
    for answer in answers:
        if answer.model_version != active:
            found.setdefault(
                (answer.replica, answer.channel, answer.model_version),
                Violation(
                    "second_model",
                    "probe" if answer.source == "probe" else "replay",
                    expected=f"model {active or '(none)'}, the active one",
                    seen=f"model {answer.model_version or '(none)'}",
                    customer=answer.user_id,
                    slate_id=answer.slate_id,
                    channel=answer.channel,
                    replica=answer.replica,
                ),
            )
    return list(found.values())
