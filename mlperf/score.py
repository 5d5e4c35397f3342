"""MLPerf score of the runs of one result: the time to the target, and its spread."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlperf import rules
from mlperf.log import Event, find_clock_error, read

RUNS_PER_RESULT = 5
"""Runs in a result of every detection benchmark. The score of that many or more drops the fastest and the slowest."""


@dataclass(frozen=True)
class EntryKey:
    """Properties that the runs of one result share.

    benchmark: MLPerf's name. dataset: name of the data set, or "" for the benchmark's own.
    """

    org: str
    platform: str
    benchmark: str
    division: str
    global_batch_size: int
    dataset: str

    def __str__(self) -> str:
        task = f"{self.benchmark} on {self.dataset}" if self.dataset else self.benchmark
        batch = f"global batch {self.global_batch_size}"
        return f"{task}, {self.platform} of {self.org}, {self.division} division, {batch}"


@dataclass(frozen=True)
class LoggedRun:
    """One run as logged, complete or not.

    benchmark: that of this program, or "" if it has none. seconds: from run_start to run_stop, or None if one is
    missing or the clock was set back. epochs: of the last evaluation. accuracy: its
    result, as logged. reached: the status of run_stop is success. images_per_s: training images over the median epoch
    time, evaluation excluded, or None if no epoch ended. ruleset: from the run's configuration, or "".
    identity: seed, and time of the first and the last event in ms, which copies of a log share.
    """

    path: Path
    entry: EntryKey
    benchmark: str
    seconds: float | None
    reached: bool
    epochs: int | None
    accuracy: Any
    images_per_s: float | None
    ruleset: str
    identity: tuple[str, int, int]


@dataclass(frozen=True)
class Score:
    """Score of several runs, and their spread.

    seconds: the mean, without the fastest and the slowest of five or more runs. None if there is no score. why: how it
    was computed, or why there is none. num_failed: runs that missed the target or do not comply. The other fields
    cover all other runs: fastest, slowest, standard deviation (n - 1), mean, and the 95% confidence interval of the
    mean (Student's t). They are None if there are too few runs.
    """

    seconds: float | None
    why: str
    num_runs: int
    num_failed: int
    fastest_s: float | None = None
    slowest_s: float | None = None
    stddev_s: float | None = None
    mean_s: float | None = None
    interval_s: tuple[float, float] | None = None


def read_run(path: Path) -> LoggedRun:
    """Read a log. Raises OSError if it is unreadable, ValueError if it is not a log or lacks the keys of an entry."""
    events = read(path)
    first = {event.key: event for event in reversed(events)}  # published logs hold some lines once per rank
    _, benchmark, ruleset = identify_run(events)
    own_rules = rules.BENCHMARKS.get(benchmark)
    dataset = str(first["dataset"].value) if "dataset" in first else ""
    try:
        entry = EntryKey(
            org=str(first["submission_org"].value),
            platform=str(first["submission_platform"].value),
            benchmark=str(first["submission_benchmark"].value),
            division=str(first["submission_division"].value),
            global_batch_size=int(first["global_batch_size"].value),
            dataset="" if own_rules and dataset == own_rules.dataset else dataset,
        )
    except KeyError as error:
        raise ValueError(f"{path}: has no line with the key {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: global_batch_size is not a number ({error})") from error
    last = {event.key: event for event in events}
    stop, evaluation = last.get("run_stop"), last.get("eval_accuracy")
    has_time = stop and "run_start" in first and not find_clock_error(events)
    samples = first["train_samples"].value if "train_samples" in first else None
    if own_rules and not dataset:  # published logs count images, batches or iterations
        samples = own_rules.epoch_images
    return LoggedRun(
        path=path,
        entry=entry,
        benchmark=benchmark,
        seconds=(stop.time_ms - first["run_start"].time_ms) / 1000 if stop and has_time else None,
        reached=stop is not None and stop.metadata.get("status") == "success",
        epochs=evaluation.metadata.get("epoch_num") if evaluation else None,
        accuracy=evaluation.value if evaluation else None,
        images_per_s=_images_per_s(events, samples),
        ruleset=ruleset,
        identity=(str(first["seed"].value) if "seed" in first else "", events[0].time_ms, events[-1].time_ms),
    )


def identify_run(events: Sequence[Event]) -> tuple[str, str, str]:
    """Return MLPerf's name of a log's benchmark, that of this program, and the ruleset. Each is "" if unknown."""
    values = {event.key: event.value for event in events}
    name, config = str(values.get("submission_benchmark", "")), values.get("config")
    ruleset = str(config.get("ruleset", "")) if isinstance(config, dict) else ""
    return name, rules.identify_benchmark(name, ruleset, values.keys()), ruleset


def _images_per_s(events: Sequence[Event], samples: Any) -> float | None:
    """Return the images of an epoch over the median time of the epochs that ended."""
    started: dict[Any, int] = {}
    lengths_ms: list[int] = []
    for event in events:
        epoch = event.metadata.get("epoch_num")
        if event.key == "epoch_start":
            started.setdefault(epoch, event.time_ms)
        elif event.key == "epoch_stop" and epoch in started:
            lengths_ms.append(event.time_ms - started[epoch])
    median_ms = statistics.median(lengths_ms) if lengths_ms else 0
    return samples / median_ms * 1000 if isinstance(samples, int) and median_ms > 0 else None


def score(runs: Iterable[LoggedRun], failed: Iterable[Path] = ()) -> Score:
    """Score the runs of one result.

    failed: logs that do not comply. These runs, and runs that missed the target, have no time. One such run of five
    or more counts as the slowest, as in the rules and the official package checker.
    """
    runs, failed = list(runs), set(failed)
    valid = [run for run in runs if run.reached and run.path not in failed]
    times = sorted(run.seconds for run in valid if run.seconds is not None)
    num_failed = len(runs) - len(times)
    seconds, why = None, f"{num_failed} of {len(runs)} runs did not reach the target or do not comply"
    if len(runs) >= RUNS_PER_RESULT and num_failed <= 1:
        kept = times[1:] if num_failed else times[1:-1]
        seconds, why = statistics.fmean(kept), f"mean of {len(runs)} runs without the fastest and the slowest"
        why += " (the run that did not reach the target or does not comply)" if num_failed else ""
    elif not num_failed:
        seconds, why = (
            statistics.fmean(times),
            f"mean of {len(runs)}: a result has {RUNS_PER_RESULT} runs and drops two",
        )
    spread: dict[str, Any] = {}
    if times:
        spread = {"fastest_s": times[0], "slowest_s": times[-1], "mean_s": statistics.fmean(times)}
    if len(times) > 1:
        stddev_s = statistics.stdev(times)
        from scipy import stats  # takes more than 1 s

        half_s = float(stats.t.ppf(0.975, len(times) - 1)) * stddev_s / len(times) ** 0.5
        mean_s = spread["mean_s"]
        spread |= {"stddev_s": stddev_s, "interval_s": (mean_s - half_s, mean_s + half_s)}
    return Score(seconds, why, len(runs), num_failed, **spread)
