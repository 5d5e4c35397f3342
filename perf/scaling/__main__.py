"""Scaling study of SSD300: a model of 1 to 1,024 accelerators, checked against published runs.

    python -m perf.scaling [--measure] [--docs DIR] [--rate IMG_S --overhead-ms MS]

Prints the published runs and their predictions, the fastest run on each number of accelerators, and a what-if analysis.
--docs updates DIR/SCALING.md and DIR/scaling.png. --measure runs perf.scaling.gradient on one rank and on two. --rate
and --overhead-ms describe another accelerator.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

from detection.config.settings import InputError, report_errors
from mlperf import stdio
from perf.machine import select_out, source_commit
from perf.page import markdown, split_at_marker, update_table
from perf.scaling import gradient
from perf.scaling.published_runs import DGX_A100, GENERATIONS, ON_NETWORK, Check, check, fit
from perf.scaling.step_model import Accelerator, Network, Run, Step, System, best_run, count_network
from perf.table import align

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DEVICE_COUNTS = tuple(2**power for power in range(11))
WHAT_IF_COUNTS = (8, 64, 512, 1024)
SLOW_GB_S = 12.5 * ON_NETWORK
PYCOCOTOOLS_S = 61.7  # 5,000 images with 200 detections each, measured

# Changes of accelerator or system for the what-if analysis, one at a time.
WHAT_IF: tuple[tuple[str, Callable[[Accelerator, System], tuple[Accelerator, System]]], ...] = (
    ("unchanged", lambda one, system: (one, system)),
    ("gradients in fp32", lambda one, system: (one, replace(system, gradient_bytes=4))),
    ("all-reduce after the backward pass", lambda one, system: (one, replace(system, overlaps=False))),
    (
        "fp32 over 100 Gb/s per node",
        lambda one, system: (one, replace(system, gradient_bytes=4, network_gb_s=SLOW_GB_S)),
    ),
    ("half the overhead", lambda one, system: (one._replace(overhead_s=one.overhead_s / 2), system)),
    ("evaluation in the background", lambda one, system: (one, replace(system, evaluates=False))),
    ("COCO metric by pycocotools", lambda one, system: (one, replace(system, metric_s=PYCOCOTOOLS_S))),
    ("one core per accelerator", lambda one, system: (one, replace(system, cores=1))),
)
PAGE, PLOT = "SCALING.md", "scaling.png"
TABLES = ("published", "fastest", "what-if", "measured")

Rows = list[tuple[str, ...]]


@report_errors
def main(argv: list[str]) -> int:
    """Compute, print and write; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="also measure the gradient all-reduce here, in minutes")
    parser.add_argument("--docs", type=Path, help=f"folder of the {PAGE} to update")
    parser.add_argument("--rate", type=float, help="images/s of an accelerator in the limit of a large batch")
    parser.add_argument("--overhead-ms", type=float, help="fixed overhead of a step, whatever its batch")
    arguments = parser.parse_args(argv)
    rate, overhead_ms, docs = arguments.rate, arguments.overhead_ms, arguments.docs
    if (rate is None) != (overhead_ms is None):
        raise InputError("--rate and --overhead-ms: only one is given. Pass both, or neither.")
    if rate is not None and (rate <= 0 or overhead_ms < 0):
        raise InputError("--rate and --overhead-ms: out of range. --rate should be positive, --overhead-ms at least 0.")
    if docs:
        if arguments.measure:
            select_out(docs, docs, source_commit())
        for name in TABLES:
            split_at_marker(docs / PAGE, name)
    network = count_network()
    accelerator = Accelerator(rate, overhead_ms / 1000) if rate else fit(network, GENERATIONS[0].fitted)
    checks = [(generation.name, one) for generation in GENERATIONS for one in check(network, generation)]
    runs = [best_run(network, accelerator, DGX_A100, ranks) for ranks in DEVICE_COUNTS]
    tables = {
        "published": published_rows(checks),
        "fastest": fastest_rows(runs),
        "what-if": what_if_rows(network, accelerator),
    }
    for rows in tables.values():
        print(f"{align(rows)}\n")
    results = measure() if arguments.measure else ""
    if docs:
        for name, rows in tables.items():
            update_table(docs / PAGE, name, markdown(rows))
        if results:
            update_table(docs / PAGE, "measured", results)
        plot(network, checks, runs, docs / PLOT)
    return 0


def measure() -> str:
    """Return the results of perf.scaling.gradient on one rank and on two."""
    results = []
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        for ranks in ("1", "2"):
            out = Path(folder) / f"{ranks}.json"
            launch = [sys.executable, "-m", "detection.runtime.launch", "--nproc-per-node", ranks]
            subprocess.run([*launch, "-m", "perf.scaling.gradient", "--out", str(out)], check=True)
            results.append(f"```\n{gradient.format_result(json.loads(out.read_text()))}\n```")
    return "\n\n".join(results)


def published_rows(checks: Sequence[tuple[str, Check]]) -> Rows:
    """Return published runs and their predictions."""
    header = ("accelerators", "system", "batch", "epoch, s", "model", "error", "score, min", "model", "error")
    rows: Rows = [(*header, "fitted to")]
    for name, one in checks:
        layout = one.published.layout
        rows.append(
            (
                f"{layout.ranks:,} × {name}",
                f"{one.published.submitter}, {layout.nodes} × {one.published.system.name}",
                str(layout.batch_size),
                f"{one.published.epoch_s:.3f}",
                f"{one.run.epoch_s:.3f}",
                f"{100 * one.epoch_error:+.1f}%",
                f"{one.published.minutes:.2f}",
                f"{one.run.minutes:.2f}",
                f"{100 * one.minutes_error:+.0f}%",
                ", ".join(f"{count:,}" for count in one.device_counts),
            )
        )
    return rows


def fastest_rows(runs: Sequence[Run]) -> Rows:
    """Return the fastest run on each number of accelerators: parts of a step, times, and efficiency."""
    parts = [part.replace("_", " ") for part in Step._fields if part != "data"]
    times = ("epoch, s", "epochs", "evaluation, s", "min", "efficiency")
    rows: Rows = [("accelerators", "batch", "global batch", "step, ms", *parts, *times)]
    for one in runs:
        layout = one.layout
        rows.append(
            (
                f"{layout.ranks:,}",
                str(layout.batch_size),
                f"{layout.global_batch_size:,}",
                *(f"{1000 * part_s:.2f}" for part_s in (sum(one.step), *one.step[: len(parts)])),
                f"{one.epoch_s:.2f}",
                f"{one.epochs:.0f}",
                f"{one.evaluation_s:.2f}",
                f"{one.minutes:.2f}",
                f"{100 * runs[0].minutes / layout.ranks / one.minutes:.0f}%",
            )
        )
    return rows


def what_if_rows(network: Network, accelerator: Accelerator) -> Rows:
    """Return minutes to the target with one thing changed, on some numbers of accelerators."""
    rows: Rows = [("minutes to the target", *(f"{ranks:,}" for ranks in WHAT_IF_COUNTS))]
    for name, change in WHAT_IF:
        runs = [best_run(network, *change(accelerator, DGX_A100), ranks) for ranks in WHAT_IF_COUNTS]
        rows.append((name, *(f"{one.minutes:.2f}" for one in runs)))
    return rows


def plot(network: Network, checks: Sequence[tuple[str, Check]], runs: Sequence[Run], path: Path) -> None:
    """Plot minutes to the target by number of accelerators, published and modeled."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for generation in GENERATIONS:
        system = generation.fitted[0].system
        accelerator = fit(network, generation.fitted)
        model = [best_run(network, accelerator, system, ranks).minutes for ranks in DEVICE_COUNTS]
        (line,) = axes.plot(DEVICE_COUNTS, model, label=f"model: {generation.name}")
        points = [one.published for name, one in checks if name == generation.name]
        axes.plot([one.layout.ranks for one in points], [one.minutes for one in points], "o", color=line.get_color())
    axes.plot(DEVICE_COUNTS, [runs[0].minutes / ranks for ranks in DEVICE_COUNTS], ":", color="gray", label="ideal")
    axes.set(xscale="log", yscale="log", xlabel="accelerators", ylabel="minutes to the target", title="dots: published")
    axes.set_xticks(DEVICE_COUNTS, [f"{ranks:,}" for ranks in DEVICE_COUNTS], rotation=45, minor=False)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
