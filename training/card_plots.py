"""The plots of a model card, each as a data address that an ``<img>`` takes: the page stays one file."""

import base64
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from features.page import BAD, GOOD, GREY, plot
from training.estimates import Bin, PopularityBias

# A loss is as noisy as its batches: points, and an average over so many of them.
_SMOOTHED_OVER = 20
_ROW = 0.28  # inches of a segment's line


def learning_curve(name: str, steps: Sequence[float], values: Sequence[float]) -> str:
    """Draws a figure over the steps; a long curve with its moving average."""

    def draw(axes: Axes) -> bool:
        if not len(values):
            return False
        long = len(values) > 2 * _SMOOTHED_OVER
        axes.plot(steps, values, color=GREY if long else GOOD, linewidth=0.8 if long else 1.6, marker="" if long else "o", markersize=4)
        if long:
            window = np.ones(_SMOOTHED_OVER) / _SMOOTHED_OVER
            axes.plot(steps[_SMOOTHED_OVER - 1 :], np.convolve(values, window, mode="valid"), color=GOOD, linewidth=1.8)
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        return True

    return _address(draw, name=name)


def calibration(bins: Sequence[Bin]) -> str:
    """Draws the share that came true over what was said; on the diagonal the model keeps its word."""

    def draw(axes: Axes) -> bool:
        if not bins:
            return False
        said, came = [part.probability for part in bins], [part.observed for part in bins]
        top = 1.08 * max(*said, *came, 1e-6)
        axes.plot([0, top], [0, top], color=GREY, linestyle="--", linewidth=1)
        axes.plot(said, came, color=GOOD, marker="o", linewidth=1.6)
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        axes.set_xlabel("probability said (mean of each tenth)")
        axes.set_ylabel("share that came true")
        return True

    return _address(draw, name="calibration", size=(6.4, 4.2))


def segments(dimension: str, rows: Sequence[tuple[str, float, float | None, float | None]]) -> str:
    """Draws a metric by segment, (name, value, low, high) each, with its confidence interval."""

    def draw(axes: Axes) -> bool:
        if not rows:
            return False
        for place, (_, value, low, high) in enumerate(reversed(rows)):
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=GREY, linewidth=2)
            axes.plot([value], [place], color=GOOD, marker="o")
        axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(left=0)
        return True

    return _address(draw, name=dimension, size=(6.4, 0.9 + _ROW * max(len(rows), 1)))


def popularity(bias: PopularityBias) -> str:
    """Draws how purchases, recommendations and what was taken spread over the tenths of the catalogue."""

    def draw(axes: Axes) -> bool:
        places = np.arange(10)
        for shift, shares, colour, label in (
            (-0.28, bias.bought, GREY, "bought before"),
            (0.0, bias.shown, BAD, "recommended"),
            (0.28, bias.taken, GOOD, "then taken"),
        ):
            axes.bar(places + shift, shares, width=0.26, color=colour, label=label)
        axes.set_xticks(places, ["most\nbought", *(str(k) for k in range(2, 10)), "least\nbought"])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(frameon=False)
        return True

    return _address(draw, name="popularity", size=(6.4, 3.4))


def _short(name: str) -> str:
    text = " ".join(name.split())
    return text if len(text) <= 40 else f"{text[:39]}…"


def _address(draw: Callable[[Axes], bool], *, name: str, size: tuple[float, float] = (6.4, 3.0)) -> str:
    """Returns the plot as a ``data:`` address; inside an image no script runs, whatever a segment is called."""
    return "data:image/svg+xml;base64," + base64.b64encode(plot(draw, name=name, size=size).encode()).decode()
