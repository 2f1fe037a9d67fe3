"""An audit as one HTML page: plots drawn by matplotlib, inline, with no resource from elsewhere."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.ticker import MaxNLocator, PercentFormatter

from features.page import BAD, GOOD, GREY, plot, render
from server.audit.report import KINDS, AuditReport, Outcome

_TEMPLATE = Path(__file__).with_name("audit_page.html.j2")
_COLOURS = {Outcome.EQUAL: GOOD, Outcome.DIFFERS: BAD, Outcome.NOT_REPLAYABLE: GREY}
_LISTED = 500
_BARS = 40


def page(report: AuditReport, *, project: str) -> str:
    """Returns the page of a report."""
    plots = [
        ("Agreement by channel", "Share of live answers that agreed with every other channel and replica.", _svg(report, _agreement)),
        ("Replays over time", "Logged answers computed again from PostgreSQL, by when they were given.", _svg(report, _timeline)),
        ("Staleness of logged answers", "Age of the oldest event that an answer did not reflect yet.", _svg(report, _staleness)),
        ("Prices and stock", "Shown prices, stock flags and channels against the catalogue at their offer_version.", _svg(report, _offers)),
    ]
    return render(
        _TEMPLATE,
        project=project,
        report=report,
        plots=plots,
        kinds=KINDS,
        replays=_replays(report),
        quantiles=[(label, report.staleness.quantile(share)) for label, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1))],
        shown=report.violations[:_LISTED],
        hidden=max(len(report.violations) - _LISTED, 0),
    )


def _replays(report: AuditReport) -> list[tuple[str, int, int, int]]:
    names = {"journal": "logged answers", "probe": "live answers", "redis": "committed slates"}
    counts = {source: report.replays.get(source, Counter[str]()) for source in names}
    equal, differs, gone = (outcome.value for outcome in Outcome)
    return [(names[source], found[equal], found[differs], found[gone]) for source, found in counts.items()]


def _svg(report: AuditReport, draw: Callable[[Axes, AuditReport], bool]) -> str:
    return plot(lambda axes: draw(axes, report), name=draw.__name__)


def _agreement(axes: Axes, report: AuditReport) -> bool:
    if not report.by_channel:
        return False
    channels = sorted(report.by_channel, reverse=True)
    ratios = [report.by_channel[channel].ratio for channel in channels]
    bars = axes.barh(channels, ratios, color=[GOOD if ratio == 1 else BAD for ratio in ratios], height=0.6)
    axes.bar_label(
        bars, [f"{100 * ratio:.4g} % of {report.by_channel[name].asked}" for name, ratio in zip(channels, ratios, strict=True)], padding=4
    )
    axes.set_xlim(0, 1.3)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return True


def _timeline(axes: Axes, report: AuditReport) -> bool:
    if not report.timeline:
        return False
    minutes = {datetime.fromisoformat(minute): counts for minute, counts in report.timeline.items()}
    first, last = min(minutes), max(minutes)
    step = max((last - first) / _BARS, timedelta(minutes=1))
    bars: dict[datetime, Counter[str]] = {}
    for minute, counts in minutes.items():
        bars.setdefault(first + step * ((minute - first) // step), Counter()).update(counts)
    times = sorted(bars)
    bottom = [0.0] * len(times)
    for outcome, colour in _COLOURS.items():
        heights = [float(bars[time][outcome.value]) for time in times]
        label = outcome.value.replace("_", " ")
        axes.bar(times, heights, width=0.9 * step, align="edge", bottom=bottom, color=colour, label=label)  # type: ignore[arg-type]
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    locator = AutoDateLocator(maxticks=6)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz="UTC"))  # type: ignore[no-untyped-call]
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel("answers")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return True


def _staleness(axes: Axes, report: AuditReport) -> bool:
    seconds = report.staleness.answer_seconds
    if not seconds:
        return False
    edges = [0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000]
    names = ["none", *(f"{edge:g} s" if edge >= 1 else f"{1000 * edge:g} ms" for edge in edges[1:]), "more"]
    found = Counter(bisect_left(edges, value) for value in seconds)
    counts = [found[k] for k in range(len(names))]
    bars = axes.bar(names, counts, color=[GOOD, *[GREY] * (len(names) - 1)], width=0.8)
    axes.bar_label(bars, [str(count) if count else "" for count in counts], padding=2, fontsize=9)
    axes.tick_params(axis="x", labelrotation=45, labelsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel("answers")
    return True


def _offers(axes: Axes, report: AuditReport) -> bool:
    names = [name for name, count in report.offers.most_common() if count][::-1]
    if not names:
        return False
    counts = [report.offers[name] for name in names]
    colours = {"equal": GOOD, "unknown": GREY}
    bars = axes.barh([name.replace("_", " ") for name in names], counts, color=[colours.get(name, BAD) for name in names], height=0.6)
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=4)
    axes.set_xscale("symlog")  # one mismatch among a million must be seen; the labels say how many
    axes.xaxis.set_visible(False)
    axes.margins(x=0.2)
    return True
