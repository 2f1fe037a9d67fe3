"""The questions to the public FAQ, and what is measured with them."""

from pathlib import Path

import pytest

from training.quality.faq import _alike, faq_index, read_questions, run


def test_every_row_has_a_question_of_ours_and_both_halves_have_their_share() -> None:
    questions = read_questions()
    asked = [question for question in questions if question.row is not None]
    assert {question.row for question in asked} == set(range(104))
    assert (len(asked), len(questions) - len(asked)) == (112, 60)
    assert len({question.text.casefold() for question in questions}) == len(questions)
    assert {question.row: question.validation for question in asked}[7] is False
    halves = [sum(question.validation is half for question in questions) for half in (True, False)]
    assert min(halves) > 80


def test_answers_that_share_their_words_count_as_alike() -> None:
    answers = ["You can return it within 30 days.", "Within 30 days you can return it!", "Shipping is 5 EUR."]
    assert _alike(answers) == [{0, 1}, {0, 1}, {2}]


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ecommerce_faq\.parquet"):
        run(tmp_path, seed=0)


@pytest.mark.data
def test_no_question_of_ours_is_one_of_theirs(data_folder: Path) -> None:
    index = faq_index(data_folder / "ecommerce_faq.parquet")
    theirs = {article.title.casefold() for article in index.articles}
    assert {question.text.casefold() for question in read_questions()} & theirs == set()


@pytest.mark.data
@pytest.mark.long
def test_the_encoder_finds_what_words_alone_do_not(data_folder: Path) -> None:
    result = run(data_folder, seed=0)
    figures = result.details["test"]
    assert isinstance(figures, dict)
    assert figures["recall_at_3"] > figures["bm25_recall_at_3"] + 0.2
    assert figures["refused_out_of_scope"] >= 0.9
    assert figures["answer_precision"] > 0.8
