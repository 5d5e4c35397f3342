"""Charts as PNG files, drawn by matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from detection.atomic_file import atomic_write
from detection.report.charts import PALETTE, Chart

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 3)))
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names come from files
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def write_png(chart: Chart, folder: Path) -> Path:
    """Write a chart to `folder` and return the path of its file."""
    path = folder / f"{chart.name}.png"
    with matplotlib.rc_context(STYLE), atomic_write(path) as partial:
        figure = Figure(figsize=(6, 4), layout="constrained")
        draw(chart, figure.add_subplot())
        if len(chart.lines) > 1:
            figure.legend(loc="outside lower left", ncols=1)
        figure.savefig(partial, format="png", dpi=144)
    return path


def draw(chart: Chart, axes: Axes) -> None:
    """Draw a chart."""
    for line in chart.lines:
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        axes.plot(
            xs,
            ys,
            label=line.name,
            color=PALETTE[line.style % len(PALETTE)][0],
            ls=DASHES[(line.style + line.style // len(PALETTE)) % len(DASHES)],
            lw=0.9 if line.thin else 1.6,
            marker="o" if line.markers else "",
            ms=4,
        )
    for y, text in chart.levels:
        axes.axhline(y, color="black", lw=0.9, ls=(0, (4, 3)))
        axes.annotate(text, (0, y), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points")
    for x, y, text in chart.marks:
        axes.plot(x, y, "x", color="black")
        axes.annotate(text, (x, y), (0, -14), textcoords="offset points", fontsize=8)
    if chart.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=min(0.0, axes.dataLim.y0))
    axes.set(xlabel=chart.x_label, title=chart.title)
