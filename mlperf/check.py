"""Command line for the official checkers: each log by itself, and the runs of a result jointly.

    python -m mlperf.check RUN... [--ruleset 3.1.0] [--json FILE]

Print PASS or FAIL and the checker's reasons for each log. For two or more logs of one system, also print the score and
its spread, the verdicts of the official seed and convergence checkers, and published results. Copies of a log count as
one run. Exit status: 0, 1 if a check failed or runs have no score, 2 if a log is unreadable.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlperf import published, rcp, rules, score, stdio
from mlperf.compliance import Verdict as Verdict
from mlperf.compliance import check as check
from mlperf.errors import InputError
from mlperf.log import read
from mlperf.published import PublishedResult
from mlperf.rcp import JointCheck
from mlperf.requirements import RULESETS
from mlperf.score import EntryKey, LoggedRun, Score


@dataclass(frozen=True)
class EntryResult:
    """Verdicts, score and published results for the runs of one entry. verdicts: in the order of the runs."""

    entry: EntryKey
    ruleset: str
    runs: list[LoggedRun]
    verdicts: list[Verdict]
    score: Score
    joint_checks: list[JointCheck]
    published: tuple[PublishedResult, ...]


def main(arguments: list[str] | None = None) -> int:
    """Check the runs on the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlperf.check", description="Check MLPerf logs of training runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="MLPerf log, or folder with result_*.txt")
    parser.add_argument(
        "--ruleset", choices=RULESETS, help="default: the one in the run's configuration, or the benchmark's newest"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")
    options = parser.parse_args(arguments)
    status = 0
    checked: list[tuple[LoggedRun, Verdict]] = []
    first_logs: dict[tuple[str, int, int], Path] = {}
    for path in options.runs:
        try:
            for log in expand_logs(path):
                run, reason = _read_run(log)
                if run and (first_log := first_logs.setdefault(run.identity, log)) is not log:
                    print(f"SAME {log} (the run in {first_log}, which counts once)")
                    continue
                verdict = check(log, options.ruleset or select_ruleset(log))
                _print_verdict(log, verdict)
                if run and not (verdict.passed or options.ruleset or run.ruleset):
                    print(f"  {_suggest_ruleset(run, verdict.ruleset)}")
                status = max(status, 0 if verdict.passed else 1)
                if run:
                    checked.append((run, verdict))
                elif verdict.passed:
                    print(f"  not scored: {reason}")
        except (OSError, InputError) as error:
            unreadable = isinstance(error, OSError) and f"{path}: {error.strerror}. Name a readable log."
            print(f"error: {unreadable or error}", file=sys.stderr)
            status = 2
    results = [score_entry(list(group)) for group in _group_by_entry(checked)]
    for result in results:
        if len(result.runs) > 1:
            print("\n" + "\n".join(format_table(result)))
        elif result.score.seconds is None:
            print(f"  no score: {result.score.why}")
        if any(joint_check.passed is False for joint_check in result.joint_checks):
            status = max(status, 1)
    if not results or any(result.score.seconds is None for result in results):
        status = max(status, 1)
    if options.json:
        try:
            options.json.write_text(json.dumps([asdict(result) for result in results], indent=2, default=str) + "\n")
        except OSError as error:
            print(f"error: --json {options.json}: {error.strerror}. Name a writable file.", file=sys.stderr)
            status = 2
    return status


def expand_logs(path: Path) -> list[Path]:
    """Return the logs of a RUN argument, which is a log or a folder. Raises InputError for a folder without logs."""
    if not path.is_dir():
        return [path]
    paths = sorted(path.glob("result_*.txt"))
    if not paths:
        raise InputError(f"{path}: contains no result_*.txt. Name a log or a run folder.")
    return paths


def select_ruleset(log: Path) -> str:
    """Return the ruleset to check a log with: its own, or the newest that has its benchmark.

    Raises InputError if the log names one that this program does not know.
    """
    name, benchmark, ruleset = score.identify_run(read(log, errors=[]))
    if ruleset and ruleset not in RULESETS:
        raise InputError(f"{log}: names ruleset {ruleset}. Choose one of {', '.join(RULESETS)} with --ruleset")
    return ruleset or (rules.newest_ruleset(benchmark, name) if benchmark else RULESETS[-1])


def score_entry(checked: Sequence[tuple[LoggedRun, Verdict]]) -> EntryResult:
    """Score runs of one entry, all checked with one ruleset, and run the joint checks."""
    runs, verdicts = [run for run, _ in checked], [verdict for _, verdict in checked]
    entry, ruleset = runs[0].entry, verdicts[0].ruleset
    failed = [run.path for run, verdict in checked if not verdict.passed]
    joint_checks = rcp.check([run.path for run in runs], ruleset, entry.division) if len(runs) > 1 else []
    published_results = () if entry.dataset else published.for_benchmark(runs[0].benchmark)
    return EntryResult(entry, ruleset, runs, verdicts, score.score(runs, failed), joint_checks, published_results)


def format_table(result: EntryResult) -> list[str]:
    """Return the lines of a result's table."""
    lines = [f"{result.entry}, ruleset {result.ruleset}: {len(result.runs)} runs"]
    lines += [f"  {'minutes':>8} {'epochs':>6} {'img/s':>9}  {'':4}  {'accuracy':<28} log"]
    for run, verdict in zip(result.runs, result.verdicts, strict=True):
        state = ("" if run.reached else "not ") + "reached" + ("" if verdict.passed else ", FAIL")
        minutes, speed = _format_number(run.seconds, 60), _format_rate(run.images_per_s)
        accuracy = f"{_format_accuracy(run.accuracy)}, {state}"
        lines.append(f"  {minutes:>8} {run.epochs or '-':>6} {speed:>9}  {'':4}  {accuracy:<28} {run.path}")
    scored = result.score
    if scored.seconds is None:
        lines.append(f"  no score: {scored.why}")
    else:
        lines.append(f"  score {scored.seconds / 60:.2f} minutes from run_start to run_stop ({scored.why})")
    if scored.interval_s and scored.stddev_s is not None:
        low_s, high_s = scored.interval_s
        fastest, slowest = _format_number(scored.fastest_s, 60), _format_number(scored.slowest_s, 60)
        lines.append(
            f"  {fastest} to {slowest} minutes, standard deviation {scored.stddev_s / 60:.2f}; 95% confidence interval "
            f"of the mean of all {scored.num_runs - scored.num_failed} (Student's t): "
            f"{low_s / 60:.2f} to {high_s / 60:.2f}"
        )
    for joint_check in result.joint_checks:
        state = {True: "PASS", False: "FAIL", None: "not checked"}[joint_check.passed]
        lines.append(f"  {joint_check.check}: {state}: {joint_check.text}")
    if result.published:
        lines.append(f"  {'minutes':>8} {'epochs':>6} {'img/s':>9}  {'GBS':>4}  {'published':<28} source")
    for other in result.published:
        minutes, speed = _format_number(other.minutes, 1), _format_rate(other.images_per_s)
        numbers = f"{minutes:>8} {other.epochs or '-':>6} {speed:>9}  {other.global_batch_size or '-':>4}"
        lines.append(f"  {numbers}  {other.system:<28} {other.source}")
    return lines


def _read_run(log: Path) -> tuple[LoggedRun | None, str]:
    """Read a run from its log, or return None and the reason."""
    try:
        return score.read_run(log), ""
    except ValueError as error:  # for a file that is not an MLPerf log, the official checker gives the details
        return None, str(error)


def _suggest_ruleset(run: LoggedRun, checked: str) -> str:
    """Suggest another ruleset for a log that names none and fails the newest, as published logs do."""
    name = run.entry.benchmark
    others = [other for other in reversed(RULESETS) if other != checked and rules.identify_benchmark(name, other)]
    passing = next((other for other in others if check(run.path, other).passed), None)
    suggestion = f"it passes --ruleset {passing}" if passing else "it does not pass another one either"
    return f"the log names no ruleset and was checked with {checked}: {suggestion}"


def _group_by_entry(checked: Sequence[tuple[LoggedRun, Verdict]]) -> list[list[tuple[LoggedRun, Verdict]]]:
    groups: dict[tuple[score.EntryKey, str], list[tuple[LoggedRun, Verdict]]] = {}
    for run, verdict in checked:
        groups.setdefault((run.entry, verdict.ruleset), []).append((run, verdict))
    return list(groups.values())


def _print_verdict(log: Path, verdict: Verdict) -> None:
    print(f"{'PASS' if verdict.passed else 'FAIL'} {log} (ruleset {verdict.ruleset})")
    for message in verdict.messages:
        print("  " + message.replace("\n", "\n  "))


def _format_number(value: float | None, unit: float, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _format_rate(images_per_s: float | None) -> str:
    return _format_number(images_per_s, 1, digits=1 if images_per_s and images_per_s < 100 else 0)


def _format_accuracy(value: Any) -> str:
    numbers = value.values() if isinstance(value, dict) else [value]
    return " ".join(f"{number:.4f}" if isinstance(number, int | float) else str(number) for number in numbers)


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main())
