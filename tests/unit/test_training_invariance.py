"""The measure of batch invariance sees what depends on the batch, and the exported encoder does not."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from training.invariance import invariant, measure, measure_ranker, token_examples

EXAMPLES = token_examples(("input_ids", "attention_mask"), 100)


def graph(*nodes: onnx.NodeProto) -> onnxruntime.InferenceSession:
    """Nodes from ``x``, float [batch, length] of the ids, to ``y``, beside nodes that make x."""
    cast = helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT)
    used = helper.make_node("Identity", ["attention_mask"], ["m"])
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "l"]) for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None), helper.make_tensor_value_info("m", TensorProto.INT64, None)]
    constants = [numpy_helper.from_array(np.array([k], np.int64), name) for k, name in ((0, "zero"), (1, "one"))]
    made = helper.make_graph([cast, used, *nodes], "g", inputs, outputs[:1], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_graph_of_single_rows_is_invariant() -> None:
    session = graph(helper.make_node("ReduceMax", ["x", "one"], ["y"], keepdims=0))
    measured = measure(session, EXAMPLES, longest=20)
    assert set(measured) == {"batch_size", "padding", "order"}
    assert invariant(measured)
    assert all(one.largest_difference == 0 for one in measured.values())


def test_a_graph_that_looks_at_its_neighbours_is_seen() -> None:
    session = graph(
        helper.make_node("ReduceMax", ["x", "zero"], ["highest"], keepdims=1),
        helper.make_node("Sub", ["x", "highest"], ["apart"]),
        helper.make_node("ReduceSum", ["apart", "one"], ["y"], keepdims=0),
    )
    measured = measure(session, EXAMPLES, longest=20)
    assert not measured["batch_size"].bit_equal
    assert measured["batch_size"].largest_difference > 1
    assert measured["order"].bit_equal  # the highest of all does not depend on their order


def test_a_graph_that_counts_padding_is_seen() -> None:
    measured = measure(graph(helper.make_node("ReduceMean", ["x", "one"], ["y"], keepdims=0)), EXAMPLES, longest=20)
    assert not measured["padding"].bit_equal
    assert measured["order"].bit_equal


def test_a_graph_that_knows_a_rows_place_is_seen() -> None:
    session = graph(
        helper.make_node("CumSum", ["x", "first"], ["summed"]),
        helper.make_node("ReduceSum", ["summed", "one"], ["y"], keepdims=0),
        helper.make_node("Constant", [], ["first"], value=helper.make_tensor("t", TensorProto.INT64, [], [0])),
    )
    measured = measure(session, EXAMPLES, longest=20)
    assert not measured["order"].bit_equal
    assert not invariant(measured)


@pytest.mark.parametrize("dependent", [False, True])
def test_a_ranker_is_measured_by_padding_and_order(tmp_path: Path, dependent: bool) -> None:
    rows = helper.make_tensor_value_info("features", TensorProto.FLOAT, [8, 3])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [8])
    nodes = [helper.make_node("ReduceMax", ["features", "axes"], ["own"], keepdims=0)]
    if dependent:
        nodes += [helper.make_node("ReduceMin", ["own"], ["lowest"]), helper.make_node("Sub", ["own", "lowest"], ["scores"])]
    else:
        nodes += [helper.make_node("Identity", ["own"], ["scores"])]
    made = helper.make_graph(nodes, "g", [rows], [scores], [numpy_helper.from_array(np.array([1], np.int64), "axes")])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "r.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "r.onnx"), providers=["CPUExecutionProvider"])
    measured = measure_ranker(session, np.random.default_rng(0).normal(5, 1, (8, 3)).astype(np.float32))
    assert set(measured) == {"padding", "order"}
    assert measured["padding"].bit_equal != dependent
    assert measured["order"].bit_equal


def test_texts_of_every_kind_of_input_are_made() -> None:
    example = token_examples(("input_ids", "attention_mask", "token_type_ids"), 50)
    first, second = example(6), example(6)
    assert list(first) == ["input_ids", "attention_mask", "token_type_ids"]
    assert first["input_ids"].shape == (1, 6)
    assert 0 < first["input_ids"].min() <= first["input_ids"].max() < 50
    assert first["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert not np.array_equal(first["input_ids"], second["input_ids"])
