"""A model card: every section it is given, none it is not, the right figures, and nothing of what a title may hold as markup."""

import base64
import re
from dataclasses import fields, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from training.card import (
    INTENDED_USE,
    NOT_FOR,
    Calibration,
    Curve,
    Metric,
    ModelCard,
    Popularity,
    Segment,
    interval,
    number,
    render_html,
    render_markdown,
)

EVIL = "<script>alert('x')</script><img src=x onerror=y> | $x_{ `b` [l](javascript:1) **b**\n# h"
SECTIONS = {
    "intended_use": "Intended use",
    "not_for": "What it must not be used for",
    "limitations": "Limitations",
    "data": "Data",
    "base_model": "Base model",
    "metrics": "Metrics",
    "curves": "Learning curves",
    "calibration": "Calibration",
    "segments": "Metrics by segment",
    "popularity": "Popularity bias",
    "classifiers": "Text classifiers",
    "configuration": "Training configuration",
    "training": "Training time and hardware",
}


def full(text: str = "web") -> ModelCard:
    said = np.repeat([0.1, 0.5], 50)
    came = np.concatenate([np.repeat([1.0, 0.0], [10, 40]), np.repeat([1.0, 0.0], [25, 25])])
    metrics = (Metric("ndcg_at_10", 0.2, 0.1, 0.3), Metric("hr_at_10", 0.4))
    return ModelCard(
        name=f"20260101-abc {text}",
        metrics=[Metric("ndcg_at_10", 0.12345, 0.11, 0.135), Metric(f"hr {text}", 0.5), Metric("evaluated_users", 1400.0)],
        description=f"A model of {text}.",
        created_at=datetime(2026, 1, 31, 12, 30, tzinfo=UTC),
        base_model=f"all-MiniLM-L6-v2 {text}",
        base_licence="apache-2.0",
        limitations=[f"Not for {text}."],
        data={"events": 123456, f"from {text}": "2026-01-01"},
        configuration={"learning_rate": 5e-05, "cut": "", text: True},
        training={"processor": text},
        curves=[Curve(f"train/loss {text}", range(1, 101), 1 / np.arange(1, 101)), Curve("validation/ndcg_at_10", [0, 50], [0.05, 0.1])],
        calibration=Calibration(said, came, f"Note {text}."),
        segments=[Segment(f"channel {text}", "app", 90, metrics), Segment(f"channel {text}", text, 10, metrics)],
        classifiers={f"intent {text}": {"labels": 27, "accuracy": 0.81}},
        popularity=Popularity(np.arange(20, 0, -1), [7, *[0] * 18, 3], [1] * 20, [f"{text} {row}" for row in range(20)]),
    )


class Page(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def plots(page: str) -> list[str]:
    return [base64.b64decode(code).decode() for code in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]


def test_every_field_of_a_card_is_shown_in_both_forms() -> None:
    assert set(SECTIONS) | {"name", "description", "created_at", "base_licence"} == {each.name for each in fields(ModelCard)}
    page, text = render_html(full()), render_markdown(full())
    for title in SECTIONS.values():
        assert f"<h2>{title}</h2>" in page
        assert f"\n## {title}\n" in text
    for fact in ("20260101-abc web", "A model of web.", "2026-01-31 12:30 UTC", "apache-2.0", "Note web.", "123,456", "5e-05", *NOT_FOR):
        assert fact in Page(page).text
        assert fact in text
    assert len(plots(page)) == 5
    assert all(ElementTree.fromstring(plot).tag.endswith("svg") for plot in plots(page))


@pytest.mark.parametrize("name", sorted(set(SECTIONS) - {"metrics"}))
def test_a_section_stands_or_falls_with_its_field(name: str) -> None:
    values = {each.name: getattr(full(), each.name) for each in fields(ModelCard)}
    empty = {"calibration": None, "popularity": None, "base_model": "", "data": {}, "configuration": {}, "training": {}, "classifiers": {}}
    text = render_markdown(ModelCard(**values | {name: empty.get(name, ())}))
    assert {title for title in SECTIONS.values() if f"\n## {title}\n" in text} == set(SECTIONS.values()) - {SECTIONS[name]}
    alone = {"name": "m", "metrics": values["metrics"], "intended_use": (), "not_for": ()} | {name: values[name]}
    page = render_html(ModelCard(**alone))
    assert {title for title in SECTIONS.values() if f"<h2>{title}</h2>" in page} == {"Metrics", SECTIONS[name]}


def test_a_name_and_metrics_are_enough() -> None:
    card = ModelCard("m1", [Metric("ndcg_at_10", 0.5)])
    assert "0.5000" in Page(render_html(card)).text
    assert "| ndcg\\_at\\_10 | 0.5000 |  |" in render_markdown(card)
    assert all(use in render_markdown(card) for use in INTENDED_USE)
    assert "bootstrap" not in render_markdown(card)


def test_the_figures_are_those_of_the_data() -> None:
    text = render_markdown(full())
    assert "| ndcg\\_at\\_10 | 0.1235 | 0.1100 to 0.1350 |" in text
    assert "| evaluated\\_users | 1,400 |  |" in text
    assert "| train/loss web | 100 | 1.0000 | 0.0100 | 1.0000 | 0.0100 |" in text
    assert "Expected calibration error: **0.0500**" in text  # half the pairs said 0.1 and were 0.2, the others said and were 0.5
    assert "| 50 | 0.1000 | 0.2000 |\n| 50 | 0.5000 | 0.5000 |" in text
    assert "| app | 90 | 0.2000 | 0.1000 to 0.3000 | 0.4000 |  |" in text
    assert "| share of the catalogue, of anybody | 0.1000 | |" in text
    assert f"| earlier purchases of an item | {(7 * 20 + 3 * 1) / 10:.4f} | 10.5000 |" in text
    assert "| 1 | 0.1857 | 0.7000 | 0.1000 |" in text
    assert "| web 0 | 7 | 20 | 1 |" in text
    shorter = replace(full(), curves=(), segments=())  # without most of the plots, which take most of the time
    page = Page(render_html(shorter)).text
    for figure in ("0.1235", "0.1100 to 0.1350", "0.0500", "0.1857", "web 0"):
        assert figure in page


def test_texts_of_the_shop_are_never_markup() -> None:
    card = full(EVIL)
    code = render_html(card)
    page = Page(code)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert all(attrs["src"].startswith("data:image/svg+xml;base64,") for tag, attrs in page.tags if tag == "img")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert EVIL in page.text
    for plot in plots(code):
        elements = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(plot).iter()}
        assert not elements & {"script", "image", "foreignObject"}
    text = render_markdown(card)
    assert "<script" not in text
    assert "<img" not in text
    for line in text.splitlines():
        if "alert" in line:
            assert "\\`b\\`" in line
            assert "\\[l\\](" in line
            assert "\\*\\*b\\*\\*" in line
            assert "\\|" in line
    assert not [line for line in text.splitlines() if line.startswith("# h")]


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = render_html(full())
    addresses = [value for _, attrs in Page(page).tags for name, value in attrs.items() if name in {"src", "href"}]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in page
    assert "@import" not in page


def test_long_dimensions_are_cut_in_the_page_and_say_so() -> None:
    card = ModelCard("m", [Metric("a", 1.0)], segments=[Segment("category", f"c{k:02d}", 50 - k, (Metric("a", 0.5),)) for k in range(33)])
    assert "… and 13 more with fewer customers." in Page(render_html(card)).text
    assert "c19" in render_markdown(card)
    assert "c20" not in render_markdown(card)


def test_nested_settings_get_dotted_names() -> None:
    settings = {"towers": [{"width": 128}, {"width": 256}], "weights": {"text": 0.5}, "without": [], "parts": ("a", 2)}
    text = render_markdown(ModelCard("m", [Metric("a", 1.0)], configuration=settings))
    for line in ("| towers.0.width | 128 |", "| towers.1.width | 256 |", "| weights.text | 0.5000 |", "| without |  |", "| parts | a, 2 |"):
        assert line in text


def test_numbers_are_written_as_people_read_them() -> None:
    values = {0.5: "0.5000", 1234567: "1,234,567", 1234.5: "1,234", 3e-07: "3e-07", True: "yes", False: "no", None: "not set"}
    assert {value: number(value) for value in values} == values
    assert number("") == "not set"
    assert (number(np.float32(0.25)), number(np.int64(2000)), number(np.True_)) == ("0.2500", "2,000", "yes")
    assert number(float("nan")) == "nan"
    assert interval(Metric("a", 1.0)) == ""
    assert interval(Metric("a", 1.0, 0.5, 1500.0)) == "0.5000 to 1,500"
