"""The model card: what a model is, what it is for and not for, and how good it is for whom; as one HTML page and as Markdown.

Knows nothing of runs and bundles: whoever has the figures fills in a ``ModelCard``. Only a name and metrics are required;
a section nobody filled in is left out.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from features.page import render
from training import card_plots
from training.estimates import LEVEL, Bin, PopularityBias, calibration_error, popularity_bias, reliability

INTENDED_USE = (
    "Ranking items of the catalogue it was trained on for customers of that shop, in every channel.",
    "Comparing the meaning of item texts, behaviour texts and queries in the language of that catalogue.",
)
NOT_FOR = (
    "Decisions about people with legal or similarly serious effects: credit, insurance, employment, housing, access to services.",
    "Setting prices or terms for a single person.",
    "Inferring what people did not say: health, origin, religion, politics, sexual orientation, or age, from what they bought.",
    "Deciding who may see or buy restricted goods (age, prescription, safety): eligibility is a rule of the shop, not a score.",
    "Another shop, another language, or a time far from the data window, without an evaluation there.",
    "Reading scores as probabilities of a purchase, beyond what a calibration on this page shows.",
)

_HTML = Path(__file__).with_name("card.html.j2")
_MARKDOWN = Path(__file__).with_name("card.md.j2")
_LISTED_SEGMENTS = 20
_LISTED_ITEMS = 10
# What Markdown would read as markup inside a line; < > & are turned into entities first.
_MARKUP = re.compile(r"([\\`*_\[\]|~$])")


@dataclass(frozen=True)
class Metric:
    """A figure with the ends of its confidence interval (``training.estimates.LEVEL``), None where it has none."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """A figure over the optimizer steps (or epochs) of the training."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Calibration:
    """Pairs float[n]: what the model said would be taken, and the share of it that was (in [0, 1])."""

    probability: npt.ArrayLike
    observed: npt.ArrayLike
    note: str = ""


@dataclass(frozen=True)
class Segment:
    """The metrics of some customers: ``dimension`` is what they were told apart by, ``name`` which of them these are."""

    dimension: str
    name: str
    customers: int
    metrics: Sequence[Metric]


@dataclass(frozen=True)
class Popularity:
    """Counts of each of n items: earlier purchases, recommendations, and what customers then turned to; ``titles`` to name them."""

    purchases: npt.ArrayLike
    shown: npt.ArrayLike
    taken: npt.ArrayLike
    titles: Sequence[str] = ()


@dataclass(frozen=True)
class ModelCard:
    """What a card says; texts may be anybody's and are escaped.

    Attributes:
        name: of the model.
        metrics: headline first; the first four stand at the top of the page.
        description: what the model is and was measured on, in a sentence or two.
        created_at: when it was made (UTC).
        base_model, base_licence: the pretrained model it started from and its licence.
        intended_use, not_for, limitations: sentences.
        data: the data window and counts, as named values; they may be nested.
        configuration: of the training, likewise. Passwords are the caller's to leave out (``training.tracking.without_secrets``).
        training: time and hardware, likewise.
        curves: learning curves.
        calibration: predictions against what came true.
        segments: metrics by segment, those of one dimension together.
        popularity: counts by item.
        classifiers: what the bundle's text classifiers are and how good, as ``data``.
    """

    name: str
    metrics: Sequence[Metric]
    description: str = ""
    created_at: datetime | None = None
    base_model: str = ""
    base_licence: str = ""
    intended_use: Sequence[str] = INTENDED_USE
    not_for: Sequence[str] = NOT_FOR
    limitations: Sequence[str] = ()
    data: Mapping[str, object] = field(default_factory=dict)
    configuration: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    curves: Sequence[Curve] = ()
    calibration: Calibration | None = None
    segments: Sequence[Segment] = ()
    popularity: Popularity | None = None
    classifiers: Mapping[str, object] = field(default_factory=dict)


def render_html(card: ModelCard) -> str:
    """Returns the card as one self-contained page, plots included."""
    view = _view(card)
    plots = {
        "curves": [(c.name, card_plots.learning_curve(c.name, c.steps, c.values)) for c in card.curves if len(c.values)],
        "calibration": card_plots.calibration(view["bins"]) if view["bins"] else "",
        "segments": {
            name: card_plots.segments(name, [(s.name, s.metrics[0].value, s.metrics[0].low, s.metrics[0].high) for s in part if s.metrics])
            for name, part, _ in view["dimensions"]
        },
        "popularity": card_plots.popularity(view["bias"]) if view["bias"] else "",
    }
    return render(_HTML, plots=plots, **view)


def render_markdown(card: ModelCard) -> str:
    """Returns the card as Markdown, the figures of the plots as tables."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_escape,
    )
    return environment.from_string(_MARKDOWN.read_text()).render(**_view(card))


def _escape(value: object) -> object:
    """Makes a value one line of plain text for Markdown; numbers and what a macro has written pass."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return Markup(_MARKUP.sub(r"\\\1", html.escape(" ".join(value.split()), quote=False)))  # noqa: S704 - escaped just now


def _view(card: ModelCard) -> dict[str, Any]:
    """Returns what both templates read."""
    bins: list[Bin] = []
    if card.calibration is not None:
        bins = reliability(card.calibration.probability, card.calibration.observed)
    bias: PopularityBias | None = None
    if card.popularity is not None:
        bias = popularity_bias(card.popularity.purchases, card.popularity.shown, card.popularity.taken)
    return {
        "card": card,
        "number": number,
        "interval": interval,
        "level": round(100 * LEVEL),
        "bootstrapped": any(interval(metric) for metric in card.metrics),
        "data": _rows(card.data),
        "configuration": _rows(card.configuration),
        "training": _rows(card.training),
        "classifiers": _rows(card.classifiers),
        "curves": [_curve_row(curve) for curve in card.curves if len(curve.values)],
        "bins": bins,
        "error": number(calibration_error(bins)),
        "dimensions": _dimensions(card.segments),
        "bias": bias,
        "most_shown": _most_shown(card.popularity) if card.popularity else [],
    }


def number(value: object) -> str:
    """Writes a value as people read it: four decimals for shares, thousands separated, small figures with their digits."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value or "not set")
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"


def interval(metric: Metric) -> str:
    """Writes a metric's confidence interval, empty where it has none."""
    return "" if metric.low is None or metric.high is None else f"{number(metric.low)} to {number(metric.high)}"


def _rows(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Returns names and texts; what is nested gets dotted names, a list of plain values one line."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += [(f"{name}.{inner}", text) for inner, text in _rows(value)]
        elif isinstance(value, list | tuple):
            nested = any(isinstance(each, Mapping | list | tuple) for each in value)
            found += _rows({f"{name}.{k}": each for k, each in enumerate(value)}) if nested else [(name, ", ".join(map(number, value)))]
        else:
            found.append((name, number(value)))
    return found


def _curve_row(curve: Curve) -> tuple[str, str, str, str, str, str]:
    """Returns name, steps, first, lowest, highest and last value."""
    values = [float(value) for value in curve.values]
    figures = (number(value) for value in (values[0], min(values), max(values), values[-1]))
    return (curve.name, f"{curve.steps[-1]:g}", *figures)  # type: ignore[return-value]


def _dimensions(segments: Sequence[Segment]) -> list[tuple[str, list[Segment], int]]:
    """Returns for each dimension its name, the segments listed and how many are not."""
    names = dict.fromkeys(segment.dimension for segment in segments)
    parts = {name: [segment for segment in segments if segment.dimension == name] for name in names}
    return [(name, part[:_LISTED_SEGMENTS], max(len(part) - _LISTED_SEGMENTS, 0)) for name, part in parts.items()]


def _most_shown(popularity: Popularity) -> list[tuple[str, str, str, str]]:
    """Returns title, recommendations, earlier purchases and what was taken of the items recommended most."""
    shown, purchases, taken = (np.asarray(column) for column in (popularity.shown, popularity.purchases, popularity.taken))
    best = np.argsort(-shown, kind="stable")[: _LISTED_ITEMS if popularity.titles else 0]
    return [(popularity.titles[row], *(f"{counts[row]:,.0f}" for counts in (shown, purchases, taken))) for row in best if shown[row]]
