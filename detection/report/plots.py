"""Plots of a report, drawn by matplotlib as SVG in the page's colors or as PNG.

Each is readable at the width of a phone. Lines differ in dash, marker and color. The colors are those of Okabe and Ito,
which color-blind people can distinguish, each in a shade for a light and one for a dark background.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from detection.atomic_file import atomic_write
from detection.report.run_record import RunRecord, to_float
from mlperf.reference_points import ReferencePoint

# Colors for a light and a dark background, with a contrast of at least 3:1.
PALETTE = (
    ("#0072b2", "#56b4e9"),
    ("#c75300", "#ff9248"),
    ("#007a5a", "#2bc49a"),
    ("#9c4480", "#e59ac9"),
    ("#806000", "#f0c52e"),
    ("#4d5661", "#b4bcc6"),
)
TEXT_COLOR = "#010203"  # a unique black, which the page replaces with the color of its text
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")

# One point is one pixel of the SVG.
WIDTH_PT, HEIGHT_PT = 380, 235
ROW_PT = 34
MAX_POINTS = 500  # per line, since more are not visible
MAX_NAME_CHARS = 34
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "text.color": TEXT_COLOR,
    "axes.edgecolor": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": TEXT_COLOR,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Plot:
    """One plot. name: for files. title: shown above the plot. alt: description for screen readers."""

    name: str
    title: str
    alt: str
    figure: Figure

    def to_svg(self) -> str:
        """Return an SVG element. Its colors are the page's variables --series-0, ... and its text color."""
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", transparent=True)
        text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
        text = text[text.index("<svg") :]
        text = re.sub(r'<g id="[^"]*"', "<g", text)  # they would repeat in each plot of a page
        text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) version="[^"]*"', r'\1 aria-hidden="true"', text, count=1)
        for index, (light, _) in enumerate(PALETTE):
            text = text.replace(light, f"var(--series-{index})")
        return text.replace(TEXT_COLOR, "currentColor")

    def write_png(self, folder: Path) -> Path:
        """Write a PNG file on a white background and return its path."""
        path = folder / f"{self.name}.png"
        with matplotlib.rc_context(STYLE), atomic_write(path) as partial:
            self.figure.savefig(partial, format="png", dpi=144, facecolor="white")
        return path


def make_plots(
    records: Sequence[RunRecord], against: Sequence[RunRecord], points: Sequence[ReferencePoint]
) -> list[Plot]:
    """Plot everything that the runs recorded, overlaid.

    against: runs to compare with. points: reference convergence points, drawn at the target.
    """
    with matplotlib.rc_context(STYLE):
        plots = [
            *(plot_metric(name, records, against, points) for name in target_metrics(records)),
            plot_steps("loss", "Loss", "loss", records, logarithmic=True),
            plot_steps("learning_rate", "Learning rate", "lr", records),
            plot_steps("throughput", "Throughput, images per second", "images_per_s", records),
            plot_ap_by_size(records),
            plot_timeline([*records, *against]),
        ]
    return [plot for plot in plots if plot is not None]


def target_metrics(records: Sequence[RunRecord]) -> list[str]:
    """Return the target metrics of all runs."""
    return list(dict.fromkeys(name for record in records for name in record.target_metrics))


def plot_metric(
    name: str, records: Sequence[RunRecord], against: Sequence[RunRecord], points: Sequence[ReferencePoint]
) -> Plot | None:
    """Plot a metric by epoch, with its target. Evaluations before training alone make no plot."""
    all_series = [record.metric_history.get(name, []) for record in records]
    if not any(epoch for series in all_series for epoch, _ in series):
        return None
    figure, axes = make_figure()
    alt = []
    for index, (record, series) in enumerate(zip(records, all_series, strict=True)):
        if series:
            axes.plot(*zip(*series, strict=True), **line_style(index), marker=MARKERS[index % len(MARKERS)])
            alt.append(
                f"{record.name}: " + ", ".join(f"{value:.4f} after epoch {epoch}" for epoch, value in series[-3:])
            )
    others: dict[str, int] = {}
    for record in against:
        series = record.metric_history.get(name, [])
        if series:
            index = others.setdefault(record.system, len(records) + len(others))
            axes.plot(*zip(*series, strict=True), **line_style(index), marker=".", lw=0.9, alpha=0.8)
            alt.append(f"{record.name}: {series[-1][1]:.4f} after epoch {series[-1][0]}")
    targets = sorted({r.targets[name] for r in records if math.isfinite(r.targets.get(name, math.nan))})
    for target in targets:
        axes.axhline(target, color=TEXT_COLOR, lw=0.9, ls=(0, (4, 3)))
        axes.annotate(
            f"target {target:g}", (0, target), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points"
        )
        alt.append(f"the target is {target:g}")
    if name == "AP" and targets:
        last = max([axes.dataLim.x1, *(point.mean_epochs for point in points)])
        for position, point in enumerate(points):
            axes.plot(point.mean_epochs, targets[0], "x", color=TEXT_COLOR, ms=6)
            # Curves come from the lower left, so the text is on the right, if it fits into the axes.
            axes.annotate(
                f"{point.global_batch_size}",
                (point.mean_epochs, targets[0]),
                (0, -24 if position % 2 else -14),  # keeps neighbors readable
                textcoords="offset points",
                ha="left" if point.mean_epochs < 0.9 * last else "right",
                fontsize=8,
            )
            alt.append(f"the reference takes {point.mean_epochs:.3g} epochs at batch {point.global_batch_size}")
    axes.set(xlabel="epoch", ylim=(0, 1.12 * max(0.01, axes.dataLim.y1, *targets)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlim(0, 1.06 * axes.dataLim.x1)
    add_legend(axes, [(record.name, index) for index, record in enumerate(records)], list(others.items()))
    return Plot(name, f"{name} by epoch", f"{name} by epoch. " + "; ".join(alt) + ".", figure)


def plot_steps(
    name: str, title: str, field: str, records: Sequence[RunRecord], *, logarithmic: bool = False
) -> Plot | None:
    """Plot one field of the step events in metrics.jsonl, for runs with at least two."""
    plotted: list[tuple[str, int]] = []
    alt, all_values = [], []
    figure, axes = make_figure()
    for index, record in enumerate(records):
        pairs = [(to_float(event.get("step")), to_float(event.get(field))) for event in record.events_named("step")]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if len(pairs) > 1:
            axes.plot(*zip(*downsample(pairs), strict=True), **line_style(index))
            plotted.append((record.name, index))
            all_values += [value for _, value in pairs]
            alt.append(
                f"{record.name}: from {pairs[0][1]:.4g} at step {pairs[0][0]:.0f} "
                f"to {pairs[-1][1]:.4g} at step {pairs[-1][0]:.0f}"
            )
    if not plotted:
        return None
    if logarithmic and min(all_values) > 0 and max(all_values) > 10 * min(all_values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=min(0.0, *all_values))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    add_legend(axes, plotted, [])
    return Plot(name, title, f"{title} by step. " + "; ".join(alt) + ".", figure)


def plot_ap_by_size(records: Sequence[RunRecord]) -> Plot | None:
    """Plot AP of small, medium and large objects at the last evaluation. -1 means that there are none."""
    with_sizes = [(index, record) for index, record in enumerate(records) if set(SIZES) <= set(record.metrics)]
    if not with_sizes:
        return None
    figure, axes = make_figure()
    alt = []
    width = 0.8 / len(with_sizes)
    for position, (index, record) in enumerate(with_sizes):
        values = [record.metrics[name] for name in SIZES]
        centers = [group + (position - (len(with_sizes) - 1) / 2) * width for group in range(len(SIZES))]
        heights = [max(0.0, value) if math.isfinite(value) else 0.0 for value in values]
        bars = axes.bar(centers, heights, 0.9 * width, color=PALETTE[index % len(PALETTE)][0])
        if len(with_sizes) <= 3:
            axes.bar_label(bars, [f"{value:.3f}" if value >= 0 else "none" for value in values], padding=2, fontsize=8)
        alt.append(
            f"{record.name}: "
            + ", ".join(f"{size} {value:.4f}" for size, value in zip(SIZES.values(), values, strict=True))
        )
    axes.set_xticks(range(len(SIZES)), SIZES.values())
    axes.grid(False, axis="x")
    axes.set_ylim(0, max(0.1, 1.15 * axes.dataLim.y1))
    add_legend(axes, [(record.name, index) for index, record in with_sizes], [])
    return Plot("AP_by_size", "AP by object size", "AP by size. " + "; ".join(alt) + ".", figure)


def plot_timeline(records: Sequence[RunRecord]) -> Plot | None:
    """Plot init, epochs and evaluations as one bar per run."""
    with_intervals = [(record, intervals) for record in records if (intervals := record.intervals())]
    if not with_intervals:
        return None
    figure, axes = make_figure(ROW_PT * len(with_intervals) + 85)
    longest_s = max(interval.stop_s for _, intervals in with_intervals for interval in intervals)
    unit, unit_s = ("hours", 3600) if longest_s > 2 * 3600 else ("minutes", 60) if longest_s > 120 else ("seconds", 1)
    alt = []
    for row, (record, intervals) in enumerate(with_intervals):
        for kind, index in (("init", 4), ("epoch", 0), ("evaluation", 1)):
            bars = [i for i in intervals if i.kind == kind]
            for parity, alpha in ((0, 0.95), (1, 0.7)):  # alternating shades separate the epochs
                spans = [
                    (i.start_s / unit_s, max(i.stop_s - i.start_s, longest_s / 2000) / unit_s)
                    for i in bars
                    if (i.epoch or 0) % 2 == parity
                ]
                axes.broken_barh(spans, (row + 0.05, 0.45), color=PALETTE[index][0], alpha=alpha, lw=0)
        axes.text(0, row - 0.02, shorten(record.name), fontsize=9, va="bottom", transform=axes.get_yaxis_transform())
        alt.append(f"{record.name}: " + ", ".join(f"{kind} {s:.1f} s" for kind, s in record.seconds_by_kind().items()))
    axes.set(xlabel=unit, ylim=(len(with_intervals) - 0.4, -0.45), xlim=(0, None), yticks=[])
    axes.spines["left"].set_visible(False)
    keys = [
        matplotlib.patches.Patch(color=PALETTE[index][0], label=text)
        for text, index in (("init", 4), ("training", 0), ("evaluation", 1))
    ]
    figure.legend(handles=keys, loc="outside upper left", ncols=3, handlelength=1, columnspacing=1.2)
    return Plot("timeline", "Timeline", "Time from the first event. " + "; ".join(alt) + ".", figure)


def make_figure(height_pt: float = HEIGHT_PT) -> tuple[Figure, Axes]:
    """Return an empty figure."""
    figure = Figure(figsize=(WIDTH_PT / 72, height_pt / 72), layout="constrained")
    return figure, figure.add_subplot()


def line_style(index: int) -> dict[str, Any]:
    """Return color and dashes of a line."""
    cycle = index // len(PALETTE)  # a color that repeats gets other dashes
    return {"color": PALETTE[index % len(PALETTE)][0], "ls": DASHES[(index + cycle) % len(DASHES)]}


def add_legend(axes: Axes, runs: list[tuple[str, int]], others: list[tuple[str, int]]) -> None:
    """Add a legend below the plot if it has several lines."""
    if len(runs) + len(others) < 2:
        return
    keys = [
        matplotlib.lines.Line2D([], [], label=shorten(name), **line_style(index)) for name, index in (*runs, *others)
    ]
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 14 / 72 * len(keys))
    figure.legend(handles=keys, loc="outside lower left", ncols=1, handlelength=3)


def shorten(name: str) -> str:
    """Return the end of a long name."""
    return name if len(name) <= MAX_NAME_CHARS else "…" + name[1 - MAX_NAME_CHARS :]


def downsample(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbors into at most `MAX_POINTS` points."""
    stride = -(-len(pairs) // MAX_POINTS)
    groups = (pairs[start : start + stride] for start in range(0, len(pairs), stride))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
