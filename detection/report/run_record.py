"""What a run left, read as far as it goes: its folder, or its MLPerf log alone.

A run that was killed leaves files that end in the middle of a line, or none; what is missing is said in `remarks`.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlperf import log
from mlperf.log import Event
from mlperf.rules import BENCHMARKS

# The figures by which a run is judged, as metrics.jsonl and the rules of MLPerf name them.
_FIGURE_OF_RULE = {"bbox": "AP", "segm": "mask_AP"}

_DAMAGE_SHOWN = 3


class Interval(NamedTuple):
    """A part of a run: kind is "init", "epoch" or "evaluation"; seconds count from the log's first event.

    epoch: from 1, None for init. ended: whether the log has its end; else it is as long as the log.
    """

    kind: str
    epoch: int | None
    start_s: float
    stop_s: float
    ended: bool


@dataclass(frozen=True)
class RunRecord:
    """One run as it was recorded; what it did not leave is empty.

    name: short, for people. log: the MLPerf log. events: of that. metrics: of metrics.jsonl (docs/METRICS_JSONL.md).
    config: every setting. summary: of summary.json. classes: of classes.json. pictures: of pictures.json, `file`
    being the whole path. remarks: what is missing or damaged.
    """

    name: str
    path: Path
    log: Path | None = None
    events: list[Event] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    classes: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def points(self, key: str) -> list[Event]:
        """The events of one key of the MLPerf log."""
        return [event for event in self.events if event.key == key]

    def value(self, key: str) -> Any:
        """The last value of a key of the MLPerf log, or None."""
        return next((event.value for event in reversed(self.events) if event.key == key), None)

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of one name in metrics.jsonl."""
        return [line for line in self.metrics if line["event"] == event]

    @property
    def facts(self) -> dict[str, Any]:
        """The last run_start of metrics.jsonl, or nothing."""
        return next(reversed(self.of("run_start")), {})

    @property
    def outcome(self) -> dict[str, Any]:
        """The summary of metrics.jsonl, or nothing: of a run that goes on still, or was killed."""
        last = self.metrics[-1] if self.metrics else {}
        return last if last.get("event") == "summary" else {}

    @property
    def benchmark(self) -> str:
        """What was trained, "" where nothing says it."""
        return str(self.facts.get("benchmark") or self.value("submission_benchmark") or "")

    @property
    def system(self) -> str:
        """The machine's name."""
        return str(self.facts.get("system") or self.config.get("system") or self.value("submission_platform") or "")

    @property
    def mode(self) -> str:
        """What was done, "train" where nothing says it."""
        return str(self.facts.get("mode") or self.config.get("mode") or "train")

    @property
    def resumed(self) -> bool:
        """Whether the run went on from a checkpoint."""
        return bool(self.points("resumed")) or any(line.get("resumed_from") for line in self.of("run_start"))

    @property
    def status(self) -> str:
        """How it ended: "success" or "aborted", as run_stop says; "" where no end is recorded."""
        stop = next((event for event in reversed(self.events) if event.key == "run_stop"), None)
        if stop is not None:
            return str(stop.metadata.get("status", ""))
        if "converged" in self.outcome:
            return "success" if self.outcome["converged"] else "aborted"
        return ""

    @property
    def run_s(self) -> float:
        """Seconds on the clock, from run_start to run_stop; NaN where one of them is missing."""
        start, stop = self.points("run_start"), self.points("run_stop")
        if start and stop:
            return (stop[-1].time_ms - start[0].time_ms) / 1000
        return number(self.outcome.get("run_s"))

    @property
    def epoch(self) -> int:
        """The epoch after which the target was reached, or else the last that was begun; 0 before the first."""
        if self.status == "success":
            return max((series[-1][0] for series in self.accuracies.values()), default=0)
        told = [line.get("epoch") for line in self.metrics] + [e.metadata.get("epoch_num") for e in self.events]
        return max((epoch for epoch in told if isinstance(epoch, int)), default=0)

    @property
    def targets(self) -> dict[str, float]:
        """Figures that end the run when all are reached, by name."""
        told = self.facts.get("targets") or self.outcome.get("targets")
        if isinstance(told, dict):
            return {str(name): number(value) for name, value in told.items()}
        if "target" in self.config:
            return {"AP": number(self.config["target"])}
        rules = BENCHMARKS.get(self.benchmark)
        return {_FIGURE_OF_RULE.get(name, name): value for name, value in rules.targets.items()} if rules else {}

    @property
    def accuracies(self) -> dict[str, list[tuple[int, float]]]:
        """The figures of each evaluation by name, as (epoch, value) in the order of time; epoch 0 is before training.

        Of metrics.jsonl, or else what the log's eval_accuracy says: a number, or several by their names.
        """
        found: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for line in self.of("evaluation"):
            if isinstance(line.get("epoch"), int) and isinstance(line.get("metrics"), dict):
                for name, value in line["metrics"].items():
                    found[str(name)].append((line["epoch"], number(value)))
        if found:
            return dict(found)
        for event in self.points("eval_accuracy"):
            epoch = event.metadata.get("epoch_num")
            values = event.value if isinstance(event.value, dict) else {"bbox": event.value}
            if isinstance(epoch, int):
                for name, value in values.items():
                    found[_FIGURE_OF_RULE.get(str(name).lower(), str(name))].append((epoch, number(value)))
        return dict(found)

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the last evaluation by name."""
        return {name: series[-1][1] for name, series in self.accuracies.items()}

    @property
    def judged_by(self) -> list[str]:
        """The names of the figures that have a target, or those that there are."""
        return list(self.targets) or [name for name in ("AP", "mask_AP") if name in self.accuracies]

    @property
    def warnings(self) -> list[str]:
        """What a reader of the figures must know."""
        found = []
        for line in self.of("step"):
            if not math.isfinite(number(line.get("loss"))):
                found.append(f"the loss is {line.get('loss')} at step {line.get('step')}")
                break
        if stopped_by := self.outcome.get("stopped_by"):
            why = "by a signal or --max-steps" if stopped_by == "Stopped" else str(stopped_by)
            found.append(f"it was stopped before its end: {why}")
        if self.resumed:
            found.append("the run was resumed: it is no MLPerf result")
        return found + self.remarks

    def intervals(self) -> list[Interval]:
        """Init, epochs and evaluations in the order of time, from the MLPerf log.

        Published logs have some events once per rank, and some epochs without an end: an interval lasts from its
        first start to its first end, or to the start of the next, or to the last event.
        """
        if not self.events:
            return []
        first_ms, last_ms = self.events[0].time_ms, self.events[-1].time_ms
        found: list[Interval] = []
        opened: dict[str, tuple[int | None, int]] = {}
        begun: set[tuple[str, int | None]] = set()

        def close(kind: str, stop_ms: int, ended: bool) -> None:
            if kind in opened:
                epoch, start_ms = opened.pop(kind)
                found.append(Interval(kind, epoch, (start_ms - first_ms) / 1000, (stop_ms - first_ms) / 1000, ended))

        kinds = {"init": "init", "epoch": "epoch", "eval": "evaluation"}
        for event in self.events:
            key, _, edge = event.key.rpartition("_")
            if key not in kinds or edge not in ("start", "stop"):
                continue
            kind, epoch = kinds[key], event.metadata.get("epoch_num")
            if edge == "stop":
                close(kind, event.time_ms, True)
            elif (kind, epoch) not in begun:
                begun.add((kind, epoch))
                for other in list(opened):
                    close(other, event.time_ms, True)
                opened[kind] = (epoch, event.time_ms)
        for kind in list(opened):
            close(kind, last_ms, False)
        return found

    def times_s(self) -> dict[str, float]:
        """Seconds that the run spent on each kind of work; "other" is what is left of the whole."""
        intervals = self.intervals()
        if intervals:
            spent = dict.fromkeys(("init", "training", "evaluation"), 0.0)
            for interval in intervals:
                spent["training" if interval.kind == "epoch" else interval.kind] += interval.stop_s - interval.start_s
            whole_s = (self.events[-1].time_ms - self.events[0].time_ms) / 1000
        else:
            fields = {"init": "init_s", "training": "train_s", "evaluation": "eval_s"}
            spent = {kind: number(self.outcome.get(name)) for kind, name in fields.items()}
            whole_s = number(self.outcome.get("e2e_s"))
            if not all(map(math.isfinite, (*spent.values(), whole_s))):
                return {}
        return spent | {"other": max(0.0, whole_s - sum(spent.values()))}


def number(value: Any) -> float:
    """A number out of a file as a float, NaN for all that is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def read_runs(path: Path) -> list[RunRecord]:
    """The runs at a path: an MLPerf log, a run's folder, that of a series of runs, or a folder of logs, each a run.

    Raises ValueError where there is nothing of the kind, OSError for a file that cannot be read.
    """
    if path.is_file():
        return [read_log(path)]
    if not path.is_dir():
        raise ValueError(f"{path} is not there. Name a run's folder, or an MLPerf log such as result_0.txt.")
    logs = sorted(path.glob("result_*.txt"))
    if (path / "metrics.jsonl").is_file() or (path / "config.json").is_file():
        return [read_folder(path, logs)]
    if series := [file.parent for file in path.glob("experiment_*/config.json")]:
        series.sort(key=lambda folder: (len(folder.name), folder.name))  # 10 behind 9
        return [read_folder(folder, sorted(folder.glob("result_*.txt"))) for folder in series]
    if not logs:
        raise ValueError(f"{path} holds neither metrics.jsonl nor result_*.txt. Name a run's folder, or an MLPerf log.")
    return [read_log(file) for file in logs]


def read_log(path: Path) -> RunRecord:
    """A run of which the MLPerf log alone is there; raises ValueError where that has no event."""
    remarks: list[str] = []
    events = log.read(path, remarks)
    if not events:
        raise ValueError(f"{path} holds no line of an MLPerf log (:::MLLOG).")
    record = RunRecord(path.stem, path, path, events, remarks=shortened(remarks))
    config, platform = record.value("config"), record.value("submission_platform")
    return replace(
        record,
        name=f"{platform} {path.stem}" if platform else path.stem,
        config=config if isinstance(config, dict) else {},
    )


def read_folder(folder: Path, logs: list[Path]) -> RunRecord:
    """A run with its folder; `logs` are the MLPerf logs in it."""
    remarks: list[str] = []
    config = read_json(folder / "config.json", dict, remarks)
    wanted = folder / f"result_{config.get('experiment', 0)}.txt"
    file = wanted if wanted in logs else logs[-1] if logs else None
    events: list[Event] = []
    damage: list[str] = []
    if file is not None:
        events = log.read(file, damage)
    elif config.get("mode", "train") == "train":
        remarks.append("there is no MLPerf log (result_*.txt)")
    metrics = read_lines(folder / "metrics.jsonl", damage)
    if not metrics:
        remarks.append("metrics.jsonl is empty or missing: there are no curves of loss, learning rate and throughput")
    pictures = [
        picture | {"file": folder / "pictures" / Path(str(picture.get("file"))).name}
        for picture in read_json(folder / "pictures.json", list, remarks, optional=True)
        if isinstance(picture, dict)
    ]
    classes = read_json(folder / "classes.json", list, remarks, optional=True)
    return RunRecord(
        name=folder.resolve().name,
        path=folder,
        log=file,
        events=events,
        metrics=metrics,
        config=config,
        summary=read_json(folder / "summary.json", dict, remarks, optional=True),
        classes=[row for row in classes if isinstance(row, dict)],
        pictures=pictures,
        remarks=remarks + shortened(damage),
    )


def read_lines(path: Path, damage: list[str]) -> list[dict[str, Any]]:
    """The events of metrics.jsonl; `damage` gets a message for each line that is none."""
    if not path.is_file():
        return []
    found = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            found.append(event)
        else:
            damage.append(f"{path.name}, line {line_number}: no event; it may be cut off")
    return found


def read_json(path: Path, kind: type, remarks: list[str], *, optional: bool = False) -> Any:
    """The content of a JSON file, or an empty one where it is missing or damaged, which `remarks` tell of."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not optional:
            remarks.append(f"{path.name} is missing")
        return kind()
    except ValueError:
        remarks.append(f"{path.name} is damaged")
        return kind()
    if isinstance(content, kind):
        return content
    remarks.append(f"{path.name} is damaged")
    return kind()


def shortened(messages: list[str]) -> list[str]:
    """The first few of many messages."""
    more = len(messages) - _DAMAGE_SHOWN
    return messages[:_DAMAGE_SHOWN] + ([f"and {more} more lines like these"] if more > 0 else [])


def told_apart(records: Iterable[RunRecord]) -> list[RunRecord]:
    """The same records with names that differ: those that are alike get their folders in front, or a number."""
    records = list(records)
    alike = Counter(record.name for record in records)
    longer = [
        f"{record.path.resolve().parent.name}/{record.name}" if alike[record.name] > 1 else record.name
        for record in records
    ]
    alike = Counter(longer)
    numbered = [
        f"{name} ({longer[: index + 1].count(name)})" if alike[name] > 1 else name for index, name in enumerate(longer)
    ]
    return [replace(record, name=name) for record, name in zip(records, numbered, strict=True)]
