"""The click classifier: pairs, metrics, training and its graph, on the tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.classifier import Clicks
from training.config import TrainConfig
from training.pairs import PairModel, Pairs, PairSets, export_pairs, fit, new_model
from training.text import load_tokenizer

CONFIG = replace(TrainConfig.tiny(), learning_rate=3e-3, epochs=20, max_steps=0, dropout=0.0, patience=99)
HEAD = Clicks()


def pairs(count: int = 64) -> Pairs:
    """Customers of cups take cups, customers of pans take pans."""
    kinds = ("cup", "pan")
    texts = [(f"bought {kinds[k % 2]} number {k}", f"{kinds[(k // 2) % 2]} of steel") for k in range(count)]
    return Pairs.of(texts, torch.tensor([int(k % 2 == (k // 2) % 2) for k in range(count)]), load_tokenizer("tiny"), 64)


def sets() -> PairSets:
    return PairSets(pairs(), pairs())


@pytest.fixture(scope="module")
def fitted():  # type: ignore[no-untyped-def]
    model = new_model(HEAD, sets(), CONFIG)
    return model, fit(model, HEAD, sets(), config=CONFIG)


def measured(model: PairModel) -> dict[str, float]:
    return HEAD.measure(model.answers(pairs()), pairs().answers)


def test_it_learns_what_goes_together(fitted) -> None:  # type: ignore[no-untyped-def]
    _, progress = fitted
    assert progress.step > 0
    assert progress.best > 0.9 > progress.first


def test_the_accuracy_is_reported_beside_that_of_the_commoner_answer() -> None:
    assert HEAD.baseline(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0, 1])) == {"constant_accuracy": 0.75}
    assert HEAD.baseline(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0, 1])) == {"constant_accuracy": 0.25}


def test_the_best_weights_are_kept(fitted) -> None:  # type: ignore[no-untyped-def]
    model, progress = fitted
    assert measured(model)["auc"] == pytest.approx(progress.best)


def test_padding_reads_both_texts_as_two_segments() -> None:
    ids, mask, segments = pairs().pad([0, 1, 15])
    assert ids.shape == mask.shape == segments.shape
    assert (segments.sum(1) > 0).all()
    assert ((segments == 1) <= (mask == 1)).all()


def test_a_pair_that_is_too_long_loses_behaviours_and_keeps_the_title() -> None:
    tokenizer = load_tokenizer("tiny")
    made = Pairs.of([("bought a cup; " * 20, "pan of steel")], torch.tensor([1]), tokenizer, 12)
    assert len(made.ids[0]) == 12
    assert tokenizer.decode(list(made.ids[0])).endswith("pan of steel")


def test_a_bound_on_steps_is_kept() -> None:
    config = replace(CONFIG, max_steps=2)
    assert fit(new_model(HEAD, sets(), config), HEAD, sets(), config=config).step == 2


def test_the_graph_agrees_with_pytorch(fitted, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert export_pairs(fitted[0], HEAD, pairs(), tmp_path / "classifier.onnx") < 1e-5
