"""Keep what a run showed: python -m perf.record RUN_FOLDER NAME [--note TEXT]

Writes perf/results/<date>_<name>/ with the run's config, log and metrics, a summary (hardware, versions, commit,
times, AP by epoch) and the curve as a picture. The commit is the one that the run logged; where it logged none, that
of this repository.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

from detection.config.run_config import OWN_DATA
from mlperf.log import read
from perf.machine import RESULTS, machine

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(argv: list[str]) -> None:
    """Copy, summarise and draw."""
    parser = argparse.ArgumentParser(prog="python -m perf.record", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", help="of the record, such as bccd_cpu")
    parser.add_argument("--note", default="", help="what a reader should know")
    arguments = parser.parse_args(argv)
    (log,) = arguments.run.glob("result_*.txt")
    summary = {"note": arguments.note} | machine() | outcome(log)
    folder = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}_{arguments.name}"
    folder.mkdir(parents=True)
    config = json.loads((arguments.run / "config.json").read_text())
    for path in (log, arguments.run / "config.json", arguments.run / "metrics.jsonl"):
        text = path.read_text()
        for key in ("data_dir", "run_dir", "log_dir", *OWN_DATA):  # a record names no folders of the machine
            if Path(config.get(key, "")).is_absolute():
                text = text.replace(config[key], Path(config[key]).name)
        (folder / path.name).write_text(text)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(summary, folder / "curve.png")
    print(f"recorded in {folder}/")


def outcome(log: Path) -> dict[str, Any]:
    """Times and accuracy of a run, from its MLPerf log."""
    events = read(log)
    time_ms = {event.key: event.time_ms for event in events}
    points = [e for e in events if e.key == "eval_accuracy"]
    epochs = zip(
        [e.time_ms for e in events if e.key == "epoch_start"],
        [e.time_ms for e in events if e.key == "epoch_stop"],
        strict=False,  # the last epoch of a run that broke off has no end
    )
    lengths_s = sorted((stop - start) / 1000 for start, stop in epochs)
    commit = next((e for e in events if e.key == "commit"), None)
    (samples,) = (e.value for e in events if e.key == "train_samples")
    named = {} if commit is None else {"commit": commit.value + "-dirty" * bool(commit.metadata["dirty"])}
    return named | {
        "init_s": (time_ms["init_stop"] - time_ms["init_start"]) / 1000,
        "run_s": (time_ms["run_stop"] - time_ms["run_start"]) / 1000,
        "status": events[-1].metadata["status"],
        "epoch_s": {
            "n": len(lengths_s),
            "min": lengths_s[0],
            "median": lengths_s[len(lengths_s) // 2],
            "max": lengths_s[-1],
        },
        "images_per_s_median": samples / lengths_s[len(lengths_s) // 2],
        "ap_by_epoch": {e.metadata["epoch_num"]: e.value for e in points},
        "minutes_by_epoch": {
            e.metadata["epoch_num"]: round((e.time_ms - time_ms["run_start"]) / 60000, 2) for e in points
        },
    }


def draw(summary: dict[str, Any], path: Path) -> None:
    """AP by epoch."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    accuracies: dict[int, Any] = summary["ap_by_epoch"]
    both = all(isinstance(value, dict) for value in accuracies.values())
    curves = {"box": [value["BBOX"] if both else value for value in accuracies.values()]}
    if both:
        curves["mask"] = [value["SEGM"] for value in accuracies.values()]
    for name, values in curves.items():
        axes.plot(list(accuracies), values, marker="o", label=name)
    axes.legend()
    axes.set(xlabel="epoch", ylabel="AP (IoU .50:.95)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
