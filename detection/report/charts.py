"""Line charts of a report as data, which the page draws with templates/report.js and `png` with matplotlib.

Lines differ in dash and color. The colors are those of Okabe and Ito, which color-blind people can distinguish, each in
a shade for a light and one for a dark background.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
MAX_POINTS = 500  # per line, since more are not visible

METRIC_NAMES = {
    "AP": "AP",
    "AP50": "AP at IoU 0.50",
    "AP75": "AP at IoU 0.75",
    "APs": "AP of small objects",
    "APm": "AP of medium objects",
    "APl": "AP of large objects",
    "AR1": "AR, 1 detection",
    "AR10": "AR, 10 detections",
    "AR100": "AR, 100 detections",
    "ARs": "AR of small objects",
    "ARm": "AR of medium objects",
    "ARl": "AR of large objects",
}


@dataclass(frozen=True)
class Line:
    """One line of a chart. style: index of its color and its dashes. thin: drawn in the background."""

    name: str
    style: int
    points: list[tuple[float, float]]
    markers: bool = False
    thin: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the line for report.js."""
        xs, ys = [round_digits(x) for x, _ in self.points], [round_digits(y) for _, y in self.points]
        return {"name": self.name, "style": self.style, "x": xs, "y": ys, "markers": self.markers, "thin": self.thin}


@dataclass(frozen=True)
class Chart:
    """One line chart.

    name: for files. title: shown above it. alt: description for screen readers. levels: horizontal lines as (y, text).
    marks: single points as (x, y, text). logarithmic: the y-axis.
    """

    name: str
    title: str
    x_label: str
    lines: list[Line]
    alt: str
    levels: list[tuple[float, str]] = field(default_factory=list)
    marks: list[tuple[float, float, str]] = field(default_factory=list)
    logarithmic: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the chart for report.js."""
        return {
            "name": self.name,
            "title": self.title,
            "x": self.x_label,
            "lines": [line.to_json() for line in self.lines],
            "levels": self.levels,
            "marks": self.marks,
            "log": self.logarithmic,
        }


def make_charts(
    records: Sequence[RunRecord], against: Sequence[RunRecord], points: Sequence[ReferencePoint]
) -> list[Chart]:
    """Return the charts of everything that the runs recorded, overlaid.

    against: runs to compare with. points: reference convergence points, drawn at the target.
    """
    charts = [
        *(metric_chart(name, records, against, points) for name in target_metrics(records)),
        step_chart("loss", "Loss", "loss", records, logarithmic=True),
        loss_terms_chart(records),
        step_chart("learning_rate", "Learning rate", "lr", records),
        step_chart("throughput", "Throughput, images per second", "images_per_s", records),
        step_chart("memory", "Peak memory of the first rank, GiB", "memory_gib", records),
    ]
    return [chart for chart in charts if chart is not None]


def target_metrics(records: Sequence[RunRecord]) -> list[str]:
    """Return the target metrics of all runs."""
    return list(dict.fromkeys(name for record in records for name in record.target_metrics))


def metric_name(key: str) -> str:
    """Return the readable name of a metric, such as mask AP at IoU 0.50."""
    base = key.removeprefix("mask_")
    return ("mask " if base != key else "") + METRIC_NAMES.get(base, base)


def metric_chart(
    name: str, records: Sequence[RunRecord], against: Sequence[RunRecord], points: Sequence[ReferencePoint]
) -> Chart | None:
    """Return a metric by epoch, with its target. Evaluations before training alone make no chart."""
    all_series = [record.metric_history.get(name, []) for record in records]
    if not any(epoch for series in all_series for epoch, _ in series):
        return None
    lines, alt = [], []
    for index, (record, series) in enumerate(zip(records, all_series, strict=True)):
        if series:
            lines.append(Line(record.name, index, finite(series), markers=True))
            alt.append(
                f"{record.name}: " + ", ".join(f"{value:.4f} after epoch {epoch}" for epoch, value in series[-3:])
            )
    systems: dict[str, int] = {}
    for record in against:
        if series := record.metric_history.get(name, []):
            style = systems.setdefault(record.system, len(records) + len(systems))
            lines.append(Line(record.name, style, finite(series), thin=True))
            alt.append(f"{record.name}: {series[-1][1]:.4f} after epoch {series[-1][0]}")
    targets = sorted({r.targets[name] for r in records if math.isfinite(r.targets.get(name, math.nan))})
    alt += [f"the target is {target:g}" for target in targets]
    marks = []
    if name == "AP" and targets:
        for point in points:
            marks.append((point.mean_epochs, targets[0], f"{point.global_batch_size}"))
            alt.append(f"the reference takes {point.mean_epochs:.3g} epochs at batch {point.global_batch_size}")
    title = f"{metric_name(name)} by epoch"
    levels = [(target, f"target {target:g}") for target in targets]
    return Chart(name, title, "epoch", lines, f"{title}. " + "; ".join(alt) + ".", levels, marks)


def step_chart(
    name: str, title: str, key: str, records: Sequence[RunRecord], *, logarithmic: bool = False
) -> Chart | None:
    """Return one field of the step events in metrics.jsonl, for runs with at least two."""
    series = [(record.name, index, step_values(record, key)) for index, record in enumerate(records)]
    return make_step_chart(name, title, series, logarithmic)


def loss_terms_chart(records: Sequence[RunRecord]) -> Chart | None:
    """Return the terms of a single run's loss. Of several runs, they would be too many lines."""
    if len(records) != 1:
        return None
    names = dict.fromkeys(name for event in records[0].events_named("step") for name in event.get("losses") or {})
    series = [(name, index, step_values(records[0], name, "losses")) for index, name in enumerate(names)]
    return make_step_chart("losses", "Loss by term", series, True) if len(series) > 1 else None


def make_step_chart(
    name: str, title: str, series: Iterable[tuple[str, int, list[tuple[float, float]]]], logarithmic: bool
) -> Chart | None:
    """Return a chart of values by step: (name, style, points) of each line with at least two."""
    lines, alt = [], []
    for line_name, style, pairs in series:
        if len(pairs) > 1:
            lines.append(Line(line_name, style, downsample(pairs)))
            alt.append(
                f"{line_name}: from {pairs[0][1]:.4g} at step {pairs[0][0]:.0f} "
                f"to {pairs[-1][1]:.4g} at step {pairs[-1][0]:.0f}"
            )
    values = [value for line in lines for _, value in line.points]
    logarithmic = logarithmic and bool(values) and min(values) > 0 and max(values) > 10 * min(values)
    alt_text = f"{title} by step. " + "; ".join(alt) + "."
    return Chart(name, title, "step", lines, alt_text, logarithmic=logarithmic) if lines else None


def step_values(record: RunRecord, key: str, parent: str = "") -> list[tuple[float, float]]:
    """Return the finite values of a field of the step events, or of a field in their field `parent`, by step."""
    events = record.events_named("step")
    holders = [event.get(parent) or {} for event in events] if parent else events
    return finite(
        (to_float(event.get("step")), to_float(holder.get(key))) for event, holder in zip(events, holders, strict=True)
    )


def precision_recall_chart(records: Sequence[RunRecord]) -> tuple[Chart | None, list[dict[str, Any]]]:
    """Return the mean precision by recall, and the curves of each class for report.js."""
    lines, alt, by_class = [], [], []
    for index, record in enumerate(records):
        for iou in (50, 75):
            key = f"precision{iou}"
            curves = {str(row.get("name")): row[key] for row in record.classes if row.get(key)}
            if not curves or len({len(curve) for curve in curves.values()}) > 1:
                continue
            columns = list(zip(*([max(0.0, to_float(v)) for v in curve] for curve in curves.values()), strict=True))
            recalls = [step / max(1, len(columns) - 1) for step in range(len(columns))]
            mean = [(recall, sum(column) / len(column)) for recall, column in zip(recalls, columns, strict=True)]
            prefix = f"{record.name}, " if len(records) > 1 else ""
            name, style = f"{prefix}IoU 0.{iou}", index if len(records) > 1 else iou // 75
            lines.append(Line(name, style, finite(mean), thin=len(records) > 1 and iou == 75))
            by_class.append({"name": name, "curves": curves})
            alt.append(f"{name}: mean precision {sum(p for _, p in mean) / len(mean):.3f} over recall 0 to 1")
    if not lines:
        return None, []
    title = "Precision by recall"
    levels = [(1.0, "")]
    return Chart("precision_recall", title, "recall", lines, f"{title}. " + "; ".join(alt) + ".", levels), by_class


def finite(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the pairs of finite numbers."""
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def downsample(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbors into at most `MAX_POINTS` points."""
    stride = -(-len(pairs) // MAX_POINTS)
    groups = (pairs[start : start + stride] for start in range(0, len(pairs), stride))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def round_digits(value: float) -> float:
    """Round to five significant digits, which no screen resolves."""
    return float(f"{value:.5g}")
