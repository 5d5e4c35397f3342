"""Record of a finished run.

    python -m perf.record RUN_FOLDER NAME [--note TEXT]

Writes perf/results/<date>_<name>/ with the run's config, log and metrics, and a summary: hardware, versions, commit,
times, AP by epoch. A run of uncommitted code is rejected with exit status 2. `python -m detection.report` plots records
as it plots runs.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detection.config.run_config import CUSTOM_DATA_SETTINGS
from detection.config.settings import InputError, report_errors
from mlperf import stdio
from mlperf.log import find_clock_error, read
from perf.machine import RESULTS, machine, select_out

PATH_SETTINGS = ("data_dir", "run_dir", "log_dir", *CUSTOM_DATA_SETTINGS)


@report_errors
def main(argv: list[str], results: Path = RESULTS) -> int:
    """Copy and summarize; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", help="of the record, such as bccd_cpu")
    parser.add_argument("--note", default="", help="note for readers")
    arguments = parser.parse_args(argv)
    (log,) = arguments.run.glob("result_*.txt")
    summary = {"note": arguments.note} | machine() | summarize(log)
    folder = select_out(None, results, summary["commit"]) / f"{datetime.now(UTC):%Y-%m-%d}_{arguments.name}"
    folder.mkdir(parents=True)
    config = json.loads((arguments.run / "config.json").read_text())
    for path in (log, arguments.run / "config.json", arguments.run / "metrics.jsonl"):
        text = path.read_text()
        for key in PATH_SETTINGS:  # a record names no folder of the machine
            if Path(config.get(key, "")).is_absolute():
                text = text.replace(config[key], Path(config[key]).name)
        (folder / path.name).write_text(text)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"wrote {folder}/")
    return 0


def summarize(log: Path) -> dict[str, Any]:
    """Return commit, times and accuracy of a run from its MLPerf log.

    Raises InputError if the log names no commit, or if its clock was set back.
    """
    events = read(log)
    if clock_error := find_clock_error(events):
        raise InputError(f"{log}: {clock_error}. The run has no valid time. Repeat it.")
    last = {event.key: event for event in events}
    if "commit" not in last:
        raise InputError(f"{log}: names no commit. Only runs of this program can be recorded.")
    start_ms = last["run_start"].time_ms
    starts, stops = ([e.time_ms for e in events if e.key == key] for key in ("epoch_start", "epoch_stop"))
    # The last epoch of an interrupted run has no end.
    epoch_s = sorted((stop - start) / 1000 for start, stop in zip(starts, stops, strict=False))
    median_s = epoch_s[len(epoch_s) // 2]
    evaluations = {e.metadata["epoch_num"]: e for e in events if e.key == "eval_accuracy"}
    return {
        "commit": last["commit"].value + "-dirty" * (last["commit"].metadata["dirty"] is not False),
        "init_s": (last["init_stop"].time_ms - last["init_start"].time_ms) / 1000,
        "run_s": (last["run_stop"].time_ms - start_ms) / 1000,
        "status": events[-1].metadata["status"],
        "epoch_s": {"n": len(epoch_s), "min": epoch_s[0], "median": median_s, "max": epoch_s[-1]},
        "images_per_s_median": last["train_samples"].value / median_s,
        "ap_by_epoch": {epoch: e.value for epoch, e in evaluations.items()},
        "minutes_by_epoch": {epoch: round((e.time_ms - start_ms) / 60000, 2) for epoch, e in evaluations.items()},
    }


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
