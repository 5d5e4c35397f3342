"""Whole made-up logs of both benchmarks, such as a run of a published recipe writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlperf.log import MlperfLog
from mlperf.rules import UNLOGGED, maskrcnn_tensor_names, ssd_tensor_name
from recipes_and_checkers import RECIPES, parameters_of_ssd300_r34

EPOCHS = {"ssd": 50, "maskrcnn": 14}  # as many as the reference needs, so that convergence is no question
REACHED: dict[str, Any] = {"ssd": 0.231, "maskrcnn": {"BBOX": 0.3774, "SEGM": 0.3427}}


def write_run(
    path: Path,
    division: str = "closed",
    without: str = "",
    *,
    benchmark: str = "ssd",
    epochs: int = 0,
    minutes: float = 20,
    commit: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Log a whole made-up run that reaches its target in one block of epochs, without the lines of one key.

    minutes: on the clock. commit: value and metadata of the point with that key. changes: other values by key.
    """
    log = MlperfLog(path, echo=False)
    epochs = epochs or EPOCHS[benchmark]
    recipe = RECIPES[benchmark]
    values = {key: value for key, value in recipe.items() if key not in UNLOGGED}
    values |= {"accuracy": REACHED[benchmark], "status": "success", "first_epoch_num": 1, "epoch_count": epochs}
    values |= {"seed": 1, "cache_clear": True, "platform": "a desk", "org": "us"} | changes

    def unless_left_out(write: Callable[..., None], key: str, *value: Any, **metadata: Any) -> None:
        written = {log.start: f"{key}_start", log.end: f"{key}_stop"}.get(write, key)
        if written != without:
            write(key, *value, **metadata)

    submission = {
        "org": values["org"],
        "platform": values["platform"],
        "division": division,
        "status": "onprem",
        "benchmark": benchmark,
    }
    for key, value in submission.items():
        unless_left_out(log.point, f"submission_{key}", value)
    if "dataset" in values:
        log.point("dataset", values["dataset"])
    if "config" in values:
        log.point("config", values["config"])
    if commit:
        log.point("commit", **commit)
    unless_left_out(log.point, "cache_clear", values["cache_clear"])
    unless_left_out(log.start, "init")
    unless_left_out(log.point, "seed", values["seed"])
    for key in recipe.keys() - set(UNLOGGED):
        unless_left_out(log.point, key, values[key])
    for tensor in tensors(benchmark):
        unless_left_out(log.point, "weights_initialization", tensor=tensor)
    unless_left_out(log.end, "init")
    unless_left_out(log.start, "run")
    unless_left_out(log.point, "train_samples", 117266)
    unless_left_out(log.point, "eval_samples", 4952)
    unless_left_out(log.start, "block", first_epoch_num=1, epoch_count=values["epoch_count"])
    for epoch in range(1, epochs + 1):
        unless_left_out(log.start, "epoch", epoch_num=epoch)
        unless_left_out(log.end, "epoch", epoch_num=epoch)
    unless_left_out(log.end, "block", first_epoch_num=1)
    unless_left_out(log.start, "eval", epoch_num=epochs)
    unless_left_out(log.point, "eval_accuracy", values["accuracy"], epoch_num=epochs)
    unless_left_out(log.end, "eval", epoch_num=epochs)
    unless_left_out(log.end, "run", status=values["status"])
    log.close()
    set_the_clock(path, minutes)
    return path


def tensors(benchmark: str) -> list[str]:
    if benchmark == "maskrcnn":
        return list(maskrcnn_tensor_names())
    return [ssd_tensor_name(parameter) for parameter in parameters_of_ssd300_r34()]


def set_the_clock(path: Path, minutes: float) -> None:
    """Let the run have taken so long, and its lines have come at even intervals."""
    lines = [json.loads(line.removeprefix(":::MLLOG ")) for line in path.read_text().splitlines()]
    keys = [line["key"] for line in lines]
    if "run_start" in keys:
        first = keys.index("run_start")
        for number, line in enumerate(lines[first:]):
            share = number / (len(lines) - 1 - first)
            line["time_ms"] = lines[first]["time_ms"] + round(share * minutes * 60_000)
    path.write_text("".join(f":::MLLOG {json.dumps(line)}\n" for line in lines))
