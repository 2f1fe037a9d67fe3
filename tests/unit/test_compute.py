"""Computing a slate gives the same bits from real ONNX graphs: any thread, any company, any order of what is equal."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.behaviour import Activity
from features.candidates import Candidates, Source, generate
from features.ranking import Profile
from features.signals import CollaborativeWeights
from server.inference.model import Tokenizers, load_model
from server.recommend import compute, searching
from server.recommend.compute import Policy, Ranked, compute_slate, policy_fingerprint, score_items
from server.recommend.searching import compute_search, rehearse
from server.recommend.slate import SlateFlag
from server.recommend.snapshot import Snapshot
from tests.unit.bundles import vary_bundle, write_bundle
from tests.unit.tables import activity, table

COUNT = 400  # more than a slate's candidates, so that their choice matters too
POLICY = Policy(slate_size=100, exclude_purchased=True, max_per_category=4)
BAND = Profile(purchase_count=3, price_mean=20.0, price_low=5.0, price_high=60.0)
BOUGHT = (("i010", 19_998), ("i020", 19_998), ("i030", 19_990), ("i040", 19_990), ("i050", 19_000))
CUSTOMER = activity(("i003", "view", 0), ("i007", "add_to_cart", 1), ("i010", "purchase", 2), ("i011", "view", 2), purchased=BOUGHT)
OTHERS = [activity((f"i{k:03d}", "view", 0), (f"i{k + 40:03d}", "purchase", 3)) for k in range(0, 300, 20)]


@pytest.fixture(scope="module")
def shot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A real bundle, opened as the server opens it, over a table with relations."""
    folder = tmp_path_factory.mktemp("bundle")
    edges: dict[str, Any] = {"relation_from": np.arange(50, dtype=np.int32), "relation_to": np.arange(100, 150, dtype=np.int32)}
    items = replace(table(COUNT), **edges, relation_weight=np.full(50, 0.5, np.float32))
    write_bundle(folder, items)
    model = load_model(folder, provider="cpu", threads=2)
    return Snapshot(model, items, model.item_vectors, model.collaborative.remapped(model.item_rows, items))


def bits(ranked: Ranked) -> tuple[bytes, bytes, bytes, int]:
    return ranked.rows.tobytes(), ranked.scores.tobytes(), ranked.sources.tobytes(), int(ranked.flags)


def test_fifty_runs_in_a_row_and_from_many_threads_give_the_same_bits(shot: Snapshot) -> None:
    expected = bits(compute_slate(shot, CUSTOMER, BAND, POLICY))
    assert {bits(compute_slate(shot, CUSTOMER, BAND, POLICY)) for _ in range(50)} == {expected}
    # Other customers run in between on the same sessions: whose company a computation is in must not show.
    work = [CUSTOMER, *OTHERS] * 10
    random.Random(1).shuffle(work)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda who: bits(compute_slate(shot, who, BAND, POLICY)), work))
    alone = {id(who): bits(compute_slate(shot, who, BAND, POLICY)) for who in (CUSTOMER, *OTHERS)}
    assert together == [alone[id(who)] for who in work]
    assert alone[id(CUSTOMER)] == expected
    assert len(set(alone.values())) == 1 + len(OTHERS)  # the customers do differ, so equality says something


def test_another_replica_that_opens_the_bundle_gives_the_same_bits(shot: Snapshot, tmp_path: Path) -> None:
    assert shot.model is not None
    write_bundle(tmp_path, shot.table)
    model = load_model(tmp_path, provider="cpu", threads=2)
    other = Snapshot(model, shot.table, model.item_vectors, model.collaborative.remapped(model.item_rows, shot.table))
    for who in (CUSTOMER, *OTHERS[:3]):
        assert bits(compute_slate(other, who, BAND, POLICY)) == bits(compute_slate(shot, who, BAND, POLICY))


@settings(max_examples=15, deadline=None)
@given(st.permutations(BOUGHT))
def test_purchases_in_another_order_are_the_same_history(shot: Snapshot, bought: list[tuple[str, int]]) -> None:
    shuffled = Activity(CUSTOMER.version, CUSTOMER.behaviours, tuple(i for i, _ in bought), tuple(day for _, day in bought))
    assert bits(compute_slate(shot, shuffled, BAND, POLICY)) == bits(compute_slate(shot, CUSTOMER, BAND, POLICY))


@pytest.mark.parametrize("modelled", [True, False])
def test_the_order_in_which_candidates_are_found_does_not_show(shot: Snapshot, modelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a model and with equal popularity all scores tie: then only the item id may decide."""
    calm = replace(shot.table, popularity=np.zeros_like(shot.table.popularity))
    seen = shot if modelled else replace(shot, model=None, table=calm)
    expected = bits(compute_slate(seen, CUSTOMER, BAND, POLICY))
    rng = np.random.default_rng(0)

    def shuffled(*arguments: object, **keywords: object) -> Candidates:
        found = generate(*arguments, **keywords)  # type: ignore[arg-type]
        order = rng.permutation(len(found.rows))
        return Candidates(found.rows[order], found.sources[order])

    monkeypatch.setattr(compute, "generate", shuffled)  # the one way to another order: candidates are no argument
    assert {bits(compute_slate(seen, CUSTOMER, BAND, POLICY)) for _ in range(10)} == {expected}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 100))
def test_any_items_in_any_order_get_the_bits_the_slate_gave_them(shot: Snapshot, seed: int, count: int) -> None:
    slate = compute_slate(shot, CUSTOMER, BAND, POLICY)
    of_slate = dict(zip(slate.rows.tolist(), slate.scores.view(np.int32).tolist(), strict=True))
    some = np.random.default_rng(seed).permutation(slate.rows)[:count]
    ranked = score_items(shot, CUSTOMER, BAND, some)
    assert sorted(ranked.rows.tolist()) == sorted(some.tolist())
    assert ranked.scores.view(np.int32).tolist() == [of_slate[row] for row in ranked.rows.tolist()]
    assert (np.diff(ranked.scores) <= 0).all()


def test_more_items_than_the_graph_is_high_are_ranked_in_several_runs(shot: Snapshot) -> None:
    everything = score_items(shot, CUSTOMER, BAND, np.arange(COUNT, dtype=np.int32))
    assert sorted(everything.rows.tolist()) == list(range(COUNT))
    whole = dict(zip(everything.rows.tolist(), everything.scores.view(np.int32).tolist(), strict=True))
    slate = compute_slate(shot, CUSTOMER, BAND, POLICY)
    assert [whole[row] for row in slate.rows.tolist()] == slate.scores.view(np.int32).tolist()


def test_no_items_to_rank_is_no_error(shot: Snapshot) -> None:
    assert len(score_items(shot, CUSTOMER, BAND, np.zeros(0, np.int32)).rows) == 0


def test_a_slate_is_full_distinct_and_without_what_was_bought(shot: Snapshot) -> None:
    slate = compute_slate(shot, CUSTOMER, BAND, POLICY)
    assert len(slate.rows) == len(set(slate.rows.tolist())) == POLICY.slate_size
    assert not {shot.table.ids[row] for row in slate.rows} & {item for item, _ in BOUGHT}
    assert slate.flags == SlateFlag(0)
    assert set(slate.stages) == {"user_vector", "candidates", "ranking", "policy"}
    assert Source.COLLABORATIVE in Source(int(np.bitwise_or.reduce(slate.sources)))


def test_state_changes_the_slate_and_the_channel_does_not(shot: Snapshot) -> None:
    slate = bits(compute_slate(shot, CUSTOMER, BAND, POLICY))
    elsewhere = replace(CUSTOMER, behaviours=tuple(replace(b, channel="store") for b in CUSTOMER.behaviours))
    assert bits(compute_slate(shot, elsewhere, BAND, POLICY)) == slate
    assert bits(compute_slate(shot, CUSTOMER.with_context(("i300",), ""), BAND, POLICY)) != slate
    assert bits(compute_slate(shot, CUSTOMER, replace(BAND, price_mean=2.0), POLICY)) != slate


def test_a_newcomer_gets_a_slate_and_is_flagged(shot: Snapshot) -> None:
    slate = compute_slate(shot, Activity(0), Profile(), POLICY)
    assert slate.flags == SlateFlag.NEWCOMER
    assert len(slate.rows) == POLICY.slate_size
    assert np.isfinite(slate.scores).all()


def test_a_rehearsal_runs_every_part_even_over_nothing(shot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, searched = [], []
    monkeypatch.setattr(searching, "compute_slate", lambda *arguments: ran.append(compute_slate(*arguments)) or ran[-1])
    monkeypatch.setattr(searching, "compute_search", lambda *arguments: searched.append(compute_search(*arguments)))
    rehearse(shot, POLICY)
    assert set(ran[0].stages) >= {"user_vector", "candidates", "ranking", "policy"}
    assert SlateFlag.NEWCOMER not in ran[0].flags  # somebody with a past, so that the encoder runs
    assert set(searched[0].stages) == {"words", "query_vector", "user_vector", "matching"}
    assert len(searched[0].rows)
    assert {"lexical", "completions"} <= set(vars(shot.table))  # built here, not when somebody searches
    ran.clear()
    rehearse(Snapshot(None, table(0), np.zeros((0, 0), np.float32), CollaborativeWeights.empty(0)), POLICY)
    assert [len(slate.rows) for slate in ran] == [0, 0]


def test_a_varied_bundle_is_another_valid_model(shot: Snapshot, tmp_path: Path) -> None:
    write_bundle(tmp_path / "one", shot.table)
    vary_bundle(tmp_path / "one", tmp_path / "two", "m2", seed=5)
    other = load_model(tmp_path / "two", provider="cpu", threads=2)
    assert other.model_version == "m2"
    varied = compute_slate(replace(shot, model=other), CUSTOMER, BAND, POLICY)
    assert varied.rows.tolist() != compute_slate(shot, CUSTOMER, BAND, POLICY).rows.tolist()


def test_other_rules_have_another_fingerprint() -> None:
    rules = [replace(POLICY, slate_size=99), replace(POLICY, exclude_purchased=False), replace(POLICY, max_per_category=5), POLICY]
    marks = {
        policy_fingerprint(rule, hide_out_of_stock=hide, onnx_threads=n, onnx_precision=precision)
        for rule in rules
        for hide in (True, False)
        for n in (1, 2)
        for precision in ("fp32", "fp16")
    }
    assert len(marks) == 32


def test_models_of_one_base_share_a_tokenizer_and_others_do_not(tmp_path: Path) -> None:
    write_bundle(tmp_path / "one", table(50))
    vary_bundle(tmp_path / "one", tmp_path / "two", "m2", seed=5)
    write_bundle(tmp_path / "other", table(60), model_version="m3")
    shared = Tokenizers()
    one, two, other = (load_model(tmp_path / name, provider="cpu", threads=1, tokenizers=shared) for name in ("one", "two", "other"))
    assert one.tokenizer is two.tokenizer
    assert other.tokenizer.get_vocab_size() == one.tokenizer.get_vocab_size() + 10
