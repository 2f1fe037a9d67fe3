"""The checker against histories made by hand: a good one passes every rule, and each rule has bad ones that it catches."""

from pathlib import Path
from typing import Any

import pytest

from tests.guarantees import rules, stored
from tests.guarantees.history import Activation, Fault, History, Listed, Offer, Read, Recorder, Row, Write, load
from tests.guarantees.profiles import Pair, whole
from tests.guarantees.report import Report, Trials
from tests.guarantees.rules import Finding
from tests.guarantees.stored import Stored

A, B, C = (Row(position, name, score, 1_000_000, "USD", True) for position, name, score in ((0, "a", 0.9), (1, "b", 0.5), (2, "c", 0.1)))


def read(*rows: Row, start: float = 1.0, **changes: Any) -> tuple[Read, tuple[Row, ...]]:
    """An answer that lasted half a second, unless told otherwise."""
    known: dict[str, Any] = {
        "client": "x",
        "replica": 0,
        "channel": "web",
        "user": "u",
        "place": "home|",
        "limit": 10,
        "filtered": "",
        "start": start,
        "end": start + 0.5,
        "status": "OK",
        "token": 0,
        "user_version": 7,
        "model_version": "m1",
        "index_version": 2,
        "offer_version": 5,
        "slate": "s1",
        "body": repr(rows),
    }
    return Read(**known | changes), rows


def history(*answers: tuple[Read, tuple[Row, ...]], **more: Any) -> History:
    return History(reads=[found for found, _ in answers], bodies={found.body: rows for found, rows in answers}, **more)


def write(event_id: str = "e1", *, start: float = 0.0, **changes: Any) -> Write:
    return Write(**{"client": "x", "replica": 0, "channel": "web", "user": "u", "event_id": event_id, "start": start, "end": start + 0.5,
                    "status": "OK", "version": 7, "online": True} | changes)  # fmt: skip


def offer(version: int, *, price: int = 2_000_000, end: float = 1.0, status: str = "OK") -> Offer:
    return Offer("x", "a", price, "USD", 3, end - 0.5, end, status, version)


LISTED = {name: Listed(name, 1_000_000, "USD", None, channels, 1) for name, channels in (("a", []), ("b", []), ("c", ["store"]))}
GOOD = history(
    read(A, B, C, channel="store"),
    read(A, B),  # web does not sell c
    read(A, limit=1),
    read(A, C, channel="store", filtered="category"),
    read(A._replace(price_micros=2_000_000), B, start=9.0, offer_version=6, slate="s1", token=7),
    read(start=3.0, status="UNAVAILABLE", token=99, user_version=0),
    read(A, start=12.0, user_version=3, stale=True, degraded="RECORD_STORE_UNAVAILABLE", slate="old"),
    read(B._replace(position=0), start=20.0, model_version="m2", slate="s2", offer_version=6),
    writes=[write()],
    offers=[offer(6, end=8.0)],
    listed=LISTED,
    activations=[Activation("m1", 0.0, 0.2, "OK", 1), Activation("m2", 15.0, 16.0, "OK", 2)],
)


@pytest.mark.parametrize("rule", [*rules.CHECKS])
def test_a_good_history_passes_every_rule_and_was_looked_at(rule: Any) -> None:
    finding = rule(GOOD)
    assert (finding.violations, finding.excerpts) == (0, [])
    assert finding.checked > 0


def test_a_good_history_has_calls_that_failed() -> None:
    assert rules.none_failed(GOOD).violations == 1


BAD = {
    "an internal error": (rules.answered, history(read(status="INTERNAL"))),
    "a rejected event": (rules.answered, History(writes=[write(status="REJECTED SUBJECT_UNKNOWN")])),
    "another order in another channel": (
        rules.same_ranking,
        history(read(A, B), read(B._replace(position=0), A._replace(position=1), channel="app")),
    ),
    "another score": (rules.same_ranking, history(read(A), read(A._replace(score=0.9000001), replica=1))),
    "another score, computed apart from Redis": (
        rules.same_ranking,
        history(read(A), read(A._replace(score=0.8), degraded="ONLINE_STORE_UNAVAILABLE", slate="s9")),
    ),
    "two slates": (rules.same_ranking, history(read(A), read(A, slate="s2"))),
    "positions out of order": (rules.same_ranking, history(read(B, A))),
    "a smaller limit that is no prefix": (rules.prefixes, history(read(A, B, C), read(B, limit=1))),
    "fewer than the limit": (rules.prefixes, history(read(A, B, C), read(A, limit=2))),
    "an item lacks where it is sold": (rules.only_removed, history(read(A, B), read(B, channel="app"), listed=LISTED)),
    "an item lacks within reach": (rules.only_removed, history(read(A, B), read(B, limit=1, channel="app"), listed=LISTED)),
    "two prices": (rules.one_price, history(read(A), read(A._replace(price_micros=9), user="v"))),
    "two stocks": (rules.one_price, history(read(A), read(A._replace(in_stock=False), user="v"))),
    "a price the catalogue never had": (
        rules.catalogue_price,
        history(read(A._replace(price_micros=3_000_000)), listed=LISTED, offers=[offer(5)]),
    ),
    "the old price at the new version": (rules.catalogue_price, history(read(A), listed=LISTED, offers=[offer(5)])),
    "an older offer version after a change": (rules.fresh_offers, history(read(A), offers=[offer(6, end=0.9)])),
    "a token answered with older state": (rules.tokens_honoured, history(read(A, token=8))),
    "a token answered with older state, flagged": (rules.tokens_honoured, history(read(A, token=8, stale=True))),
    "a version that goes back": (rules.monotonic, history(read(A, user_version=8), read(A, start=2.0, slate="s0"))),
    "a version that goes back after a degraded answer": (
        rules.monotonic,
        history(read(A, user_version=8, degraded="ONLINE_STORE_UNAVAILABLE"), read(A, start=2.0)),
    ),
    "an older version after one that a replica showed without Redis": (
        rules.monotonic,
        history(read(A, user_version=8, degraded="ONLINE_STORE_UNAVAILABLE"), read(A, start=2.0, replica=1)),
    ),
    "a write said to be online and not seen": (rules.monotonic, history(read(A), writes=[write(version=8)])),
    "the old model after the new one": (
        rules.one_model,
        history(read(A, start=5.0), activations=[Activation("m2", 1.0, 2.0, "OK", 2)]),
    ),
    "a request that failed during a switch": (rules.none_failed, history(read(status="UNAVAILABLE"))),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_is_caught(name: str) -> None:
    rule, bad = BAD[name]
    finding = rule(bad)
    assert finding.violations == 1
    assert finding.excerpts


def test_what_overlaps_proves_nothing() -> None:
    together = history(read(A, user_version=8, start=1.0), read(A, start=1.4))
    assert rules.monotonic(together).violations == 0
    assert rules.fresh_offers(history(read(A), offers=[offer(6, end=1.2)])).violations == 0
    switching = history(read(A, start=5.0), activations=[Activation("m2", 1.0, 5.2, "OK", 2)])
    assert rules.one_model(switching).violations == 0


def test_a_price_change_nobody_acknowledged_makes_the_item_uncertain() -> None:
    shown = history(read(A._replace(price_micros=2_000_000)), listed=LISTED, offers=[offer(0, status="UNAVAILABLE")])
    assert rules.catalogue_price(shown).violations == 0


def test_after_a_loss_only_the_contents_of_a_slate_must_be_the_same() -> None:
    again = history(read(A), read(A, slate="s2"))
    assert rules.same_ranking(again, one_slate=False).violations == 0
    assert {finding.rule: finding.violations for finding in rules.check(again)}["C1 one ranking per versions"] == 1


HELD = Stored(events=[("u", "e1"), ("u", "e2"), ("v", "e3")], versions={"u": 2, "v": 1, "w": 0})


def test_what_is_stored_as_it_was_attempted_is_whole() -> None:
    tried = History(writes=[write("e1"), write("e2", status="UNAVAILABLE"), write("e4", status="DEADLINE_EXCEEDED")])
    assert stored.nothing_lost(tried, HELD, before=frozenset({"e3"})).violations == 0
    assert stored.nothing_twice(HELD).violations == 0
    assert stored.caught_up(HELD, {"u": 2, "v": None}).violations == 0
    assert stored.same_bytes({"u": {b"f": b"1"}}, {"u": {b"f": b"1"}}).violations == 0


@pytest.mark.parametrize(
    "finding",
    [
        stored.nothing_lost(History(writes=[write("e9")]), HELD, before=frozenset({"e1", "e2", "e3"})),
        stored.nothing_lost(History(writes=[write("e1")]), HELD, before=frozenset({"e2"})),
        stored.nothing_twice(Stored([("u", "e1"), ("u", "e1")], {"u": 2})),
        stored.nothing_twice(Stored([("u", "e1"), ("v", "e1")], {"u": 1, "v": 1})),
        stored.nothing_twice(Stored([("u", "e1")], {"u": 2})),
        stored.caught_up(Stored([], {"u": 2}, outbox=["u"]), {}),
        stored.caught_up(HELD, {"u": 1}),
        stored.caught_up(HELD, {"u": 3}),
        stored.same_bytes({"u": {b"f": b"1"}}, {"u": {b"f": b"2"}}),
        stored.same_bytes({"u": {b"f": b"1"}}, {}),
        whole([Pair(1, 1), Pair(2, 1)]),
        whole([Pair(1, None)]),
    ],
)
def test_what_the_stores_should_not_hold_is_caught(finding: Finding) -> None:
    assert finding.violations == 1


def test_a_history_comes_back_from_its_file(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "h.jsonl")
    body = recorder.body((A, B))
    assert recorder.body((A, B)) == body != recorder.body((B, A))
    asked = read(A)[0]._replace(body=body)
    for record in (asked, write(), offer(5), Activation("m1", 0.0, 0.5, "OK", 1), LISTED["c"], Fault("redis kill", 0.0, 1.0)):
        recorder.add(record)
    recorder.close()
    found = load([tmp_path / "h.jsonl"])
    assert recorder.answers == 1
    assert found.reads == [asked]
    assert found.rows(asked) == (A, B)
    assert (found.writes, found.offers, found.listed) == ([write()], [offer(5)], {"c": LISTED["c"]})
    assert (len(found.activations), len(found.faults)) == (1, 1)


def test_the_last_line_counts_by_guarantee() -> None:
    report = Report(answers=3)
    report.add([Finding("C2 tokens honoured or refused", 5, 2), Finding("C4 one model at a time", 5, 1), Finding("not looked at")])
    report.add([Finding("C2 tokens honoured or refused", 5, 1), Finding("C1 one price per offer version", 1, 1)])
    fine, noticed = Finding("C1", 9), Finding("C1", 9, 4)
    report.trials = {"set-if-absent": Trials(fine, noticed), "compare-and-set": Trials(fine, fine)}
    assert report.last_line() == (
        '{"answers": 3, "violations": 6, "torn_reads": 0, "token_misses": 3, "mixed_models": 1, "price_mismatches": 1}'
    )
    assert "not looked at" not in report.findings
