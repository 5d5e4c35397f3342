"""Record of one run, read from its run folder or from its MLPerf log alone.

A killed run leaves files that are missing or end in the middle of a line. `notes` lists what is missing or damaged.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from detection.run_dir import CONFIG, METRICS, log_path
from mlperf import log, rules
from mlperf.errors import InputError
from mlperf.log import Event

# Names in MLPerf logs to names in metrics.jsonl.
_METRIC_NAMES = {"bbox": "AP", "segm": "mask_AP"}

_MAX_ERRORS_SHOWN = 3


class Interval(NamedTuple):
    """Part of a run: kind is "init", "epoch" or "evaluation". Seconds count from the log's first event.

    epoch: from 1, None for init. has_end: whether the log has its end. Otherwise it lasts until the log ends.
    """

    kind: str
    epoch: int | None
    start_s: float
    stop_s: float
    has_end: bool


@dataclass(frozen=True)
class RunRecord:
    """Record of one run. Parts that it did not write are empty.

    name: short display name. log: path of the MLPerf log. log_events: its events. jsonl_events: events of
    metrics.jsonl (docs/METRICS_JSONL.md). config: all settings. summary: from summary.json. classes: from classes.json.
    images: from pictures.json, with the full path as `file`. confusion: from confusion.json. notes: what is missing or
    damaged.
    """

    name: str
    path: Path
    log: Path | None = None
    log_events: list[Event] = field(default_factory=list)
    jsonl_events: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    classes: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    confusion: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def log_events_named(self, key: str) -> list[Event]:
        """Return the MLPerf log's events with a key."""
        return [event for event in self.log_events if event.key == key]

    def log_value(self, key: str) -> Any:
        """Return the last value of a key in the MLPerf log, or None."""
        return next((event.value for event in reversed(self.log_events) if event.key == key), None)

    def events_named(self, name: str) -> list[dict[str, Any]]:
        """Return the events of metrics.jsonl with a name."""
        return [event for event in self.jsonl_events if event["event"] == name]

    @property
    def metadata(self) -> dict[str, Any]:
        """The last run_start event of metrics.jsonl, or an empty one."""
        return next(reversed(self.events_named("run_start")), {})

    @property
    def summary_event(self) -> dict[str, Any]:
        """The summary event of metrics.jsonl. Empty for a run that is still in progress or was killed."""
        last = self.jsonl_events[-1] if self.jsonl_events else {}
        return last if last.get("event") == "summary" else {}

    @property
    def benchmark(self) -> str:
        """Name of the benchmark, or "" if it is not recorded. A log has MLPerf's name, which depends on the ruleset."""
        if recorded := self.metadata.get("benchmark"):
            return str(recorded)
        name, ruleset = self.log_value("submission_benchmark") or "", self.config.get("ruleset") or ""
        return rules.identify_benchmark(name, ruleset, {event.key for event in self.log_events}) or name

    @property
    def system(self) -> str:
        """Name of the system, or "" if it is not recorded."""
        recorded = self.metadata.get("system") or self.config.get("system")
        return str(recorded or self.log_value("submission_platform") or "")

    @property
    def mode(self) -> str:
        """Mode of the run, "train" if it is not recorded."""
        return str(self.metadata.get("mode") or self.config.get("mode") or "train")

    @property
    def resumed(self) -> bool:
        """True if the run resumed from a checkpoint."""
        return bool(self.log_events_named("resumed")) or any(
            event.get("resumed_from") for event in self.events_named("run_start")
        )

    @property
    def clock_error(self) -> str:
        """Reason why the times of the MLPerf log are invalid, or ""."""
        return log.find_clock_error(self.log_events)

    @property
    def status(self) -> str:
        """Status in run_stop, "success" or "aborted", or "" if no end is recorded."""
        stop = next(reversed(self.log_events_named("run_stop")), None)
        if stop is not None:
            return str(stop.metadata.get("status", ""))
        if "converged" in self.summary_event:
            return "success" if self.summary_event["converged"] else "aborted"
        return ""

    @property
    def run_s(self) -> float:
        """Seconds from run_start to run_stop, NaN if one of them is missing or the log's times are invalid."""
        start, stop = self.log_events_named("run_start"), self.log_events_named("run_stop")
        if start and stop and not self.clock_error:
            return (stop[-1].time_ms - start[0].time_ms) / 1000
        return to_float(self.summary_event.get("run_s"))

    @property
    def epoch(self) -> int:
        """The epoch that reached the target, or the last one that started. 0 before the first."""
        if self.status == "success":
            return max((series[-1][0] for series in self.metric_history.values()), default=0)
        reported = [event.get("epoch") for event in self.jsonl_events]
        reported += [event.metadata.get("epoch_num") for event in self.log_events]
        return max((epoch for epoch in reported if isinstance(epoch, int)), default=0)

    @property
    def targets(self) -> dict[str, float]:
        """Target values by metric. The run ends when all are reached."""
        reported = self.metadata.get("targets") or self.summary_event.get("targets")
        if isinstance(reported, dict):
            return {str(name): to_float(value) for name, value in reported.items()}
        if "target" in self.config:
            return {"AP": to_float(self.config["target"])}
        return rules.targets(self.benchmark) if self.benchmark in rules.BENCHMARKS else {}

    @property
    def metric_history(self) -> dict[str, list[tuple[int, float]]]:
        """Metrics of each evaluation by name, as (epoch, value) in order of time. Epoch 0 is before training.

        Source: metrics.jsonl, or else eval_accuracy in the log, which is a number or several by name.
        """
        history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for line in self.events_named("evaluation"):
            if isinstance(line.get("epoch"), int) and isinstance(line.get("metrics"), dict):
                for name, value in line["metrics"].items():
                    history[str(name)].append((line["epoch"], to_float(value)))
        if history:
            return dict(history)
        for event in self.log_events_named("eval_accuracy"):
            epoch = event.metadata.get("epoch_num")
            values = event.value if isinstance(event.value, dict) else {"bbox": event.value}
            if isinstance(epoch, int):
                for name, value in values.items():
                    history[_METRIC_NAMES.get(str(name).lower(), str(name))].append((epoch, to_float(value)))
        return dict(history)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation by name."""
        return {name: series[-1][1] for name, series in self.metric_history.items()}

    @property
    def target_metrics(self) -> list[str]:
        """Names of the metrics with a target. Without targets, those of AP and mask_AP that are recorded."""
        return list(self.targets) or [name for name in ("AP", "mask_AP") if name in self.metric_history]

    @property
    def stop_reason(self) -> str:
        """Reason why the run stopped early, or ""."""
        stopped_by = str(self.summary_event.get("stopped_by") or "")
        by_request = stopped_by in ("TrainingStopped", "Stopped")  # the second: name in older runs
        return str(
            self.summary_event.get("stop_reason") or ("by a signal or --max-steps" if by_request else stopped_by)
        )

    @property
    def last_step(self) -> str:
        """The last step that is recorded, such as "step 95 of epoch 1", or ""."""
        step = next(reversed(self.events_named("step")), None)
        return f"step {to_float(step.get('step')) + 1:.0f} of epoch {step.get('epoch')}" if step else ""

    @property
    def commit(self) -> str:
        """Commit of the program and whether it had changes, or ""."""
        commit = next(reversed(self.log_events_named("commit")), None)
        if commit is None:
            return str(self.summary.get("commit") or "")
        return f"{commit.value}{', with changes' if commit.metadata.get('dirty') else ''}"

    @property
    def images_per_s(self) -> float:
        """Training images per second: over the run, or the median of its epochs or steps so far. NaN if unknown."""
        reported = [to_float(self.summary_event.get("images_per_s"))]
        for name in ("epoch", "step"):
            if not any(map(math.isfinite, reported)):
                reported = [to_float(event.get("images_per_s")) for event in self.events_named(name)]
        known = [rate for rate in reported if math.isfinite(rate)]
        return median(known) if known else math.nan

    @property
    def warnings(self) -> list[str]:
        """Warnings that a reader of the metrics needs."""
        messages = []
        for event in self.events_named("step"):
            if not math.isfinite(to_float(event.get("loss"))):
                messages.append(f"the loss is {event.get('loss')} at step {event.get('step')}")
                break
        if self.resumed:
            messages.append("the run was resumed: it is not an MLPerf result")
        if self.clock_error:
            messages.append(f"{self.clock_error}: the run has no valid time")
        return messages + self.notes

    def intervals(self) -> list[Interval]:
        """Return init, epochs and evaluations in order of time, from the MLPerf log.

        Published logs have some events once per rank, and some epochs without an end. An interval therefore lasts from
        its first start to its first end, to the start of the next interval, or to the last event.
        """
        if not self.log_events or self.clock_error:
            return []
        first_ms, last_ms = self.log_events[0].time_ms, self.log_events[-1].time_ms
        intervals: list[Interval] = []
        open_intervals: dict[str, tuple[int | None, int]] = {}
        started: set[tuple[str, int | None]] = set()

        def close(kind: str, stop_ms: int, has_end: bool) -> None:
            if kind in open_intervals:
                epoch, start_ms = open_intervals.pop(kind)
                start_s, stop_s = (start_ms - first_ms) / 1000, (stop_ms - first_ms) / 1000
                intervals.append(Interval(kind, epoch, start_s, stop_s, has_end))

        kinds = {"init": "init", "epoch": "epoch", "eval": "evaluation"}
        for event in self.log_events:
            key, _, edge = event.key.rpartition("_")
            if key not in kinds or edge not in ("start", "stop"):
                continue
            kind, epoch = kinds[key], event.metadata.get("epoch_num")
            if edge == "stop":
                close(kind, event.time_ms, True)
            elif (kind, epoch) not in started:
                started.add((kind, epoch))
                for other in list(open_intervals):
                    close(other, event.time_ms, True)
                open_intervals[kind] = (epoch, event.time_ms)
        for kind in list(open_intervals):
            close(kind, last_ms, False)
        return intervals

    def seconds_by_kind(self) -> dict[str, float]:
        """Return the seconds that each kind of work took. "other" is the rest of the total."""
        intervals = self.intervals()
        if intervals:
            seconds = dict.fromkeys(("init", "training", "evaluation"), 0.0)
            for interval in intervals:
                kind = "training" if interval.kind == "epoch" else interval.kind
                seconds[kind] += interval.stop_s - interval.start_s
            total_s = (self.log_events[-1].time_ms - self.log_events[0].time_ms) / 1000
        else:
            fields = {"init": "init_s", "training": "train_s", "evaluation": "eval_s"}
            seconds = {kind: to_float(self.summary_event.get(name)) for kind, name in fields.items()}
            total_s = to_float(self.summary_event.get("e2e_s"))
            if not all(map(math.isfinite, (*seconds.values(), total_s))):
                return {}
        return seconds | {"other": max(0.0, total_s - sum(seconds.values()))}


def to_float(value: Any) -> float:
    """Convert a number from a file to float. Anything else becomes NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def run_index(config: dict[str, Any]) -> Any:
    """Return the index of a run in its log's name. Older runs call it `experiment`."""
    return config.get("run_index", config.get("experiment", 0))


def read_runs(path: Path) -> list[RunRecord]:
    """Read the runs at a path: an MLPerf log, a run folder, the folder of a series, or a folder of logs.

    Raises InputError if there is none of these, OSError for an unreadable file.
    """
    if path.is_file():
        return [read_log(path)]
    if not path.is_dir():
        raise InputError(f"{path} does not exist. Name a run folder, or an MLPerf log such as result_0.txt.")
    logs = sorted(path.glob("result_*.txt"))
    if (path / METRICS).is_file() or (path / CONFIG).is_file():
        return [read_run_dir(path, logs)]
    if series := [file.parent for file in path.glob(f"experiment_*/{CONFIG}")]:
        series.sort(key=lambda folder: (len(folder.name), folder.name))  # 9 before 10
        return [read_run_dir(folder, sorted(folder.glob("result_*.txt"))) for folder in series]
    if not logs:
        raise InputError(f"{path} contains neither {METRICS} nor result_*.txt. Name a run folder, or an MLPerf log.")
    return [read_log(file) for file in logs]


def read_log(path: Path) -> RunRecord:
    """Read a run from its MLPerf log alone. Raises InputError if the log has no event."""
    errors: list[str] = []
    events = log.read(path, errors)
    if not events:
        raise InputError(f"{path} contains no line of an MLPerf log (:::MLLOG).")
    record = RunRecord(path.stem, path, path, events, notes=truncate_messages(errors))
    config, platform = record.log_value("config"), record.log_value("submission_platform")
    return replace(
        record,
        name=f"{platform} {path.stem}" if platform else path.stem,
        config=config if isinstance(config, dict) else {},
    )


def read_run_dir(folder: Path, logs: list[Path]) -> RunRecord:
    """Read a run from its folder. logs: the MLPerf logs in it."""
    notes: list[str] = []
    config = read_json(folder / CONFIG, dict, notes)
    expected_log = log_path(folder, run_index(config))
    file = expected_log if expected_log in logs else logs[-1] if logs else None
    log_events: list[Event] = []
    errors: list[str] = []
    if file is not None:
        log_events = log.read(file, errors)
    elif config.get("mode", "train") == "train":
        notes.append("the MLPerf log (result_*.txt) is missing")
    jsonl_events = read_events(folder / METRICS, errors)
    if not jsonl_events:
        notes.append(f"{METRICS} is empty or missing: there are no curves of loss, learning rate and throughput")
    images = [
        image | {"file": folder / "pictures" / Path(str(image.get("file"))).name}
        for image in read_json(folder / "pictures.json", list, notes, optional=True)
        if isinstance(image, dict)
    ]
    classes = read_json(folder / "classes.json", list, notes, optional=True)
    return RunRecord(
        name=folder.resolve().name,
        path=folder,
        log=file,
        log_events=log_events,
        jsonl_events=jsonl_events,
        config=config,
        summary=read_json(folder / "summary.json", dict, notes, optional=True),
        classes=[row for row in classes if isinstance(row, dict)],
        images=images,
        confusion=read_json(folder / "confusion.json", dict, notes, optional=True),
        notes=notes + truncate_messages(errors),
    )


def read_events(path: Path, errors: list[str]) -> list[dict[str, Any]]:
    """Read the events of metrics.jsonl. A message for each invalid line is appended to `errors`."""
    if not path.is_file():
        return []
    events = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        event = parse_event(line)
        if event is not None:
            events.append(event)
        else:
            errors.append(f"{path.name}, line {line_number}: not an event, possibly truncated")
    return events


def parse_event(line: str | bytes) -> dict[str, Any] | None:
    """Parse one line of metrics.jsonl, or return None if it is invalid."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def read_json(path: Path, kind: type, notes: list[str], *, optional: bool = False) -> Any:
    """Read a JSON file. If it is missing or damaged, append that to `notes` and return an empty `kind`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not optional:
            notes.append(f"{path.name} is missing")
        return kind()
    except ValueError:
        content = None
    if isinstance(content, kind):
        return content
    notes.append(f"{path.name} is damaged")
    return kind()


def truncate_messages(messages: list[str]) -> list[str]:
    """Return the first messages and the number of the others."""
    num_hidden = len(messages) - _MAX_ERRORS_SHOWN
    return messages[:_MAX_ERRORS_SHOWN] + ([f"and {num_hidden} more such lines"] if num_hidden > 0 else [])


def disambiguate_names(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the records with unique names: prefix equal names with their parent folder, then number them."""
    records = list(records)
    counts = Counter(record.name for record in records)
    with_parent = [
        f"{record.path.resolve().parent.name}/{record.name}" if counts[record.name] > 1 else record.name
        for record in records
    ]
    counts = Counter(with_parent)
    unique = [
        f"{name} ({with_parent[: index + 1].count(name)})" if counts[name] > 1 else name
        for index, name in enumerate(with_parent)
    ]
    return [replace(record, name=name) for record, name in zip(records, unique, strict=True)]
