"""Synthetic MLPerf logs of complete runs of all benchmarks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlperf.log import MlperfLog
from mlperf.rules import hyperparameter_keys, mlperf_name, newest_ruleset, tensor_names
from recipes_and_checkers import RECIPES

EPOCHS = {"ssd": 50, "maskrcnn": 14, "retinanet": 4}  # as many as the reference needs, so that the RCP check passes
REACHED: dict[str, Any] = {"ssd": 0.231, "maskrcnn": {"BBOX": 0.3774, "SEGM": 0.3427}, "retinanet": 0.3412}


def write_run(
    path: Path,
    division: str = "closed",
    without: str = "",
    *,
    benchmark: str = "ssd",
    ruleset: str = "",
    epochs: int = 0,
    minutes: float = 20,
    commit: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Log a complete run that reaches its target in one block of epochs.

    without: key of the lines to omit. ruleset: selects MLPerf's name of the benchmark, by default the newest. minutes:
    timed duration. commit: value and metadata of that event. changes: other values by key.
    """
    log = MlperfLog(path)
    epochs = epochs or EPOCHS[benchmark]
    recipe = RECIPES[benchmark]
    keys = hyperparameter_keys(benchmark)
    values = {key: recipe[key] for key in keys}
    values |= {"accuracy": REACHED[benchmark], "status": "success", "first_epoch_num": 1, "epoch_count": epochs}
    values |= {"seed": 1, "cache_clear": True, "platform": "a desk", "org": "us"} | changes

    def log_unless_omitted(write: Callable[..., None], key: str, *value: Any, **metadata: Any) -> None:
        full_key = {log.start: f"{key}_start", log.end: f"{key}_stop"}.get(write, key)
        if full_key != without:
            write(key, *value, **metadata)

    submission = {
        "org": values["org"],
        "platform": values["platform"],
        "division": division,
        "status": "onprem",
        "benchmark": mlperf_name(benchmark, ruleset or newest_ruleset(benchmark)),
    }
    for key, value in submission.items():
        log_unless_omitted(log.event, f"submission_{key}", value)
    if "dataset" in values:
        log.event("dataset", values["dataset"])
    if "config" in values:
        log.event("config", values["config"])
    if commit:
        log.event("commit", **commit)
    log_unless_omitted(log.event, "cache_clear", values["cache_clear"])
    log_unless_omitted(log.start, "init")
    log_unless_omitted(log.event, "seed", values["seed"])
    for key in keys:
        log_unless_omitted(log.event, key, values[key])
    for tensor in tensor_names(benchmark):
        log_unless_omitted(log.event, "weights_initialization", tensor=tensor)
    log_unless_omitted(log.end, "init")
    log_unless_omitted(log.start, "run")
    log_unless_omitted(log.event, "train_samples", 117266)
    log_unless_omitted(log.event, "eval_samples", 4952)
    log_unless_omitted(log.start, "block", first_epoch_num=1, epoch_count=values["epoch_count"])
    for epoch in range(1, epochs + 1):
        log_unless_omitted(log.start, "epoch", epoch_num=epoch)
        log_unless_omitted(log.end, "epoch", epoch_num=epoch)
    log_unless_omitted(log.end, "block", first_epoch_num=1)
    log_unless_omitted(log.start, "eval", epoch_num=epochs)
    log_unless_omitted(log.event, "eval_accuracy", values["accuracy"], epoch_num=epochs)
    log_unless_omitted(log.end, "eval", epoch_num=epochs)
    log_unless_omitted(log.end, "run", status=values["status"])
    log.close()
    spread_timestamps(path, minutes)
    return path


def spread_timestamps(path: Path, minutes: float) -> None:
    """Spread the timestamps of the lines evenly over a duration."""
    lines = [json.loads(line.removeprefix(":::MLLOG ")) for line in path.read_text().splitlines()]
    keys = [line["key"] for line in lines]
    if "run_start" in keys:
        first = keys.index("run_start")
        for number, line in enumerate(lines[first:]):
            fraction = number / (len(lines) - 1 - first)
            line["time_ms"] = lines[first]["time_ms"] + round(fraction * minutes * 60_000)
    path.write_text("".join(f":::MLLOG {json.dumps(line)}\n" for line in lines))
