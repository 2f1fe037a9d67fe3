"""Bundles: whole or refused by name, copied so that a half one is never read, and proved by their golden outputs."""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from features.bundle import (
    COLLABORATIVE,
    ENCODER,
    ENCODER_FP16,
    FORMAT,
    GOLDEN,
    ITEMS,
    MANIFEST,
    RANKER,
    REQUIRED_FILES,
    TOKENIZER,
    BundleError,
    Invariance,
    Manifest,
    checksum,
    checksums,
    fetch,
    read_bundle,
    upload,
    write_manifest,
)
from features.ranking import RANKING_FEATURES
from server.errors import UnavailableError
from server.inference.model import load_model
from tests.unit.bundles import write_bundle
from tests.unit.tables import activity, table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", table(10))
    return tmp_path / "bundle"


def rewrite(folder: Path, **changes: object) -> None:
    """Writes the manifest anew, checksums included."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    write_manifest(folder, manifest.model_copy(update={"files": dict(checksums(folder)), **changes}))


def test_a_whole_bundle_is_read_back(folder: Path) -> None:
    manifest = read_bundle(folder)
    assert manifest.model_version == "m1"
    assert set(manifest.files) == set(REQUIRED_FILES)
    assert manifest.files[ENCODER] == checksum(folder / ENCODER)


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_file_that_differs_or_is_missing_is_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"checksum of {name}"):
        read_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        read_bundle(folder)
    rewrite(folder)
    with pytest.raises(BundleError, match=f"names no {name}"):
        read_bundle(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b'{"format": 4}'])
def test_an_unreadable_manifest_is_one_line(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=MANIFEST) as caught:
        read_bundle(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("earlier", [1, 2])
def test_a_bundle_that_reads_states_of_an_earlier_form_says_to_train_again(folder: Path, tmp_path: Path, earlier: int) -> None:
    written = json.loads((folder / MANIFEST).read_text())
    assert written["format"] == FORMAT == 3
    (folder / MANIFEST).write_text(json.dumps(written | {"format": earlier}))
    for read in (lambda: read_bundle(folder), lambda: fetch(folder.as_uri(), tmp_path / "here")):
        with pytest.raises(BundleError, match=f"m1: format {earlier} .*train again"):
            read()


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is missing"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("version", ["", "../up", "a b", ".hidden", "x" * 65, "a/b"])
def test_a_version_that_is_no_plain_name_is_refused(folder: Path, version: str) -> None:
    given = read_bundle(folder).model_dump()
    with pytest.raises(ValidationError):
        Manifest.model_validate(given | {"model_version": version})


def test_a_bundle_travels_whole(folder: Path, tmp_path: Path) -> None:
    url = (tmp_path / "published" / "m1").as_uri()
    upload(folder, url)
    assert fetch(url, tmp_path / "here") == read_bundle(folder)
    assert checksums(tmp_path / "here") == checksums(folder)


def test_the_manifest_goes_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whoever sees a manifest sees a whole bundle, on any file system."""
    files = fsspec.filesystem("memory")
    order: list[str] = []
    put = files.put_file

    def noted(source: str, target: str) -> None:
        order.append(target.rsplit("/", 1)[-1])
        put(source, target)

    monkeypatch.setattr(files, "put_file", noted)
    upload(folder, "memory://models/m1")
    assert order[-1] == MANIFEST
    assert sorted(order) == sorted([*REQUIRED_FILES, MANIFEST])
    files.rm("/models", recursive=True)


def test_a_bundle_already_here_is_not_fetched_again(folder: Path, tmp_path: Path) -> None:
    assert fetch("file:///nowhere", folder) == read_bundle(folder)
    with pytest.raises(BundleError, match="no bundle at the registered address"):
        fetch((tmp_path / "nowhere").as_uri(), tmp_path / "here")


@pytest.mark.parametrize("name", [ENCODER, MANIFEST])
def test_a_local_copy_that_was_damaged_is_fetched_again(folder: Path, tmp_path: Path, name: str) -> None:
    """A disk that was full or a machine that was cut off must not keep a replica away from a good bundle for ever."""
    url = (tmp_path / "published").as_uri()
    upload(folder, url)
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    assert fetch(url, folder).model_version == "m1"
    assert read_bundle(folder).model_version == "m1"


def test_many_that_fetch_it_at_once_all_get_it_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begins while the one before copies, and copying takes its time: half of a file stands there for a while."""

    def slowly(_self: object, source: str, target: str) -> None:
        content = Path(source).read_bytes()
        with open(target, "wb", buffering=0) as file:
            for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                file.write(half)
                time.sleep(0.01)

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.get_file", slowly)
    with ThreadPoolExecutor(4) as threads:
        fetching = []
        for _ in range(4):
            fetching.append(threads.submit(fetch, folder.as_uri(), tmp_path / "home" / "m1"))
            time.sleep(0.05)
    assert [one.result() for one in fetching] == [read_bundle(folder)] * 4


def test_a_published_bundle_without_its_manifest_is_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(BundleError, match="no bundle at the registered address"):
        fetch(folder.as_uri(), tmp_path / "here")


def test_an_opened_bundle_answers_as_recorded(folder: Path) -> None:
    model = load_model(folder, provider="cpu", threads=1)
    items = table(10)
    assert model.user_vector(activity(), items, model.item_vectors) is None
    vector = model.user_vector(activity(("i003", "view", 0)), items, model.item_vectors)
    assert vector is not None
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert model.item_rows == {item: row for row, item in enumerate(items.ids)}
    assert model.provider == "cpu"


def test_a_long_text_is_cut_to_the_models_length(folder: Path) -> None:
    model = load_model(folder, provider="cpu", threads=1)
    words = ["title", *[f"i{k % 10:03d}" for k in range(100)], "text"]
    kept = [*words[: model.manifest.item_tokens - 1], words[-1]]
    assert np.array_equal(model.item_vector(" ".join(words)), model.item_vector(" ".join(kept)))


@pytest.mark.parametrize("changed", ["user_vectors", "item_vectors", "ranker_scores"])
@pytest.mark.parametrize("value", [0.01, np.nan])
def test_a_graph_that_computes_something_else_is_refused(folder: Path, changed: str, value: float) -> None:
    golden = dict(np.load(folder / GOLDEN))
    golden[changed] = golden[changed] + np.float32(value)
    np.savez(folder / GOLDEN, **golden)
    rewrite(folder)
    with pytest.raises(BundleError, match="golden"):
        load_model(folder, provider="cpu", threads=1)


@pytest.mark.parametrize("name", [ENCODER, RANKER, TOKENIZER, ITEMS, COLLABORATIVE, GOLDEN])
def test_a_file_that_is_something_else_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"hello, this is no model")
    rewrite(folder)
    with pytest.raises(BundleError, match="m1"):
        load_model(folder, provider="cpu", threads=1)


def test_a_ranker_of_other_features_is_refused(folder: Path) -> None:
    rewrite(folder, ranking_features=RANKING_FEATURES[::-1])
    with pytest.raises(BundleError, match="other ranking features"):
        load_model(folder, provider="cpu", threads=1)


def test_half_precision_needs_a_graph_in_it(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"has no encoder\.fp16\.onnx"):
        load_model(folder, provider="auto", threads=1, precision="fp16")


def test_half_precision_is_for_cuda_only(folder: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    (folder / ENCODER_FP16).write_bytes((folder / ENCODER).read_bytes())
    rewrite(folder)
    with pytest.raises(UnavailableError) as caught:
        load_model(folder, provider="auto", threads=1, precision="fp16")
    assert caught.value.reason == "CUDA_UNAVAILABLE"
    assert load_model(folder, provider="cpu", threads=1).provider == "cpu"  # and nobody has to use it


def test_half_precision_may_be_less_exact_but_not_wrong(folder: Path) -> None:
    model, golden = load_model(folder, provider="cpu", threads=1), dict(np.load(folder / GOLDEN))
    for off, passes in ((0.005, True), (0.05, False)):
        np.savez(folder / GOLDEN, **golden | {"user_vectors": golden["user_vectors"] + np.float32(off)})
        with contextlib.nullcontext() if passes else pytest.raises(BundleError, match="golden"):
            model.check_golden(folder, precision="fp16")
        with pytest.raises(BundleError, match="golden"):
            model.check_golden(folder)


def test_a_ranker_that_depends_on_its_batch_is_warned_of(folder: Path) -> None:
    measured = {"padding": Invariance(bit_equal=False, largest_difference=0.25), "order": Invariance(bit_equal=True, largest_difference=0)}
    with capture_logs() as quiet:
        load_model(folder, provider="cpu", threads=1)
    rewrite(folder, invariance={RANKER: measured})
    with capture_logs() as told:
        load_model(folder, provider="cpu", threads=1)
    assert quiet == []
    (entry,) = told
    assert (entry["event"], entry["of"], entry["largest_difference"]) == ("ranker depends on its batch", "padding", 0.25)


def test_a_manifest_that_measured_no_invariance_is_still_read(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    del values["invariance"]
    (folder / MANIFEST).write_text(json.dumps(values))
    assert read_bundle(folder).invariance == {}


def test_cuda_that_is_not_there_is_said_not_replaced(folder: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnavailableError) as caught:
        load_model(folder, provider="cuda", threads=1)
    assert caught.value.reason == "CUDA_UNAVAILABLE"
