"""Cost curves: time and memory by number of images, boxes, detections, workers and batch size.

    python -m perf.growth [NAME ...] [--out DIR] [--page FILE] [--rounds 5] [--quick]

Each point is measured in a separate process, so that its peak memory is its own. A round measures all points of an axis
once, so that drift of the machine affects all of them. The time of a point in a round is the median of its calls. The
table shows the median and the range over rounds. `perf/footprint.py` defines memory.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from tqdm import tqdm

from detection.config.settings import InputError
from perf import footprint
from perf.curves import Axis, axes
from perf.footprint import PEAK_RESET, Values
from perf.machine import machine
from perf.page import split_at_marker, update_table
from perf.timing import quartiles

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

OUT = Path(__file__).parent.parent / "docs" / "performance"

UNITS = {
    "time": "ms",
    "memory": "MiB",
    "rate": "img/s",
    "first batch": "ms",
    "all processes": "MiB",
    "private to a worker": "MiB",
}
FITTED = ("time", "memory")  # measures that may follow a power law
MAX_TICKS = 7
UPPER_END = 3  # points that the exponent is fitted to: fixed costs matter least there


def main(argv: list[str]) -> int:
    """Measure, write and plot; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = {axis.name: axis for axis in axes()}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}; default: all")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for growth.json and a plot of each NAME")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are updated")
    parser.add_argument("--rounds", type=int, default=5, help="processes per point")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the program")
    arguments = parser.parse_args(argv)
    try:
        if unknown := [name for name in arguments.names if name not in known]:
            raise InputError(f"{', '.join(unknown)}: no such axis. Choose from {', '.join(known)}.")
        if arguments.rounds < 1:
            raise InputError(f"--rounds {arguments.rounds}: should be at least 1.")
        if not PEAK_RESET.exists():
            raise InputError(f"{PEAK_RESET}: missing, but needed to measure peak memory. Use Linux.")
        measure_all(
            [known[name] for name in arguments.names] or list(known.values()),
            arguments.out,
            arguments.page,
            rounds=arguments.rounds,
            quick=arguments.quick,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure_all(names: Sequence[Axis], out: Path, page: Path | None, *, rounds: int, quick: bool) -> None:
    """Measure each axis, and keep the records of other axes in out/growth.json."""
    for axis in names:
        if page:
            split_at_marker(page, axis.name)  # fail now, not after hours
    out.mkdir(parents=True, exist_ok=True)
    results = out / "growth.json"
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        for axis in names:
            record = measure(axis, Path(folder), rounds=rounds, quick=quick)
            records = json.loads(results.read_text()) if results.exists() else {}
            results.write_text(json.dumps(records | {axis.name: record}, indent=1) + "\n")
            plot(record, out / f"{axis.name}.png")
            print(f"\n{table(record)}", flush=True)
            if page:
                update_table(page, axis.name, table(record))


def measure(axis: Axis, folder: Path, *, rounds: int, quick: bool) -> dict[str, Any]:
    """Return the record of an axis: machine, date, and the measurements of each curve."""
    points = [(curve, work) for curve in axis.curves for work in (curve.quick if quick else curve.works)]
    values: dict[tuple[str, int], list[Values]] = {(curve.name, work): [] for curve, work in points}
    with tqdm(total=rounds * len(points), unit="point", disable=None, leave=False) as progress:
        for _ in range(rounds):
            for curve, work in points:
                progress.set_description(f"{axis.name}: {curve.name}, {work:,}")
                values[curve.name, work].append(footprint.run_in_subprocess(curve.measure, work, folder))
                progress.update()
    return {
        "work": axis.work,
        "machine": machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "n": rounds,
        "series": list(series(values)),
    }


def series(values: dict[tuple[str, int], list[Values]]) -> Iterator[dict[str, Any]]:
    """Yield each measure of each curve, with n, median and range at each amount of work."""
    for name in dict.fromkeys(curve for curve, _ in values):
        curve_values = {work: rounds for (curve, work), rounds in values.items() if curve == name}
        for measure_name in UNITS:
            samples = {
                work: [one[measure_name] for one in rounds if measure_name in one]
                for work, rounds in curve_values.items()
            }
            points = [{"work": work} | asdict(quartiles(found)) for work, found in samples.items() if found]
            if points:
                yield {
                    "curve": name,
                    "measure": measure_name,
                    "unit": UNITS[measure_name],
                    "exponent": exponent(points) if measure_name in FITTED else None,
                    "points": points,
                }


def exponent(points: Sequence[dict[str, float]]) -> float | None:
    """Return the scaling exponent at the upper end by least squares, or None for a single point.

    The fit uses the minimum of each point, which other load on the machine affects least.
    """
    upper = [point for point in points if point["work"] > 0][-UPPER_END:]
    if len(upper) < 2:
        return None
    work, minimum = (np.log([point[key] for point in upper]) for key in ("work", "min"))
    return float(np.polyfit(work, minimum, 1)[0])


def table(record: dict[str, Any]) -> str:
    """Return a record as a Markdown table: one row per amount of work, the exponents, and the machine below."""
    columns = record["series"]
    works = sorted({point["work"] for column in columns for point in column["points"]})
    header = [record["work"], *(f"{column['curve']}: {column['measure']}, {column['unit']}" for column in columns)]
    rows = [header, ["---:"] * len(header)]
    for work in works:
        cells = [[point for point in column["points"] if point["work"] == work] for column in columns]
        rows.append([f"{work:,}", *(format_point(points[0]) if points else "" for points in cells)])
    exponents = [column["exponent"] for column in columns]
    if any(value is not None for value in exponents):
        rows.append(["grows with the power", *("" if value is None else f"{value:.2f}" for value in exponents)])
    host = record["machine"]
    caption = (
        f"n = {record['n']}, {record['date']}, {host['hardware']}, {host['processor']}, "
        f"torch {host['versions']['torch']}, commit {host['commit']}."
    )
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", caption])


def format_point(point: dict[str, float]) -> str:
    """Return the median as text, with the range in brackets if it differs."""
    median, low, high = (format_number(point[key]) for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low} to {high})"


def format_number(value: float) -> str:
    """Return a number with three significant digits, or more before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot a panel for each measure and a line for each curve. Dotted lines are proportional to the work."""
    measures = list(dict.fromkeys(column["measure"] for column in record["series"]))
    width = 4.6 if len(measures) < 3 else 3.4
    figure, panels = plt.subplots(1, len(measures), figsize=(width * len(measures), 3.8), layout="constrained")
    for panel, measure_name in zip(np.atleast_1d(panels), measures, strict=True):
        columns = [column for column in record["series"] if column["measure"] == measure_name]
        for column in columns:
            work, median, low, high = (
                np.array([point[key] for point in column["points"]]) for key in ("work", "median", "min", "max")
            )
            (line, *_) = panel.errorbar(
                work, median, yerr=(median - low, high - median), marker="o", markersize=4, label=column["curve"]
            )
            if column["exponent"] is not None:
                proportional = median[-1] * work[work > 0] / work[-1]
                panel.plot(work[work > 0], proportional, linestyle=":", linewidth=1, color=line.get_color())
        panel.set(title=f"{measure_name}, {columns[0]['unit']}", xlabel=record["work"])
        panel.grid(alpha=0.3)
        works = sorted({point["work"] for column in columns for point in column["points"]})
        if measure_name in FITTED:
            panel.set_xscale("symlog", linthresh=1)
            panel.set_yscale("log")
            panel.set_ylim(bottom=min(point["min"] for column in columns for point in column["points"]) / 2)
            panel.yaxis.set_major_formatter("{x:,g}")
            panel.yaxis.set_minor_formatter(ticker.NullFormatter())
            if np.divide(*reversed(panel.get_ylim())) < 100:
                panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        else:
            panel.set_xscale("linear" if 0 in works else "log")
            panel.set_ylim(bottom=0)
        ticks = works if len(works) <= MAX_TICKS else [work for work in works if f"{work}".rstrip("0") in ("", "1")]
        panel.set_xticks(ticks, [f"{work:,}" for work in ticks], rotation=30 if ticks[-1] > 1000 else 0)
        panel.xaxis.set_minor_locator(ticker.NullLocator())
    handles, labels = np.atleast_1d(panels)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
