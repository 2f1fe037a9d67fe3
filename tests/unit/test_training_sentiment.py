"""Training on reviews: what is read, split and learned, and that the exported graph says what the model said."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from features.bundle import classifier_files
from features.classifiers import read_folder
from tests.unit import made_reviews
from training.classifier_export import write_classifier
from training.messages import messages
from training.quality.sentiment import by_aspect, by_group, run
from training.reviews import CLOTHING, SHOPPING, TEST, TRAIN, VALIDATION, ReviewDataError, Reviews, read_reviews, split
from training.sentiment import SentimentConfig, macro_f1, train_sentiment
from training.sentiment_baseline import baseline
from training.sentiment_model import Phrases, character_tokenizer
from training.sentiment_phrases import fit_phrases
from training.sentiment_run import golden_texts, review_files
from training.sentiment_run import run as run_training
from training.text import Tokens, tokenize
from training.text_classifier import predict

SMALL = SentimentConfig(tokens=24, width=16, filters=16, buckets=1 << 12)
SMALL = replace(SMALL, loop=replace(SMALL.loop, epochs=6, learning_rate=5e-3, dropout=0.1))


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Reviews:
    return read_reviews(made_reviews.write(tmp_path_factory.mktemp("en"), "en", 900, rated=True))


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Reviews:
    return read_reviews(made_reviews.write(tmp_path_factory.mktemp("zh"), "zh", 900, rated=False))


def test_the_split_is_of_the_texts_alone() -> None:
    texts = [f"review {k}" for k in range(5_000)]
    parts = split(texts)
    assert parts.tolist() == split(texts[::-1])[::-1].tolist()
    assert np.bincount(parts) / 5_000 == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert len(set(split(["the same"] * 9).tolist())) == 1
    assert split(["review 0", "review 3", "review 9"]).tolist() == [TRAIN, TRAIN, TRAIN]  # fixed: other figures would not compare


def test_the_public_files_are_read_by_their_columns(tmp_path: Path) -> None:
    count = 400
    rows = made_reviews.texts("en", count)
    clothing = pd.DataFrame({
        "Title": ["Fine" if k % 2 else None for k in range(count)],
        "Review Text": [text if k % 5 else None for k, (text, _) in enumerate(rows)],
        "Rating": [stars for _, stars in rows],
        "Recommended IND": [int(stars > 3) for _, stars in rows],
        "Class Name": ["Dresses"] * count,
    })  # fmt: skip
    clothing.to_parquet(tmp_path / CLOTHING)
    reviews = read_reviews(tmp_path / CLOTHING)
    empty = sum(1 for k in range(count) if k % 5 == 0 and k % 2 == 0)
    assert (len(reviews.texts), reviews.language) == (count - empty, "en")
    assert reviews.texts[:2] == [f"Fine. {rows[1][0]}", rows[2][0]]
    assert reviews.stars is not None
    assert reviews.positive.tolist() == (reviews.stars > 3).tolist()

    shopping = pd.DataFrame(made_reviews.texts("zh", count), columns=["review", "stars"])
    shopping.assign(review="\ufeff" + shopping["review"], label=(shopping["stars"] > 3).astype(int), cat="书籍").to_parquet(
        tmp_path / SHOPPING
    )
    reviews = read_reviews(tmp_path / SHOPPING)
    assert (reviews.language, reviews.stars, set(reviews.groups)) == ("zh", None, {"书籍"})
    assert reviews.texts[0] == shopping["review"][0]
    assert [path.name for path in review_files(tmp_path)] == [CLOTHING, SHOPPING]
    assert review_files(tmp_path / SHOPPING) == [tmp_path / SHOPPING]


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        ({"words": ["good"]}, "needs the columns text and rating, or text and label"),
        ({"text": ["good"] * 40, "rating": [6] * 40}, "ratings must be 1 to 5"),
        ({"text": ["good"] * 40, "label": [2] * 40}, "labels must be 0 or 1"),
        ({"text": ["хорошо"] * 40, "label": [0, 1] * 20}, "holds no texts in en or zh"),
        ({"text": ["good", "bad"], "label": [1, 0]}, "2 reviews are too few"),
        ({"text": [f"good {k}" for k in range(200)], "label": [1] * 200}, "too few to train, validate and test on both verdicts"),
    ],
)
def test_a_file_that_teaches_nothing_is_refused(tmp_path: Path, frame: dict[str, list[object]], told: str) -> None:
    pd.DataFrame(frame).to_json(tmp_path / "reviews.jsonl", orient="records", lines=True)
    with pytest.raises(ReviewDataError, match=told):
        read_reviews(tmp_path / "reviews.jsonl")


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    for call in (read_reviews, review_files):
        with pytest.raises(FileNotFoundError, match="nothing"):
            call(tmp_path / "nothing.csv")


def test_characters_are_tokens_in_their_plain_form() -> None:
    tokenizer = character_tokenizer(["质量很好，GOOD", "质量不好 good", "g"])
    assert tokenizer.encode("质ＧＯＯＤ 很\n坏").tokens == [
        "[CLS]",
        "质",
        "g",
        "o",
        "o",
        "d",
        "[UNK]",
        "[UNK]",
        "[SEP]",
    ]  # 很 once: unknown
    assert Tokenizer.from_str(tokenizer.to_str()).encode("质量").ids == tokenizer.encode("质量").ids
    assert tokenizer.encode(" \t").tokens == ["[CLS]", "[SEP]"]
    assert character_tokenizer(["一一二二三三三"], most=1).get_vocab_size() == 5


def test_phrases_are_weighed_by_regression_and_padding_is_none() -> None:
    rng = np.random.default_rng(1)
    tokens = Tokens([tuple(rng.integers(4, 9, rng.integers(2, 7)).tolist()) for _ in range(400)])
    targets = np.array([int((5, 6) in pairwise(ids)) for ids in tokens.ids])  # a pair of neighbours decides
    phrases = Phrases(2, longest=2, buckets=1 << 10)
    fit_phrases(phrases, tokens, targets, tokens, targets)
    assert (predict(phrases, tokens, 2).argmax(1) == targets).mean() > 0.98
    ids = tokens.pad([0])[0]
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], 1), torch.tensor([[1] * ids.shape[1] + [0] * 5])
    assert torch.allclose(phrases(*padded), phrases(ids, torch.ones_like(ids)), atol=1e-6)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_it_learns_says_how_sure_it_is_and_is_the_same_for_equal_seeds(english: Reviews, chinese: Reviews, language: str) -> None:
    reviews = {"en": english, "zh": chinese}[language]
    trained = train_sentiment(reviews, SMALL)
    assert trained.labels == ("negative", "neutral", "positive")
    assert trained.metrics["auc"] > 0.93
    assert trained.metrics["calibration_error"] < 0.15
    assert {"rating_accuracy", "rating_mae", "macro_f1"} <= set(trained.metrics) or language == "zh"
    again = train_sentiment(reviews, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(trained.model.state_dict().values(), again.model.state_dict().values(), strict=True))
    beside = baseline(reviews)
    assert set(beside) == set(trained.metrics) - {"calibration_error"}
    assert beside["auc"] > 0.93
    assert set(by_group(trained, replace(reviews, parts=np.full(len(reviews.texts), TEST)))) == {"even", "odd"}
    assert by_aspect(trained, reviews) == {}  # too few name any


def test_the_classifier_it_leaves_says_what_the_model_said(chinese: Reviews, tmp_path: Path) -> None:
    trained = train_sentiment(chinese, SMALL)
    spec = write_classifier(tmp_path, "sentiment_zh", trained, golden_texts(chinese))
    assert all(one.bit_equal for one in spec.invariance.values())
    files = classifier_files("sentiment_zh")
    session = onnxruntime.InferenceSession(str(tmp_path / files.graph), providers=["CPUExecutionProvider"])
    tokens = tokenize(Tokenizer.from_file(str(tmp_path / files.tokenizer)), ["好", "这个很好但是太差", "😀", "很" * 500], spec.tokens)
    assert max(map(len, tokens.ids)) == spec.tokens
    for row, ids in enumerate(tokens.ids):
        (logits,) = session.run(None, {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)})
        assert np.allclose(logits, predict(trained.model, Tokens([tokens.ids[row]]), 3), atol=1e-5)


def test_a_base_of_another_language_is_plugged_in_by_its_path(chinese: Reviews, tmp_path: Path) -> None:
    """The loading of a real multilingual model: its configuration, weights and tokenizer from a folder, here a small BERT's."""
    base = tmp_path / "multilingual"
    tokenizer = character_tokenizer(chinese.texts)
    torch.manual_seed(1)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **size)).save_pretrained(base)
    tokenizer.save(str(base / "tokenizer.json"))
    usual = SentimentConfig.pretrained(str(base))
    path = tmp_path / "zh.csv"
    pd.DataFrame({"text": chinese.texts, "label": chinese.positive.astype(int)}).head(400).to_csv(path, index=False)
    done = run_training(path, replace(usual, tokens=12, loop=replace(usual.loop, epochs=3, threads=1)), tmp_path / "classifiers")
    assert done.folder.parent == tmp_path / "classifiers" / "sentiment_zh"
    assert read_folder(done.folder).classifier == done.classifier
    assert (done.classifier.base_model, done.classifier.settings["base"]) == ("multilingual", str(base))
    assert done.classifier.metrics["auc"] > 0.9
    assert done.classifier.metrics["tfidf_auc"] > 0.9
    assert Tokenizer.from_file(str(done.folder / classifier_files("sentiment_zh").tokenizer)).get_vocab() == tokenizer.get_vocab()


def test_the_mean_of_f1_counts_every_label_alike() -> None:
    assert macro_f1(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert macro_f1(np.array([0, 0]), np.array([0, 1])) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.data
def test_the_public_sets_are_read_and_split(data_folder: Path) -> None:
    for name, language in ((CLOTHING, "en"), (SHOPPING, "zh")):
        reviews = read_reviews(data_folder / name)
        shares = np.bincount(reviews.parts) / len(reviews.texts)
        assert (reviews.language, shares.round(1).tolist()) == (language, [0.8, 0.1, 0.1])
        assert {reviews.texts[row] for row in reviews.rows(TEST)}.isdisjoint(reviews.texts[row] for row in reviews.rows(TRAIN))
        assert len(reviews.rows(VALIDATION)) > 2_000


def test_a_quality_run_names_the_set_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=CLOTHING):
        run(tmp_path, seed=0)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_messages_ask_or_complain(language: Literal["en", "zh"]) -> None:
    said = messages(language)
    assert said == messages(language)
    assert len(said) == len({one.text for one in said}) > 100
    assert 0.05 < np.mean([one.complains for one in said]) < 0.3


def test_a_question_is_neither_praise_nor_blame(english: Reviews, chinese: Reviews) -> None:
    """In wordings that are like those of no review, and not trained on."""
    asked = {"en": ["when will order 77 arrive?", "how much is the blue one?"], "zh": ["订单什么时候能到", "蓝色的多少钱"]}
    for reviews in (english, chinese):
        trained = train_sentiment(reviews, SMALL)
        tokens = tokenize(trained.tokenizer, asked[reviews.language], trained.tokens)
        assert predict(trained.model, tokens, 3).argmax(1).tolist() == [1, 1]
