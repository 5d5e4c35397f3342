"""Runs of one entry as a result: MLPerf score, spread, and comparison with other results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from detection.report.formatting import format_duration, format_rate, format_ratio, percent_of
from detection.report.run_record import RunRecord
from mlperf import published, score
from mlperf.compliance import Verdict
from mlperf.score import EntryKey, LoggedRun, Score


@dataclass(frozen=True)
class Series:
    """Runs of one entry: the same system, benchmark, division, global batch and data set."""

    entry: EntryKey
    runs: list[LoggedRun]
    score: Score

    @property
    def name(self) -> str:
        """Name of the system, with the number of runs."""
        return f"{self.entry.platform} ({len(self.runs)} run{'s' if len(self.runs) > 1 else ''})"

    @property
    def images_per_s(self) -> float:
        """Median training throughput of the runs, NaN if unknown."""
        return _median(run.images_per_s for run in self.runs)

    @property
    def epochs(self) -> float:
        """Median epochs of the runs that reached the target, NaN without any."""
        return _median(run.epochs for run in self.runs if run.reached)


def _median(values: Any) -> float:
    known = [value for value in values if value is not None]
    return float(median(known)) if known else math.nan


def group_series(records: Sequence[RunRecord], verdicts: Mapping[str, Verdict | None]) -> list[Series]:
    """Group runs by entry. Runs without a complete log are left out. verdicts: of the compliance checker, by name."""
    runs_by_entry: dict[EntryKey, list[LoggedRun]] = {}
    failed = []
    for record in records:
        if record.log is None:
            continue
        try:
            run = score.read_run(record.log)
        except (OSError, ValueError):  # the record's notes say so
            continue
        runs_by_entry.setdefault(run.entry, []).append(run)
        verdict = verdicts.get(record.name)
        if verdict is not None and not verdict.passed:
            failed.append(run.path)
    return [Series(entry, runs, score.score(runs, failed)) for entry, runs in runs_by_entry.items()]


def comparison(series: Sequence[Series]) -> dict[str, Any]:
    """Return the table of results on the first one's data, with published results. Empty for one result."""
    if not series:
        return {}
    first = series[0]
    series = [
        s for s in series if (s.runs[0].benchmark, s.entry.dataset) == (first.runs[0].benchmark, first.entry.dataset)
    ]
    rows: list[tuple[str, float, float, float, str]] = [
        (s.name, s.score.seconds or math.nan, s.images_per_s, s.epochs, "report" if n else "this result")
        for n, s in enumerate(series)
    ]
    if not first.entry.dataset:
        rows += [
            (
                result.system,
                (result.minutes or math.nan) * 60,
                result.images_per_s,
                result.epochs or math.nan,
                result.source,
            )
            for result in published.for_benchmark(first.runs[0].benchmark)
        ]
    if len(rows) < 2:
        return {}
    longest_s = max((seconds for _, seconds, *_ in rows if math.isfinite(seconds)), default=0.0)
    _, first_s, first_rate, _, _ = rows[0]
    return {
        "first": first.name,
        "rows": [
            {
                "name": name,
                "time": format_duration(seconds),
                "percent": percent_of(seconds, longest_s),
                "time_ratio": format_ratio(seconds / first_s),
                "rate": format_rate(rate),
                "rate_ratio": format_ratio(rate / first_rate),
                "epochs": f"{epochs:.0f}" if math.isfinite(epochs) else "–",
                "source": source,
            }
            for name, seconds, rate, epochs, source in rows
        ],
    }
