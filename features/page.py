"""The look of Concord's own pages, audits and model cards alike: one style sheet, escaped templates, plots as SVG text."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GOOD, BAD, GREY = "#2a7f62", "#c8452f", "#9aa3ad"
_STYLE_SHEET = Path(__file__).with_name("page.css")
_PLOTS: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "text.parse_math": False,  # names come from the shop: a dollar sign in one is no formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
}


def render(template: Path, **values: object) -> str:
    """Returns a page: every value is escaped, an unknown name is an error, and ``style`` is the common style sheet."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = Markup(_STYLE_SHEET.read_text())  # noqa: S704 - our own file, not a value
    return environment.from_string(template.read_text()).render(style=style, **values)


def plot(draw: Callable[[Axes], bool], *, name: str, size: tuple[float, float] = (6.4, 3.0)) -> str:
    """Returns a plot as one ``<svg>`` element.

    Args:
        draw: fills the axes; returns False when there is nothing to show, and the plot says so.
        name: salts the ids inside, because several plots share a page.
        size: width and height, inches.
    """
    with mpl.rc_context({**_PLOTS, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes):
            axes.set_axis_off()
            axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", color=GREY, fontsize=12)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True)
    return re.sub(r"\A.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL)
