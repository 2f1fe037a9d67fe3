"""The click classifier: pairs, metrics, training and its graph, on the tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.classifier import Pairs, export_classifier, fit, measure, new_classifier
from training.config import TrainConfig
from training.text import load_tokenizer

CONFIG = replace(TrainConfig.tiny(), learning_rate=3e-3, epochs=20, max_steps=0, dropout=0.0)


def pairs(count: int = 64) -> Pairs:
    """Customers of cups take cups, customers of pans take pans."""
    kinds = ("cup", "pan")
    texts = [(f"bought {kinds[k % 2]} number {k}", f"{kinds[(k // 2) % 2]} of steel") for k in range(count)]
    clicked = torch.tensor([int(k % 2 == (k // 2) % 2) for k in range(count)])
    encoded = load_tokenizer("tiny").encode_batch(texts)
    return Pairs(tuple(tuple(e.ids) for e in encoded), tuple(tuple(e.type_ids) for e in encoded), clicked)


@pytest.fixture(scope="module")
def fitted():  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    model = new_classifier(CONFIG)
    return model, *fit(model, pairs(), pairs(), config=CONFIG)


def test_it_learns_what_goes_together(fitted) -> None:  # type: ignore[no-untyped-def]
    _, metrics, steps = fitted
    assert steps > 0
    assert metrics["auc"] > 0.9


def test_the_best_weights_are_kept(fitted) -> None:  # type: ignore[no-untyped-def]
    model, metrics, _ = fitted
    assert measure(model, pairs())["auc"] == pytest.approx(metrics["auc"])


def test_padding_reads_both_texts_as_two_segments() -> None:
    ids, mask, segments = pairs().pad([0, 1, 15])
    assert ids.shape == mask.shape == segments.shape
    assert (segments.sum(1) > 0).all()
    assert ((segments == 1) <= (mask == 1)).all()


def test_a_bound_on_steps_is_kept() -> None:
    assert fit(new_classifier(CONFIG), pairs(), pairs(), config=replace(CONFIG, max_steps=2))[1] == 2


def test_the_graph_agrees_with_pytorch(fitted, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert export_classifier(fitted[0], pairs(), tmp_path / "classifier.onnx") < 1e-5
