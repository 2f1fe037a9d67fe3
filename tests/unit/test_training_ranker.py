"""The ranker learns what puts bought items on top, through the very candidate and feature code the server runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from features.candidates import CANDIDATE_COUNT
from features.ranking import RANKING_FEATURES, Profile
from features.signals import SignalConfig
from tests.unit.training_shop import DAY, START, activity_before, chain_log, item_table
from training.collaborative import fit
from training.config import TrainConfig
from training.dataset import Customer, Snapshots
from training.evaluate import Visit, Visits, measure, metrics_of, write_rankings
from training.labels import holdout_labels, visit_labels
from training.ranker import Ranker, list_loss, to_lists, train_ranker, validate
from training.scoring import Model, Query, make_queries

CONFIG = TrainConfig(ease_lambda=5, ease_half_life_days=1000, ranker_epochs=30, ranker_dropout=0.0)
CUT = START + 40 * DAY


def queries(*, holdout: bool) -> list[Query]:
    log, table = chain_log(customers=150), item_table()
    labels = holdout_labels(log, ("purchase",), cut=CUT) if holdout else visit_labels(log, ("purchase",), start=START + 25 * DAY, end=CUT)
    known = [Customer(activity_before(log, label.user_id, label.time, table), Profile()) for label in labels]
    weights = fit(log, len(table), until=CUT if holdout else START + 25 * DAY, config=CONFIG)
    model = Model(np.eye(12, dtype=np.float32), weights, SignalConfig(30.0))
    return make_queries(labels, known, np.zeros((len(labels), 12), np.float32), model=model, snapshots=Snapshots({START: table}))


@pytest.fixture(scope="module")
def trained() -> Ranker:
    return train_ranker(queries(holdout=False), CONFIG)


def test_a_query_never_offers_what_was_bought_or_not_yet_sold() -> None:
    for query in queries(holdout=True):
        offered = set(query.candidates.rows.tolist())
        assert not offered & query.label.bought
        assert offered == set(np.flatnonzero(query.allowed).tolist())  # 12 items all fit into 256 places
        assert query.features.shape == (len(offered), len(RANKING_FEATURES))


def test_snapshots_are_strictly_before_a_label() -> None:
    first, second = item_table(), item_table()
    snapshots = Snapshots({100: first, 200: second})
    assert snapshots.before(200) is first
    assert snapshots.before(201) is second
    with pytest.raises(KeyError):
        snapshots.before(100)


def test_the_pipeline_beats_popularity_on_the_holdout(trained: Ranker) -> None:
    metrics = metrics_of(measure(queries(holdout=True), trained))
    assert metrics["ndcg_at_10"] > metrics["popularity_ndcg_at_10"] + 0.2
    assert metrics["candidate_recall"] == 1.0
    assert 0 < metrics["coverage"] <= 1
    assert metrics["evaluated_users"] == 150


def test_training_is_reproducible(trained: Ranker) -> None:
    again = train_ranker(queries(holdout=False), CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(trained.state_dict().values(), again.state_dict().values(), strict=True))


def test_padding_changes_no_score_and_no_loss(trained: Ranker) -> None:
    lists = to_lists(queries(holdout=False)[:8])
    assert lists.features.shape == (8, CANDIDATE_COUNT, len(RANKING_FEATURES))
    scores = trained(lists.features)
    garbage = torch.where(lists.filled.unsqueeze(-1), lists.features, torch.tensor(99.0))
    loss = list_loss(scores, lists.filled, lists.wanted)
    assert torch.isclose(loss, list_loss(trained(garbage), lists.filled, lists.wanted))
    width = int(lists.filled.sum(1).max())
    assert torch.allclose(trained(lists.features[0, :width]), scores[0, :width], atol=1e-5)


def test_normalisation_is_part_of_the_graph() -> None:
    ranker = Ranker(4)
    rows = np.random.default_rng(0).normal(5, 3, (500, len(RANKING_FEATURES))).astype(np.float32)
    rows[:, 2] = 7.0  # a feature that never varies
    ranker.normalise_by(rows)
    normal = (torch.from_numpy(rows) - ranker.mean) * ranker.scale
    assert torch.allclose(normal.mean(0), torch.zeros(23), atol=1e-4)
    assert torch.allclose(normal.std(0)[[0, 1, 3]], torch.ones(3), atol=1e-2)
    assert torch.isfinite(ranker(torch.full((1, 23), 1e30))).all()


def test_validation_scores_all_lists_as_one_would(trained: Ranker) -> None:
    some = queries(holdout=True)[:5]
    single = [validate(trained, [query]) for query in some]
    assert validate(trained, some) == pytest.approx(np.mean(single))
    assert validate(trained, []) == 0.0


def test_without_a_useful_list_the_ranker_stays_untrained() -> None:
    ranker = train_ranker([], CONFIG)
    assert not ranker.training


def test_probabilities_are_the_softmax_of_the_first_ten(trained: Ranker) -> None:
    some = queries(holdout=True)[:5]
    visits = Visits({some[0].label.user_id: Visit("app", ("app", "web"))})
    found = measure(some, trained, visits).users
    assert (found[0].channel, found[0].history_channels, found[1].channel) == ("app", ("app", "web"), "")
    for user, query in zip(found, some, strict=True):
        with torch.inference_mode():
            scores = trained(torch.from_numpy(query.features)).double().numpy()
        shares = dict(zip(query.candidates.rows.tolist(), np.exp(scores) / np.exp(scores).sum(), strict=True))
        assert user.probabilities == pytest.approx([shares[row] for row in user.rankings[""][:10]], abs=1e-6)
        assert user.bought_count == len(query.label.bought)
        assert set(user.wanted) == {row for row in query.label.items if query.allowed[row]}


def test_rankings_hold_every_customer_and_nothing_of_their_own(trained: Ranker, tmp_path: Path) -> None:
    some = queries(holdout=True)
    some[0] = replace(some[0], label=replace(some[0].label, items=()))  # measured or not, a customer is ranked for
    write_rankings(some, trained, tmp_path / "rankings.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert [line["user"] for line in lines] == [query.label.user_id for query in some]
    for line, query in zip(lines, some, strict=True):
        own = {query.table.ids[row] for row in query.label.bought}
        assert line["items"]
        assert len(set(line["items"])) == len(line["items"])
        assert not own & set(line["items"])
