"""Builder of a submission folder, checked by the official package checker.

    python -m mlperf.submission --org O --system S RUN... [--set FIELD=VALUE ...] [--out DIR]

Build DIR/O/ with systems/, results/ and benchmarks/ from runs of one or several benchmarks on one system. The runs of
a benchmark share one recipe, and all runs share one commit of this repository. Exit status: 0, 1 if an official checker
rejects the folder (which is kept for inspection), 2 for invalid runs or arguments (nothing is written).
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlperf import compliance, rules, score, stdio, system_desc
from mlperf.check import expand_logs, select_ruleset
from mlperf.errors import InputError
from mlperf.log import read

ROOT = Path(__file__).resolve().parent.parent
REQUIRED_FILES = ("README.md", "setup.sh", "init_datasets.sh", "run_and_time.sh")
"""Files that an implementation folder must contain."""

_PER_RUN_SETTINGS = {
    "seed", "run_index", "data_dir", "run_dir", "log_dir", "resume", "summary_json", "echo_log",
    "page_cache_dropped", "source_commit", "experiment", "summary", "caches_cleared", "commit",
}  # fmt: skip
"""Settings that may differ between runs of one recipe. The last four are names in older logs."""


@dataclass(frozen=True)
class RunLog:
    """Contents of a run's log, in addition to its times.

    status: availability of the machine. caches_dropped: the page cache was dropped before the run. commit: of the
    program, or None if the log names none. dirty: files differed from the commit. hyperparameters: values of the keys
    in the rules. settings: the configuration, if it is logged.
    """

    run: score.LoggedRun
    status: str
    caches_dropped: bool
    commit: str | None
    dirty: bool
    hyperparameters: Mapping[str, Any]
    settings: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and check the folder that the command line requests, and return the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        run_logs = [_read_run_log(path) for run in options.runs for path in expand_logs(run)]
        ruleset = _select_ruleset(run_logs, options.ruleset)
        for warning in check_runs(run_logs, options.org, options.division, ruleset):
            print(f"warning: {warning}", file=sys.stderr)
        description = _describe_system(run_logs[0], options, ruleset)
        folder = build(options.out, description, run_logs, options.implementation, options.repository)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except InputError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0 if run_official_checkers(folder, description["system_name"], ruleset) else 1


def check_runs(run_logs: Sequence[RunLog], org: str, division: str | None, ruleset: str) -> list[str]:
    """Check the logs against each other and against the rules. Returns warnings, raises InputError with every error.

    org, division: from the command line. The logs must match them. None accepts the logs' division.
    """
    errors, warnings = [], []
    for run_log in run_logs:
        entry, path = run_log.run.entry, run_log.run.path
        if entry.org != org:
            errors.append(f"{path}: submission_org is {entry.org}, and --org is {org}. Run with --org {org}")
        if division and entry.division != division:
            errors.append(f"{path}: submission_division is {entry.division}, and --division is {division}")
        if not rules.identify_benchmark(entry.benchmark, ruleset):
            errors.append(f"{path}: submission_benchmark is {entry.benchmark}, which {ruleset} does not have here")
    errors += _find_differences(run_logs)
    errors += _check_commits(run_logs)
    for group in _group_by_benchmark(run_logs).values():
        verdicts = [(run_log.run.path, compliance.check(run_log.run.path, ruleset)) for run_log in group]
        # The package checker would accept these, with their times.
        errors += [f"{path}: {verdict.disqualified}. Repeat it" for path, verdict in verdicts if verdict.disqualified]
        failed = [
            f"{path}: {' '.join('; '.join(verdict.messages).split())}"
            for path, verdict in verdicts
            if not verdict.passed
        ]
        name = group[0].run.entry.benchmark
        if len(failed) > 1 or len(failed) == len(group):
            errors += [f"{message} (MLPerf {ruleset}: one run of five may fail)" for message in failed]
        elif failed:
            warnings.append(f"{name}: one run does not comply and counts as the slowest: {failed[0]}")
        if with_caches := [run_log.run.path.name for run_log in group if not run_log.caches_dropped]:
            warnings.append(
                f"{name}: cache_clear is not true in {', '.join(with_caches)}: MLPerf requires the page cache to be "
                "dropped before each run. Run as root, or with passwordless sudo"
            )
        if len(group) != score.RUNS_PER_RESULT:
            warnings.append(
                f"{name}: a result has {score.RUNS_PER_RESULT} runs, and these are {len(group)}: it will be rejected"
            )
    if errors:
        raise InputError("\n".join(errors))
    return warnings


def build(
    out: Path, description: Mapping[str, str], run_logs: Sequence[RunLog], implementation: str, source: Path
) -> Path:
    """Build out/<org>/ atomically and return it. Raises InputError if it exists, or if code is missing.

    description: every field of the system. implementation: the name of this program there. source: its repository.
    """
    folder = out / description["submitter"]
    if folder.exists():
        raise InputError(f"{folder} already exists: choose another --out, or remove it")
    commit, name = str(run_logs[0].commit), description["system_name"]
    archive = _archive_commit(source, commit)
    out.mkdir(parents=True, exist_ok=True)
    tmp_dir = Path(tempfile.mkdtemp(prefix=".", dir=out))
    try:
        _write_json(tmp_dir / "systems" / f"{name}.json", dict(description))
        for benchmark, group in _group_by_benchmark(run_logs).items():
            code = tmp_dir / "benchmarks" / benchmark / "implementations" / implementation
            code.mkdir(parents=True)
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                # An attribute, since Python 3.11 has the argument only from 3.11.4. The archive comes from git.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(code)
            if missing := [file for file in REQUIRED_FILES if not (code / file).is_file()]:
                raise InputError(f"commit {commit} of {source} has no {', '.join(missing)}: it is not this program")
            implementation_desc = implementation_description(group[0], description["framework"])
            _write_json(code / f"{name}_{implementation}.json", implementation_desc)
            results = tmp_dir / "results" / name / benchmark
            results.mkdir(parents=True)
            for index, run_log in enumerate(group):
                shutil.copyfile(run_log.run.path, results / f"result_{index}.txt")
        tmp_dir.chmod(0o755)  # mkdtemp makes it private
        os.rename(tmp_dir, folder)
    except BaseException:
        shutil.rmtree(tmp_dir, ignore_errors=True)
        raise
    return folder


def implementation_description(run_log: RunLog, framework: str) -> dict[str, Any]:
    """Return the description of an implementation on a system: the code, and the recipe with all settings."""
    return {
        "benchmark": run_log.run.entry.benchmark,
        "framework": framework,
        "commit": run_log.commit,
        "hyperparameters": dict(run_log.hyperparameters),
        "settings": dict(run_log.settings),
    }


def run_official_checkers(folder: Path, name: str, ruleset: str) -> bool:
    """Run the official checkers on a folder and its system description, print their output, return their verdict."""
    description = str(folder / "systems" / f"{name}.json")
    checks = (
        ("system description", "system_desc_checker", description, "System description checker passed"),
        ("package", "package_checker", str(folder), "PACKAGE CHECKER FOUND NO ERRORS"),
    )
    all_passed = True
    for title, checker, path, success in checks:
        process = _run_checker(checker, path, "training", ruleset)
        passed = process.returncode == 0 and success in process.stderr  # it exits with 0 in any case
        print(f"{'PASS' if passed else 'FAIL'} {title} (official checker, ruleset {ruleset}): {path}")
        for line in process.stderr.splitlines():
            if line.startswith(("WARNING - ", "ERROR - ")):
                print(f"  {line.partition(' - ')[2].strip()}")
        if process.returncode != 0:
            print(f"  the official checker crashed: {process.stderr.strip().rpartition(chr(10))[2]}")
        all_passed = all_passed and passed
    return all_passed


def _run_checker(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an official checker in a separate process: it sets up the root logger and prints its verdict."""
    command = [sys.executable, "-m", f"mlperf_logging.{name}", *arguments, "--log_output", os.devnull]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)


def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="python -m mlperf.submission", description="Build the folder of an MLPerf submission and check it."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="MLPerf log, or folder with result_*.txt")
    add("--org", required=True, help="the submitter, as in the logs (--org of the runs)")
    add("--system", required=True, help="name of the system in the folder, such as DGXA100")
    add("--division", choices=rules.DIVISIONS, help="default: as in the logs")
    add("--ruleset", choices=rules.RULESETS, help="default: as in the runs' settings, or the benchmark's newest")
    add("--implementation", default="pytorch", help="name of this program in the folder (%(default)s)")
    add("--out", type=Path, default=Path("results/submission"), help="parent of the folder (%(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the system description")
    add(
        "--system-file",
        type=Path,
        metavar="FILE",
        help="JSON file with fields of the system description; --set takes precedence",
    )
    add("--repository", type=Path, default=ROOT, help="git repository of this program, with the runs' commit")
    return parser


def _read_run_log(path: Path) -> RunLog:
    try:
        run, events = score.read_run(path), read(path)
    except ValueError as error:
        raise InputError(f"{error}. Name logs of runs") from error
    first = {event.key: event for event in reversed(events)}
    config = first["config"].value if "config" in first and isinstance(first["config"].value, dict) else {}
    commit = first.get("commit")
    keys = rules.hyperparameter_keys(run.benchmark) if run.benchmark else ()
    return RunLog(
        run=run,
        status=str(first["submission_status"].value) if "submission_status" in first else "",
        caches_dropped=bool("cache_clear" in first and first["cache_clear"].value),
        commit=commit.value if commit and re.fullmatch("[0-9a-f]{40}", str(commit.value)) else None,
        dirty=bool(commit and commit.metadata.get("dirty")),
        hyperparameters={key: first[key].value for key in keys if key in first},
        settings={key: value for key, value in config.items() if key not in _PER_RUN_SETTINGS},
    )


def _select_ruleset(run_logs: Sequence[RunLog], requested: str | None) -> str:
    rulesets = [requested] if requested else sorted({select_ruleset(run_log.run.path) for run_log in run_logs})
    if len(rulesets) > 1:
        raise InputError(f"the runs use several rulesets ({', '.join(rulesets)}): choose one with --ruleset")
    return rulesets[0]


def _group_by_benchmark(run_logs: Sequence[RunLog]) -> dict[str, list[RunLog]]:
    groups: dict[str, list[RunLog]] = {}
    for run_log in run_logs:
        groups.setdefault(run_log.run.entry.benchmark, []).append(run_log)
    return groups


def _find_differences(run_logs: Sequence[RunLog]) -> list[str]:
    """Return an error for each difference in the system, and in the recipe of a benchmark."""
    entries = [run_log.run.entry for run_log in run_logs]
    errors = [
        f"the logs differ in submission_{field}: {', '.join(sorted(values))}. Name logs of one system"
        for field in ("platform", "division")
        if len(values := {getattr(entry, field) for entry in entries}) > 1
    ]
    if len({run_log.run.identity for run_log in run_logs}) < len(run_logs):
        errors.append("a run is named twice: name each once")
    for benchmark, (first, *others) in _group_by_benchmark(run_logs).items():
        for other in others:
            recipes = [{**run_log.hyperparameters, **run_log.settings} for run_log in (first, other)]
            keys = sorted(recipes[0].keys() | recipes[1].keys())
            different = [key for key in keys if recipes[0].get(key) != recipes[1].get(key)]
            if different:
                errors.append(
                    f"{benchmark}: {other.run.path} and {first.run.path} differ in {', '.join(different)}. "
                    "The runs of a result share one recipe"
                )
    return errors


def _check_commits(run_logs: Sequence[RunLog]) -> list[str]:
    errors = []
    for run_log in run_logs:
        if run_log.commit is None:
            errors.append(
                f"{run_log.run.path} names no commit, so its code cannot be submitted. Run from the git repository, or "
                "in an image built with --build-arg COMMIT"
            )
        elif run_log.dirty:
            errors.append(
                f"{run_log.run.path}: files differed from commit {run_log.commit[:12]} when it ran, so its code cannot "
                "be submitted. Commit the changes and run again"
            )
    commits = sorted({run_log.commit for run_log in run_logs if run_log.commit})
    if len(commits) > 1:
        errors.append(f"the logs come from several commits ({', '.join(commits)}): the runs of a result share one")
    return errors


def _describe_system(run_log: RunLog, options: argparse.Namespace, ruleset: str) -> dict[str, str]:
    """Return every field of the system description. Raises InputError with the missing ones."""
    for option, name in (
        ("--system", options.system),
        ("--org", options.org),
        ("--implementation", options.implementation),
    ):
        if not re.fullmatch(r"[\w.+-]+( [\w.+-]+)*", name) or name.startswith("."):
            raise InputError(f"{option} {name}: not a folder name. Use letters, digits and . _ + -")
    overrides: dict[str, Any] = {}
    if options.system_file:
        try:
            overrides = json.loads(options.system_file.read_text())
        except ValueError as error:
            raise InputError(f"--system-file {options.system_file}: not valid JSON ({error})") from error
        if not isinstance(overrides, dict):
            raise InputError(f"--system-file {options.system_file}: should be a JSON object of strings")
    for assignment in options.set:
        field, sign, value = assignment.partition("=")
        if not sign:
            raise InputError(f"--set {assignment}: write it as FIELD=VALUE")
        overrides[field] = value
    if unknown := sorted(overrides.keys() - set(system_desc.FIELDS)):
        raise InputError(f"{', '.join(unknown)}: no such field. Fields: {', '.join(system_desc.FIELDS)}")
    entry = run_log.run.entry
    nodes = re.match(r"(\d+)x", entry.platform)
    fixed = {
        "submitter": entry.org,
        "division": entry.division,
        "status": system_desc.availability(run_log.status, ruleset),
        "system_name": options.system,
    }
    for field, value in fixed.items():
        if overrides.get(field) not in (None, value):
            raise InputError(f"{field}={overrides[field]}: the logs and --system determine it, and have {value}")
    fields = fixed | system_desc.system_description(int(nodes[1]) if nodes else None)
    fields |= {field: str(value) for field, value in overrides.items() if value is not None}
    description = {field: fields[field] for field in system_desc.FIELDS}
    if missing := [field for field, value in description.items() if value is None]:
        template = options.out / f"{options.system}.json"
        options.out.mkdir(parents=True, exist_ok=True)
        if not template.exists():
            _write_json(template, description)
        raise InputError(
            f"the machine does not report {', '.join(missing)}. Pass each as --set FIELD=VALUE (an empty value if it "
            f"does not apply), or replace each null in {template} and pass --system-file {template}"
        )
    return {field: str(value) for field, value in description.items()}


def _archive_commit(source: Path, commit: str) -> bytes:
    """Return the files of a commit as a tar archive. Raises InputError if the repository lacks the commit."""
    command = ["git", "-C", str(source), "-c", f"safe.directory={source.resolve()}", "archive", "--format=tar", commit]
    try:
        process = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise InputError(f"git cannot be started ({error.strerror}): it reads the code of the runs") from error
    if process.returncode != 0:
        reason = process.stderr.decode(errors="replace").strip()
        raise InputError(
            f"--repository {source} does not have commit {commit} of the runs ({reason}). Name one that does"
        )
    return process.stdout


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main())
