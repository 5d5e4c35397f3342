"""Report on one or several runs as a single HTML file without external resources.

    python -m detection.report RUN... [--against LOG...] [--out FILE] [--png DIR]

RUN is a run folder, the folder of a series (NEXP), an MLPerf log, or a folder of logs. LOG is the same, plotted for
comparison. The report omits or notes what a run did not record. Exit status: 0, or 2 if a run cannot be read or the
report cannot be written.
"""

import argparse
import base64
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detection.atomic_file import atomic_write
from detection.report.run_record import RunRecord, disambiguate_names, read_runs, to_float
from mlperf import compliance, rules
from mlperf.errors import report_errors
from mlperf.reference_points import ReferencePoint

NUM_VISIBLE_CLASSES = 15
IMAGE_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}

# Keys of run_start in metrics.jsonl about the machine and versions, and keys that the report shows elsewhere.
METADATA_KEYS = (
    "start", "network", "device", "ranks", "precision", "torch", "seed", "global_batch_size", "resumed_from"
)  # fmt: skip
EXCLUDED_KEYS = ("note", "ap_by_epoch", "minutes_by_epoch", "init_s", "run_s", "status", "epoch_s", "metrics")


def make_report(
    records: Sequence[RunRecord], against: Sequence[RunRecord] = (), ruleset: str = "", png: str = ""
) -> str:
    """Return the report as HTML.

    ruleset: used to check logs that name none. png: folder to write the plots to as PNG files, if set.
    """
    import jinja2  # with matplotlib 0.5 s, which --help does not need
    from markupsafe import Markup

    from detection.report import plots

    all_records = disambiguate_names([*records, *against])
    records, against = all_records[: len(records)], all_records[len(records) :]
    points = reference_points(records, ruleset)
    all_plots = plots.make_plots(records, against, points)
    if png:
        Path(png).mkdir(parents=True, exist_ok=True)
        for plot in all_plots:
            plot.write_png(Path(png))
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return templates.get_template("report.html").render(
        title=title(records),
        palette=plots.PALETTE,
        runs=[header(record, check_compliance(record, ruleset)) for record in records],
        plots=[{"name": p.name, "title": p.title, "alt": p.alt, "svg": Markup(p.to_svg())} for p in all_plots],
        target_metrics=plots.target_metrics(records),
        points=points,
        metrics=metric_table(all_records),
        classes=class_table(records),
        overview=overview_rows(all_records),
        times=time_table(all_records),
        phases=phase_table(records),
        images=[{"name": record.name, "images": images} for record in records if (images := inline_images(record))],
        settings=settings_table(records),
        hyperparameters=hyperparameter_table(all_records),
        machine=machine_table(records),
        sources=", ".join(record.name for record in all_records),
    )


def title(records: Sequence[RunRecord]) -> str:
    """Return the title: the network, and the system of a single run."""
    record = records[0]
    network = record.metadata.get("network") or record.config.get("network") or record.benchmark or "a detector"
    if len(records) > 1:
        return f"{len(records)} runs: {network}"
    action = {"train": "trained", "evaluate": "evaluated"}.get(record.mode, record.mode)
    return f"{network}, {action}{f' on {record.system}' if record.system else ''}"


def check_compliance(record: RunRecord, ruleset: str) -> compliance.Verdict | None:
    """Run the official checker on a run's log. Return None if there is no log or no known ruleset."""
    ruleset = str(record.config.get("ruleset") or ruleset)
    return compliance.check(record.log, ruleset) if record.log and ruleset in rules.RULESETS else None


def header(record: RunRecord, verdict: compliance.Verdict | None) -> dict[str, Any]:
    """Return the header card of a run."""
    text, tone = status_text(record)
    rows = []
    if math.isfinite(record.run_s):
        rows.append(("time to target" if tone == "good" else "time", duration(record.run_s)))
    rows.append(("epochs", f"{record.epoch}"))
    for name in record.target_metrics:
        if name in record.metrics:
            target = record.targets.get(name)
            rows.append((name, f"{record.metrics[name]:.4f}" + (f", target {target:g}" if target is not None else "")))
    rows.append(("system", record.system or "not recorded"))
    if device := record.metadata.get("device"):
        rows.append(("device", f"{record.metadata.get('ranks', 1)} × {device}"))
    rows.append(("MLPerf compliance", compliance_text(record, verdict)))
    return {
        "name": record.name,
        "status": text,
        "tone": tone,
        "rows": rows,
        "compliance_messages": verdict.messages if verdict else [],
        "warnings": record.warnings,
    }


def status_text(record: RunRecord) -> tuple[str, str]:
    """Return how a run ended, and the tone "good", "bad" or ""."""
    if record.mode.startswith("bench"):  # bench-train, bench-infer, and benchmark-... in older runs
        return "Benchmark: no training to a target", ""
    if record.mode != "train":
        return "Evaluated", ""
    if record.status == "success":
        return "Target reached", "good"
    if record.status:
        stopped_early = record.summary_event.get("stopped_by") or not record.metrics
        return "Aborted" if stopped_early else "Target not reached", "bad"
    return "No end is recorded: the run is still in progress or was killed", "bad"


def compliance_text(record: RunRecord, verdict: compliance.Verdict | None) -> str:
    """Return the checker's verdict, or why there is none."""
    if verdict is not None:
        return f"{'PASS' if verdict.passed else 'FAIL'} ({verdict.ruleset})"
    return "not checked: pass a --ruleset" if record.log else "no log"


def reference_points(records: Sequence[RunRecord], ruleset: str) -> list[ReferencePoint]:
    """Return the reference convergence points of runs on the benchmark's own data set.

    ruleset: of logs that name none.
    """
    points: list[ReferencePoint] = []
    for record in records:
        benchmark = rules.BENCHMARKS.get(record.benchmark)
        dataset = record.log_value("dataset") or record.config.get("dataset")
        if benchmark and dataset in (None, benchmark.dataset):
            version = record.config.get("ruleset") or ruleset or rules.newest_ruleset(record.benchmark)
            found = rules.nearest_reference_points(record.benchmark, version) if version in benchmark.names else ()
            points += [point for point in found if point not in points]
    return points


def metric_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the table of all metrics of the last evaluations, or an empty one."""
    with_metrics = [record for record in records if record.metrics]
    if not with_metrics:
        return {}
    names = dict.fromkeys(name for record in with_metrics for name in record.metrics)
    rows = [[name, *(format_metric(record.metrics.get(name)) for record in with_metrics)] for name in names]
    return {"names": [record.name for record in with_metrics], "rows": rows}


def format_metric(value: float | None) -> str:
    """Format a COCO metric, which is -1 if there is no ground truth."""
    return "" if value is None else "–" if value < 0 else f"{value:.4f}"


def class_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the table of AP by class, most frequent first, or an empty one."""
    with_classes = [record for record in records if record.classes]
    if not with_classes:
        return {}
    rows_by_run = [{str(row.get("name")): row for row in record.classes} for record in with_classes]
    objects: dict[str, float] = {}
    for rows in rows_by_run:
        for name, row in rows.items():
            objects.setdefault(name, to_float(row.get("objects")))
    table = []
    for name in sorted(objects, key=lambda name: 0 if math.isnan(objects[name]) else -objects[name]):
        values = [to_float(rows.get(name, {}).get("AP")) for rows in rows_by_run]
        cells = [
            {"text": f"{v:.3f}", "percent": round(100 * max(0.0, min(1.0, v)), 1)}
            if math.isfinite(v)
            else {"text": "–", "percent": 0}
            for v in values
        ]
        table.append({"name": name, "objects": f"{objects[name]:.0f}", "cells": cells})
    parts = [table[:NUM_VISIBLE_CLASSES], table[NUM_VISIBLE_CLASSES:]]
    return {"names": [record.name for record in with_classes], "parts": [part for part in parts if part]}


def overview_rows(records: Sequence[RunRecord]) -> list[list[str]]:
    """Return one row per run: name, status, time, epochs, AP, global batch, system."""
    return [
        [
            record.name,
            status_text(record)[0],
            duration(record.run_s) if math.isfinite(record.run_s) else "–",
            str(record.epoch),
            format_metric(record.metrics.get("AP")),
            format_value(record.metadata.get("global_batch_size") or record.log_value("global_batch_size")),
            record.system,
        ]
        for record in records
    ]


def time_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the table of each run's time by kind of work."""
    seconds_by_run = {
        record.name: seconds for record in records if sum((seconds := record.seconds_by_kind()).values()) > 0
    }
    kinds = list(dict.fromkeys(kind for seconds in seconds_by_run.values() for kind in seconds))
    rows = []
    for name, seconds in seconds_by_run.items():
        total_s = sum(seconds.values())
        cells = [f"{duration(seconds[kind])} ({format_percent(seconds[kind] / total_s)})" for kind in kinds]
        rows.append([name, duration(total_s), *cells])
    return {"kinds": kinds, "rows": rows}


def phase_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the table of step time by phase, for runs that measured it."""
    results = [
        (record.name, result.get("input"), fractions)
        for record in records
        for result in record.summary_event.get("results") or []
        if isinstance(result, dict)
        # The second: name in older runs.
        and isinstance(fractions := result.get("time_fraction", result.get("share")), dict)
    ]
    names = list(dict.fromkeys(str(name) for _, _, fractions in results for name in fractions))
    rows = [
        [run, format_value(kind), *(format_percent(to_float(fractions.get(name))) for name in names)]
        for run, kind, fractions in results
    ]
    return {"names": names, "rows": rows}


def inline_images(record: RunRecord) -> list[dict[str, str]]:
    """Return a run's images as data URIs with captions, without unreadable ones."""
    images = []
    for image in record.images:
        file = image["file"]
        if (media_type := IMAGE_TYPES.get(file.suffix.lower())) and file.is_file():
            content = base64.b64encode(file.read_bytes()).decode()
            images.append({"uri": f"data:{media_type};base64,{content}", "caption": str(image.get("caption", ""))})
    return images


def settings_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the settings that differ between runs, and those that are equal."""
    with_config = [record for record in records if record.config]
    differing, same = [], []
    for key in dict.fromkeys(key for record in with_config for key in record.config):
        values = [format_value(record.config.get(key)) for record in with_config]
        if len(set(values)) > 1:
            differing.append([key, *values])
        else:
            same.append([key, values[0]])
    return {"names": [record.name for record in with_config], "differing": differing, "same": same}


def hyperparameter_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the hyperparameters in the MLPerf logs."""
    with_log = [record for record in records if record.log_events]
    keys = [rules.hyperparameter_keys(r.benchmark) for r in with_log if r.benchmark in rules.BENCHMARKS]
    rows = [
        [key, *("" if record.log_value(key) is None else format_value(record.log_value(key)) for record in with_log)]
        for key in dict.fromkeys(key for benchmark_keys in keys for key in benchmark_keys)
        if any(record.log_value(key) is not None for record in with_log)
    ]
    return {"names": [record.name for record in with_log], "rows": rows}


def machine_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the table of machines and versions."""
    metadata_by_run = [machine_metadata(record) for record in records]
    keys = dict.fromkeys(key for metadata in metadata_by_run for key in metadata)
    return {
        "names": [record.name for record in records],
        "rows": [[key, *(metadata.get(key, "") for metadata in metadata_by_run)] for key in keys],
    }


def machine_metadata(record: RunRecord) -> dict[str, str]:
    """Return machine and versions of one run by name."""
    metadata = {name: record.metadata.get(name) for name in METADATA_KEYS if record.metadata.get(name) is not None}
    if isinstance(start := metadata.get("start"), str):
        metadata["start"] = format_timestamp(start)
    if isinstance(machine := record.metadata.get("machine"), Mapping):
        metadata |= machine
    if not metadata:
        platform = record.log_value("submission_platform")
        metadata = {"platform": platform} if platform else {}
    for name, value in record.summary.items():
        if isinstance(value, Mapping) and name == "versions":
            metadata |= value
        elif name not in EXCLUDED_KEYS and not isinstance(value, Mapping | list) and value not in ("", None):
            metadata[name] = value
    for commit in record.log_events_named("commit")[-1:]:
        metadata["commit"] = f"{commit.value}{', with changes' if commit.metadata.get('dirty') else ''}"
    return {str(name): format_value(value) for name, value in metadata.items()}


def format_timestamp(text: str) -> str:
    """Format a date and time of metrics.jsonl to the second, in UTC."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return text


def format_value(value: Any) -> str:
    """Format the value of a setting."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    return "–" if value is None or value == "" else str(value)


def format_percent(fraction: float) -> str:
    """Format a fraction as percent."""
    return f"{fraction:.1%}" if math.isfinite(fraction) else "–"


def duration(seconds: float) -> str:
    """Format seconds for people, such as 93.2 s or 10 min 27 s."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


@report_errors
def main(arguments: list[str] | None = None) -> int:
    """Write the report that the command line requests, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.report",
        description="Report on runs as one HTML file. `python -m detection.report watch` shows a run in progress.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or MLPerf log")
    parser.add_argument("--against", nargs="+", type=Path, default=[], metavar="LOG", help="logs to compare with")
    parser.add_argument(
        "--out", type=Path, help="default: report.html in the run folder, or here for several runs or a log"
    )
    parser.add_argument("--png", default="", metavar="DIR", help="also write the plots to this folder as PNG files")
    parser.add_argument("--ruleset", default="", choices=rules.RULESETS, help="ruleset for logs that name none")
    options = parser.parse_args(arguments)
    records = [record for path in options.runs for record in read_runs(path)]
    against = [record for path in options.against for record in read_runs(path)]
    folder = options.runs[0] if len(options.runs) == 1 and options.runs[0].is_dir() else Path()
    out = options.out or folder / "report.html"
    text = make_report(records, against, options.ruleset, options.png)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"report: {out}")
    return 0
