"""A run in progress, live in the terminal.

    python -m detection.report.watch [RUN] [--under results]

RUN is a run's folder; without it, the newest run below `results`. On a terminal the view renews itself in place, else
each event is a line. It ends when the run does; Ctrl-C ends it, and leaves the run alone. Exit status: 0, or 2
where there is no run.
"""

import argparse
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from detection.report.run_record import RunRecord, number, read_json
from mlperf import log

METRICS = "metrics.jsonl"
CURVE_WIDTH = 20
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
SILENCE_S = 120  # and that many times the usual time between two events: then something may be wrong
SILENCE_FACTOR = 10


class Follower:
    """The events of a metrics.jsonl that grows, and is cut shorter where a run goes on from a checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self.events: list[dict[str, Any]] = []
        self.read_bytes = 0
        self.rest = b""

    def new(self) -> list[dict[str, Any]]:
        """The events that have come since the last call; a line that is not whole yet waits for its end."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.read_bytes:
                    self.events, self.read_bytes, self.rest = [], 0, b""
                file.seek(self.read_bytes)
                content = file.read()
        except FileNotFoundError:
            return []
        self.read_bytes += len(content)
        *lines, self.rest = (self.rest + content).split(b"\n")
        found = []
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                found.append(event)
        self.events += found
        return found

    @property
    def over(self) -> bool:
        """Whether the run has said how it ended."""
        return bool(self.events) and self.events[-1]["event"] == "summary"


class Watched:
    """A run as it is now."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.follower = Follower(folder / METRICS)
        self.config: dict[str, Any] = {}
        self.mark_s = time.monotonic()

    def read(self) -> list[dict[str, Any]]:
        """What is new."""
        if not self.config:
            self.config = read_json(self.folder / "config.json", dict, [])
        events = self.follower.new()
        if events:
            self.mark_s = time.monotonic()
        return events

    @property
    def record(self) -> RunRecord:
        """What is known."""
        return RunRecord(self.folder.name, self.folder, metrics=self.follower.events, config=self.config)

    def since_start(self) -> list[dict[str, Any]]:
        """The events on the clock that runs now: of a resumed run those of its last part."""
        starts = [index for index, event in enumerate(self.follower.events) if event["event"] == "run_start"]
        return self.follower.events[starts[-1] :] if starts else self.follower.events

    def last(self, name: str) -> dict[str, Any]:
        """The last event of a name, or nothing."""
        return next((event for event in reversed(self.follower.events) if event["event"] == name), {})

    def num_epochs(self) -> float:
        """After how many the run gives up; NaN where nothing says it."""
        return number(self.last("run_start").get("epochs", self.config.get("epochs")))

    def steps_per_epoch(self) -> float:
        """Of an epoch that is over, or else of the samples that the MLPerf log names; NaN where neither is there."""
        done = self.last("epoch")
        if number(done.get("epoch")) > 0:
            return number(done.get("step")) / done["epoch"]
        try:
            events = log.read(self.folder / f"result_{self.config.get('experiment', 0)}.txt", damage=[])
        except OSError:
            return math.nan
        samples = next((number(event.value) for event in events if event.key == "train_samples"), math.nan)
        batch = number(self.last("run_start").get("global_batch_size"))
        return math.ceil(samples / batch) if math.isfinite(samples) and batch > 0 else math.nan

    def left_s(self) -> float:
        """Seconds to the last epoch, if no target is reached before; NaN where that cannot be told."""
        rates = [number(event.get("images_per_s")) for event in self.since_start() if event["event"] == "step"][-20:]
        batch = number(self.last("run_start").get("global_batch_size"))
        steps = self.num_epochs() * self.steps_per_epoch() - number(self.last("step").get("step")) - 1
        if not rates or not math.isfinite(steps * batch) or not median(rates) > 0:
            return math.nan
        epochs = self.config.get("eval_epochs")
        lengths_s = [number(event.get("seconds")) for event in self.record.of("evaluation")]
        evaluated = number(self.last("evaluation").get("epoch", 0))
        ahead = [epoch for epoch in epochs if epoch > evaluated] if isinstance(epochs, list) else []
        return max(0.0, steps) * batch / median(rates) + len(ahead) * (median(lengths_s) if lengths_s else 0.0)

    def shares(self) -> dict[str, float]:
        """Of the time on the clock, the part of each kind of work; nothing before the first event with a time."""
        events = self.since_start()
        whole_s = number(events[-1].get("time_s")) if events else 0.0
        if not whole_s > 0:
            return {}
        spent = dict.fromkeys(("training", "evaluation"), 0.0)
        mark_s = 0.0  # when what goes on now began
        for event in events:
            if event["event"] in ("epoch", "evaluation"):
                spent["training" if event["event"] == "epoch" else "evaluation"] += number(event.get("seconds"))
                mark_s = number(event.get("time_s"))
        now: dict[str, Any] = next((event for event in reversed(events) if event["event"] != "summary"), {})
        if now.get("event") == "step":
            spent["training"] += number(now.get("time_s")) - mark_s
        if not all(map(math.isfinite, spent.values())):
            return {}
        shares = {kind: min(1.0, seconds / whole_s) for kind, seconds in spent.items()}
        return shares | {"other": max(0.0, 1 - sum(shares.values()))}

    def warnings(self) -> list[str]:
        """What whoever watches should look at."""
        found = list(self.record.warnings)
        silent_s = time.monotonic() - self.mark_s
        times = [number(event.get("time_s")) for event in self.since_start()]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        usual_s = max(gaps, default=0.0)
        if not self.follower.over and silent_s > max(SILENCE_S, SILENCE_FACTOR * usual_s):
            found.append(f"nothing new for {clock(silent_s)}: it may hang, or have been killed")
        return found


def view(run: Watched, *, ascii_only: bool = False) -> Panel:
    """The whole view, for a terminal of any width from 40 columns on."""
    record = run.record
    step, evaluation = run.last("step"), run.last("evaluation")
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    facts = record.facts
    if facts:
        machine = f"{facts.get('ranks')} × {facts.get('device')}, {facts.get('precision')}"
        rows.add_row("run", Text(f"{facts.get('network')} on {record.system}, {machine}"))
    else:
        rows.add_row("run", Text("it has not begun yet"))
    total = run.num_epochs() * run.steps_per_epoch()
    if step:
        made = number(step.get("step")) + 1
        of_steps = f"/{total:.0f}" if math.isfinite(total) else ""
        rows.add_row("epoch", Text(f"{step.get('epoch')}/{run.num_epochs():.0f}, step {made:.0f}{of_steps}"))
        if math.isfinite(total):
            rows.add_row("", ProgressBar(total=total, completed=made, width=40))
        losses = [number(event.get("loss")) for event in record.of("step")]
        rows.add_row("loss", Text(f"{losses[-1]:.4g}  {curve(losses, blocks)}"))
        rows.add_row("lr", Text(f"{number(step.get('lr')):.4g}"))
        rates = [number(event.get("images_per_s")) for event in record.of("step")]
        rows.add_row("img/s", Text(f"{rates[-1]:.1f}  {curve(rates, blocks, least=0.0)}"))
    for name in record.judged_by:
        target = record.targets.get(name, math.nan)
        series = [value for _, value in record.accuracies.get(name, [])]
        of_target = f", target {target:g}" if math.isfinite(target) else ""
        reached = bool(series) and series[-1] >= target
        text = f"{series[-1]:.4f} after epoch {evaluation.get('epoch')}" if series else "not evaluated yet"
        top = max([target, *series]) if math.isfinite(target) else None
        shown = f"{text}{of_target}  {curve(series, blocks, least=0.0, most=top)}"
        rows.add_row(name, Text(shown, style="bold green" if reached else ""))
    rows.add_row("time", Text(times(run)))
    if shares := run.shares():
        rows.add_row("", Text(", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items())))
    parts: list[Any] = [rows]
    parts += [Text(f"! {warning}", style="bold red") for warning in run.warnings()]
    return Panel(Group(*parts), title=Text(record.name), title_align="left", padding=(0, 1), expand=True)


def times(run: Watched) -> str:
    """How long the run is on the clock, and how long it may be yet."""
    if run.follower.over:
        outcome = run.record.outcome
        below = "it was stopped before its end" if outcome.get("stopped_by") else "it ended below its target"
        how = "the target is reached" if outcome.get("converged") else below
        return f"{clock(run.record.run_s)} on the clock; {how}"
    try:
        start = datetime.fromisoformat(str(run.record.facts.get("start")))
        on_clock_s = (datetime.now(UTC) - start).total_seconds()
    except (ValueError, TypeError):  # older logs have no start, and one without a zone cannot be told
        on_clock_s = number(run.follower.events[-1].get("time_s")) if run.follower.events else math.nan
    left_s = run.left_s()
    at_most = f", at most {clock(left_s)} left" if math.isfinite(left_s) else ""
    return f"{clock(on_clock_s)} on the clock{at_most}"


def line(event: dict[str, Any], run: Watched) -> str:
    """An event as a line of text, "" for those that say nothing to a reader."""
    match event["event"]:
        case "run_start":
            resumed = f", resumed from {event['resumed_from']}" if event.get("resumed_from") else ""
            return f"{event.get('network')} on {event.get('ranks')} × {event.get('device')}{resumed}"
        case "step":
            left_s = run.left_s()
            left = f"  at most {clock(left_s)} left" if math.isfinite(left_s) else ""
            return (
                f"epoch {event.get('epoch')}/{run.num_epochs():.0f}  step {number(event.get('step')) + 1:.0f}  "
                f"loss {number(event.get('loss')):.4g}  lr {number(event.get('lr')):.3g}  "
                f"{number(event.get('images_per_s')):.1f} img/s{left}"
            )
        case "evaluation":
            metrics = event.get("metrics")
            values = metrics if isinstance(metrics, dict) else {}
            judged = (f"{name} {number(values.get(name)):.4f}" for name in run.record.judged_by)
            targets = ", ".join(f"{name} {target:g}" for name, target in run.record.targets.items())
            return f"evaluation after epoch {event.get('epoch')}: {', '.join(judged)} (target {targets or 'none'})"
        case "summary":
            return times(run)
        case _:
            return ""


def curve(values: Sequence[float], blocks: str, *, least: float | None = None, most: float | None = None) -> str:
    """A line of blocks, the means of as many neighbours as it takes; what is no number is a blank."""
    every = max(1, -(-len(values) // CURVE_WIDTH))
    means = [sum(part) / len(part) for part in (values[i : i + every] for i in range(0, len(values), every))]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low = min(finite) if least is None else least
    span = (max(finite) if most is None else most) - low
    heights = [
        min(len(blocks) - 1, max(0, int((mean - low) / span * len(blocks)))) if span > 0 else 0 for mean in finite
    ]
    drawn = iter(heights)
    return "".join(blocks[next(drawn)] if math.isfinite(mean) else " " for mean in means)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def watch(run: Watched, console: Console, wait: Callable[[], None]) -> None:
    """Show the run until it has ended; `wait` is called between two looks at its files."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            for _ in looks(run, wait):
                live.update(view(run, ascii_only=console.options.ascii_only), refresh=True)
        return
    warned: set[str] = set()
    for events in looks(run, wait):
        texts = [line(event, run) for event in events]
        fresh = [warning for warning in run.warnings() if warning.split(":")[0] not in warned]
        for warning in run.warnings():
            warned.add(warning.split(":")[0])
        for text in [*texts, *(f"warning: {warning}" for warning in fresh)]:
            if text:
                print(text, file=console.file, flush=True)


def looks(run: Watched, wait: Callable[[], None]) -> Iterator[list[dict[str, Any]]]:
    """What is new in each look, until the run has ended."""
    while True:
        yield run.read()
        if run.follower.over:
            return
        wait()


def newest(under: Path) -> Path | None:
    """The folder of the run that wrote something last, of all below a folder."""
    files = [(path.stat().st_mtime, path) for path in under.glob(f"**/{METRICS}")]
    return max(files)[1].parent if files else None


def main(arguments: list[str] | None = None) -> int:
    """Watch the run that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m detection.report.watch", description="Watch a run in progress.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="its folder; default: the newest")
    parser.add_argument("--under", type=Path, default=Path("results"), help="where to look for it (%(default)s)")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="look this often (%(default)s)")
    options = parser.parse_args(arguments)
    folder = options.run or newest(options.under)
    if folder and folder.is_dir() and not (folder / METRICS).exists():
        folder = newest(folder) or folder  # a series of runs: the one that goes on
    if folder is None:
        print(f"error: no run is below {options.under}. Name a run's folder, or pass --under.", file=sys.stderr)
        return 2
    if not folder.is_dir():
        print(f"error: {folder} is no folder. Name that of a run.", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another
    try:
        watch(Watched(folder), Console(highlight=False), lambda: time.sleep(max(0.1, options.every)))
    except (KeyboardInterrupt, BrokenPipeError):  # whoever watched has seen enough
        sys.stderr.close()  # the interpreter would complain of the pipe
    return 0


if __name__ == "__main__":
    sys.exit(main())
