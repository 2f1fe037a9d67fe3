"""Utterances are read, told apart and reworded as said; a classifier is trained, calibrated, exported and served alike."""

import random
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from features.bundle import classifier_files
from features.classifiers import SPEC, newest_folders, read_folder
from features.sample_shop import generate
from features.settings import Settings
from training.classifier_export import TrainedClassifier, write_classifier
from training.config import TrainConfig
from training.export import ParityError
from training.intent import choose_threshold, measured, probabilities, train_intents
from training.intent_run import IntentResult, train_intent
from training.invariance import open_graph
from training.text import load_encoder, tokenize
from training.text_classifier import TextClassifier, fit_head, fit_temperature, predict
from training.utterances import (
    OUT_OF_SCOPE,
    Rewording,
    UtteranceError,
    Utterances,
    different,
    filled,
    mistyped,
    name_texts,
    read_texts,
    read_utterances,
    wording_groups,
)

FILES = classifier_files("intent")
CONFIG = replace(TrainConfig.intent(), base_model="tiny", epochs=8, learning_rate=2e-3, trainable_layers=-1, threads=1)


@pytest.fixture(scope="module")
def shop_utterances() -> Utterances:
    shop = generate(7, end=datetime(2026, 1, 1, tzinfo=UTC), users=1)
    return Utterances(tuple(one.text for one in shop.utterances), tuple(one.intent for one in shop.utterances))


@pytest.fixture(scope="module")
def trained(shop_utterances: Utterances) -> TrainedClassifier:
    return train_intents(shop_utterances, ["the weather is lovely"] * 3, config=CONFIG, examples=20)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("columns", [("text", "intent"), ("utterance", "label"), ("question", "intent")])
def test_utterances_are_read_from_any_format_and_equal_ones_count_once(tmp_path: Path, suffix: str, columns: tuple[str, str]) -> None:
    rows = [("Where is it?", "track"), ("where is it?", "track"), ("  stop\tit ", "cancel"), ("", "cancel"), ("x", ""), ("NULL", "cancel")]
    frame, path = pd.DataFrame(rows, columns=list(columns)), tmp_path / f"u{suffix}"
    match suffix:
        case ".parquet":
            frame.to_parquet(path)
        case ".csv":
            frame.to_csv(path, index=False)
        case _:
            frame.to_json(path, orient="records", lines=True)
    assert read_utterances(path) == Utterances(("Where is it?", "stop it", "NULL"), ("track", "cancel", "cancel"))
    assert read_texts(path)[:2] == ["Where is it?", "where is it?"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,intent\na,one\nb,one\n", "fewer than two intents"),
        ("text,intent\na,one\nb,out_of_scope\n", "fewer than two intents"),
        ("words,intent\na,one\n", "no column text"),
        ("text,kind\na,one\n", "no column intent or label"),
        ("", "cannot be read"),
    ],
)
def test_a_file_that_teaches_nothing_says_why(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "u.csv").write_text(content)
    with pytest.raises(UtteranceError, match=said):
        read_utterances(tmp_path / "u.csv")
    with pytest.raises(FileNotFoundError):
        read_utterances(tmp_path / "nowhere.csv")
    (tmp_path / "u.parquet").write_text("no parquet")
    with pytest.raises(UtteranceError, match="cannot be read"):
        read_utterances(tmp_path / "u.parquet")


def test_what_is_held_out_is_worded_otherwise() -> None:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((5, 16))
    vectors = np.concatenate([centres[k] + 0.01 * rng.standard_normal((6, 16)) for k in range(5)] + [rng.standard_normal((4, 16))])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    groups = wording_groups(vectors, [0] * 30 + [1] * 4, seed=0)
    assert [len(set(groups[k : k + 6].tolist())) for k in range(0, 30, 6)] == [1] * 5  # near texts are in one group
    assert len(set(groups[:30].tolist())) == 5
    assert set(groups[30:].tolist()) == {-1}  # too few to be divided


def test_the_most_different_texts_are_taken() -> None:
    base = np.eye(4, dtype=np.float32)
    vectors = np.repeat(base, 5, axis=0)  # five copies of each of four
    taken = different(vectors, 4, rng=np.random.default_rng(0))
    assert sorted(row // 5 for row in taken) == [0, 1, 2, 3]
    assert sorted(different(vectors, 50, rng=np.random.default_rng(0))) == list(range(20))
    assert different(vectors[:0], 3, rng=np.random.default_rng(0)) == []


def test_a_reworded_text_is_alike_never_empty_and_the_same_for_a_seed() -> None:
    texts = ["", "hi", "where is it", "could you please tell me where my order with the red kettle is", "我的订单到哪了"]
    once, again = ([reword(text) for _ in range(50) for text in texts] for reword in (Rewording(3), Rewording(3)))
    assert once == again
    assert all(bool(got) == bool(text) for got, text in zip(once, texts * 50, strict=True))
    long = once[3::5]
    assert len(set(long)) > 20
    assert min(len(got.split()) for got in long) >= 3


def test_typos_and_placeholders() -> None:
    dice = random.Random(2)
    forms = {mistyped("kettle", dice) for _ in range(200)}
    assert len(forms) > 10
    assert all(abs(len(form) - 6) <= 1 and form[0] == "k" for form in forms)
    assert mistyped("mug", dice) == "mug"
    assert filled("cancel {{Order Number}} of {{ Person Name }}", dice).startswith("cancel #")
    assert filled("{{Refund Amount}}", dice)[0] == "$"
    assert filled("{{Person Name}} {} {{}}", dice) == "Person Name {} {{}}"


def test_names_are_said_as_words() -> None:
    assert name_texts("track_order")[:2] == ["track order", "I want to track order"]


def test_temperature_and_threshold() -> None:
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 4_000)
    shares = np.full((4_000, 3), 0.15, np.float32)
    shares[np.arange(4_000), np.where(rng.random(4_000) < 0.7, answers, (answers + 1) % 3)] = 0.7
    sharp = np.log(shares) * 4  # four times too sure of itself
    temperature = fit_temperature(sharp, answers.tolist())
    assert temperature == pytest.approx(4, rel=0.15)
    assert (
        measured(probabilities(sharp, temperature), answers.tolist())["ece"]
        < 0.03
        < measured(probabilities(sharp, 1.0), answers.tolist())["ece"]
    )
    known, strange = np.array([0.9, 0.8, 0.7, 0.3], np.float32), np.array([0.1, 0.2, 0.4, 0.6], np.float32)
    assert choose_threshold(known, strange) == pytest.approx(0.7)
    assert choose_threshold(np.linspace(0, 1, 101, dtype=np.float32), None) == pytest.approx(0.05)


@pytest.mark.parametrize("labels", [2, 3])
def test_the_head_alone_is_a_logistic_regression(labels: int) -> None:
    torch.manual_seed(0)
    classifier = TextClassifier(load_encoder("tiny", dropout=0.0), labels)
    rng = np.random.default_rng(1)
    answers = rng.integers(0, labels, 300)
    vectors = (np.eye(labels, 32)[answers] + 0.3 * rng.standard_normal((300, 32))).astype(np.float32)
    fit_head(classifier, vectors, answers.tolist())
    with torch.inference_mode():
        said = classifier.head(torch.from_numpy(vectors)).softmax(-1).numpy()
    expected = LogisticRegression(C=10.0, max_iter=500).fit(vectors, answers).predict_proba(vectors)
    assert np.allclose(said, expected, atol=1e-5)
    assert (said.argmax(1) == answers).mean() > 0.9


def test_a_classifier_knows_its_intents_and_what_is_none(trained: TrainedClassifier) -> None:
    assert OUT_OF_SCOPE not in trained.labels
    assert list(trained.labels) == sorted(trained.labels)
    assert len(trained.labels) == 12
    assert trained.threshold is not None
    assert 1 / 12 < trained.threshold < 1
    assert trained.temperature > 0
    assert {"validation_accuracy", "validation_macro_f1", "validation_ece", "validation_out_of_scope_refused"} <= set(trained.metrics)
    assert trained.metrics["validation_accuracy"] > 3 / 12  # a random encoder of width 32; by chance it would be 1 in 12
    assert trained.settings["examples"] == 20


def test_equal_seeds_give_equal_classifiers(trained: TrainedClassifier, shop_utterances: Utterances) -> None:
    again = train_intents(shop_utterances, ["the weather is lovely"] * 3, config=CONFIG, examples=20)
    for left, right in zip(trained.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    assert (again.temperature, again.threshold) == (trained.temperature, trained.threshold)


def test_training_moves_the_encoder_unless_it_is_frozen(shop_utterances: Utterances, trained: TrainedClassifier) -> None:
    frozen = train_intents(shop_utterances, [], config=replace(CONFIG, trainable_layers=0), examples=5)
    layer = "encoder.encoder.layer.1.output.dense.weight"
    assert not torch.equal(trained.model.state_dict()[layer], frozen.model.state_dict()[layer])
    assert frozen.threshold is not None  # the utterances have some that are out of scope


def test_too_few_utterances_are_all_learned_from_and_every_text_is_in_scope() -> None:
    few = Utterances(("where is my parcel", "track it", "give me my money", "refund me"), ("track", "track", "refund", "refund"))
    made = train_intents(few, [], config=CONFIG)
    assert (made.temperature, made.threshold) == (1.0, None)
    assert made.metrics == {"utterances": 4.0}


@pytest.fixture(scope="module")
def run(shop_utterances: Utterances, tmp_path_factory: pytest.TempPathFactory) -> IntentResult:
    """A whole run; the classifier in it is the one of ``trained``, for equal seeds give equal ones."""
    settings, now = Settings(data_dir=tmp_path_factory.mktemp("data")), datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    return train_intent(settings, shop_utterances, ["the weather is lovely"] * 3, config=CONFIG, examples=20, now=now)


def test_a_run_leaves_a_folder_that_an_export_finds(run: IntentResult) -> None:
    assert run.folder.parts[-3:] == ("classifiers", "intent", "20260102T030405")
    assert newest_folders(run.folder.parents[1]) == {"intent": run.folder}
    assert read_folder(run.folder).classifier == run.classifier
    assert len(np.load(run.folder / FILES.golden)["lengths"]) == 8


def test_the_exported_graph_says_what_the_classifier_says_in_any_company(run: IntentResult, trained: TrainedClassifier) -> None:
    assert run.classifier.parity < 1e-4
    assert all(one.bit_equal for one in run.classifier.invariance.values())
    texts = ["where is my order", "x", "how much is the gooseneck kettle, and when would it be here?", "退款"]
    session = open_graph(run.folder / FILES.graph)
    tokens = tokenize(trained.tokenizer, texts, trained.tokens)
    expected = predict(trained.model, tokens, 12)
    for row, ids in enumerate(tokens.ids):
        given = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        assert np.allclose(session.run(["logits"], given)[0][0], expected[row], atol=1e-4)


def test_a_graph_that_is_not_the_model_is_refused(
    run: IntentResult, trained: TrainedClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.classifier_export.export_graph", lambda _, __, path, **___: copyfile(run.folder / FILES.graph, path))
    other = replace(trained, model=TextClassifier(trained.model.encoder, 12))
    with pytest.raises(ParityError, match="intent by"):
        write_classifier(tmp_path, "intent", other, ["where is my order"])
    assert not (tmp_path / SPEC).exists()


def test_weights_of_4_bits_answer_nearly_alike_and_alike_in_any_company(
    run: IntentResult, trained: TrainedClassifier, shop_utterances: Utterances, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.classifier_export.export_graph", lambda _, __, path, **___: copyfile(run.folder / FILES.graph, path))
    made = write_classifier(tmp_path, "intent", trained, ["where is my order", "x"], int4=True)
    assert (made.settings["weights"], run.classifier.settings["weights"]) == ("int4", "fp32")
    assert (tmp_path / FILES.graph).stat().st_size < 0.4 * (run.folder / FILES.graph).stat().st_size
    assert all(one.bit_equal for one in made.invariance.values())
    assert 1e-4 < made.parity < 5
    sessions = [open_graph(folder / FILES.graph) for folder in (run.folder, tmp_path)]
    tokens = tokenize(trained.tokenizer, shop_utterances.texts[::10], trained.tokens)
    rows = [np.array([ids], np.int64) for ids in tokens.ids]
    exact, small = (
        np.array([s.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0].argmax() for row in rows])
        for s in sessions
    )
    assert (exact == small).mean() > 0.6  # of a random encoder of width 32, whose rows are one block; MiniLM: docs/understanding.md
