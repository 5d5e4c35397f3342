"""Scaling study of SSD300: a model of 1 to 1,024 accelerators, checked against published runs.

    python -m perf.scaling.study [--measure] [--docs DIR] [--out FILE] [--rate IMG_S --fixed-ms MS]

Prints the published runs and their predictions, the fastest run on each number of accelerators, and a what-if analysis.
--docs updates DIR/SCALING.md and DIR/scaling.png. --measure runs perf.scaling.gradient on one rank and on two. --rate
and --fixed-ms describe another accelerator.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

from detection.config.settings import InputError
from perf.page import split_at_marker, update_table
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

Machine = tuple[Accelerator, System]

# Changes of accelerator or system for the what-if analysis, one at a time.
WHAT_IF: tuple[tuple[str, Callable[[Accelerator, System], Machine]], ...] = (
    ("as above", lambda one, system: (one, system)),
    ("gradients in fp32", lambda one, system: (one, replace(system, gradient_bytes=4))),
    ("gradients sent after the backward pass", lambda one, system: (one, replace(system, overlaps=False))),
    ("fp32 over 100 Gb/s a node", lambda one, system: (one, replace(system, gradient_bytes=4, network_gb_s=SLOW_GB_S))),
    ("half of what is fixed", lambda one, system: (one._replace(overhead_s=one.overhead_s / 2), system)),
    ("evaluation beside training", lambda one, system: (one, replace(system, evaluates=False))),
    ("COCO's figures by pycocotools", lambda one, system: (one, replace(system, metric_s=PYCOCOTOOLS_S))),
    ("one core for each accelerator", lambda one, system: (one, replace(system, cores=1))),
)
PAGE, PLOT = "SCALING.md", "scaling.png"
TABLES = ("published", "widths", "otherwise", "measured")

Rows = list[tuple[str, ...]]


def main(argv: list[str]) -> int:
    """Compute, print and write; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.scaling.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="also measure the gradient all-reduce here, in minutes")
    parser.add_argument("--docs", type=Path, help=f"folder of the {PAGE} to update")
    parser.add_argument("--out", type=Path, help="a .json file for all results")
    parser.add_argument("--rate", type=float, help="images/s of an accelerator in the limit of a large batch")
    parser.add_argument("--fixed-ms", type=float, help="fixed overhead of a step, whatever its batch")
    arguments = parser.parse_args(argv)
    try:
        report(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(arguments: argparse.Namespace) -> None:
    """Run the command. Raise InputError for invalid flags."""
    if (arguments.rate is None) != (arguments.fixed_ms is None):
        raise InputError("--rate and --fixed-ms: only one is given. Pass both, or neither.")
    if arguments.rate is not None and (arguments.rate <= 0 or arguments.fixed_ms < 0):
        raise InputError("--rate and --fixed-ms: out of range. --rate should be positive, --fixed-ms at least 0.")
    if arguments.docs:
        for name in TABLES:
            split_at_marker(arguments.docs / PAGE, name)
    network = count_network()
    given = Accelerator(arguments.rate, arguments.fixed_ms / 1000) if arguments.rate else None
    accelerator = given or fit(network, GENERATIONS[0].fitted)
    checks = [(generation.name, one) for generation in GENERATIONS for one in check(network, generation)]
    runs = [best_run(network, accelerator, DGX_A100, ranks) for ranks in DEVICE_COUNTS]
    tables = {
        "published": published_rows(checks),
        "widths": width_rows(runs),
        "otherwise": what_if_rows(network, accelerator),
    }
    for rows in tables.values():
        print(f"{align(rows)}\n")
    measured = measure() if arguments.measure else []
    if arguments.docs:
        for name, rows in tables.items():
            update_table(arguments.docs / PAGE, name, markdown(rows))
        if measured:
            update_table(
                arguments.docs / PAGE,
                "measured",
                "\n\n".join(f"```\n{gradient.format_result(one)}\n```" for one in measured),
            )
        plot(network, checks, runs, arguments.docs / PLOT)
    if arguments.out:
        record = to_record(network, accelerator, checks, runs) | {"measured": measured}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def measure() -> list[dict[str, Any]]:
    """Return the results of perf.scaling.gradient on one rank and on two."""
    results = []
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        for ranks in ("1", "2"):
            out = Path(folder) / f"{ranks}.json"
            launch = [sys.executable, "-m", "detection.runtime.launch", "--nproc-per-node", ranks]
            subprocess.run([*launch, "-m", "perf.scaling.gradient", "--out", str(out)], check=True)
            results.append(json.loads(out.read_text()))
    return results


def published_rows(checks: Sequence[tuple[str, Check]]) -> Rows:
    """Return published runs and their predictions."""
    header = ("accelerators", "", "batch", "epoch, s", "model", "error", "score, min", "model", "error", "fitted to")
    rows: Rows = [header]
    for name, one in checks:
        layout = one.published.layout
        rows.append(
            (
                f"{layout.ranks:,} × {name}",
                f"{one.published.submitter}, {layout.nodes} × {one.published.system.name}",
                str(layout.batch_size),
                f"{one.published.epoch_s:.3f}",
                f"{one.run.epoch_s:.3f}",
                f"{100 * one.epoch_error:+.1f} %",
                f"{one.published.minutes:.2f}",
                f"{one.run.minutes:.2f}",
                f"{100 * one.minutes_error:+.0f} %",
                ", ".join(f"{count:,}" for count in one.device_counts),
            )
        )
    return rows


def width_rows(runs: Sequence[Run]) -> Rows:
    """Return the fastest run on each number of accelerators: parts of a step, times, and efficiency."""
    parts = ("fixed", "images", "gradient", "batch norm")
    header = (
        "accelerators",
        "batch",
        "global",
        "step, ms",
        *parts,
        "epoch, s",
        "epochs",
        "evaluation, s",
        "min",
        "of ideal",
    )
    rows: Rows = [header]
    for one in runs:
        layout = one.layout
        ideal = runs[0].minutes / layout.ranks
        rows.append(
            (
                f"{layout.ranks:,}",
                str(layout.batch_size),
                f"{layout.global_batch_size:,}",
                f"{1000 * one.step.total:.2f}",
                *(f"{1000 * part:.2f}" for part in one.step[: len(parts)]),
                f"{one.epoch_s:.2f}",
                f"{one.epochs:.0f}",
                f"{one.evaluation_s:.2f}",
                f"{one.minutes:.2f}",
                f"{100 * ideal / one.minutes:.0f} %",
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


def markdown(rows: Rows) -> str:
    """Return rows as a Markdown table."""
    header, *rest = rows
    rule = (":---", *("---:" for _ in header[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rest))


def to_record(
    network: Network, accelerator: Accelerator, checks: Sequence[tuple[str, Check]], runs: Sequence[Run]
) -> dict[str, Any]:
    """Return all results as a JSON record."""
    counts = {name: value for name, value in network._asdict().items() if name != "grad_ready_times"}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "network": counts | {"elements": network.elements},
        "accelerator": accelerator._asdict(),
        "system": asdict(DGX_A100),
        "published": [
            {
                "generation": name,
                "submitter": one.published.submitter,
                "system": one.published.system.name,
                "layout": one.published.layout._asdict(),
                "epoch_s": one.published.epoch_s,
                "minutes": one.published.minutes,
                "model_epoch_s": one.run.epoch_s,
                "model_minutes": one.run.minutes,
                "fitted_to": one.device_counts,
            }
            for name, one in checks
        ],
        "widths": [
            one._asdict() | {"layout": one.layout._asdict(), "step": one.step._asdict(), "minutes": one.minutes}
            for one in runs
        ],
    }


def plot(network: Network, checks: Sequence[tuple[str, Check]], runs: Sequence[Run], path: Path) -> None:
    """Plot minutes to the target by number of accelerators, published and modeled, and the parts of a step."""
    figure, (time, parts) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for generation in GENERATIONS:
        system = generation.fitted[0].system
        accelerator = fit(network, generation.fitted)
        model = [best_run(network, accelerator, system, ranks).minutes for ranks in DEVICE_COUNTS]
        (line,) = time.plot(DEVICE_COUNTS, model, label=f"model: {generation.name}")
        points = [one.published for name, one in checks if name == generation.name]
        time.plot([one.layout.ranks for one in points], [one.minutes for one in points], "o", color=line.get_color())
    time.plot(DEVICE_COUNTS, [runs[0].minutes / ranks for ranks in DEVICE_COUNTS], ":", color="gray", label="ideal")
    time.set(xscale="log", yscale="log", xlabel="accelerators", ylabel="minutes to the target", title="dots: published")
    time.set_xticks(DEVICE_COUNTS, [f"{ranks:,}" for ranks in DEVICE_COUNTS], rotation=45, minor=False)
    time.legend(frameon=False, fontsize=8)
    time.grid(alpha=0.3)
    names = [f"{one.layout.ranks:,}" for one in runs]
    bottom = [0.0] * len(runs)
    for index, part in enumerate(Step._fields):
        percentages = [100 * one.step[index] / one.step.total for one in runs]
        if any(percentages):
            parts.bar(names, percentages, bottom=bottom, label=part.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, percentages, strict=True)]
    parts.set(xlabel="accelerators", ylabel="% of a step", title=GENERATIONS[0].name, ylim=(0, 100))
    parts.tick_params(axis="x", rotation=45)
    parts.legend(frameon=False, fontsize=8, ncols=len(Step._fields), loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
