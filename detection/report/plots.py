"""The figures of a report: matplotlib's, as SVG that takes its colours from the page, or as PNG.

Each is readable at the width of a phone. Lines differ in dash and marker as well as in colour (Okabe and Ito's, which
colour-blind people can tell apart, each in a shade for light ground and one for dark).
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from detection.report.run_record import RunRecord, number
from mlperf.rules import ReferencePoint

# For light ground, for dark ground: at least 3:1 against it.
PALETTE = (
    ("#0072b2", "#56b4e9"),
    ("#c75300", "#ff9248"),
    ("#007a5a", "#2bc49a"),
    ("#9c4480", "#e59ac9"),
    ("#806000", "#f0c52e"),
    ("#4d5661", "#b4bcc6"),
)
INK = "#010203"  # a black that is no other colour, for the page to replace by that of its text
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")

# In points, of which an SVG has as many as pixels.
WIDTH_PT, HEIGHT_PT = 380, 235
ROW_PT = 34
MOST_POINTS = 500  # of a line: more cannot be seen
NAME_CHARS = 34
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
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
    """One figure. name: for files. title: above it. alt: what it shows, for those who do not see it."""

    name: str
    title: str
    alt: str
    figure: Figure

    def svg(self) -> str:
        """As an SVG element whose colours are the page's variables --series-0 and so on, and its text's colour."""
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", transparent=True)
        text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
        text = text[text.index("<svg") :]
        text = re.sub(r'<g id="[^"]*"', "<g", text)  # they would be the same in each figure of a page
        text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) version="[^"]*"', r'\1 aria-hidden="true"', text, count=1)
        for index, (light, _) in enumerate(PALETTE):
            text = text.replace(light, f"var(--series-{index})")
        return text.replace(INK, "currentColor")

    def write_png(self, folder: Path) -> Path:
        """As a picture on white ground; returns its file."""
        path = folder / f"{self.name}.png"
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(path, format="png", dpi=144, facecolor="white")
        return path


def draw(records: Sequence[RunRecord], against: Sequence[RunRecord], points: Sequence[ReferencePoint]) -> list[Plot]:
    """The figures that these runs have data for, overlaid; against: runs to compare them with.

    points: how fast the reference converges, drawn at the target.
    """
    with matplotlib.rc_context(STYLE):
        drawn = [
            *(accuracy(name, records, against, points) for name in judged(records)),
            line("loss", "Loss", "loss", records, logarithmic=True),
            line("learning_rate", "Learning rate", "lr", records),
            line("throughput", "Throughput, images per second", "images_per_s", records),
            by_size(records),
            time_line([*records, *against]),
        ]
    return [plot for plot in drawn if plot is not None]


def judged(records: Sequence[RunRecord]) -> list[str]:
    """The figures by which any of the runs is judged."""
    return list(dict.fromkeys(name for record in records for name in record.judged_by))


def accuracy(
    name: str, records: Sequence[RunRecord], against: Sequence[RunRecord], points: Sequence[ReferencePoint]
) -> Plot | None:
    """A figure of the evaluations by epoch, with its target."""
    all_series = [record.accuracies.get(name, []) for record in records]
    if not any(all_series):
        return None
    figure, axes = make()
    told = []
    for index, (record, series) in enumerate(zip(records, all_series, strict=True)):
        if series:
            axes.plot(*zip(*series, strict=True), **look(index), marker=MARKERS[index % len(MARKERS)])
            told.append(
                f"{record.name}: " + ", ".join(f"{value:.4f} after epoch {epoch}" for epoch, value in series[-3:])
            )
    others: dict[str, int] = {}
    for record in against:
        series = record.accuracies.get(name, [])
        if series:
            index = others.setdefault(record.system, len(records) + len(others))
            axes.plot(*zip(*series, strict=True), **look(index), marker=".", lw=0.9, alpha=0.8)
            told.append(f"{record.name}: {series[-1][1]:.4f} after epoch {series[-1][0]}")
    targets = sorted({r.targets[name] for r in records if math.isfinite(r.targets.get(name, math.nan))})
    for target in targets:
        axes.axhline(target, color=INK, lw=0.9, ls=(0, (4, 3)))
        axes.annotate(
            f"target {target:g}", (0, target), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points"
        )
        told.append(f"the target is {target:g}")
    if name == "AP" and targets:
        last = max([axes.dataLim.x1, *(point.mean_epochs for point in points)])
        for place, point in enumerate(points):
            axes.plot(point.mean_epochs, targets[0], "x", color=INK, ms=6)
            # Curves come from the left and below, so the text is on the right, where that is within the axes.
            axes.annotate(
                f"{point.global_batch_size}",
                (point.mean_epochs, targets[0]),
                (0, -24 if place % 2 else -14),  # so that neighbours can be read
                textcoords="offset points",
                ha="left" if point.mean_epochs < 0.9 * last else "right",
                fontsize=8,
            )
            told.append(f"the reference takes {point.mean_epochs:g} epochs at batch {point.global_batch_size}")
    axes.set(xlabel="epoch", ylim=(0, 1.12 * max(0.01, axes.dataLim.y1, *targets)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlim(0, 1.06 * axes.dataLim.x1)
    legend(axes, [(record.name, index) for index, record in enumerate(records)], list(others.items()))
    return Plot(name, f"{name} by epoch", f"{name} by epoch. " + "; ".join(told) + ".", figure)


def line(name: str, title: str, field: str, records: Sequence[RunRecord], *, logarithmic: bool = False) -> Plot | None:
    """What the step events of metrics.jsonl say of one field."""
    drawn: list[tuple[str, int]] = []
    told, everything = [], []
    figure, axes = make()
    for index, record in enumerate(records):
        pairs = [(number(event.get("step")), number(event.get(field))) for event in record.of("step")]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if pairs:
            axes.plot(*zip(*thinned(pairs), strict=True), **look(index))
            drawn.append((record.name, index))
            everything += [value for _, value in pairs]
            told.append(
                f"{record.name}: from {pairs[0][1]:.4g} at step {pairs[0][0]:.0f} "
                f"to {pairs[-1][1]:.4g} at step {pairs[-1][0]:.0f}"
            )
    if not drawn:
        return None
    if logarithmic and min(everything) > 0 and max(everything) > 10 * min(everything):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=min(0.0, *everything))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    legend(axes, drawn, [])
    return Plot(name, title, f"{title} by step. " + "; ".join(told) + ".", figure)


def by_size(records: Sequence[RunRecord]) -> Plot | None:
    """AP of small, medium and large objects at the last evaluation; -1 means that there are none."""
    having = [(index, record) for index, record in enumerate(records) if set(SIZES) <= set(record.figures)]
    if not having:
        return None
    figure, axes = make()
    told = []
    width = 0.8 / len(having)
    for place, (index, record) in enumerate(having):
        values = [record.figures[name] for name in SIZES]
        at = [position + (place - (len(having) - 1) / 2) * width for position in range(len(SIZES))]
        shown = [max(0.0, value) if math.isfinite(value) else 0.0 for value in values]
        bars = axes.bar(at, shown, 0.9 * width, color=PALETTE[index % len(PALETTE)][0])
        if len(having) <= 3:
            axes.bar_label(bars, [f"{value:.3f}" if value >= 0 else "none" for value in values], padding=2, fontsize=8)
        told.append(
            f"{record.name}: "
            + ", ".join(f"{size} {value:.4f}" for size, value in zip(SIZES.values(), values, strict=True))
        )
    axes.set_xticks(range(len(SIZES)), SIZES.values())
    axes.grid(False, axis="x")
    axes.set_ylim(0, max(0.1, 1.15 * axes.dataLim.y1))
    legend(axes, [(record.name, index) for index, record in having], [])
    return Plot("AP_by_size", "AP by size of object", "AP by size. " + "; ".join(told) + ".", figure)


def time_line(records: Sequence[RunRecord]) -> Plot | None:
    """Init, epochs and evaluations of each run, a bar for each run."""
    having = [(record, record.intervals()) for record in records]
    having = [(record, intervals) for record, intervals in having if intervals]
    if not having:
        return None
    figure, axes = make(ROW_PT * len(having) + 85)
    longest_s = max(interval.stop_s for _, intervals in having for interval in intervals)
    unit, unit_s = ("hours", 3600) if longest_s > 2 * 3600 else ("minutes", 60) if longest_s > 120 else ("seconds", 1)
    told = []
    for row, (record, intervals) in enumerate(having):
        for kind, index in (("init", 4), ("epoch", 0), ("evaluation", 1)):
            bars = [i for i in intervals if i.kind == kind]
            for parity, alpha in ((0, 0.95), (1, 0.7)):  # neighbours differ, so that epochs can be counted
                spans = [
                    (i.start_s / unit_s, max(i.stop_s - i.start_s, longest_s / 2000) / unit_s)
                    for i in bars
                    if (i.epoch or 0) % 2 == parity
                ]
                axes.broken_barh(spans, (row + 0.05, 0.45), color=PALETTE[index][0], alpha=alpha, lw=0)
        axes.text(0, row - 0.02, short(record.name), fontsize=9, va="bottom", transform=axes.get_yaxis_transform())
        told.append(f"{record.name}: " + ", ".join(f"{kind} {s:.1f} s" for kind, s in record.times_s().items()))
    axes.set(xlabel=unit, ylim=(len(having) - 0.4, -0.45), xlim=(0, None), yticks=[])
    axes.spines["left"].set_visible(False)
    keys = [
        matplotlib.patches.Patch(color=PALETTE[index][0], label=text)
        for text, index in (("init", 4), ("training", 0), ("evaluation", 1))
    ]
    figure.legend(handles=keys, loc="outside upper left", ncols=3, handlelength=1, columnspacing=1.2)
    return Plot("time_line", "Time line", "Time from the first event. " + "; ".join(told) + ".", figure)


def make(height_pt: float = HEIGHT_PT) -> tuple[Figure, Axes]:
    """An empty figure, whose legend goes below it."""
    figure = Figure(figsize=(WIDTH_PT / 72, height_pt / 72), layout="constrained")
    return figure, figure.add_subplot()


def look(index: int) -> dict[str, Any]:
    """Colour and dashes of the index-th line."""
    round_of_colours = index // len(PALETTE)  # the second time each has other dashes
    return {"color": PALETTE[index % len(PALETTE)][0], "ls": DASHES[(index + round_of_colours) % len(DASHES)]}


def legend(axes: Axes, runs: list[tuple[str, int]], others: list[tuple[str, int]]) -> None:
    """The names of the lines, below the figure, where there are several."""
    if len(runs) + len(others) < 2:
        return
    keys = [matplotlib.lines.Line2D([], [], label=short(name), **look(index)) for name, index in (*runs, *others)]
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 14 / 72 * len(keys))
    figure.legend(handles=keys, loc="outside lower left", ncols=1, handlelength=3)


def short(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= NAME_CHARS else "…" + name[1 - NAME_CHARS :]


def thinned(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` means of neighbours."""
    every = -(-len(pairs) // MOST_POINTS)
    mean: Callable[[Sequence[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731
    parts = (pairs[start : start + every] for start in range(0, len(pairs), every))
    return [(mean([x for x, _ in part]), mean([y for _, y in part])) for part in parts]
