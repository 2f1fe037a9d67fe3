"""Other forms of the encoder's graph: fused, half precision, weight-only and static quantization, and dynamic to measure it by."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import PreTrainedModel

from features.item_table import ItemTable
from training.model import ExportedEncoder, Tower
from training.progress import quiet
from training.text import Tokens

_BLOCK = 32  # weights that share a scale; 128, the usual, is wider than some rows of small models
_CALIBRATION_ITEMS = 64
_CALIBRATION_CUSTOMERS = 64


class Variant(StrEnum):
    """A form of the encoder's graph.

    FP32 as exported. FUSED by ONNX Runtime's BERT optimizer. FP16 for CUDA. INT8 and INT4: weights only, in blocks, arithmetic in
    fp32. STATIC: int8 weights and activations of calibrated ranges. DYNAMIC: int8 with ranges taken from the batch at hand.
    """

    FP32 = "fp32"
    FUSED = "fused"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    STATIC = "static"
    DYNAMIC = "dynamic"


QUANTIZED = frozenset({Variant.INT8, Variant.INT4, Variant.STATIC, Variant.DYNAMIC})


def write_variant(variant: Variant, out: Path, *, encoder: Path, tower: Tower, calibration: Tokens) -> None:
    """Writes a variant of an exported encoder.

    Args:
        variant: which one.
        out: the file to write.
        encoder: the fp32 graph.
        tower: the model it was exported from.
        calibration: texts that the ranges of static quantization are taken from.
    """
    with quiet(), _root_logger_kept():
        if variant is Variant.FP32:
            out.write_bytes(encoder.read_bytes())
        elif variant is Variant.FUSED:
            _fuse(tower, out)
        elif variant is Variant.FP16:
            _halve(encoder, out)
        elif variant in (Variant.INT8, Variant.INT4):
            weights_only(encoder, out, bits=8 if variant is Variant.INT8 else 4)
        elif variant is Variant.STATIC:
            _static(encoder, out, calibration)
        else:
            _dynamic(encoder, out)


def calibration_texts(table: ItemTable) -> list[str]:
    """Returns texts of a shop as the encoder meets them: item texts, and behaviour texts of 1 to 16 purchases."""
    step = max(len(table) // _CALIBRATION_ITEMS, 1)
    titles = table.titles[::step]
    items = list(table.texts[::step])[:_CALIBRATION_ITEMS]
    customers = range(_CALIBRATION_CUSTOMERS)
    return items + ["; ".join(f"bought {titles[(k * 7 + j) % len(titles)]}" for j in range(k % 16 + 1)) for k in customers]


def _fuse(tower: Tower, out: Path) -> None:
    """Exports with eager attention through TorchScript, the only graph whose attention the optimizer knows, and optimizes it."""
    from onnxruntime.transformers.optimizer import optimize_model

    plain = copy.deepcopy(tower)
    encoders = [module for module in plain.modules() if isinstance(module, PreTrainedModel)]
    for module in encoders:
        module.set_attn_implementation("eager")
    example = (torch.full((2, 8), 5, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    names, axes = ("input_ids", "attention_mask"), {0: "batch", 1: "length"}
    with torch.no_grad():
        torch.onnx.export(
            ExportedEncoder(plain).eval(),
            example,
            str(out),
            input_names=list(names),
            output_names=["user_vector", "item_vector"],
            dynamic_axes=dict.fromkeys(names, axes),
            opset_version=17,
            dynamo=False,
        )
    config = encoders[0].config
    optimized = optimize_model(str(out), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=0)
    optimized.save_model_to_file(str(out))


def _halve(encoder: Path, out: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(encoder), keep_io_types=True), out)


def weights_only(encoder: Path, out: Path, *, bits: int) -> None:
    """Quantizes a graph's matrices, and with 4 bits also the embeddings, for which ONNX Runtime has no 8-bit operator."""
    with _root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(encoder)
    kinds = ("MatMul",) if bits == 8 else ("MatMul", "Gather")
    # Accuracy level 1: sums in fp32. The higher ones quantize activations while running.
    made = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=_BLOCK,
        accuracy_level=1,
        op_types_to_quantize=kinds,
        nodes_to_include=_weighted(model, kinds),
    )
    made.process()
    onnx.save(made.model.model, out)


def _static(encoder: Path, out: Path, calibration: Tokens) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    kinds = ("MatMul", "Gemm", "Gather")
    quantize_static(
        str(encoder),
        str(out),
        _Reader(calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,  # 7 bits: processors without VNNI saturate on 8, and would then give other bits than those with it
        nodes_to_quantize=_weighted(onnx.load(encoder), kinds),
    )


def _dynamic(encoder: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(encoder), str(out), weight_type=QuantType.QInt8)


def _weighted(model: "onnx.ModelProto", kinds: Sequence[str]) -> list[str]:
    """Returns the names of nodes of these kinds that multiply by, or look up in, a matrix of fp32 weights."""
    matrices = {one.name for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) == 2}
    return [node.name for node in model.graph.node if node.op_type in kinds and matrices.intersection(node.input)]


class _Reader:
    """Hands calibration texts to ONNX Runtime one by one."""

    def __init__(self, tokens: Tokens) -> None:
        self._left = iter(range(len(tokens)))
        self._tokens = tokens

    def get_next(self) -> "dict[str, Any] | None":
        row = next(self._left, None)
        if row is None:
            return None
        ids, mask = self._tokens.pad([row])
        return {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undoes what ONNX Runtime's quantizer does to the root logger when it is imported."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
