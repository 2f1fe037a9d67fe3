"""A whole bundle written in a second without PyTorch: real ONNX graphs with random weights, for tests of what reads bundles."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from features.bundle import (
    COLLABORATIVE,
    ENCODER,
    GOLDEN,
    ITEMS,
    MANIFEST,
    RANKER,
    TOKENIZER,
    TOWER,
    Classifier,
    FeatureContract,
    FeatureRef,
    Manifest,
    checksums,
    classifier_files,
    write_manifest,
)
from features.candidates import CANDIDATE_COUNT
from features.classifiers import put_into, save_folder
from features.item_table import FloatArray, ItemTable
from features.ranking import RANKING_FEATURES
from features.sequence import TOWER_INPUTS, SequenceSpec

SIZE = 16  # components of a vector
SPEC = SequenceSpec(length=12, text_count=3, actions=("purchase", "search", "view"), channels=("app", "web"))
_WORDS = ("viewed", "bought", "added", "searched", "title", "text", ";")


def write_bundle(
    folder: Path,
    table: ItemTable,
    *,
    model_version: str = "m1",
    seed: int = 1,
    sequence: SequenceSpec | None = None,
    classifiers: Mapping[str, Sequence[str]] | None = None,
) -> Manifest:
    """Writes a bundle over all items of ``table`` into ``folder``: with a text tower, or a sequence tower that reads as ``sequence``.

    ``classifiers`` are the labels of those it carries, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    words = {word: code for code, word in enumerate(("[UNK]", *_WORDS, *table.ids))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / TOKENIZER))
    onnx.save(_encoder(rng, len(words)), str(folder / ENCODER))
    onnx.save(_ranker(rng), str(folder / RANKER))
    vectors = _unit(rng.standard_normal((len(table), SIZE)))
    np.savez(folder / ITEMS, item_ids=np.array(table.ids), content_hashes=np.array(table.content_hashes), vectors=vectors)
    np.savez(folder / COLLABORATIVE, **_neighbours(rng, len(table)))
    _write_golden(folder, rng, len(words))
    if sequence is not None:
        _write_tower(folder, rng, sequence)
    made = []
    for name, labels in (classifiers or {}).items():
        with tempfile.TemporaryDirectory() as scratch:
            write_classifier_folder(Path(scratch), name, labels, tokenizer, seed=seed)
            made.append(put_into(folder, [Path(scratch)]))
    manifest = _manifest(folder, model_version, sequence, {name: one for each in made for name, one in each.items()})
    write_manifest(folder, manifest)
    return manifest


def write_classifier_folder(folder: Path, name: str, labels: Sequence[str], tokenizer: Tokenizer, *, seed: int = 1) -> Classifier:
    """Writes what a training of a classifier leaves: a real graph with random weights, its tokenizer and golden values."""
    files, rng = classifier_files(name), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / files.tokenizer))
    onnx.save(_classifier(rng, words, len(labels)), str(folder / files.graph))
    session = onnxruntime.InferenceSession(str(folder / files.graph), providers=["CPUExecutionProvider"])
    ids, lengths = rng.integers(0, words, (3, 9)), np.array([1, 5, 9])
    runs = [{"input_ids": ids[k : k + 1, :n], "attention_mask": np.ones((1, n), np.int64)} for k, n in enumerate(lengths)]
    np.savez(folder / files.golden, input_ids=ids, lengths=lengths, logits=np.concatenate([session.run(None, run)[0] for run in runs]))
    classifier = Classifier(
        labels=tuple(labels),
        tokens=12,
        own_tokenizer=True,
        temperature=2.0,
        threshold=0.3,
        base_model="none",
        metrics={"accuracy": 0.75},
        parity=0.0,
        invariance={},
        settings={"seed": seed},
    )
    save_folder(folder, name, classifier)
    return classifier


def _classifier(rng: np.random.Generator, words: int, labels: int) -> onnx.ModelProto:
    """Mean of word vectors that hold a logit of each label."""
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["read"]),
        helper.make_node("ReduceMean", ["read"], ["logits"], axes=[1], keepdims=0),
    ]
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", labels])
    return _model(nodes, ids, [logits], words=(3 * rng.standard_normal((words, labels))).astype(np.float32))


def _manifest(
    folder: Path, model_version: str, sequence: SequenceSpec | None, classifiers: Mapping[str, Classifier] | None = None
) -> Manifest:
    day = datetime(2026, 1, 1, tzinfo=UTC)
    return Manifest(
        model_version=model_version,
        created_at=day,
        base_model="none",
        tower="text" if sequence is None else "sequence",
        sequence=sequence,
        vector_size=SIZE,
        item_tokens=16,
        user_tokens=24,
        behaviour_limit=8,
        half_life_days=30.0,
        ranking_features=RANKING_FEATURES,
        candidate_count=CANDIDATE_COUNT,
        contract=FeatureContract(name="ranking_v1", features=(FeatureRef(ref="user_profile:price_mean", dtype="Float64"),)),
        metrics={"ndcg_at_10": 0.5},
        parity={"encoder": 0.0},
        classifiers=dict(classifiers or {}),
        data_from=day,
        data_until=day,
        settings={"seed": 1},
        files=dict(checksums(folder)),
    )


def _unit(rows: "np.ndarray[tuple[int, int], np.dtype[np.float64]]") -> FloatArray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def _neighbours(rng: np.random.Generator, count: int, each: int = 5) -> dict[str, Any]:
    indices = np.concatenate([np.sort(rng.choice(count, each, replace=False)) for _ in range(count)]) if count else np.zeros(0)
    return {
        "indptr": np.arange(count + 1, dtype=np.int64) * each,
        "indices": indices.astype(np.int32),
        "weights": rng.random(count * each).astype(np.float32),
    }


def _model(nodes: "list[onnx.NodeProto]", inputs: "list[onnx.ValueInfoProto]", outputs: "list[onnx.ValueInfoProto]", **weights: FloatArray):  # type: ignore[no-untyped-def]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _encoder(rng: np.random.Generator, words: int) -> onnx.ModelProto:
    """Mean of word vectors, one head for customers and one for items, both of unit length."""
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded"], ["mean"], axes=[1], keepdims=0),
    ]
    for head in ("user", "item"):
        nodes += [
            helper.make_node("MatMul", ["mean", f"{head}_head"], [f"{head}_raw"]),
            helper.make_node("LpNormalization", [f"{head}_raw"], [f"{head}_vector"], axis=1, p=2),
        ]
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")]
    vectors = [helper.make_tensor_value_info(f"{head}_vector", TensorProto.FLOAT, ["b", SIZE]) for head in ("user", "item")]
    weights = {name: rng.standard_normal((SIZE, SIZE)).astype(np.float32) for name in ("user_head", "item_head")}
    return _model(nodes, ids, vectors, words=rng.standard_normal((words, SIZE)).astype(np.float32), **weights)


def _ranker(rng: np.random.Generator, hidden: int = 24) -> onnx.ModelProto:
    """Two dense layers over the fixed height that the server runs."""
    nodes = [
        helper.make_node("Gemm", ["features", "w1", "b1"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "w2"], ["column"]),
        helper.make_node("Squeeze", ["column", "axis"], ["scores"]),
    ]
    given = helper.make_tensor_value_info("features", TensorProto.FLOAT, [CANDIDATE_COUNT, len(RANKING_FEATURES)])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [CANDIDATE_COUNT])
    weights = {
        "w1": rng.normal(0, 0.3, (len(RANKING_FEATURES), hidden)).astype(np.float32),
        "b1": rng.standard_normal(hidden).astype(np.float32),
        "w2": rng.standard_normal((hidden, 1)).astype(np.float32),
    }
    return _model(nodes, [given], [scores], axis=np.array([1], np.int64), **weights)


def _write_golden(folder: Path, rng: np.random.Generator, words: int) -> None:
    encoder, ranker = (onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"]) for name in (ENCODER, RANKER))
    lengths = np.array([1, 5, 9])
    ids = rng.integers(0, words, (3, 9))
    pairs = [
        encoder.run(None, {"input_ids": ids[k : k + 1, :n], "attention_mask": np.ones((1, n), np.int64)}) for k, n in enumerate(lengths)
    ]
    features = rng.standard_normal((CANDIDATE_COUNT, len(RANKING_FEATURES))).astype(np.float32)
    np.savez(
        folder / GOLDEN,
        lengths=lengths,
        input_ids=ids,
        user_vectors=np.stack([user[0] for user, _ in pairs]),
        item_vectors=np.stack([item[0] for _, item in pairs]),
        ranker_features=features,
        ranker_scores=ranker.run(None, {"features": features})[0],
    )


def _write_tower(folder: Path, rng: np.random.Generator, spec: SequenceSpec) -> None:
    """A mean over the filled places that tells actions, channels, gaps and places apart, and its golden values."""
    sizes = {"actions": len(spec.actions) + 1, "channels": len(spec.channels) + 1, "gaps": len(spec.gap_seconds) + 2}
    nodes = [helper.make_node("MatMul", ["vectors", "mixed"], ["sum0"])]
    for k, name in enumerate(sizes):
        nodes += [
            helper.make_node("Gather", [f"{name}_table", name], [f"{name}_read"]),
            helper.make_node("Add", [f"sum{k}", f"{name}_read"], [f"sum{k + 1}"]),
        ]
    nodes += [
        helper.make_node("Sub", ["places", "begin"], ["since"]),
        helper.make_node("Add", ["since", "length"], ["order"]),
        helper.make_node("GreaterOrEqual", ["order", "zero"], ["filled"]),
        helper.make_node("Cast", ["filled"], ["share"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["share", "fading"], ["weight"]),
        helper.make_node("Unsqueeze", ["weight", "axes"], ["column"]),
        helper.make_node("Mul", ["sum3", "column"], ["weighted"]),
        helper.make_node("Tanh", ["weighted"], ["bent"]),
        helper.make_node("ReduceSum", ["bent", "one"], ["total"], keepdims=0),
        helper.make_node("LpNormalization", ["total"], ["user_vector"], axis=1, p=2),
    ]
    inputs = [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, [1, spec.length, SIZE])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT64, [1, spec.length]) for name in sizes]
    inputs += [helper.make_tensor_value_info("length", TensorProto.INT64, [1])]
    weights: dict[str, Any] = {f"{name}_table": rng.standard_normal((size, SIZE)).astype(np.float32) for name, size in sizes.items()}
    weights |= {"mixed": rng.standard_normal((SIZE, SIZE)).astype(np.float32), "places": np.arange(spec.length, dtype=np.int64)}
    weights |= {name: np.array([value], np.int64) for name, value in (("begin", spec.length), ("zero", 0), ("one", 1), ("axes", -1))}
    weights["fading"] = np.linspace(0.5, 1.5, spec.length, dtype=np.float32)
    out = helper.make_tensor_value_info("user_vector", TensorProto.FLOAT, [1, SIZE])
    onnx.save(_model(nodes, inputs, [out], **weights), str(folder / TOWER))
    session = onnxruntime.InferenceSession(str(folder / TOWER), providers=["CPUExecutionProvider"])
    golden: dict[str, Any] = {name: rng.integers(0, size, (3, spec.length)) for name, size in sizes.items()}
    golden |= {"vectors": rng.standard_normal((3, spec.length, SIZE)).astype(np.float32), "length": np.array([1, 4, spec.length])}
    users = [session.run(None, {name: golden[name][k : k + 1] for name in TOWER_INPUTS})[0] for k in range(3)]
    known: dict[str, Any] = dict(np.load(folder / GOLDEN))
    named = {f"tower_{name}": golden[name] for name in TOWER_INPUTS}
    np.savez(folder / GOLDEN, **known, **named, tower_user_vectors=np.concatenate(users))


def vary_bundle(bundle: Path, folder: Path, model_version: str, *, seed: int) -> Manifest:
    """Writes another valid model after ``bundle``: its ranker and collaborative weights shaken, golden outputs and checksums anew."""
    shutil.copytree(bundle, folder)
    rng = np.random.default_rng(seed)
    ranker = onnx.load(folder / RANKER)
    for weight in ranker.graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(weight)
            shaken = values * rng.normal(1.0, 0.4, values.shape)
            weight.CopyFrom(numpy_helper.from_array(shaken.astype(np.float32), weight.name))
    onnx.save(ranker, folder / RANKER)
    collaborative = dict(np.load(folder / COLLABORATIVE))
    np.savez(folder / COLLABORATIVE, **{**collaborative, "weights": rng.permutation(collaborative["weights"])})
    golden = dict(np.load(folder / GOLDEN))
    session = onnxruntime.InferenceSession(str(folder / RANKER), providers=["CPUExecutionProvider"])
    golden["ranker_scores"] = session.run(["scores"], {"features": golden["ranker_features"]})[0]
    np.savez(folder / GOLDEN, **golden)
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    manifest = manifest.model_copy(update={"model_version": model_version, "files": dict(checksums(folder))})
    write_manifest(folder, manifest)
    return manifest
