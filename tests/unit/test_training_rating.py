"""The rating regression: it starts as the mean predictor, learns who likes what, and its graph answers on the shop's scale."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.config import TrainConfig
from training.pairs import Pairs, PairSets, export_pairs, fit, new_model
from training.rating import Ratings
from training.text import load_tokenizer

CONFIG = replace(TrainConfig.tiny(), learning_rate=3e-3, epochs=20, max_steps=0, dropout=0.0, patience=99)
HEAD = Ratings()


def rated(count: int = 64) -> Pairs:
    """Customers of cups give cups five stars and pans two, customers of pans the reverse."""
    kinds = ("cup", "pan")
    texts = [(f"bought {kinds[k % 2]} number {k}", f"{kinds[(k // 2) % 2]} of steel") for k in range(count)]
    stars = [5.0 if k % 2 == (k // 2) % 2 else 2.0 for k in range(count)]
    return Pairs.of(texts, torch.tensor(stars), load_tokenizer("tiny"), 64)


@pytest.fixture(scope="module")
def fitted():  # type: ignore[no-untyped-def]
    sets = PairSets(rated(), rated())
    model = new_model(HEAD, sets, CONFIG)
    untrained = HEAD.measure(model.answers(rated()), rated().answers)
    return model, untrained, fit(model, HEAD, sets, config=CONFIG)


def test_it_starts_as_the_mean_predictor(fitted) -> None:  # type: ignore[no-untyped-def]
    _, untrained, progress = fitted
    mean = HEAD.baseline(rated().answers, rated().answers)
    assert untrained["rmse"] == pytest.approx(mean["mean_rmse"]) == pytest.approx(1.5)
    assert progress.first == pytest.approx(-1.5)


def test_it_learns_who_likes_what(fitted) -> None:  # type: ignore[no-untyped-def]
    model, _, progress = fitted
    after = HEAD.measure(model.answers(rated()), rated().answers)
    assert after["rmse"] < 1.0
    assert after["rmse"] == pytest.approx(-progress.best)
    assert after["mae"] <= after["rmse"]


def test_the_error_of_the_mean_is_that_of_the_training_mean() -> None:
    assert HEAD.baseline(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0])) == {"mean_rmse": 2.0}


def test_the_graph_answers_on_the_shops_scale(fitted, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import onnxruntime

    model = fitted[0]
    assert export_pairs(model, HEAD, rated(), tmp_path / "rating.onnx") < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "rating.onnx"), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    (got,) = session.run(["rating"], {name: tensor.numpy() for name, tensor in zip(names, rated().pad(range(8)), strict=True)})
    assert got.shape == (8, 1)
    assert torch.allclose(torch.from_numpy(got), model.answers(rated())[:8], atol=1e-4)
