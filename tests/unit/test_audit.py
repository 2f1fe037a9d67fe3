"""The audit's judgement on values alone: probes held against each other, counts, quantiles, metrics and the page."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cli.audit_page import page
from server.audit.metrics import write_metrics
from server.audit.probes import Probe, Prober
from server.audit.report import KINDS, Agreement, Answered, AuditReport, Outcome, Replayed, Staleness, Violation

NOW = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)
ANSWER = Answered(
    source="probe",
    user_id="u1",
    slate_id="s1",
    channel="web",
    surface="home",
    context_item_ids=(),
    user_version=3,
    model_version="m1",
    index_version=2,
    offer_version=5,
    as_of=NOW,
    item_ids=tuple(f"i{k}" for k in range(8)),
    positions=tuple(range(8)),
    scores=tuple(1 - k / 8 for k in range(8)),
    prices_micros=tuple(k * 1_000_000 for k in range(8)),
    currencies=("EUR",) * 8,
    in_stock=(True,) * 8,
    page_limit=100,
    answered_at=NOW,
)


def report() -> AuditReport:
    return AuditReport("run-1", NOW)


def cut(answer: Answered, places: list[int]) -> Answered:
    """Returns the answer with only the items at these places, in that order."""
    names = ("item_ids", "positions", "scores", "prices_micros", "currencies", "in_stock")
    return replace(answer, **{name: tuple(getattr(answer, name)[k] for k in places) for name in names})


async def probed(change: Callable[[Answered, Probe], Answered | None]) -> AuditReport:
    """Probes two replicas in two channels, each answer changed by ``change``."""

    async def ask(probe: Probe) -> Answered | None:
        answer = change(replace(ANSWER, replica=probe.replica, channel=probe.channel), probe)
        return None if answer is None else cut(answer, list(range(min(probe.limit, len(answer.item_ids)))))

    found = report()
    await Prober(ask, replicas=["a", "b"], channels=["web", "app"]).probe("u1", "home", found)
    return found


def at(replica: str, channel: str, answer: Answered) -> Callable[[Answered, Probe], Answered | None]:
    """One replica and channel gives another answer."""

    def change(usual: Answered, probe: Probe) -> Answered:
        there = (probe.replica, probe.channel) == (replica, channel)
        return replace(answer, replica=replica, channel=channel) if there else usual

    return change


async def test_equal_answers_agree() -> None:
    found = await probed(lambda answer, _: answer)
    assert (found.violations, found.probes, found.agreement) == ([], 4, 1.0)


async def test_a_channel_may_lack_items_but_not_reorder_them() -> None:
    assert (await probed(at("a", "app", cut(ANSWER, [0, 2, 3, 5, 6, 7])))).violations == []
    found = await probed(at("b", "app", cut(ANSWER, [0, 2, 1, 3, 4, 5, 6, 7])))
    (violation,) = found.violations
    assert (violation.kind, violation.replica, violation.channel, violation.item_id) == ("order_differs", "b", "app", "i2")
    assert (violation.expected, violation.seen) == ("i1 next", "i2")
    assert found.by_channel == {"web": Agreement(2, 2), "app": Agreement(2, 1)}
    assert found.by_replica == {"a": Agreement(2, 2), "b": Agreement(2, 1)}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"scores": (0.9, *ANSWER.scores[1:])}, "score_differs"),
        ({"prices_micros": (1, *ANSWER.prices_micros[1:])}, "price_differs"),
        ({"model_version": "m2"}, "second_model"),
    ],
)
async def test_what_differs_is_named(changes: dict[str, object], kind: str) -> None:
    found = await probed(at("b", "web", replace(ANSWER, **changes)))  # type: ignore[arg-type]
    assert [(v.kind, v.replica, v.channel) for v in found.violations] == [(kind, "b", "web")]


async def test_other_versions_are_not_compared_but_counted() -> None:
    found = await probed(at("b", "web", replace(cut(ANSWER, [1, 0, 2]), user_version=4)))
    assert (found.violations, found.probes_moving) == ([], 1)
    newer = replace(ANSWER, offer_version=6, prices_micros=(7, *ANSWER.prices_micros[1:]))
    assert (await probed(at("b", "web", newer))).violations == []


async def test_a_smaller_limit_must_be_a_prefix() -> None:
    def change(answer: Answered, probe: Probe) -> Answered:
        return cut(answer, [1, 0, 2, 3, 4]) if (probe.limit, probe.replica, probe.channel) == (5, "a", "app") else answer

    found = await probed(change)
    assert [(v.kind, v.expected, v.seen) for v in found.violations] == [("prefix_broken", "i0, i1, i2, i3, i4", "i1, i0, i2, i3, i4")]


async def test_a_silent_replica_is_named_once_and_asked_no_more() -> None:
    asked: list[Probe] = []

    async def ask(probe: Probe) -> Answered | None:
        asked.append(probe)
        silent = probe.replica == "b" or (probe.replica, probe.channel, probe.user_id) == ("a", "app", "u2")
        return None if silent else replace(ANSWER, replica=probe.replica, channel=probe.channel, user_id=probe.user_id)

    found = report()
    prober = Prober(ask, replicas=["a", "b"], channels=["web", "app"])
    for user_id in ("u1", "u2"):
        await prober.probe(user_id, "home", found)
    assert [(v.kind, v.replica, v.channel, v.customer) for v in found.violations if v.kind == "no_answer"] == [
        ("no_answer", "b", "", ""),
        ("no_answer", "a", "app", "u2"),
    ]
    assert sum(probe.replica == "b" for probe in asked) == 2


async def test_a_customer_forgotten_meanwhile_is_passed_over() -> None:
    async def ask(probe: Probe) -> Answered | None:
        raise LookupError(probe.user_id)

    found = report()
    assert await Prober(ask, replicas=["a"], channels=["web"]).probe("u1", "home", found) == []
    assert (found.violations, found.probes) == ([], 0)


def replayed(outcome: Outcome, *, source: str = "journal", reason: str = "", kind: str = "") -> Replayed:
    violation = Violation(kind, "replay", "a", "b", customer="u1", slate_id="s1") if kind else None
    return Replayed(replace(ANSWER, source=source), outcome, reason, violation)


def test_replays_are_counted_and_each_slate_is_reported_once() -> None:
    found = report()
    tampered = replayed(Outcome.DIFFERS, kind="tampered_slate")
    gone = replayed(Outcome.NOT_REPLAYABLE, reason="customer_forgotten")
    found.replayed([tampered, tampered, replayed(Outcome.EQUAL), gone, replayed(Outcome.EQUAL, source="redis")])
    assert found.replays == {"journal": {"differs": 2, "equal": 1, "not_replayable": 1}, "redis": {"equal": 1}}
    assert found.timeline == {"2026-03-01T12:00:00+00:00": {"differs": 2, "equal": 1, "not_replayable": 1}}
    assert found.kinds == {"tampered_slate": 1}
    summary = found.summary()
    assert (summary["replayed"], summary["differs"], summary["not_replayable"], summary["violations"]) == (4, 2, 1, 1)


def test_a_kept_result_names_no_customer() -> None:
    found = report()
    found.violations.append(Violation("stale_price", "offers", "1", "2", customer="u-secret", item_id="i1"))
    assert "u-secret" in json.dumps(found.as_dict())
    assert "u-secret" not in json.dumps(found.as_dict(names=False))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="bad_luck"):
        Violation("bad_luck", "replay", "", "")


def test_quantiles_of_staleness() -> None:
    assert Staleness().quantile(0.99) == 0
    stale = Staleness(answer_seconds=[3.0, *[0.0] * 98, 1.0])
    assert [stale.quantile(share) for share in (0.5, 0.98, 0.99, 1)] == [0, 1, 3, 3]


def full() -> AuditReport:
    found = report()
    found.replayed([replayed(Outcome.EQUAL), replayed(Outcome.DIFFERS, kind="second_model")])
    found.by_channel = {"web": Agreement(4, 4), "app": Agreement(4, 3)}
    found.by_replica = {"10.0.0.1:50051": Agreement(8, 7)}
    found.offers.update(equal=10, stale_price=2)
    found.staleness.answer_seconds = [0.0, 0.02, 5.0, 5000.0]
    found.notes.append("a note")
    return found


def test_metrics_name_every_kind_and_read_back(tmp_path: Path) -> None:
    write_metrics(full(), tmp_path / "audit.prom")
    families = {family.name: family for family in text_string_to_metric_families((tmp_path / "audit.prom").read_text())}
    kinds = {sample.labels["kind"]: sample.value for sample in families["concord_audit_violations"].samples}
    assert kinds == {kind: float(kind == "second_model") for kind in KINDS}
    assert {s.labels["channel"]: s.value for s in families["concord_audit_agreement_ratio"].samples} == {"web": 1.0, "app": 0.75}
    assert {s.labels["quantile"]: s.value for s in families["concord_audit_answer_staleness_seconds"].samples}["1"] == 5000.0
    assert "concord_audit_event_visible_seconds" not in families


@pytest.mark.parametrize("found", [full(), report()], ids=["full", "empty"])
def test_the_page_stands_alone(found: AuditReport) -> None:
    html = page(found, project="<shop>")
    assert "&lt;shop&gt;" in html
    assert html.count("<svg") == html.count("</svg>") == 4
    assert "http" not in html.replace("http://www.w3.org/", "")  # the names of SVG's namespaces, nothing to fetch
    assert ("1 broken promise found" in html) == bool(found.violations)
    assert ("The promise is kept" in html) == (not found.violations)
