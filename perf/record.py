"""Record of a finished run.

    python -m perf.record RUN_FOLDER NAME [--note TEXT]

Writes perf/results/<date>_<name>/ with the run's config, log and metrics, a summary (hardware, versions, commit,
times, AP by epoch) and a plot of the AP. The commit is the one that the run logged, or else that of this repository.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

from detection.config.run_config import CUSTOM_DATA_SETTINGS
from mlperf.log import read
from perf.machine import RESULTS, machine

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PATH_SETTINGS = ("data_dir", "run_dir", "log_dir", *CUSTOM_DATA_SETTINGS)


def main(argv: list[str]) -> None:
    """Copy, summarize and plot."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", help="of the record, such as bccd_cpu")
    parser.add_argument("--note", default="", help="note for readers")
    arguments = parser.parse_args(argv)
    (log,) = arguments.run.glob("result_*.txt")
    summary = {"note": arguments.note} | machine() | summarize(log)
    folder = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}_{arguments.name}"
    folder.mkdir(parents=True)
    config = json.loads((arguments.run / "config.json").read_text())
    for path in (log, arguments.run / "config.json", arguments.run / "metrics.jsonl"):
        text = path.read_text()
        for key in PATH_SETTINGS:  # a record names no folder of the machine
            if Path(config.get(key, "")).is_absolute():
                text = text.replace(config[key], Path(config[key]).name)
        (folder / path.name).write_text(text)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(summary, folder / "curve.png")
    print(f"wrote {folder}/")


def summarize(log: Path) -> dict[str, Any]:
    """Return times and accuracy of a run from its MLPerf log."""
    events = read(log)
    time_ms = {event.key: event.time_ms for event in events}
    evaluations = [e for e in events if e.key == "eval_accuracy"]
    epochs = zip(
        [e.time_ms for e in events if e.key == "epoch_start"],
        [e.time_ms for e in events if e.key == "epoch_stop"],
        strict=False,  # the last epoch of an interrupted run has no end
    )
    epoch_s = sorted((stop - start) / 1000 for start, stop in epochs)
    commit = next((e for e in events if e.key == "commit"), None)
    (samples,) = (e.value for e in events if e.key == "train_samples")
    logged_commit = {} if commit is None else {"commit": commit.value + "-dirty" * bool(commit.metadata["dirty"])}
    return logged_commit | {
        "init_s": (time_ms["init_stop"] - time_ms["init_start"]) / 1000,
        "run_s": (time_ms["run_stop"] - time_ms["run_start"]) / 1000,
        "status": events[-1].metadata["status"],
        "epoch_s": {
            "n": len(epoch_s),
            "min": epoch_s[0],
            "median": epoch_s[len(epoch_s) // 2],
            "max": epoch_s[-1],
        },
        "images_per_s_median": samples / epoch_s[len(epoch_s) // 2],
        "ap_by_epoch": {e.metadata["epoch_num"]: e.value for e in evaluations},
        "minutes_by_epoch": {
            e.metadata["epoch_num"]: round((e.time_ms - time_ms["run_start"]) / 60000, 2) for e in evaluations
        },
    }


def plot(summary: dict[str, Any], path: Path) -> None:
    """Plot AP by epoch."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    accuracies: dict[int, Any] = summary["ap_by_epoch"]
    has_masks = all(isinstance(value, dict) for value in accuracies.values())
    curves = {"box": [value["BBOX"] if has_masks else value for value in accuracies.values()]}
    if has_masks:
        curves["mask"] = [value["SEGM"] for value in accuracies.values()]
    for name, values in curves.items():
        axes.plot(list(accuracies), values, marker="o", label=name)
    axes.legend()
    axes.set(xlabel="epoch", ylabel="AP (IoU 0.50:0.95)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
