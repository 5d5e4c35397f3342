"""How far SSD300 scales: a model of 1 to 1,024 accelerators, beside published runs, and what is measured for it here.

    python -m perf.scaling.study [--measure] [--docs DIR] [--out FILE] [--rate IMG_S --fixed-ms MS]

Prints the tables: the published runs that the model was checked against, the fastest run at each width, and what that
run would take if one thing were otherwise. --docs brings DIR/SCALING.md and DIR/scaling.png up to date. --measure runs
perf.scaling.gradient on one rank and on two. --rate and --fixed-ms stand for an accelerator of your own.
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
from perf.page import update_marker, update_table
from perf.scaling import gradient
from perf.scaling.published_runs import DGX_A100, GENERATIONS, ON_NETWORK, Check, check, fit
from perf.scaling.step_model import Accelerator, Network, Run, Step, System, best_run, count_network
from perf.table import align

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DEVICE_COUNTS = tuple(2**power for power in range(11))
COMPARED = (8, 64, 512, 1024)
SLOW_GB_S = 12.5 * ON_NETWORK
PYCOCOTOOLS_S = 61.7  # 5,000 images with 200 detections each, measured

Machine = tuple[Accelerator, System]

# What could be otherwise, one thing at a time.
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
PLACES = ("published", "widths", "otherwise", "measured")

Rows = list[tuple[str, ...]]


def main(argv: list[str]) -> int:
    """Compute, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.scaling.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure the gradient's way here, in some minutes")
    parser.add_argument("--docs", type=Path, help=f"folder with the {PAGE} to bring up to date")
    parser.add_argument("--out", type=Path, help="a .json file for all of it")
    parser.add_argument("--rate", type=float, help="images/s of an accelerator, in the limit of a large batch")
    parser.add_argument("--fixed-ms", type=float, help="what a step takes, however small its batch")
    arguments = parser.parse_args(argv)
    try:
        report(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(arguments: argparse.Namespace) -> None:
    """All that the command does; raises InputError for what cannot be."""
    if (arguments.rate is None) != (arguments.fixed_ms is None):
        raise InputError("--rate and --fixed-ms: give both, or neither.")
    if arguments.rate is not None and (arguments.rate <= 0 or arguments.fixed_ms < 0):
        raise InputError("--rate should be more than 0, --fixed-ms at least 0.")
    if arguments.docs:
        for name in PLACES:
            update_marker(arguments.docs / PAGE, name)
    network = count_network()
    own = Accelerator(arguments.rate, arguments.fixed_ms / 1000) if arguments.rate else None
    accelerator = own or fit(network, GENERATIONS[0].fitted)
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
                "\n\n".join(f"```\n{gradient.print_result(one)}\n```" for one in measured),
            )
        draw(network, checks, runs, arguments.docs / PLOT)
    if arguments.out:
        record = to_record(network, accelerator, checks, runs) | {"measured": measured}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def measure() -> list[dict[str, Any]]:
    """What perf.scaling.gradient finds with one rank and with two."""
    found = []
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        for ranks in ("1", "2"):
            out = Path(folder) / f"{ranks}.json"
            launch = [sys.executable, "-m", "detection.runtime.launch", "--nproc-per-node", ranks]
            subprocess.run([*launch, "-m", "perf.scaling.gradient", "--out", str(out)], check=True)
            found.append(json.loads(out.read_text()))
    return found


def published_rows(checks: Sequence[tuple[str, Check]]) -> Rows:
    """Published runs beside the model's."""
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
                ", ".join(f"{width:,}" for width in one.widths),
            )
        )
    return rows


def width_rows(runs: Sequence[Run]) -> Rows:
    """The fastest run at each width, where its time goes, and what share of the accelerators' time is not lost."""
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
    """Minutes to the target if one thing were otherwise, at some widths."""
    rows: Rows = [("minutes to the target", *(f"{ranks:,}" for ranks in COMPARED))]
    for name, change in WHAT_IF:
        runs = [best_run(network, *change(accelerator, DGX_A100), ranks) for ranks in COMPARED]
        rows.append((name, *(f"{one.minutes:.2f}" for one in runs)))
    return rows


def markdown(rows: Rows) -> str:
    """A table."""
    header, *rest = rows
    rule = (":---", *("---:" for _ in header[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rest))


def to_record(
    network: Network, accelerator: Accelerator, checks: Sequence[tuple[str, Check]], runs: Sequence[Run]
) -> dict[str, Any]:
    """All figures, for programs."""
    counted = {name: value for name, value in network._asdict().items() if name != "arrivals"}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "network": counted | {"elements": network.elements},
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
                "fitted_to": one.widths,
            }
            for name, one in checks
        ],
        "widths": [
            one._asdict() | {"layout": one.layout._asdict(), "step": one.step._asdict(), "minutes": one.minutes}
            for one in runs
        ],
    }


def draw(network: Network, checks: Sequence[tuple[str, Check]], runs: Sequence[Run], path: Path) -> None:
    """Minutes to the target by width, published and modelled, and what a step is made of."""
    figure, (time, parts) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for generation in GENERATIONS:
        system = generation.fitted[0].system
        accelerator = fit(network, generation.fitted)
        model = [best_run(network, accelerator, system, ranks).minutes for ranks in DEVICE_COUNTS]
        (line,) = time.plot(DEVICE_COUNTS, model, label=f"model: {generation.name}")
        points = [one.published for name, one in checks if name == generation.name]
        time.plot([one.layout.ranks for one in points], [one.minutes for one in points], "o", color=line.get_color())
    time.plot(DEVICE_COUNTS, [runs[0].minutes / ranks for ranks in DEVICE_COUNTS], ":", color="grey", label="ideal")
    time.set(xscale="log", yscale="log", xlabel="accelerators", ylabel="minutes to the target", title="dots: published")
    time.set_xticks(DEVICE_COUNTS, [f"{ranks:,}" for ranks in DEVICE_COUNTS], rotation=45, minor=False)
    time.legend(frameon=False, fontsize=8)
    time.grid(alpha=0.3)
    names = [f"{one.layout.ranks:,}" for one in runs]
    bottom = [0.0] * len(runs)
    for index, part in enumerate(Step._fields):
        shares = [100 * one.step[index] / one.step.total for one in runs]
        if any(shares):
            parts.bar(names, shares, bottom=bottom, label=part.replace("_", " "))
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    parts.set(xlabel="accelerators", ylabel="% of a step", title=GENERATIONS[0].name, ylim=(0, 100))
    parts.tick_params(axis="x", rotation=45)
    parts.legend(frameon=False, fontsize=8, ncols=len(Step._fields), loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
