"""Text classifiers of a bundle: carried whole or refused by name, unknown to bundles without, the same bits in any company."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from features.bundle import MANIFEST, TOKENIZER, BundleError, Invariance, Manifest, checksums, read_bundle, upload, write_manifest
from features.classifiers import fetch_folders, newest_folders, put_into, read_folder
from features.sequence import SequenceSpec
from server.errors import PreconditionError
from server.inference.batching import Sharing
from server.inference.model import LoadedModel, load_model
from server.metrics import Metrics
from server.recommend.computing import Computing
from server.understand.classifiers import Classifiers
from server.understand.text_runs import TextRuns
from tests.unit.bundles import SPEC, write_bundle, write_classifier_folder
from tests.unit.tables import table

LABELS = ("buy", "ask", "complain")
FILES = ("classifier.intent.onnx", "classifier.intent.golden.npz")
TEXTS = ["viewed title", "bought", "", "title text ; added searched", "title " * 40, "unknown words"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", table(10), classifiers={"intent": LABELS})
    return tmp_path / "bundle"


def rewrite(folder: Path, **changes: object) -> None:
    """Writes the manifest anew, checksums included."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    write_manifest(folder, manifest.model_copy(update={"files": dict(checksums(folder)), **changes}))


@pytest.mark.parametrize("sequence", [None, SPEC])
def test_they_go_with_either_tower_or_are_not_there(tmp_path: Path, sequence: SequenceSpec | None) -> None:
    write_bundle(tmp_path / "with", table(10), sequence=sequence, classifiers={"intent": LABELS, "sentiment_en": ("bad", "good")})
    write_bundle(tmp_path / "without", table(10), sequence=sequence)
    found = [sorted(read_bundle(tmp_path / name).classifiers) for name in ("with", "without")]
    assert found == [["intent", "sentiment_en"], []]


@pytest.mark.parametrize("name", ["", "Intent", "1st", "a.b", "../up", "x" * 33])
def test_a_name_that_is_no_plain_word_is_refused(folder: Path, name: str) -> None:
    said = read_bundle(folder).model_dump()
    with pytest.raises(ValidationError):
        Manifest.model_validate(said | {"classifiers": {name: said["classifiers"]["intent"]}})


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_it_that_is_missing_or_differs_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b"x")
    with pytest.raises(BundleError, match=f"checksum of {name}"):
        read_bundle(folder)
    (folder / name).unlink()
    rewrite(folder)
    with pytest.raises(BundleError, match=f"names no {name}"):
        read_bundle(folder)


def test_a_graph_that_computes_something_else_is_refused(folder: Path) -> None:
    golden = dict(np.load(folder / FILES[1]))
    np.savez(folder / FILES[1], **golden | {"logits": golden["logits"] + np.float32(0.01)})
    rewrite(folder)
    with pytest.raises(BundleError, match=r"classifier\.intent\.onnx differs from the golden output"):
        load_model(folder, provider="cpu", threads=1)


def test_a_graph_of_other_labels_is_refused(folder: Path) -> None:
    known = read_bundle(folder).classifiers["intent"]
    rewrite(folder, classifiers={"intent": known.model_copy(update={"labels": ("one", "two")})})
    with pytest.raises(BundleError, match="one logit for each of 2 labels"):
        load_model(folder, provider="cpu", threads=1)


def test_a_tokenizer_of_its_own_is_carried_and_one_like_the_encoders_is_not(folder: Path, tmp_path: Path) -> None:
    assert not read_bundle(folder).classifiers["intent"].own_tokenizer
    assert not (folder / "classifier.intent.tokenizer.json").exists()
    other = load_model(folder, provider="cpu", threads=1).tokenizer
    other.add_tokens(["another"])
    write_classifier_folder(tmp_path / "made", "sentiment_zh", ("bad", "good"), other)
    carried = put_into(folder, [tmp_path / "made"])
    rewrite(folder, classifiers=read_bundle(folder).classifiers | carried)
    loaded = load_model(folder, provider="cpu", threads=1)
    assert carried["sentiment_zh"].own_tokenizer
    assert loaded.classifiers["sentiment_zh"].tokenizer.get_vocab_size() == loaded.tokenizer.get_vocab_size() + 1
    assert loaded.classifiers["intent"].tokenizer is loaded.tokenizer


def test_two_of_one_name_and_a_folder_that_is_none_are_refused(folder: Path, tmp_path: Path) -> None:
    write_classifier_folder(tmp_path / "made", "intent", LABELS, load_model(folder, provider="cpu", threads=1).tokenizer)
    with pytest.raises(ValueError, match="two classifiers are named intent"):
        put_into(folder, [tmp_path / "made", tmp_path / "made"])
    with pytest.raises(FileNotFoundError, match="no trained classifier"):
        read_folder(tmp_path)
    (tmp_path / "made" / "classifier.json").write_text("{}")
    with pytest.raises(BundleError, match=r"classifier\.json cannot be read"):
        read_folder(tmp_path / "made")


def test_a_published_bundles_classifiers_go_on_into_the_next(folder: Path, tmp_path: Path) -> None:
    upload(folder, (tmp_path / "published").as_uri())
    manifest = read_bundle(folder)
    folders = fetch_folders(manifest.model_dump(mode="json"), (tmp_path / "published").as_uri(), tmp_path / "carried")
    write_bundle(tmp_path / "next", table(12), model_version="m2")
    assert put_into(tmp_path / "next", folders)["intent"].model_copy(update={"own_tokenizer": False}) == manifest.classifiers["intent"]
    assert (tmp_path / "next" / FILES[0]).read_bytes() == (folder / FILES[0]).read_bytes()
    (tmp_path / "published" / TOKENIZER).write_text("{}")
    with pytest.raises(BundleError, match=f"checksum of {TOKENIZER}"):
        fetch_folders(manifest.model_dump(mode="json"), (tmp_path / "published").as_uri(), tmp_path / "again")


def test_the_newest_run_of_each_kind_is_found(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_model(folder, provider="cpu", threads=1).tokenizer
    for name, time in (("intent", "20260101T000000"), ("intent", "20260301T000000"), ("sentiment_en", "20260201T000000")):
        write_classifier_folder(tmp_path / "runs" / name / time, name, LABELS, tokenizer)
    (tmp_path / "runs" / "intent" / "20260401T000000").mkdir()  # broken off: it has no classifier.json
    found = newest_folders(tmp_path / "runs")
    assert {name: path.name for name, path in found.items()} == {"intent": "20260301T000000", "sentiment_en": "20260201T000000"}
    assert newest_folders(tmp_path / "nowhere") == {}


def room(*, waiting: int = 512) -> Classifiers:
    return Classifiers(TextRuns(Computing(threads=2, waiting=8), batches=2, waiting=waiting, metrics=Metrics(CollectorRegistry())))


async def told(model: LoadedModel, texts: Sequence[str]) -> list[bytes]:
    found = await room().classify(model, "intent", texts)
    return [b"" if one.probabilities is None else one.probabilities.tobytes() for one in found]


@pytest.mark.parametrize("sharing", list(Sharing))
async def test_company_changes_no_bit(folder: Path, sharing: Sharing) -> None:
    model = load_model(folder, provider="cpu", threads=1)
    model = replace(model, classifiers={"intent": replace(model.classifiers["intent"], session=_Exact(3), sharing=sharing)})
    alone = [(await told(model, [text]))[0] for text in TEXTS]
    crowd = room()
    answers = await asyncio.gather(*(crowd.classify(model, "intent", TEXTS) for _ in range(20)))
    for answer in answers:
        assert [b"" if one.probabilities is None else one.probabilities.tobytes() for one in answer] == alone


class _Exact:
    """A graph whose rows depend on their own tokens alone."""

    def __init__(self, labels: int) -> None:
        self._words = np.random.default_rng(3).standard_normal((100, labels)).astype(np.float32)

    def run(self, _outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        return [np.stack([self._words[ids[mask == 1]].sum(0) for ids, mask in pairs])]


async def test_probabilities_are_the_softmax_at_the_temperature_and_the_threshold_decides(folder: Path) -> None:
    model = load_model(folder, provider="cpu", threads=1)
    known = model.classifiers["intent"]
    (found,) = await room().classify(model, "intent", ["viewed title"])
    logits = known.logits([known.tokens("viewed title").ids])[0].astype(np.float64) / known.spec.temperature
    expected = np.exp(logits) / np.exp(logits).sum()
    assert np.allclose(found.probabilities, expected, atol=1e-6)
    assert found.top(2) == sorted(zip(LABELS, found.probabilities.tolist(), strict=True), key=lambda pair: -pair[1])[:2]
    most = float(found.probabilities.max())
    for threshold, in_scope in ((None, True), (most, True), (most + 1e-3, False)):
        spec = known.spec.model_copy(update={"threshold": threshold})
        changed = replace(model, classifiers={"intent": replace(known, spec=spec)})
        assert (await room().classify(changed, "intent", ["viewed title"]))[0].in_scope is in_scope


async def test_where_there_is_nothing_to_read_there_is_no_label(folder: Path) -> None:
    model = load_model(folder, provider="cpu", threads=1)
    empty, long = await room().classify(model, "intent", [" \t", "title " * 40])
    assert (empty.probabilities, empty.in_scope, empty.token_count, empty.top(3)) == (None, False, 0, [])
    assert (long.token_count, long.truncated) == (12, True)


async def test_a_model_without_it_is_the_states_fault(tmp_path: Path) -> None:
    write_bundle(tmp_path, table(10))
    with pytest.raises(PreconditionError) as caught:
        await room().classify(load_model(tmp_path, provider="cpu", threads=1), "intent", ["title"])
    assert caught.value.reason == "NO_INTENT_MODEL"


def test_what_a_bundle_claims_is_proved_here(folder: Path) -> None:
    said = {name: Invariance(bit_equal=True, largest_difference=0.0) for name in ("batch_size", "order", "padding")}
    known = read_bundle(folder).classifiers["intent"]
    rewrite(folder, classifiers={"intent": known.model_copy(update={"invariance": said})})
    model = load_model(folder, provider="cpu", threads=1)
    assert model.classifiers["intent"].sharing is not Sharing.ANY_LENGTH  # the test graph averages padding too: a false claim, found out
