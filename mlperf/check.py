"""The official checkers as a command: on each log, and on the runs of a result together.

    python -m mlperf.check RUN... [--ruleset 1.1.0] [--json FILE]

prints PASS or FAIL and the checker's reasons for each log. Of two or more logs of one system it also prints the score
and its spread, what the official checkers of seeds and of convergence say of them, and what was published. Exit
status: 0, or 1 if a log failed or the logs together, or 2 if one cannot be read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlperf import published, rcp, score
from mlperf.compliance import Verdict as Verdict
from mlperf.compliance import check as check
from mlperf.published import Published
from mlperf.rcp import Together
from mlperf.rules import RULESETS
from mlperf.score import Entry, Run, Score


@dataclass(frozen=True)
class Result:
    """All that is to be said of the runs of one result; verdicts are in the order of the runs."""

    entry: Entry
    ruleset: str
    runs: list[Run]
    verdicts: list[Verdict]
    score: Score
    together: list[Together]
    published: tuple[Published, ...]


class InputError(ValueError):
    """A user's mistake: the message says what is wrong, where, and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Check the runs named on the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlperf.check", description="Check MLPerf logs of training runs.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="an MLPerf log, or a folder of result_*.txt, as a run's is"
    )
    parser.add_argument(
        "--ruleset", choices=RULESETS, help=f"default: that of the run's configuration, or {RULESETS[-1]}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all of it there")
    options = parser.parse_args(arguments)
    status = 0
    checked: list[tuple[Run, Verdict]] = []
    for named in options.runs:
        try:
            for log in logs(named):
                run, why = _run(log)
                verdict = check(log, options.ruleset or (run and run.ruleset) or RULESETS[-1])
                _print_verdict(log, verdict)
                if run and not (verdict.passed or options.ruleset or run.ruleset):
                    print(f"  {_other_ruleset(log, verdict.ruleset)}")
                status = max(status, 0 if verdict.passed else 1)
                if run:
                    checked.append((run, verdict))
                elif verdict.passed:
                    print(f"  not scored: {why}")
        except OSError as error:
            print(f"error: {named}: {error.strerror}; name a log that can be read.", file=sys.stderr)
            status = 2
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    results = [judge(list(group)) for group in _results(checked)]
    for result in results:
        if len(result.runs) > 1:
            print("\n" + "\n".join(table(result)))
        if any(found.passed is False for found in result.together):
            status = max(status, 1)
    if options.json:
        try:
            options.json.write_text(json.dumps([asdict(result) for result in results], indent=2, default=str) + "\n")
        except OSError as error:
            print(f"error: --json {options.json}: {error.strerror}; name a file that can be written.", file=sys.stderr)
            status = 2
    return status


def logs(named: Path) -> list[Path]:
    """The logs that a RUN of the command line stands for; raises InputError for a folder without one."""
    if not named.is_dir():
        return [named]
    found = sorted(named.glob("result_*.txt"))
    if not found:
        raise InputError(f"{named}: there is no result_*.txt in it; name a log, or the folder of a run.")
    return found


def judge(checked: Sequence[tuple[Run, Verdict]]) -> Result:
    """Judge and score the runs of one result, all of one entry and checked by one ruleset."""
    runs, verdicts = [run for run, _ in checked], [verdict for _, verdict in checked]
    entry, ruleset = runs[0].entry, verdicts[0].ruleset
    failed = [run.path for run, verdict in checked if not verdict.passed]
    together = rcp.check([run.path for run in runs], ruleset, entry.division) if len(runs) > 1 else []
    others = published.of(entry.benchmark) if entry.dataset == score.DATASET else ()
    return Result(entry, ruleset, runs, verdicts, score.score(runs, failed), together, others)


def table(result: Result) -> list[str]:
    """Lay a result out, a line each."""
    lines = [f"{result.entry}, ruleset {result.ruleset}: {len(result.runs)} runs"]
    lines += [f"  {'minutes':>8} {'epochs':>6} {'img/s':>9}  {'':4}  {'accuracy':<28} log"]
    for run, verdict in zip(result.runs, result.verdicts, strict=True):
        state = ("" if run.reached else "not ") + "reached" + ("" if verdict.passed else ", FAIL")
        minutes, speed = _number(run.seconds, 60), _rate(run.images_per_s)
        shown = f"{_accuracy(run.accuracy)}, {state}"
        lines.append(f"  {minutes:>8} {run.epochs or '-':>6} {speed:>9}  {'':4}  {shown:<28} {run.path}")
    scored = result.score
    if scored.seconds is None:
        lines.append(f"  no score: {scored.why}")
    else:
        lines.append(f"  score {scored.seconds / 60:.2f} minutes from run_start to run_stop ({scored.why})")
    if scored.interval_s and scored.deviation_s is not None:
        low_s, high_s = scored.interval_s
        lines.append(
            f"  {_number(scored.fastest_s, 60)} to {_number(scored.slowest_s, 60)} minutes, standard deviation "
            f"{scored.deviation_s / 60:.2f}; 95 % interval of the mean of all {scored.num_runs - scored.num_lost} "
            f"(Student's t): {low_s / 60:.2f} to {high_s / 60:.2f}"
        )
    for found in result.together:
        state = {True: "PASS", False: "FAIL", None: "not judged"}[found.passed]
        lines.append(f"  {found.check}: {state}: {found.text}")
    if result.published:
        lines.append(f"  {'minutes':>8} {'epochs':>6} {'img/s':>9}  {'GBS':>4}  {'published':<28} source")
    for other in result.published:
        minutes, speed = _number(other.minutes, 1), _rate(other.images_per_s)
        numbers = f"{minutes:>8} {other.epochs or '-':>6} {speed:>9}  {other.global_batch_size or '-':>4}"
        lines.append(f"  {numbers}  {other.system:<28} {other.source}")
    return lines


def _run(log: Path) -> tuple[Run | None, str]:
    """What a log says of its run, or None and why not."""
    try:
        return score.read_run(log), ""
    except ValueError as error:  # where it is no MLPerf log, the official checker says what is wrong with it
        return None, str(error)


def _other_ruleset(log: Path, checked: str) -> str:
    """What to say of a log that names no ruleset and does not pass the newest: published ones are of their time."""
    others = [ruleset for ruleset in RULESETS if ruleset != checked and check(log, ruleset).passed]
    told = f"it passes --ruleset {others[-1]}" if others else "nor does it pass an older one"
    return f"the log names no ruleset, so that it was held to {checked}: {told}"


def _results(checked: Sequence[tuple[Run, Verdict]]) -> list[list[tuple[Run, Verdict]]]:
    groups: dict[tuple[score.Entry, str], list[tuple[Run, Verdict]]] = {}
    for run, verdict in checked:
        groups.setdefault((run.entry, verdict.ruleset), []).append((run, verdict))
    return list(groups.values())


def _print_verdict(log: Path, verdict: Verdict) -> None:
    print(f"{'PASS' if verdict.passed else 'FAIL'} {log} (ruleset {verdict.ruleset})")
    for message in verdict.messages:
        print("  " + message.replace("\n", "\n  "))


def _number(value: float | None, unit: float, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _rate(images_per_s: float | None) -> str:
    return _number(images_per_s, 1, digits=1 if images_per_s and images_per_s < 100 else 0)


def _accuracy(value: Any) -> str:
    numbers = value.values() if isinstance(value, dict) else [value]
    return " ".join(f"{number:.4f}" if isinstance(number, int | float) else str(number) for number in numbers)


if __name__ == "__main__":
    sys.exit(main())
