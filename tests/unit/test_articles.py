"""Articles into passages, and which passage answers a question."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from features.article_search import FUSED, LEXICAL, ArticleIndex, Calibration, Fusion
from features.articles import PASSAGE_CHARS, Article, Passage, escaped, passage_text, passages, text_hash
from features.catalogue import content_hash

POLICY = """Before any heading, **bold** and a [link](https://shop.example/a).

# Returns

Within *30* days.
A second line.

- unworn
- with its `label`

## Refunds

| way | days |
|---|---|
| card | 5 |

<script>alert(1)</script>

> quoted
"""


def test_passages_are_the_blocks_below_a_heading() -> None:
    found = passages(Article("p", "Policy", POLICY))
    assert [(one.heading, one.text) for one in found] == [
        ("", "Before any heading, bold and a link."),
        ("Returns", "Within 30 days. A second line.\nunworn\nwith its label"),
        ("Refunds", "way\ndays\ncard\n5\n<script>alert(1)</script>\nquoted"),
    ]
    assert found[1].markdown == "Within *30* days.\nA second line.\n\n- unworn\n- with its `label`"


@pytest.mark.parametrize("body", ["", "   \n", "# only\n## headings", "[a]: http://x.example"])
def test_where_there_is_no_text_there_is_no_passage(body: str) -> None:
    assert passages(Article("p", "t", body)) == []


def test_long_blocks_are_cut_after_sentences() -> None:
    found = passages(Article("p", "t", "This is a sentence of a long paragraph. " * 60 + "x" * 1_500))
    assert all(len(one.text) <= PASSAGE_CHARS for one in found)
    assert all(one.text.endswith(".") for one in found[:4])
    assert "".join("".join(one.text.split()) for one in found) == "Thisisasentenceofalongparagraph." * 60 + "x" * 1_500


@given(st.text(max_size=300))
def test_any_body_is_cut_without_an_error_and_escaped_text_shows_as_it_is(body: str) -> None:
    for one in passages(Article("p", "t", body)):
        assert one.text.strip()
    shown = passages(Article("p", "t", escaped(body)))
    assert [each.type for each in MarkdownIt("commonmark", {"html": True}).parse(escaped(body)) if "html" in each.type] == []
    assert len({one.heading for one in shown}) <= 1  # no heading was made of it


def test_a_passage_never_shares_its_vector_with_an_item() -> None:
    assert text_hash("Mug") != content_hash("Mug", "", "", "")
    assert text_hash("Mug") == text_hash("Mug") != text_hash("mug")
    assert passage_text("t", Passage("a", "", "*x*", "x")) == "t x"


ARTICLES = (
    Article("returns", "Returns", "# How long\n\nSend it back within 30 days.\n\n# Money\n\nRefunds take 5 days."),
    Article("shipping", "Shipping", "Standard shipping takes 3 days."),
    Article("zh", "退货政策", "收到商品后七天内可以退货。"),
)


def test_words_alone_find_the_article_and_its_passage() -> None:
    index = ArticleIndex(ARTICLES)
    assert index.search("how many days do refunds take?", None, limit=2)[0].passage.text == "Refunds take 5 days."
    assert index.search("standard shiping", None, limit=1)[0].article.article_id == "shipping"
    assert index.search("怎么退货", None, limit=1)[0].article.article_id == "zh"
    assert [hit.article.article_id for hit in index.search("days", None, limit=9)].count("returns") == 1
    assert ArticleIndex(()).search("anything", None, limit=3) == []


def test_a_score_hangs_on_no_other_passage_asked_beside_it() -> None:
    rng = np.random.default_rng(0)
    index = ArticleIndex(ARTICLES)
    vectors = {}
    for key in index.texts():
        vector = rng.normal(size=16).astype(np.float32)
        vectors[key] = vector / np.linalg.norm(vector)
    titles = [vectors[text_hash(article.title)] for article in index.articles]
    bodies = [vectors[text_hash(passage_text(a.title, p))] for a, p in zip(index.articles, index.passages, strict=True)]
    question = bodies[2]
    hits = index.with_vectors(vectors).search("zzz", question, limit=1)
    assert hits[0].article.article_id == "shipping"
    whole = index.with_vectors(vectors).scores("refund days", question, FUSED)
    zero = index.with_vectors(vectors)._baseline
    semantic = FUSED.semantic * (np.maximum(np.array(titles) @ question, np.array(bodies) @ question) - zero) / (1 - zero)
    assert np.allclose(whole, (1 - FUSED.semantic) * index.scores("refund days", None, LEXICAL) + semantic, atol=1e-6)
    assert index.scores("refund days", None, FUSED).max() <= 1 - FUSED.semantic + 1e-6


def test_confidence_grows_with_the_score_and_stays_a_probability() -> None:
    curve = Calibration(10.0, -5.0)
    values = [curve.probability(score) for score in (-1.0, 0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert values[2] == 0.5
    assert 0 < values[0] < values[-1] <= 1
    assert Fusion(0.0, curve).calibration is curve
