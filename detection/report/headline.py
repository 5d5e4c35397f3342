"""Header of a report: the verdict on one run, or the score of several."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from detection.report.charts import metric_name
from detection.report.formatting import (
    format_duration,
    format_metric,
    format_rate,
    format_timestamp,
    format_value,
    percent_of,
)
from detection.report.run_record import RunRecord
from detection.report.series import Series
from mlperf.compliance import Verdict
from mlperf.score import read_run


def title(records: Sequence[RunRecord]) -> str:
    """Return the title: the network, and the system of a single run."""
    record = records[0]
    network = record.metadata.get("network") or record.config.get("network") or record.benchmark or "a detector"
    if len(records) > 1:
        return f"{len(records)} runs: {network}"
    action = {"train": "trained", "evaluate": "evaluated"}.get(record.mode, record.mode)
    return f"{network}, {action}{f' on {record.system}' if record.system else ''}"


def run_headline(record: RunRecord, verdict: Verdict | None, *, live: bool) -> dict[str, Any]:
    """Return the header of one run. live: it may be in progress."""
    text, tone, reason = describe_end(record, live=live)
    return {
        "name": record.name,
        "verdict": text,
        "tone": tone,
        "reason": reason,
        "scores": [describe_metric(record, name) for name in record.target_metrics if name in record.metrics],
        "facts": run_facts(record, verdict, reached=tone == "good"),
        "compliance_messages": verdict.messages if verdict else [],
        "warnings": record.warnings,
    }


def describe_end(record: RunRecord, *, live: bool = False) -> tuple[str, str, str]:
    """Return how a run ended, the tone "good", "bad" or "", and the reason or the progress."""
    if record.mode.startswith("bench"):  # bench-train, bench-infer, and benchmark-... in older runs
        return "Benchmark: no training to a target", "", ""
    if record.mode != "train":
        return "Evaluated", "", ""
    if record.status == "success":
        return "Target reached", "good", ""
    at = record.last_step
    if record.status:
        if record.stop_reason or not record.metrics:
            place = f"after {at}" if at else "before the first recorded step"
            return "Aborted", "bad", f"Stopped {place}: {record.stop_reason or 'the reason is not recorded'}"
        return "Target not reached", "bad", describe_gaps(record)
    if live:
        return (
            "In progress",
            "",
            f"At {at} of at most {record.metadata.get('epochs')}" if at else "Before the first step",
        )
    return (
        "No end is recorded: the run is still in progress or was killed",
        "bad",
        f"Its last record is of {at}" if at else "It recorded no step",
    )


def throughput(record: RunRecord) -> float:
    """Return a run's training images per second, from its log if metrics.jsonl is missing. NaN if unknown."""
    rate = record.images_per_s
    if math.isnan(rate) and record.log:
        with suppress(OSError, ValueError):  # the record's notes say so
            return read_run(record.log).images_per_s or math.nan
    return rate


def describe_gaps(record: RunRecord) -> str:
    """Return how far the metrics stayed below their targets."""
    gaps = [
        f"{name} {record.metrics[name]:.4f} is {target - record.metrics[name]:.4f} below the target {target:g}"
        for name, target in record.targets.items()
        if record.metrics.get(name, math.inf) < target
    ]
    return f"After epoch {record.epoch}, " + " and ".join(gaps) if gaps else ""


def describe_metric(record: RunRecord, name: str) -> dict[str, Any]:
    """Return a target metric, its target, and both as places on a bar."""
    value, target = record.metrics[name], record.targets.get(name, math.nan)
    known = [number for number in (value, target) if math.isfinite(number)]
    scale = min(1.0, 1.25 * max(0.01, *known)) if known else 1.0
    has_target = math.isfinite(target)
    return {
        "name": metric_name(name),
        "value": format_metric(value),
        "percent": percent_of(value, scale),
        "target": f"{target:g}" if has_target else "",
        "target_percent": percent_of(target, scale),
        "tone": ("good" if value >= target else "bad") if has_target else "",
        "note": "",
    }


def run_facts(record: RunRecord, verdict: Verdict | None, *, reached: bool) -> list[tuple[str, str, str]]:
    """Return the key facts of a run as (name, value, note), without those that it did not record."""
    metadata = record.metadata
    epochs = f"of at most {metadata['epochs']}" if metadata.get("epochs") else ""
    ranks = metadata.get("ranks", 1)
    rate = throughput(record)
    per_rank = f"{format_rate(rate / ranks)} per rank" if isinstance(ranks, int) and ranks > 1 else ""
    batch = metadata.get("global_batch_size") or record.log_value("global_batch_size")
    device = f"{ranks} × {metadata['device']}" if metadata.get("device") else record.system
    facts = [
        ("time to target" if reached else "time", format_duration(record.run_s), ""),
        ("images per second", format_rate(rate), per_rank),
        ("epochs", str(record.epoch), epochs),
        ("hardware", device or "–", record.system if metadata.get("device") else ""),
        ("global batch", format_value(batch), format_value(metadata.get("precision") or "")),
        ("date", *start_time(record)),
        ("commit", record.commit[:10] or "–", "with changes" if "with changes" in record.commit else ""),
        ("MLPerf compliance", *compliance_text(record, verdict)),
    ]
    return [(name, value, "" if note == "–" else note) for name, value, note in facts if value != "–"]


def start_time(record: RunRecord) -> tuple[str, str]:
    """Return date and time of the start, – if unknown."""
    text = format_timestamp(str(record.metadata.get("start") or ""))
    if not text and record.log_events and not record.clock_error:
        text = datetime.fromtimestamp(record.log_events[0].time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    date, _, time = text.partition(" ")
    return date or "–", time


def compliance_text(record: RunRecord, verdict: Verdict | None) -> tuple[str, str]:
    """Return the checker's verdict and its ruleset, or why there is none."""
    if verdict is not None:
        return "PASS" if verdict.passed else "FAIL", f"ruleset {verdict.ruleset}"
    return "not checked", "pass a --ruleset" if record.log else "no log"


def series_headline(records: Sequence[RunRecord], series: Sequence[Series]) -> dict[str, Any]:
    """Return the header of several runs: the score if they are one result, and how many reached the target."""
    reached = sum(record.status == "success" for record in records)
    result = series[0] if len(series) == 1 and len(series[0].runs) == len(records) else None
    scores, facts = [], []
    if result:
        score = result.score
        scores.append({
            "name": "MLPerf score" if score.seconds is not None else "No MLPerf score",
            "value": format_duration(score.seconds if score.seconds is not None else math.nan),
            "percent": None,
            "target": "",
            "tone": "",
            "note": score.why,
        })  # fmt: skip
        facts = [
            ("fastest", format_duration(score.fastest_s or math.nan), ""),
            ("slowest", format_duration(score.slowest_s or math.nan), ""),
            ("standard deviation", format_duration(score.stddev_s or math.nan), spread_text(result)),
            ("epochs", f"{result.epochs:.0f}" if math.isfinite(result.epochs) else "–", "median"),
            ("images per second", format_rate(result.images_per_s), "median"),
            ("system", result.entry.platform, result.entry.org),
            ("global batch", str(result.entry.global_batch_size), f"{result.entry.division} division"),
        ]
        if score.interval_s:
            low_s, high_s = score.interval_s
            text = f"{format_duration(low_s)} to {format_duration(high_s)}"
            facts.insert(3, ("95% confidence interval", text, "of the mean, Student's t"))
    return {
        "verdict": f"{reached} of {len(records)} runs reached the target",
        "tone": "good" if reached == len(records) else "bad",
        "reason": "" if result else "They are not runs of one result: their settings differ",
        "scores": scores,
        "facts": [fact for fact in facts if fact[1] != "–"],
        "compliance_messages": [],
        "warnings": [],
    }


def spread_text(result: Series) -> str:
    """Return the standard deviation in percent of the mean."""
    score = result.score
    return f"{score.stddev_s / score.mean_s:.1%} of the mean" if score.stddev_s and score.mean_s else ""


def run_rows(
    records: Sequence[RunRecord], verdicts: Mapping[str, Verdict | None], num_own: int
) -> list[dict[str, Any]]:
    """Return one row per run: how it ended, its time as a bar, and its metrics. num_own: those of the report itself."""
    longest_s = max((record.run_s for record in records if math.isfinite(record.run_s)), default=0.0)
    rows = []
    for index, record in enumerate(records):
        text, tone, reason = describe_end(record)
        batch = record.metadata.get("global_batch_size") or record.log_value("global_batch_size")
        rows.append({
            "name": record.name,
            "style": index if index < num_own else None,
            "verdict": text,
            "tone": tone,
            "reason": reason,
            "time": format_duration(record.run_s),
            "percent": percent_of(record.run_s, longest_s),
            "cells": [
                str(record.epoch),
                ", ".join(format_metric(record.metrics.get(name)) for name in record.target_metrics) or "–",
                format_rate(throughput(record)),
                format_value(batch),
                record.system or "–",
                compliance_text(record, verdicts.get(record.name))[0],
            ],
            "warnings": record.warnings if index < num_own else [],
        })  # fmt: skip
    return rows
