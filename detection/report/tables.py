"""Tables of a report: metrics, classes, time, settings and machine."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from detection.report.charts import metric_name
from detection.report.formatting import (
    format_duration,
    format_metric,
    format_percent,
    format_timestamp,
    format_value,
    percent_of,
)
from detection.report.run_record import RunRecord, to_float
from mlperf import rules

# Keys of run_start in metrics.jsonl about the machine and versions, and keys that the report shows elsewhere.
METADATA_KEYS = (
    "start", "network", "device", "ranks", "precision", "torch", "packages", "seed", "global_batch_size", "resumed_from"
)  # fmt: skip
EXCLUDED_KEYS = ("note", "ap_by_epoch", "minutes_by_epoch", "init_s", "run_s", "status", "epoch_s", "metrics")
CLASS_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def metric_groups(record: RunRecord) -> list[dict[str, Any]]:
    """Return all metrics of a run's last evaluation, boxes and masks apart."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, value in record.metrics.items():
        group = "Masks" if key.startswith("mask_") else "Boxes"
        name = metric_name(key.removeprefix("mask_"))
        bar = percent_of(value, 1.0)
        groups.setdefault(group, []).append({"key": key, "name": name, "value": format_metric(value), "percent": bar})
    return [{"name": name, "metrics": metrics} for name, metrics in groups.items()]


def metric_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the table of all metrics of the last evaluations, or an empty one."""
    with_metrics = [record for record in records if record.metrics]
    names = dict.fromkeys(name for record in with_metrics for name in record.metrics)
    rows = [[metric_name(name), *(format_metric(r.metrics.get(name)) for r in with_metrics)] for name in names]
    return {"names": [record.name for record in with_metrics], "rows": rows}


def class_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return AP by class, most frequent first: all metrics of one run, or AP of several. Empty without classes."""
    with_classes = [record for record in records if record.classes]
    if not with_classes:
        return {}
    rows_by_run = [{str(row.get("name")): row for row in record.classes} for record in with_classes]
    objects: dict[str, float] = {}
    for run_rows in rows_by_run:
        for name, row in run_rows.items():
            objects.setdefault(name, to_float(row.get("objects")))
    if len(with_classes) == 1:
        used = [name for name in CLASS_METRICS if any(name in row for row in rows_by_run[0].values())]
        columns = [(metric_name(name), rows_by_run[0], name) for name in used]
    else:
        columns = [(run.name, run_rows, "AP") for run, run_rows in zip(with_classes, rows_by_run, strict=True)]
    table = []
    for name in sorted(objects, key=lambda name: 0 if math.isnan(objects[name]) else -objects[name]):
        values = [to_float(rows_of.get(name, {}).get(key)) for _, rows_of, key in columns]
        cells = [{"text": f"{v:.3f}" if math.isfinite(v) else "–", "percent": percent_of(v, 1.0)} for v in values]
        table.append({"name": name, "objects": f"{objects[name]:.0f}", "cells": cells})
    return {"names": [name for name, _, _ in columns], "rows": table}


def time_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return each run's time by kind of work, and its timeline."""
    seconds_by_run = {r.name: seconds for r in records if sum((seconds := r.seconds_by_kind()).values()) > 0}
    kinds = list(dict.fromkeys(kind for seconds in seconds_by_run.values() for kind in seconds))
    rows = []
    for name, seconds in seconds_by_run.items():
        total_s = sum(seconds.values())
        cells = [f"{format_duration(seconds[kind])} ({format_percent(seconds[kind] / total_s)})" for kind in kinds]
        rows.append([name, format_duration(total_s), *cells])
    return {"kinds": kinds, "rows": rows, "timelines": timelines(records)}


def timelines(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return init, epochs and evaluations of each run as spans, in percent of the longest run."""
    with_intervals = [(record, intervals) for record in records if (intervals := record.intervals())]
    longest_s = max((interval.stop_s for _, intervals in with_intervals for interval in intervals), default=0.0)
    rows = []
    for record, intervals in with_intervals:
        spans = [
            {
                "kind": interval.kind + (" odd" if (interval.epoch or 0) % 2 else ""),
                "left": percent_of(interval.start_s, longest_s),
                "width": max(0.1, percent_of(interval.stop_s - interval.start_s, longest_s)),
                "text": f"{interval.kind}{f' {interval.epoch}' if interval.epoch else ''}: "
                + format_duration(interval.stop_s - interval.start_s),
            }
            for interval in intervals
        ]
        alt = ", ".join(f"{kind} {format_duration(s)}" for kind, s in record.seconds_by_kind().items())
        rows.append({"name": record.name, "spans": spans, "alt": alt})
    return rows


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


def settings_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the settings that differ between runs, those given as flags of a single run, and the others."""
    with_config = [record for record in records if record.config]
    differing, same, flags = [], [], []
    for key in dict.fromkeys(key for record in with_config for key in record.config):
        values = [format_value(record.config.get(key)) for record in with_config]
        if len(set(values)) > 1:
            differing.append([key, *values])
        elif len(records) == 1 and key in (records[0].metadata.get("flags") or ()):
            flags.append([key, *values])
        else:
            same.append([key, values[0]])
    names = [record.name for record in with_config]
    return {"names": names, "differing": differing, "flags": flags, "same": same}


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
        "rows": [[key.replace("_", " "), *(metadata.get(key, "") for metadata in metadata_by_run)] for key in keys],
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
    if record.commit:
        metadata["commit"] = record.commit
    return {str(name): format_value(value) for name, value in metadata.items()}
