"""Live view of a run in the terminal or in a browser.

    python -m detection.report watch [RUN] [--under results] [--serve PORT]

RUN is a run folder. The default is the latest run below `results`. A terminal shows the view in place, a pipe gets one
line per event. It ends with the run. `--serve` serves the report as a web page that follows the run, until Ctrl-C.
Ctrl-C ends the view without affecting the run. Exit status: 0, or 2 if there is no run.
"""

import argparse
import io
import itertools
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

from detection.engine.duration import format_hms
from detection.report.run_record import RunRecord, parse_event, read_json, run_index, to_float
from detection.run_dir import CONFIG, METRICS, log_path
from mlperf import log
from mlperf.errors import InputError, report_errors

SPARKLINE_WIDTH = 20
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
STALL_TIMEOUT_S = 120
STALL_FACTOR = 10
"""A run stalls if it writes nothing for `STALL_TIMEOUT_S` and for this multiple of the longest gap between events."""


class JsonlTail:
    """Reader of a growing metrics.jsonl, which a resumed run may have truncated."""

    def __init__(self, path: Path):
        self.path = path
        self.events: list[dict[str, Any]] = []
        self.num_bytes = 0
        self.partial = b""

    def poll(self) -> list[dict[str, Any]]:
        """Return the events since the last call. An incomplete line waits for its end."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.num_bytes:
                    self.events, self.num_bytes, self.partial = [], 0, b""
                file.seek(self.num_bytes)
                content = file.read()
        except FileNotFoundError:
            return []
        self.num_bytes += len(content)
        *lines, self.partial = (self.partial + content).split(b"\n")
        events = [event for line in lines if (event := parse_event(line)) is not None]
        self.events += events
        return events

    @property
    def finished(self) -> bool:
        """True once the last event is the summary."""
        return bool(self.events) and self.events[-1]["event"] == "summary"


class WatchedRun:
    """State of a run in progress."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tail = JsonlTail(folder / METRICS)
        self.config: dict[str, Any] = {}
        self.last_event_s = time.monotonic()

    def poll(self) -> list[dict[str, Any]]:
        """Read and return the new events."""
        if not self.config:
            self.config = read_json(self.folder / CONFIG, dict, [])
        events = self.tail.poll()
        if events:
            self.last_event_s = time.monotonic()
        return events

    @property
    def record(self) -> RunRecord:
        """The record of the run so far."""
        return RunRecord(self.folder.name, self.folder, jsonl_events=self.tail.events, config=self.config)

    def events_since_start(self) -> list[dict[str, Any]]:
        """Return the events since the last run_start. For a resumed run, these are the events of its last part."""
        starts = [index for index, event in enumerate(self.tail.events) if event["event"] == "run_start"]
        return self.tail.events[starts[-1] :] if starts else self.tail.events

    def last_event(self, name: str) -> dict[str, Any]:
        """Return the last event with a name, or an empty one."""
        return next((event for event in reversed(self.tail.events) if event["event"] == name), {})

    def num_epochs(self) -> float:
        """Return the maximum number of epochs, NaN if it is not recorded."""
        return to_float(self.last_event("run_start").get("epochs", self.config.get("epochs")))

    def steps_per_epoch(self) -> float:
        """Return the steps of a finished epoch, or derive them from the MLPerf log. NaN if neither is available."""
        epoch = self.last_event("epoch")
        if to_float(epoch.get("epoch")) > 0:
            return to_float(epoch.get("step")) / epoch["epoch"]
        try:
            events = log.read(log_path(self.folder, run_index(self.config)), errors=[])
        except OSError:
            return math.nan
        samples = next((to_float(event.value) for event in events if event.key == "train_samples"), math.nan)
        global_batch_size = to_float(self.last_event("run_start").get("global_batch_size"))
        return math.ceil(samples / global_batch_size) if math.isfinite(samples) and global_batch_size > 0 else math.nan

    def remaining_s(self) -> float:
        """Return the seconds until the last epoch ends without reaching the target, NaN if unknown."""
        steps = [event for event in self.events_since_start() if event["event"] == "step"]
        rates = [to_float(event.get("images_per_s")) for event in steps][-20:]
        global_batch_size = to_float(self.last_event("run_start").get("global_batch_size"))
        last_step = to_float(self.last_event("step").get("step"))
        num_steps = self.num_epochs() * self.steps_per_epoch() - last_step - 1
        if not rates or not math.isfinite(num_steps * global_batch_size) or not median(rates) > 0:
            return math.nan
        eval_epochs = self.config.get("eval_epochs")
        eval_s = [to_float(event.get("seconds")) for event in self.record.events_named("evaluation")]
        evaluated = to_float(self.last_event("evaluation").get("epoch", 0))
        pending = [epoch for epoch in eval_epochs if epoch > evaluated] if isinstance(eval_epochs, list) else []
        train_s = max(0.0, num_steps) * global_batch_size / median(rates)
        return train_s + len(pending) * (median(eval_s) if eval_s else 0.0)

    def time_fractions(self) -> dict[str, float]:
        """Return the fraction of the run time by kind of work. Empty before the first event with a time."""
        events = self.events_since_start()
        total_s = to_float(events[-1].get("time_s")) if events else 0.0
        if not total_s > 0:
            return {}
        seconds = dict.fromkeys(("training", "evaluation"), 0.0)
        last_end_s = 0.0
        for event in events:
            if event["event"] in ("epoch", "evaluation"):
                seconds["training" if event["event"] == "epoch" else "evaluation"] += to_float(event.get("seconds"))
                last_end_s = to_float(event.get("time_s"))
        current: dict[str, Any] = next((event for event in reversed(events) if event["event"] != "summary"), {})
        if current.get("event") == "step":
            seconds["training"] += to_float(current.get("time_s")) - last_end_s
        if not all(map(math.isfinite, seconds.values())):
            return {}
        fractions = {kind: min(1.0, value / total_s) for kind, value in seconds.items()}
        return fractions | {"other": max(0.0, 1 - sum(fractions.values()))}

    def warnings(self) -> list[str]:
        """Return the warnings of the record, and one if the run stalls."""
        record = self.record
        messages = [f"the run stopped early: {record.stop_reason}"] if record.stop_reason else []
        messages += record.warnings
        silent_s = time.monotonic() - self.last_event_s
        times = [to_float(event.get("time_s")) for event in self.events_since_start()]
        longest_gap_s = max((end - start for start, end in itertools.pairwise(times)), default=0.0)
        if not self.tail.finished and silent_s > max(STALL_TIMEOUT_S, STALL_FACTOR * longest_gap_s):
            messages.append(f"no event for {format_hms(silent_s)}: the run may hang, or may have been killed")
        return messages


def render(run: WatchedRun, *, ascii_only: bool = False) -> Panel:
    """Render the view for a terminal of at least 40 columns."""
    record = run.record
    step, evaluation = run.last_event("step"), run.last_event("evaluation")
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    metadata = record.metadata
    if metadata:
        machine = f"{metadata.get('ranks')} × {metadata.get('device')}, {metadata.get('precision')}"
        rows.add_row("run", Text(f"{metadata.get('network')} on {record.system}, {machine}"))
    else:
        rows.add_row("run", Text("not started yet"))
    total = run.num_epochs() * run.steps_per_epoch()
    if step:
        num_steps = to_float(step.get("step")) + 1
        of_total = f"/{total:.0f}" if math.isfinite(total) else ""
        rows.add_row("epoch", Text(f"{step.get('epoch')}/{run.num_epochs():.0f}, step {num_steps:.0f}{of_total}"))
        if math.isfinite(total):
            rows.add_row("", ProgressBar(total=total, completed=num_steps, width=40))
        losses = [to_float(event.get("loss")) for event in record.events_named("step")]
        rows.add_row("loss", Text(f"{losses[-1]:.4g}  {sparkline(losses, blocks)}"))
        rows.add_row("lr", Text(f"{to_float(step.get('lr')):.4g}"))
        rates = [to_float(event.get("images_per_s")) for event in record.events_named("step")]
        rows.add_row("img/s", Text(f"{rates[-1]:.1f}  {sparkline(rates, blocks, minimum=0.0)}"))
    for name in record.target_metrics:
        target = record.targets.get(name, math.nan)
        series = [value for _, value in record.metric_history.get(name, [])]
        target_text = f", target {target:g}" if math.isfinite(target) else ""
        reached = bool(series) and series[-1] >= target
        text = f"{series[-1]:.4f} after epoch {evaluation.get('epoch')}" if series else "not evaluated yet"
        maximum = max([target, *series]) if math.isfinite(target) else None
        line = f"{text}{target_text}  {sparkline(series, blocks, minimum=0.0, maximum=maximum)}"
        rows.add_row(name, Text(line, style="bold green" if reached else ""))
    rows.add_row("time", Text(format_times(run)))
    if fractions := run.time_fractions():
        rows.add_row("", Text(", ".join(f"{kind} {fraction:.0%}" for kind, fraction in fractions.items())))
    parts: list[Any] = [rows]
    parts += [Text(f"! {warning}", style="bold red") for warning in run.warnings()]
    return Panel(Group(*parts), title=Text(record.name), title_align="left", padding=(0, 1), expand=True)


def format_times(run: WatchedRun) -> str:
    """Format the elapsed time, and the remaining time or the result."""
    if run.tail.finished:
        summary = run.record.summary_event
        failure = "stopped early" if summary.get("stopped_by") else "target not reached"
        result = "target reached" if summary.get("converged") else failure
        return f"{format_hms(run.record.run_s)} elapsed, {result}"
    try:
        start = datetime.fromisoformat(str(run.record.metadata.get("start")))
        elapsed_s = (datetime.now(UTC) - start).total_seconds()
    except (ValueError, TypeError):  # older runs have no start, or one without a time zone
        elapsed_s = to_float(run.tail.events[-1].get("time_s")) if run.tail.events else math.nan
    remaining_s = run.remaining_s()
    at_most = f", at most {format_hms(remaining_s)} left" if math.isfinite(remaining_s) else ""
    return f"{format_hms(elapsed_s)} elapsed{at_most}"


def format_event(event: dict[str, Any], run: WatchedRun) -> str:
    """Format an event as a line of text, "" for events without a line."""
    match event["event"]:
        case "run_start":
            resumed = f", resumed from {event['resumed_from']}" if event.get("resumed_from") else ""
            return f"{event.get('network')} on {event.get('ranks')} × {event.get('device')}{resumed}"
        case "step":
            remaining_s = run.remaining_s()
            at_most = f"  at most {format_hms(remaining_s)} left" if math.isfinite(remaining_s) else ""
            return (
                f"epoch {event.get('epoch')}/{run.num_epochs():.0f}  step {to_float(event.get('step')) + 1:.0f}  "
                f"loss {to_float(event.get('loss')):.4g}  lr {to_float(event.get('lr')):.3g}  "
                f"{to_float(event.get('images_per_s')):.1f} img/s{at_most}"
            )
        case "evaluation":
            metrics = event.get("metrics")
            values = metrics if isinstance(metrics, dict) else {}
            results = (f"{name} {to_float(values.get(name)):.4f}" for name in run.record.target_metrics)
            targets = ", ".join(f"{name} {target:g}" for name, target in run.record.targets.items())
            return f"evaluation after epoch {event.get('epoch')}: {', '.join(results)} (target {targets or 'none'})"
        case "summary":
            return format_times(run)
        case _:
            return ""


def sparkline(
    values: Sequence[float], blocks: str, *, minimum: float | None = None, maximum: float | None = None
) -> str:
    """Draw values as a line of blocks, averaged to `SPARKLINE_WIDTH`. A non-finite value is a blank."""
    stride = max(1, -(-len(values) // SPARKLINE_WIDTH))
    means = [sum(group) / len(group) for group in (values[i : i + stride] for i in range(0, len(values), stride))]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low = min(finite) if minimum is None else minimum
    span = (max(finite) if maximum is None else maximum) - low

    def block(mean: float) -> str:
        if not math.isfinite(mean):
            return " "
        return blocks[min(len(blocks) - 1, max(0, int((mean - low) / span * len(blocks)))) if span > 0 else 0]

    return "".join(map(block, means))


def watch(run: WatchedRun, console: Console, wait: Callable[[], None]) -> None:
    """Show the run until it ends. `wait` is called between polls."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            for _ in poll_loop(run, wait):
                live.update(render(run, ascii_only=console.options.ascii_only), refresh=True)
        return
    seen: set[str] = set()
    for events in poll_loop(run, wait):
        lines = [format_event(event, run) for event in events]
        warnings = run.warnings()
        new_warnings = [warning for warning in warnings if warning.split(":")[0] not in seen]
        seen |= {warning.split(":")[0] for warning in warnings}
        for line in [*lines, *(f"warning: {warning}" for warning in new_warnings)]:
            if line:
                print(line, file=console.file, flush=True)


def poll_loop(run: WatchedRun, wait: Callable[[], None]) -> Iterator[list[dict[str, Any]]]:
    """Yield the new events of each poll until the run ends."""
    while True:
        yield run.poll()
        if run.tail.finished:
            return
        wait()


def latest_run(under: Path) -> Path | None:
    """Return the folder below `under` whose run wrote last."""
    files = [(path.stat().st_mtime, path) for path in under.glob(f"**/{METRICS}")]
    return max(files)[1].parent if files else None


@report_errors
def main(arguments: list[str] | None = None) -> int:
    """Watch the run on the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m detection.report watch", description="Watch a run in progress.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="run folder; default: the latest run")
    parser.add_argument("--under", type=Path, default=Path("results"), help="parent of the runs (%(default)s)")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="poll interval (%(default)s)")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the report as a web page in place of the view")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (%(default)s: this machine only)")
    options = parser.parse_args(arguments)
    folder = options.run or latest_run(options.under)
    if folder and folder.is_dir() and not (folder / METRICS).exists():
        folder = latest_run(folder) or folder  # a series: watch its current run
    if folder is None:
        raise InputError(f"no run below {options.under}. Name a run folder, or pass --under.")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Name a run folder.")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that lack a character
    try:
        if options.serve is not None:
            from detection.report import server  # imports jinja2

            server.serve(folder, options.host, options.serve)
        watch(WatchedRun(folder), Console(highlight=False), lambda: time.sleep(max(0.1, options.every)))
    except (KeyboardInterrupt, BrokenPipeError):  # the user has left
        sys.stderr.close()  # otherwise the interpreter complains about the pipe
    return 0
