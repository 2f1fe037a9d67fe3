"""Variants of the encoder: each computes nearly the same, the batch changes none that may be served, and the others are refused."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from features.bundle import ENCODER, ENCODER_FP16, GOLDEN, RANKER, Invariance, read_bundle
from features.signals import CollaborativeWeights
from tests.unit.test_training_export import CONFIG, CONTEXT, make_trained, session
from tests.unit.training_shop import item_table, tower_data
from training.checkpoint import Trained
from training.export import export_encoder, write_bundle
from training.invariance import invariant
from training.quantize import Encoding, Figures, RefusedVariantError, check, measure_all, refusal, ship
from training.train import TowerSet
from training.variants import Variant, calibration_texts

EQUAL = {name: Invariance(bit_equal=True, largest_difference=0.0) for name in ("batch_size", "padding", "order")}
UNEQUAL = EQUAL | {"batch_size": Invariance(bit_equal=False, largest_difference=0.03)}


@pytest.fixture(scope="module")
def trained() -> Trained:
    return make_trained()


@pytest.fixture(scope="module")
def validation() -> TowerSet:
    return tower_data(CONFIG, customers=12).validation


@pytest.fixture(scope="module")
def measured(trained: Trained, validation: TowerSet, tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, Figures]:
    folder, table = tmp_path_factory.mktemp("variants"), item_table()
    export_encoder(trained, folder / "fp32.onnx")
    wanted = {variant: folder / f"{variant.value}.onnx" for variant in Variant if variant is not Variant.FP32}
    items = trained.item_vectors(table)
    return measure_all(wanted, trained, encoder=folder / "fp32.onnx", table=table, items=items, validation=validation)


def test_every_variant_computes_nearly_the_same(measured: Mapping[Variant, Figures]) -> None:
    allowed = {"fp32": 0.0, "fused": 1e-5, "fp16": 1e-2, "int8": 1e-2, "int4": 0.2, "static": 0.2, "dynamic": 0.2}
    assert {variant.value for variant in measured} == set(allowed)
    assert {variant.value for variant, one in measured.items() if one.difference > allowed[variant.value]} == set()
    assert {variant.value for variant, one in measured.items() if one.difference == 0.0} == {"fp32"}
    assert all(one.ndcg_loss == measured[Variant.FP32].ndcg_at_10 - one.ndcg_at_10 for one in measured.values())


def test_quantized_files_are_smaller(measured: Mapping[Variant, Figures]) -> None:
    sizes = {variant.value: one.megabytes for variant, one in measured.items()}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert max(sizes["int4"], sizes["static"], sizes["dynamic"]) < 0.4 * sizes["fp32"]


def test_the_batch_changes_no_bit_of_the_exported_encoder(measured: Mapping[Variant, Figures]) -> None:
    """Fails when pooling sums over positions again: ONNX Runtime sums a batch of one in another order."""
    assert invariant(measured[Variant.FP32].invariance)
    assert refusal(measured[Variant.FP32], measured[Variant.FP32]) == ""


def test_dynamic_quantization_depends_on_the_batch_and_is_refused(measured: Mapping[Variant, Figures]) -> None:
    assert measured[Variant.DYNAMIC].invariance["batch_size"].largest_difference > 1e-4
    with pytest.raises(RefusedVariantError, match="ranges come from the batch"):
        check(measured[Variant.DYNAMIC], measured[Variant.FP32])


def test_static_quantization_does_not_depend_on_the_batch(measured: Mapping[Variant, Figures]) -> None:
    assert invariant(measured[Variant.STATIC].invariance)
    check(measured[Variant.STATIC], measured[Variant.FP32])


@pytest.mark.parametrize(
    ("variant", "invariance", "ms", "difference", "reason"),
    [
        (Variant.INT8, EQUAL, 9.0, 0.01, ""),
        (Variant.INT8, UNEQUAL, 1.0, 0.01, "the batch changes a vector by up to 3.0e-02"),
        (Variant.STATIC, UNEQUAL, 1.0, 0.01, "the batch changes"),
        (Variant.DYNAMIC, EQUAL, 1.0, 0.0, "ranges come from the batch"),
        (Variant.FUSED, EQUAL, 4.0, 1e-7, ""),
        (Variant.FUSED, EQUAL, 5.0, 1e-7, "not faster"),
        (Variant.FUSED, EQUAL, 4.0, 1e-2, "differs from the fp32 graph by 1.0e-02"),
    ],
)
def test_what_is_refused(variant: Variant, invariance: Mapping[str, Invariance], ms: float, difference: float, reason: str) -> None:
    fp32 = Figures(Variant.FP32, 4.0, 5.0, 0.0, EQUAL, 0.5, 0.0)
    one = Figures(variant, 1.0, ms, difference, invariance, 0.49, 0.01)
    assert reason in refusal(one, fp32)
    assert bool(refusal(one, fp32)) == bool(reason)


def test_a_bundle_may_carry_a_quantized_encoder_and_one_in_half_precision(trained: Trained, validation: TowerSet, tmp_path: Path) -> None:
    encoding = Encoding(Variant.STATIC, True, validation)
    weights = CollaborativeWeights.empty(12)
    manifest = write_bundle(tmp_path, trained, table=item_table(), collaborative=weights, context=CONTEXT, encoding=encoding)
    assert read_bundle(tmp_path) == manifest
    assert manifest.settings["encoder"] == "static"
    assert set(manifest.invariance) == {ENCODER, ENCODER_FP16, RANKER}
    assert invariant(manifest.invariance[ENCODER])
    assert invariant(manifest.invariance[RANKER])
    assert {"ndcg_at_10", "encoder_validation_ndcg_loss", "encoder_fp16_validation_ndcg_loss"} == set(manifest.metrics)
    assert 1e-5 < manifest.parity["encoder"] < 0.2
    golden, served = np.load(tmp_path / GOLDEN), session(tmp_path / ENCODER)
    ids = golden["input_ids"][:1, : golden["lengths"][0]]
    user = served.run(["user_vector"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    assert np.allclose(user[0], golden["user_vectors"][0], atol=1e-6)
    half = session(tmp_path / ENCODER_FP16).run(["user_vector"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    assert np.abs(half - user).max() < 0.2
    assert (tmp_path / ENCODER_FP16).stat().st_size > (tmp_path / ENCODER).stat().st_size


def test_a_refused_variant_leaves_no_bundle(trained: Trained, validation: TowerSet, tmp_path: Path) -> None:
    encoding = Encoding(Variant.DYNAMIC, False, TowerSet(validation.labels[:2], replace(validation.tokens, ids=validation.tokens.ids[:2])))
    weights = CollaborativeWeights.empty(12)
    with pytest.raises(RefusedVariantError):
        write_bundle(tmp_path, trained, table=item_table(), collaborative=weights, context=CONTEXT, encoding=encoding)
    assert not (tmp_path / "manifest.json").exists()


def test_half_precision_does_not_take_the_encoders_place(trained: Trained, validation: TowerSet, tmp_path: Path) -> None:
    encoding = Encoding(Variant.FP16, False, validation)
    with pytest.raises(RefusedVariantError, match="beside the encoder"):
        ship(tmp_path, trained, encoding, table=item_table(), items=np.zeros((12, 32), np.float32))


def test_calibration_reads_items_and_customers_of_any_catalogue() -> None:
    for count in (1, 12, 200):
        texts = calibration_texts(item_table(count))
        assert len(texts) == min(count, 64) + 64
        assert texts[0] == item_table(count).texts[0]
        assert max(text.count("bought") for text in texts) == 16
