"""Bundles with a sequence tower: whole or refused, read by the row, and the same bits in whatever company."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from features.behaviour import Activity, Behaviour
from features.bundle import FORMAT, GOLDEN, MANIFEST, REQUIRED_FILES, TOWER, BundleError, Manifest, checksums, read_bundle, write_manifest
from features.sequence import TOWER_INPUTS
from server.inference.model import LoadedModel, load_model
from tests.unit.bundles import SIZE, SPEC, write_bundle
from tests.unit.tables import activity, table

ITEMS = table(10)
SEEN = activity(("i003", "view", 0), ("i007", "purchase", 1), ("i003", "view", 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder, ITEMS, sequence=SPEC)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, provider="cpu", threads=1)


def copy(folder: Path, to: Path) -> Path:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def rewrite(folder: Path) -> None:
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    write_manifest(folder, manifest.model_copy(update={"files": dict(checksums(folder))}))


def user_vector(model: LoadedModel, seen: Activity, vectors: Any = None) -> Any:
    return model.user_vector(seen, ITEMS, model.item_vectors if vectors is None else vectors)


def searched(*texts: str) -> Activity:
    return Activity(len(texts), tuple(Behaviour("", "search", "web", 10**15 - k, text) for k, text in enumerate(texts)))


def test_the_manifest_says_how_behaviours_are_read_and_survives_its_file(folder: Path) -> None:
    manifest = read_bundle(folder)
    assert (manifest.format, manifest.tower, manifest.sequence) == (FORMAT, "sequence", SPEC)
    assert set(manifest.files) == {*REQUIRED_FILES, TOWER}


def test_a_bundle_without_its_tower_is_refused(folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path)
    (other / TOWER).unlink()
    with pytest.raises(BundleError, match=f"{TOWER} is missing"):
        read_bundle(other)
    rewrite(other)
    with pytest.raises(BundleError, match=f"names no {TOWER}"):
        read_bundle(other)


@pytest.mark.parametrize("change", [{"format": FORMAT + 1}, {"sequence": None}, {"tower": "text"}, {"tower": "image"}])
def test_a_release_that_does_not_know_a_tower_refuses_it(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """What this release does with a tower or a format it does not know is what earlier ones do with this release's."""
    given = read_bundle(folder).model_dump()
    with pytest.raises(ValidationError):
        Manifest.model_validate(given | change)
    other = copy(folder, tmp_path)
    (other / MANIFEST).write_text(read_bundle(folder).model_copy(update=change).model_dump_json(warnings=False))
    with pytest.raises(BundleError, match=MANIFEST):
        read_bundle(other)


@pytest.mark.parametrize("changed", ["tower_user_vectors", "tower_vectors"])
@pytest.mark.parametrize("value", [0.05, np.nan])
def test_a_tower_that_computes_something_else_is_refused(folder: Path, tmp_path: Path, changed: str, value: float) -> None:
    other = copy(folder, tmp_path)
    golden: dict[str, Any] = dict(np.load(other / GOLDEN))
    golden[changed] = golden[changed] + np.float32(value)
    np.savez(other / GOLDEN, **golden)
    rewrite(other)
    with pytest.raises(BundleError, match="tower differs from the golden output"):
        load_model(other, provider="cpu", threads=1)


def test_a_tower_that_is_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path)
    (other / TOWER).write_bytes(b"hello, this is no model")
    rewrite(other)
    with pytest.raises(BundleError, match="m1"):
        load_model(other, provider="cpu", threads=1)


def test_a_customer_is_a_unit_vector_of_what_they_did_where_and_when(model: LoadedModel) -> None:
    vector = user_vector(model, SEEN)
    assert vector.shape == (SIZE,)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    first, *rest = SEEN.behaviours
    others = [
        replace(first, item_id="i004"),
        replace(first, action="purchase"),
        replace(first, channel="app"),
        replace(first, occurred_at=first.occurred_at + 10**12),
    ]
    vectors = [user_vector(model, Activity(3, (other, *rest))) for other in others]
    assert all(np.abs(other - vector).max() > 1e-3 for other in vectors)


def test_who_did_nothing_that_can_be_read_has_no_vector(model: LoadedModel) -> None:
    assert user_vector(model, activity()) is None
    assert user_vector(model, activity(("gone", "view", 0))) is None
    assert user_vector(model, searched("")) is None


def test_items_are_read_by_the_vectors_of_the_epoch(model: LoadedModel) -> None:
    """So an item the bundle does not carry is read by what the fleet encoded for it, on every replica the same."""
    vectors = model.item_vectors.copy()
    vectors[7] = model.item_vector("another description")
    assert not np.array_equal(user_vector(model, SEEN, vectors), user_vector(model, SEEN))
    vectors[5] = vectors[7]  # nobody touched this one
    changed = model.item_vectors.copy()
    changed[5] = vectors[7]
    assert np.array_equal(user_vector(model, SEEN, changed), user_vector(model, SEEN))


def test_a_search_is_read_as_an_item_of_its_text_and_encoded_once(model: LoadedModel) -> None:
    fresh = LoadedModel(**{name: getattr(model, name) for name in model.__dataclass_fields__})
    seen: list[Any] = []

    class Watched:
        def run(self, outputs: list[str], inputs: dict[str, Any]) -> Any:
            seen.append(inputs)
            return model.encoder.run(outputs, inputs)

    watched = LoadedModel(**{**{name: getattr(model, name) for name in model.__dataclass_fields__}, "encoder": Watched()})
    once, twice = user_vector(watched, searched("title i003", "text")), user_vector(watched, searched("title i003", "text"))
    assert np.array_equal(once, twice)
    assert np.array_equal(once, user_vector(fresh, searched("title i003", "text")))
    assert len(seen) == 2
    assert not np.array_equal(once, user_vector(watched, searched("title i004", "text")))
    as_item = Activity(1, (Behaviour("i003", "search", "web", 10**15),))
    vectors = model.item_vectors.copy()
    vectors[3] = model.item_vector("title i003")
    assert np.array_equal(user_vector(model, as_item, vectors), user_vector(model, searched("title i003")))


def test_the_newest_searches_only_are_encoded(model: LoadedModel) -> None:
    texts = [f"title i{k:03d}" for k in range(9)]
    assert SPEC.text_count == 3
    assert np.array_equal(user_vector(model, searched(*texts)), user_vector(model, searched(*texts[:3])))


def test_any_thread_in_any_company_computes_the_same_bits(model: LoadedModel) -> None:
    people = [activity((f"i{k % 10:03d}", "view", 0), (f"i{k % 7:03d}", "purchase", k)) for k in range(20)]
    alone = [user_vector(model, who).tobytes() for who in people]
    work = list(range(20)) * 20
    random.Random(1).shuffle(work)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda k: user_vector(model, people[k]).tobytes(), work))
    assert together == [alone[k] for k in work]
    assert len(set(alone)) == 20


def test_another_replica_computes_the_same_bits(model: LoadedModel, tmp_path: Path) -> None:
    write_bundle(tmp_path, ITEMS, sequence=SPEC)
    assert np.array_equal(user_vector(load_model(tmp_path, provider="cpu", threads=4), SEEN), user_vector(model, SEEN))


def test_what_precedes_the_oldest_behaviour_is_never_read(model: LoadedModel, folder: Path) -> None:
    golden = np.load(folder / GOLDEN)
    assert model.tower is not None
    inputs = {name: golden[f"tower_{name}"][:1] for name in TOWER_INPUTS}
    blank = {name: value.copy() for name, value in inputs.items()}
    for name in TOWER_INPUTS[:-1]:
        blank[name][0, : SPEC.length - int(inputs["length"][0])] = 0
    assert np.array_equal(model.tower.run(None, inputs)[0], model.tower.run(None, blank)[0])
