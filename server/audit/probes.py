"""Live probes: the same question asked in every channel of every replica, and the answers held against each other."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import product

from server.audit.report import Agreement, Answered, AuditReport, Violation

_TRIES = 4
_LIMIT, _PREFIX = 100, 5
_Key = tuple[str, str]  # replica, channel


@dataclass(frozen=True)
class Probe:
    """One question: of whom, where it is shown, in which channel, to which replica, and how many items."""

    replica: str
    channel: str
    user_id: str
    surface: str
    limit: int


# Asks a replica without leaving an exposure; None when it does not answer. Raises LookupError when the customer is not (any more).
Ask = Callable[[Probe], Awaitable[Answered | None]]


class Prober:
    """Asks every replica in every channel about customers, and counts who agrees with whom."""

    def __init__(self, ask: Ask, *, replicas: Sequence[str], channels: Sequence[str]) -> None:
        self._ask = ask
        self._replicas = list(replicas)
        self._channels = channels

    async def probe(self, user_id: str, surface: str, report: AuditReport) -> list[Answered]:
        """Probes one customer on one surface; returns the answers that can be replayed.

        Answers are compared only under equal versions: while versions move between the questions they are asked again.
        """
        answers: dict[_Key, Answered | None] = {}
        for _ in range(_TRIES):
            try:
                answers = await self._everywhere(user_id, surface)
            except LookupError:
                return []
            if None in answers.values() or len({_versions(answer) for answer in answers.values() if answer}) <= 1:
                break
        given = {key: answer for key, answer in answers.items() if answer is not None}
        self._leave_out(answers.keys() - given.keys(), user_id, report)
        await self._compare(given, report)
        return list(given.values())

    def _leave_out(self, silent: set[_Key], user_id: str, report: AuditReport) -> None:
        """Reports who did not answer; a replica silent in every channel is asked no more, since each silence costs a deadline."""
        for replica in sorted({replica for replica, _ in silent}):
            channels = sorted(channel for name, channel in silent if name == replica)
            gone = len(channels) == len(self._channels)
            if gone:
                self._replicas.remove(replica)
            whom = {"customer": "", "channel": ""} if gone else {"customer": user_id, "channel": ", ".join(channels)}
            report.violations.append(Violation("no_answer", "probe", "an answer", "none within the deadline", replica=replica, **whom))

    async def _everywhere(self, user_id: str, surface: str) -> dict[_Key, Answered | None]:
        keys = list(product(self._replicas, self._channels))
        answers = await asyncio.gather(*(self._ask(Probe(replica, channel, user_id, surface, _LIMIT)) for replica, channel in keys))
        return dict(zip(keys, answers, strict=True))

    async def _compare(self, given: dict[_Key, Answered], report: AuditReport) -> None:
        if not given:
            return
        report.probes += len(given)
        models: dict[str, list[_Key]] = {}
        for key, answer in given.items():
            models.setdefault(answer.model_version, []).append(key)
        reference = max(given.values(), key=lambda answer: (len(models[answer.model_version]), len(answer.item_ids)))
        for (replica, channel), answer in given.items():
            found = _differences(reference, answer)
            if not found and _versions(answer) != _versions(reference):
                report.probes_moving += 1
            found += await self._prefix(answer)
            for counts, name in ((report.by_channel, channel), (report.by_replica, replica)):
                part = counts.setdefault(name, Agreement())
                part.asked += 1
                part.agreed += not found
            report.violations += found

    async def _prefix(self, answer: Answered) -> list[Violation]:
        """Asks again for fewer items: they must be the beginning of what a larger limit showed."""
        try:
            few = await self._ask(Probe(answer.replica, answer.channel, answer.user_id, answer.surface, _PREFIX))
        except LookupError:
            return []
        if few is None or _versions(few) != _versions(answer) or few.slate_id != answer.slate_id:
            return []
        beginning = _rows(answer)[:_PREFIX]
        if _rows(few) == beginning:
            return []
        return [_violation("prefix_broken", few, expected=_listed(beginning), seen=_listed(_rows(few)))]


def _versions(answer: Answered) -> tuple[int, str, int, int]:
    return answer.user_version, answer.model_version, answer.index_version, answer.offer_version


def _rows(answer: Answered) -> list[tuple[str, float, int | None]]:
    return list(zip(answer.item_ids, answer.scores, answer.prices_micros, strict=True))


def _differences(reference: Answered, answer: Answered) -> list[Violation]:
    """Compares an answer with the reference: model, order and scores of what both show, and prices at the same offer_version."""
    if answer.model_version != reference.model_version:
        expected = f"model {reference.model_version or '(none)'}, as most replicas answer"
        return [_violation("second_model", answer, expected=expected, seen=f"model {answer.model_version or '(none)'}")]
    if _versions(answer)[:3] != _versions(reference)[:3]:
        return []
    common = set(reference.item_ids) & set(answer.item_ids)
    due = [row for row in _rows(reference) if row[0] in common]
    seen = [row for row in _rows(answer) if row[0] in common]
    found = []
    if [row[0] for row in seen] != [row[0] for row in due]:
        place = next(k for k, (a, b) in enumerate(zip(due, seen, strict=True)) if a[0] != b[0])
        found.append(_violation("order_differs", answer, expected=f"{due[place][0]} next", seen=seen[place][0], item_id=seen[place][0]))
    prices, scores = {row[0]: row[2] for row in due}, {row[0]: row[1] for row in due}
    for item, score, price in seen:
        if score != scores[item] and not any(v.kind == "score_differs" for v in found):
            found.append(_violation("score_differs", answer, expected=repr(scores[item]), seen=repr(score), item_id=item))
        if price != prices[item] and answer.offer_version == reference.offer_version:
            found.append(_violation("price_differs", answer, expected=f"{prices[item]} micros", seen=f"{price} micros", item_id=item))
    return found


def _violation(kind: str, answer: Answered, *, expected: str, seen: str, item_id: str = "") -> Violation:
    return Violation(
        kind,
        "probe",
        expected,
        seen,
        customer=answer.user_id,
        slate_id=answer.slate_id,
        item_id=item_id,
        channel=answer.channel,
        replica=answer.replica,
    )


def _listed(rows: Sequence[tuple[str, float, int | None]]) -> str:
    return ", ".join(item for item, _, _ in rows)
