"""What the runs of one result come to: the time to the target, by MLPerf's way of scoring, and how it spreads."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlperf.log import Event, read

RUNS = 5
"""Runs that a result of SSD or Mask R-CNN has; from so many on, the fastest and the slowest are left out."""

DATASET = "coco2017"
"""What the benchmarks are trained on."""


@dataclass(frozen=True)
class Entry:
    """What runs must have in common to be one result. dataset: the benchmark's own where the log names none."""

    org: str
    platform: str
    benchmark: str
    division: str
    global_batch_size: int
    dataset: str

    def __str__(self) -> str:
        trained = self.benchmark if self.dataset == DATASET else f"{self.benchmark} on {self.dataset}"
        batch = f"global batch {self.global_batch_size}"
        return f"{trained}, {self.platform} of {self.org}, {self.division} division, {batch}"


@dataclass(frozen=True)
class Run:
    """One log, as far as it got.

    seconds: from run_start to run_stop; None where one is absent. epochs: of the last evaluation. accuracy: what it
    gave, as logged. reached: run_stop says success. images_per_s: training images over the median epoch, evaluation
    excluded; None where no epoch ended. ruleset: what the run's configuration names, where it names one.
    """

    path: Path
    entry: Entry
    seconds: float | None
    reached: bool
    epochs: int | None
    accuracy: Any
    images_per_s: float | None
    ruleset: str | None


@dataclass(frozen=True)
class Score:
    """The score of runs, and their spread.

    seconds: the mean, of five runs or more without the fastest and the slowest; None where there is none, and `why`
    says so. The rest is of the runs that count, all of them: fastest, slowest, standard deviation (n - 1), mean, and
    the 95 % interval of that mean by Student's t; None where there are too few.
    """

    seconds: float | None
    why: str
    num_runs: int
    num_lost: int
    fastest_s: float | None = None
    slowest_s: float | None = None
    deviation_s: float | None = None
    mean_s: float | None = None
    interval_s: tuple[float, float] | None = None


def read_run(path: Path) -> Run:
    """Read a log; raises OSError where it cannot be read, ValueError where it is none or does not say whose it is."""
    events = read(path)
    first = {event.key: event for event in reversed(events)}  # published logs hold some lines once per rank
    try:
        entry = Entry(
            org=str(first["submission_org"].value),
            platform=str(first["submission_platform"].value),
            benchmark=str(first["submission_benchmark"].value),
            division=str(first["submission_division"].value),
            global_batch_size=int(first["global_batch_size"].value),
            dataset=str(first["dataset"].value) if "dataset" in first else DATASET,
        )
    except KeyError as error:
        raise ValueError(f"{path}: it has no line with the key {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: global_batch_size is no number ({error})") from error
    last = {event.key: event for event in events}
    stop, evaluation = last.get("run_stop"), last.get("eval_accuracy")
    config = first["config"].value if "config" in first else None
    return Run(
        path=path,
        entry=entry,
        seconds=(stop.time_ms - first["run_start"].time_ms) / 1000 if stop and "run_start" in first else None,
        reached=stop is not None and stop.metadata.get("status") == "success",
        epochs=evaluation.metadata.get("epoch_num") if evaluation else None,
        accuracy=evaluation.value if evaluation else None,
        images_per_s=_images_per_s(events),
        ruleset=config.get("ruleset") if isinstance(config, dict) else None,
    )


def _images_per_s(events: Sequence[Event]) -> float | None:
    started: dict[Any, int] = {}
    lengths_ms: list[int] = []
    samples = None
    for event in events:
        epoch = event.metadata.get("epoch_num")
        if event.key == "epoch_start":
            started.setdefault(epoch, event.time_ms)
        elif event.key == "epoch_stop" and epoch in started:
            lengths_ms.append(event.time_ms - started[epoch])
        elif event.key == "train_samples":
            samples = event.value
    median_ms = statistics.median(lengths_ms) if lengths_ms else 0
    return samples / median_ms * 1000 if isinstance(samples, int) and median_ms > 0 else None


def score(runs: Iterable[Run], failed: Iterable[Path] = ()) -> Score:
    """Score runs of one result.

    failed: logs that do not comply. Such a run, and one that did not reach the target, has no time; one of them among
    five or more counts as the slowest, as the rules and the official package checker have it.
    """
    runs, failed = list(runs), set(failed)
    counted = [run for run in runs if run.reached and run.seconds is not None and run.path not in failed]
    times = sorted(run.seconds for run in counted if run.seconds is not None)
    lost = len(runs) - len(times)
    seconds, why = None, f"{lost} of {len(runs)} runs did not reach the target or do not comply"
    if len(runs) >= RUNS and lost <= 1:
        kept = times[1:] if lost else times[1:-1]
        seconds, why = statistics.fmean(kept), f"mean of {len(runs)} runs without the fastest and the slowest"
        why += ", which is the one that did not reach the target or does not comply" if lost else ""
    elif not lost:
        seconds, why = statistics.fmean(times), f"mean of {len(runs)}: a result has {RUNS}, and leaves two out"
    spread: dict[str, Any] = {}
    if times:
        spread = {"fastest_s": times[0], "slowest_s": times[-1], "mean_s": statistics.fmean(times)}
    if len(times) > 1:
        deviation_s = statistics.stdev(times)
        from scipy import stats  # more than a second, which one run need not wait for

        half_s = float(stats.t.ppf(0.975, len(times) - 1)) * deviation_s / len(times) ** 0.5
        mean_s = spread["mean_s"]
        spread |= {"deviation_s": deviation_s, "interval_s": (mean_s - half_s, mean_s + half_s)}
    return Score(seconds, why, len(runs), lost, **spread)
