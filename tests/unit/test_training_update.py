"""The parts of an update: who wins, what is replayed, what becomes of a changed catalogue, and which time each model may know."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.training_shop import DAY, START, chain_log, item_table
from training.checkpoint import Trained, new_model, new_tower
from training.comparison import Gain, paired_bootstrap
from training.config import TrainConfig
from training.dataset import Split, TrainingDataError
from training.labels import Label
from training.ranker import Ranker, train_ranker
from training.text import load_tokenizer
from training.update import REFRESHED, TRAINED, UpdatePolicy, judge, update_split
from training.warm_start import Origin, WarmStart, grown, load_origin, save_origin, with_replay

CONFIG = TrainConfig.tiny()
tokenizer = cache(load_tokenizer)  # half a second each


def labels(count: int) -> list[Label]:
    return [Label("u", START + k * DAY, (k % 5,), frozenset()) for k in range(count)]


def model(items: int = 12, config: TrainConfig = CONFIG) -> Trained:
    tower = new_tower(config, items)
    torch.nn.init.normal_(tower.residual.weight)
    tower.warm[: items - 2] = 1.0
    return Trained(config, tower.eval(), tokenizer("tiny"), Ranker(config.ranker_hidden).eval(), item_table(items).ids)


# Who wins


def test_the_interval_of_a_paired_difference_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(1)
    champion = rng.uniform(size=2_000)
    difference = rng.normal(0.01, 0.1, 2_000)
    gain = paired_bootstrap(champion, champion + difference, confidence=0.95, seed=3)
    half_width = 1.96 * difference.std() / np.sqrt(2_000)
    assert gain.mean == pytest.approx(difference.mean())
    assert gain.low == pytest.approx(gain.mean - half_width, abs=half_width / 10)
    assert gain.high == pytest.approx(gain.mean + half_width, abs=half_width / 10)


def test_the_interval_is_reproducible_and_wider_when_it_must_be_surer() -> None:
    champion, challenger = np.zeros(50), np.linspace(-0.1, 0.2, 50)
    first = paired_bootstrap(champion, challenger, confidence=0.9, seed=3)
    assert paired_bootstrap(champion, challenger, confidence=0.9, seed=3) == first
    surer = paired_bootstrap(champion, challenger, confidence=0.99, seed=3)
    assert surer.low < first.low < first.mean < first.high < surer.high


def test_pairing_is_what_makes_a_small_gain_visible() -> None:
    """Shuffled, the same scores have the same means, and an interval too wide to tell them apart."""
    rng = np.random.default_rng(0)
    champion = rng.uniform(size=400)
    challenger = champion + rng.normal(0.01, 0.02, 400)
    assert paired_bootstrap(champion, challenger, confidence=0.95, seed=0).low > 0
    assert paired_bootstrap(champion, rng.permutation(challenger), confidence=0.95, seed=0).low < 0


def test_equal_models_gain_nothing_and_one_customer_is_no_comparison() -> None:
    assert paired_bootstrap([0.1, 0.9, 0.4], [0.1, 0.9, 0.4], confidence=0.95, seed=0) == Gain(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="1 customers"):
        paired_bootstrap([0.1], [0.2], confidence=0.95, seed=0)


@pytest.mark.parametrize(
    ("gain", "margin", "certain", "wins"),
    [
        (Gain(0.010, -0.002, 0.022), 0.0, False, True),
        (Gain(0.010, -0.002, 0.022), 0.0, True, False),
        (Gain(0.010, 0.004, 0.016), 0.0, True, True),
        (Gain(0.010, 0.004, 0.016), 0.01, False, False),
        (Gain(0.0, 0.0, 0.0), 0.0, False, False),
        (Gain(-0.001, -0.004, 0.002), -0.002, False, True),
    ],
)
def test_the_challenger_wins_only_above_the_margin(gain: Gain, margin: float, certain: bool, wins: bool) -> None:
    assert UpdatePolicy(margin=margin, certain=certain).wins(gain) is wins


@pytest.mark.parametrize(
    ("refreshed", "trained", "margin", "kept", "wins"),
    [
        (0.1, 0.2, 0.0, TRAINED, True),
        (0.1, 0.1, 0.0, REFRESHED, True),  # training on gained nothing: newer weights are worth having by themselves
        (0.1, 0.05, 0.0, REFRESHED, True),
        (-0.1, 0.05, 0.0, TRAINED, True),
        (-0.1, -0.2, 0.0, REFRESHED, False),
        (-0.1, -0.05, 0.0, TRAINED, False),
        (0.1, 0.105, 0.01, REFRESHED, True),
        (0.005, 0.02, 0.01, TRAINED, True),
        (0.005, 0.01, 0.01, REFRESHED, False),
    ],
)
def test_training_on_has_to_beat_newer_weights_and_the_better_has_to_beat_the_champion(
    refreshed: float, trained: float, margin: float, kept: str, wins: bool
) -> None:
    champion = np.linspace(0.3, 0.6, 40)
    verdict = judge(champion, champion + refreshed, champion + trained, policy=UpdatePolicy(margin=margin), seed=0)
    assert (verdict.kept, verdict.wins) == (kept, wins)
    assert verdict.gain.mean == pytest.approx(trained if kept == TRAINED else refreshed)
    assert verdict.training_gain.mean == pytest.approx(trained - refreshed)


@pytest.mark.parametrize("wrong", [{"replay_fraction": 1.0}, {"holdout_fraction": 0.0}, {"confidence": 1.0}, {"min_customers": 1}])
def test_a_policy_that_cannot_be_followed_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        UpdatePolicy(**wrong)  # type: ignore[arg-type]


# What is replayed


def test_a_replay_has_the_share_asked_for_and_every_new_label() -> None:
    everything = labels(100)
    since = START + 80 * DAY
    mixed = with_replay(everything, since=since, fraction=0.5, limit=1_000, rng=np.random.default_rng(0))
    old = [label for label in mixed if label.time < since]
    assert mixed[len(old) :] == everything[80:]
    assert len(old) == 20
    assert len({label.time for label in old}) == 20  # without replacement
    assert mixed == sorted(mixed, key=lambda label: label.time)
    assert max(label.time for label in old) - min(label.time for label in old) > 40 * DAY  # from the whole past, not its end


def test_a_replay_is_random_seeded_and_optional() -> None:
    everything, since = labels(100), START + 80 * DAY
    draw = [with_replay(everything, since=since, fraction=0.5, limit=99, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    assert with_replay(everything, since=since, fraction=0.0, limit=99, rng=np.random.default_rng(0)) == everything[80:]


def test_a_replay_keeps_to_the_limit_and_to_what_there_is() -> None:
    everything = labels(100)
    bounded = with_replay(everything, since=START + 40 * DAY, fraction=0.5, limit=20, rng=np.random.default_rng(0))
    assert bounded[10:] == everything[90:]  # of the new ones the newest
    assert len(bounded) == 20
    scarce = with_replay(everything, since=START + 5 * DAY, fraction=0.9, limit=1_000, rng=np.random.default_rng(0))
    assert scarce == everything  # 5 old ones are all there are
    assert with_replay(everything, since=START + 200 * DAY, fraction=0.5, limit=20, rng=np.random.default_rng(0)) == []


def test_only_the_tower_gets_older_visits_and_none_from_the_rankers_time_on() -> None:
    log = chain_log(visits=10)
    split = Split(START, START + 60 * DAY, START + 75 * DAY, START + 100 * DAY)
    origin = Origin(model(), ranker_start=START + 40 * DAY, cut=START + 50 * DAY)
    chosen = WarmStart("m1", origin, split, 0.5).labels(log, replace(CONFIG, tower_labels=10_000))
    seen = [label.time < origin.ranker_start for label in chosen.tower]
    assert 0.45 < sum(seen) / len(seen) < 0.55
    assert all(label.time < split.ranker_start for label in chosen.tower)
    assert all(split.ranker_start <= label.time < split.cut for label in [*chosen.ranker, *chosen.validation])
    assert all(label.time == split.cut for label in chosen.holdout)


# Which time each model may know


def test_the_holdout_lies_after_the_last_event_of_the_champion() -> None:
    log = chain_log(visits=10)
    _, last = log.window()
    origin = Origin(model(), ranker_start=START + 40 * DAY, cut=START + 50 * DAY)
    since = START + 60 * DAY
    split = update_split(log, origin, since=since, config=CONFIG, policy=UpdatePolicy(holdout_fraction=0.5))
    assert origin.ranker_start < split.ranker_start < split.cut < split.end == last + 1
    assert split.cut - since == pytest.approx(split.end - split.cut, abs=2)
    assert split.ranker_start - origin.ranker_start == pytest.approx(split.cut - split.ranker_start, abs=2)


def test_a_cut_the_champion_has_seen_is_refused() -> None:
    log, origin = chain_log(visits=10), Origin(model(), ranker_start=START + 40 * DAY, cut=START + 50 * DAY)
    policy, since = UpdatePolicy(), START + 60 * DAY
    with pytest.raises(ValueError, match="active model's last event"):
        update_split(log, origin, since=since, config=replace(CONFIG, cut="2024-11-20"), policy=policy)
    assert update_split(log, origin, since=since, config=replace(CONFIG, cut="2024-12-20"), policy=policy).cut > since


# What becomes of a changed catalogue


def test_a_warm_start_gives_every_item_the_vector_it_had() -> None:
    old, table = model(), item_table()
    assert np.array_equal(grown(old, table.ids, replace(CONFIG, dropout=0.3)).item_vectors(table), old.item_vectors(table))


def test_new_items_start_from_their_text_and_removed_ones_are_dropped() -> None:
    old = model()
    ids = ("a-new-one", *old.item_ids[3:], "z-new-one")
    new = grown(old, ids, CONFIG)
    assert tuple(new.item_ids) == ids
    assert new.tower.residual.weight.shape[0] == 11
    assert torch.equal(new.tower.residual.weight[1:10], old.tower.residual.weight[3:])
    assert not new.tower.residual.weight[[0, 10]].any()
    assert new.tower.warm.flatten().tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]  # i10 and i11 were never taken
    assert torch.equal(old.tower.residual.weight[3:], new.tower.residual.weight[1:10])
    with torch.no_grad():
        new.tower.residual.weight.zero_()
    assert old.tower.residual.weight.any()  # a copy: the champion is still needed


def test_an_ensemble_grows_tower_by_tower() -> None:
    config = replace(CONFIG, ensemble=2)
    ensemble = new_model(config, 12)
    for tower in ensemble.members:
        torch.nn.init.normal_(tower.residual.weight)
        tower.warm[:] = 1.0
    old, table = replace(model(), config=config, tower=ensemble.eval()), item_table()
    assert np.array_equal(grown(old, table.ids, config).item_vectors(table), old.item_vectors(table))
    for tower, before in zip(grown(old, ("new", *table.ids), config).tower.members, ensemble.members, strict=True):
        assert torch.equal(tower.residual.weight[1:], before.residual.weight)
        assert not tower.residual.weight[0].any()


def test_another_network_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"shape of the network.*deep"):
        grown(model(), item_table().ids, replace(CONFIG, ranker_hidden=8))


def test_a_warm_ranker_without_a_useful_list_is_the_one_it_was() -> None:
    start = Ranker(CONFIG.ranker_hidden)
    start.normalise_by(np.random.default_rng(0).normal(2, 3, (99, 23)).astype(np.float32))
    same = train_ranker([], CONFIG, start=start).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in start.state_dict().items())


# The file in the bundle


def test_the_file_gives_back_the_model_and_leaves_out_what_is_the_base_models(tmp_path: Path) -> None:
    origin = Origin(model(), ranker_start=5, cut=7)
    save_origin(origin, tmp_path / "a")
    (tmp_path / "usual").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode  # servers of other users read it too
    loaded = load_origin(tmp_path / "a")
    assert (loaded.ranker_start, loaded.cut, loaded.trained.config, loaded.trained.item_ids) == (5, 7, CONFIG, origin.trained.item_ids)
    table, features = item_table(), torch.randn(5, 23)
    assert np.array_equal(loaded.trained.item_vectors(table), origin.trained.item_vectors(table))
    assert torch.equal(loaded.trained.ranker(features), origin.trained.ranker(features))
    with torch.no_grad():
        for parameter in origin.trained.tower.encoder.parameters():
            parameter.add_(0.01)
    save_origin(origin, tmp_path / "b")
    whole = sum(p.numel() * 4 for p in origin.trained.tower.encoder.parameters())
    assert (tmp_path / "b").stat().st_size - (tmp_path / "a").stat().st_size > 0.99 * whole
    assert np.array_equal(load_origin(tmp_path / "b").trained.item_vectors(table), origin.trained.item_vectors(table))


def test_another_base_model_under_the_same_name_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_origin(Origin(model(), ranker_start=5, cut=7), tmp_path / "a")
    monkeypatch.setattr("training.checkpoint.torch.manual_seed", lambda _: torch.random.manual_seed(99))  # "tiny" is random by seed
    with pytest.raises(ValueError, match="'tiny' is not the one"):
        load_origin(tmp_path / "a")


def test_a_file_with_a_field_of_another_release_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"training\.safetensors: unknown field wings"):
        TrainConfig.from_record({"wings": 2}, "training.safetensors")


def test_too_few_visits_say_so() -> None:
    log = chain_log(customers=1, visits=2)
    split = Split(START, START + 1 * DAY, START + 2 * DAY, START + 20 * DAY)
    with pytest.raises(TrainingDataError, match="visits to train"):
        WarmStart("m1", Origin(model(), ranker_start=0, cut=0), split, 0.5).labels(log, CONFIG)
