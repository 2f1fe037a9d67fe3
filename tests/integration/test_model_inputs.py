"""What a model session is never given: the shapes and values ONNX Runtime refuses, and the path that cannot produce them."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from features.behaviour import Activity, Behaviour
from server.inference.model import LoadedModel, load_model
from tests.unit.tables import table

_STATE = ort.capi.onnxruntime_pybind11_state
# A mask of another length fails inside the graph (Fail); ONNX Runtime's errors share no base.
REFUSALS = (_STATE.InvalidArgument, _STATE.RuntimeException, _STATE.Fail)


@pytest.fixture(scope="module")
def model(bundle: Path) -> LoadedModel:
    return load_model(bundle, provider="cpu", threads=1)


def run(model: LoadedModel, ids: Any, mask: Any) -> Any:
    return model.encoder.run(["item_vector"], {"input_ids": ids, "attention_mask": mask})[0]


def ones(rows: int, length: int) -> Any:
    return np.ones((rows, length), np.int64)


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        pytest.param(np.full((1, 4), 10**6, np.int64), ones(1, 4), id="token out of the vocabulary"),
        pytest.param(np.full((1, 4), -(10**6), np.int64), ones(1, 4), id="token far below zero"),
        pytest.param(ones(1, 4), ones(1, 5), id="mask of another length"),
        pytest.param(ones(1, 4).astype(np.int32), ones(1, 4), id="wrong dtype"),
        pytest.param(ones(1, 4).astype(np.float32), ones(1, 4), id="floats for tokens"),
        pytest.param(np.ones(4, np.int64), ones(1, 4), id="wrong rank"),
    ],
)
def test_a_session_refuses_what_is_no_input_and_goes_on(model: LoadedModel, ids: Any, mask: Any) -> None:
    with pytest.raises(REFUSALS):
        run(model, ids, mask)
    assert np.isfinite(run(model, ones(1, 4), ones(1, 4))).all()


def test_an_empty_batch_gives_no_rows(model: LoadedModel) -> None:
    assert model.rank(np.zeros((0, 23), np.float32)).shape == (0,)


def test_a_row_that_masks_everything_is_finite(model: LoadedModel) -> None:
    assert np.isfinite(run(model, ones(1, 4), np.zeros((1, 4), np.int64))).all()


@pytest.mark.parametrize("text", ["word " * 5_000, "👩‍👧" * 1_000, "漢" * 2_000, "\x00\x01\u202e", "a" * 10_000, " "])
def test_no_text_reaches_the_session_as_something_it_refuses(model: LoadedModel, text: str) -> None:
    """Callers send text, never tokens: it is cut to what the model was trained on (513 tokens cannot arrive), and is finite."""
    seen: list[Any] = []

    class Watched:
        def run(self, outputs: list[str], inputs: dict[str, Any]) -> Any:
            seen.append(inputs)
            return model.encoder.run(outputs, inputs)

    watched = LoadedModel(**{**{name: getattr(model, name) for name in model.__dataclass_fields__}, "encoder": Watched()})
    vector = watched.item_vector(text)
    assert np.isfinite(vector).all()
    assert np.isclose(np.linalg.norm(vector), 1, atol=1e-3)
    (inputs,) = seen
    ids = inputs["input_ids"]
    assert ids.dtype == np.int64
    assert ids.shape == inputs["attention_mask"].shape
    assert 1 <= ids.shape[1] <= model.manifest.item_tokens
    assert ids.max() < model.tokenizer.get_vocab_size()


def test_a_customer_without_behaviour_has_no_vector(model: LoadedModel) -> None:
    from features.item_table import ItemTable

    assert model.user_vector(Activity(0), ItemTable.__new__(ItemTable), model.item_vectors) is None


def test_a_model_that_is_let_go_is_freed_at_once(bundle: Path) -> None:
    """What it remembers must not hold it: a circle keeps a replaced model's sessions until Python looks for circles."""
    let_go = load_model(bundle, provider="cpu", threads=1)
    items = table(3)
    activity = Activity(1, (Behaviour("i001", "view", "web", 0),))
    assert let_go.user_vector(activity, items, np.zeros((3, let_go.manifest.vector_size), np.float32)) is not None
    assert let_go.text_vector("a mug").any()
    seen = weakref.ref(let_go)
    gc.disable()
    try:
        del let_go
        assert seen() is None
    finally:
        gc.enable()
