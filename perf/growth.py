"""What it costs as work grows: time and memory against images, boxes, detections, workers and the batch size.

    python -m perf.growth [NAME ...] [--out DIR] [--page FILE] [--rounds 5] [--quick]

Each point is measured in a process of its own, so that its peak of memory is its own. A round goes through all points
of an axis once, so that a machine that slows down slows all of them alike. A point's time in a round is the median of
its calls; reported are the median over rounds, the least and the greatest. What memory is: `perf/footprint.py`.
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
from perf.page import update_marker, update_table
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
FITTED = ("time", "memory")  # what is a power of the work, if anything is
MAX_TICKS = 7
UPPER_END = 3  # points that the exponent is fitted to: fixed costs hide in them least


def main(argv: list[str]) -> int:
    """Measure, write and draw; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = {axis.name: axis for axis in axes()}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all of them if none is named")
    parser.add_argument("--out", type=Path, default=OUT, help="for growth.json and a picture of each NAME")
    parser.add_argument("--page", type=Path, help="a page of Markdown to bring the tables of up to date")
    parser.add_argument("--rounds", type=int, default=5, help="processes that measure each point")
    parser.add_argument("--quick", action="store_true", help="sizes so small that only the program is tested")
    arguments = parser.parse_args(argv)
    try:
        if unknown := [name for name in arguments.names if name not in known]:
            raise InputError(f"{', '.join(unknown)}: not measured here. What is: {', '.join(known)}.")
        if arguments.rounds < 1:
            raise InputError(f"--rounds {arguments.rounds}: should be at least 1.")
        if not PEAK_RESET.exists():
            raise InputError(f"The peak of memory is measured with {PEAK_RESET}, which this system lacks.")
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
    """Measure each axis; what is known of the others in out/growth.json stays there."""
    for axis in names:
        if page:
            update_marker(page, axis.name)  # hours before it is filled
    out.mkdir(parents=True, exist_ok=True)
    results = out / "growth.json"
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        for axis in names:
            record = measure(axis, Path(folder), rounds=rounds, quick=quick)
            records = json.loads(results.read_text()) if results.exists() else {}
            results.write_text(json.dumps(records | {axis.name: record}, indent=1) + "\n")
            draw(record, out / f"{axis.name}.png")
            print(f"\n{table(record)}", flush=True)
            if page:
                update_table(page, axis.name, table(record))


def measure(axis: Axis, folder: Path, *, rounds: int, quick: bool) -> dict[str, Any]:
    """What one axis showed: machine, date, and each curve's measures, point by point."""
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
    """Each measure of each curve, with n, median, least and greatest at each work."""
    for name in dict.fromkeys(curve for curve, _ in values):
        of_curve = {work: found for (curve, work), found in values.items() if curve == name}
        for measured in UNITS:
            points = [
                {"work": work} | asdict(quartiles(found))
                for work, found in (
                    (work, [one[measured] for one in rounds if measured in one]) for work, rounds in of_curve.items()
                )
                if found
            ]
            if points:
                yield {
                    "curve": name,
                    "measure": measured,
                    "unit": UNITS[measured],
                    "exponent": exponent(points) if measured in FITTED else None,
                    "points": points,
                }


def exponent(points: Sequence[dict[str, float]]) -> float | None:
    """The power of the work that a measure grows with at the upper end, by least squares; None of one point.

    That of the least of each point, from which other work on the machine has taken least.
    """
    upper = [point for point in points if point["work"] > 0][-UPPER_END:]
    if len(upper) < 2:
        return None
    work, least = (np.log([point[key] for point in upper]) for key in ("work", "min"))
    return float(np.polyfit(work, least, 1)[0])


def table(record: dict[str, Any]) -> str:
    """A record as a table in Markdown: a row for each work, the exponents, and what it was measured on."""
    columns = record["series"]
    works = sorted({point["work"] for column in columns for point in column["points"]})
    header = [record["work"], *(f"{column['curve']}: {column['measure']}, {column['unit']}" for column in columns)]
    rows = [header, ["---:"] * len(header)]
    for work in works:
        found = [[point for point in column["points"] if point["work"] == work] for column in columns]
        rows.append([f"{work:,}", *(cell(points[0]) if points else "" for points in found)])
    powers = [column["exponent"] for column in columns]
    if any(power is not None for power in powers):
        rows.append(["grows with the power", *("" if power is None else f"{power:.2f}" for power in powers)])
    on = record["machine"]
    below = (
        f"n = {record['n']}, {record['date']}, {on['hardware']}, {on['processor']}, torch {on['versions']['torch']}, "
        f"commit {on['commit']}."
    )
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", below])


def cell(point: dict[str, float]) -> str:
    """Median, and in brackets the least and the greatest where they differ from it."""
    median, least, greatest = (digits(point[key]) for key in ("median", "min", "max"))
    return median if least == greatest else f"{median} ({least} to {greatest})"


def digits(value: float) -> str:
    """A number with three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(record: dict[str, Any], path: Path) -> None:
    """A panel for each measure, a line for each curve; the dotted lines grow in proportion to the work."""
    measures = list(dict.fromkeys(column["measure"] for column in record["series"]))
    width = 4.6 if len(measures) < 3 else 3.4
    sheet, panels = plt.subplots(1, len(measures), figsize=(width * len(measures), 3.8), layout="constrained")
    for panel, measured in zip(np.atleast_1d(panels), measures, strict=True):
        columns = [column for column in record["series"] if column["measure"] == measured]
        for column in columns:
            work, median, least, greatest = (
                np.array([point[key] for point in column["points"]]) for key in ("work", "median", "min", "max")
            )
            (line, *_) = panel.errorbar(
                work, median, yerr=(median - least, greatest - median), marker="o", markersize=4, label=column["curve"]
            )
            if column["exponent"] is not None:
                proportional = median[-1] * work[work > 0] / work[-1]
                panel.plot(work[work > 0], proportional, linestyle=":", linewidth=1, color=line.get_color())
        panel.set(title=f"{measured}, {columns[0]['unit']}", xlabel=record["work"])
        panel.grid(alpha=0.3)
        works = sorted({point["work"] for column in columns for point in column["points"]})
        if measured in FITTED:
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
        shown = works if len(works) <= MAX_TICKS else [work for work in works if f"{work}".rstrip("0") in ("", "1")]
        panel.set_xticks(shown, [f"{work:,}" for work in shown], rotation=30 if shown[-1] > 1000 else 0)
        panel.xaxis.set_minor_locator(ticker.NullLocator())
    handles, labels = np.atleast_1d(panels)[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    sheet.savefig(path, dpi=110)
    plt.close(sheet)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
