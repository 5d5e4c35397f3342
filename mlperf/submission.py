"""The folder of a submission, built from runs and held against the official package checker.

    python -m mlperf.submission --org O --system S RUN... [--set FIELD=VALUE ...] [--out DIR]

The runs of one or several benchmarks on one system, each by one recipe and all of one commit of this repository, become
DIR/O/ with systems/, results/ and benchmarks/. Exit status: 0, or 1 if an official checker refuses the folder (which
stays, to be looked at), or 2 for what is wrong with the runs or the arguments; then nothing is made.
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

from mlperf import compliance, rules, score, system_desc
from mlperf.check import InputError, logs
from mlperf.log import read

ROOT = Path(__file__).resolve().parent.parent
CODE = ("README.md", "setup.sh", "init_datasets.sh", "run_and_time.sh")
"""What the folder of an implementation must hold."""

_OF_ONE_RUN = frozenset(
    ("seed", "experiment", "data_dir", "run_dir", "log_dir", "resume", "summary", "page_cache_dropped", "commit")
)
"""Settings that may differ between runs of one recipe."""


@dataclass(frozen=True)
class Logged:
    """What a log says of its run, beside its times.

    status: availability of the machine. cleared: the file caches were dropped before it. commit: of the program, None
    where the log names none; dirty: files differed from it. values: the hyperparameters that the rules name. recipe:
    the settings, where the log has them.
    """

    run: score.Run
    status: str
    cleared: bool
    commit: str | None
    dirty: bool
    values: Mapping[str, Any]
    recipe: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the folder that the command line asks for, check it, and return the exit status."""
    options = parser().parse_args(arguments)
    try:
        found = [_read(path) for named in options.runs for path in logs(named)]
        ruleset = _ruleset(found, options.ruleset)
        for warning in check(found, options.org, options.division, ruleset):
            print(f"warning: {warning}", file=sys.stderr)
        first = found[0]
        described = _described(first, options)
        folder = build(options.out, described, found, options.implementation, options.repository)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except InputError as error:
        print("\n".join(f"error: {mistake}" for mistake in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0 if show_verdict(folder, described["system_name"], ruleset) else 1


def check(found: Sequence[Logged], org: str, division: str | None, ruleset: str) -> list[str]:
    """Hold the logs against each other and against the rules; returns warnings, raises InputError with every mistake.

    org, division: what the command line says, which the logs must say as well; None leaves it to them.
    """
    mistakes, warnings = [], []
    for logged in found:
        entry, path = logged.run.entry, logged.run.path
        if entry.org != org:
            mistakes.append(f"{path}: submission_org is {entry.org}, and --org is {org}. Run with --org {org}")
        if division and entry.division != division:
            mistakes.append(f"{path}: submission_division is {entry.division}, and --division is {division}")
        if entry.benchmark not in rules.BENCHMARKS:
            mistakes.append(f"{path}: submission_benchmark is {entry.benchmark}, which this program does not train")
    mistakes += _differences(found)
    mistakes += _commits(found)
    for runs in _by_benchmark(found).values():
        verdicts = [(logged.run.path, compliance.check(logged.run.path, ruleset)) for logged in runs]
        failed = [
            f"{path}: {' '.join('; '.join(verdict.messages).split())}"
            for path, verdict in verdicts
            if not verdict.passed
        ]
        name = runs[0].run.entry.benchmark
        if len(failed) > 1 or len(failed) == len(runs):
            mistakes += [f"{text} (MLPerf {ruleset}: one run of five may fail)" for text in failed]
        elif failed:
            warnings.append(f"{name}: one run does not comply, and counts as the slowest: {failed[0]}")
        if kept := [logged.run.path.name for logged in runs if not logged.cleared]:
            warnings.append(
                f"{name}: cache_clear is not true in {', '.join(kept)}: MLPerf asks that the machine's file caches are "
                "dropped before each run. Run as root, or with sudo that asks for no password"
            )
        if len(runs) != score.RUNS:
            warnings.append(f"{name}: a result has {score.RUNS} runs, and these are {len(runs)}: it will be refused")
    if mistakes:
        raise InputError("\n".join(mistakes))
    return warnings


def build(out: Path, described: Mapping[str, str], found: Sequence[Logged], implementation: str, source: Path) -> Path:
    """Make out/<org>/ whole or not at all, and return it; raises InputError where it is there or code is missing.

    described: every field of the system. implementation: the name of this program there. source: its repository.
    """
    folder = out / described["submitter"]
    if folder.exists():
        raise InputError(f"{folder} is there already: choose another --out, or remove it")
    commit, name = str(found[0].commit), described["system_name"]
    archive = _archive(source, commit)
    out.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".", dir=out))
    try:
        _write_json(draft / "systems" / f"{name}.json", dict(described))
        for benchmark, runs in _by_benchmark(found).items():
            code = draft / "benchmarks" / benchmark / "implementations" / implementation
            code.mkdir(parents=True)
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                # An attribute, since Python 3.11 takes the argument only from 3.11.4 on; git has made the archive.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(code)
            if absent := [file for file in CODE if not (code / file).is_file()]:
                raise InputError(f"commit {commit} of {source} has no {', '.join(absent)}: it is not this program")
            _write_json(code / f"{name}_{implementation}.json", facts(runs[0], described["framework"]))
            results = draft / "results" / name / benchmark
            results.mkdir(parents=True)
            for number, logged in enumerate(runs):
                shutil.copyfile(logged.run.path, results / f"result_{number}.txt")
        draft.chmod(0o755)  # mkdtemp's is its owner's alone
        os.rename(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def facts(logged: Logged, framework: str) -> dict[str, Any]:
    """What the description of an implementation on a system says: the code, and the recipe with all its settings."""
    return {
        "benchmark": logged.run.entry.benchmark,
        "framework": framework,
        "commit": logged.commit,
        "hyperparameters": dict(logged.values),
        "settings": dict(logged.recipe),
    }


def show_verdict(folder: Path, name: str, ruleset: str) -> bool:
    """Print what the official checkers say of a folder and of its system's description; returns their verdict."""
    description = str(folder / "systems" / f"{name}.json")
    checks = (
        ("system description", "system_desc_checker", description, "System description checker passed"),
        ("package", "package_checker", str(folder), "PACKAGE CHECKER FOUND NO ERRORS"),
    )
    passed = True
    for title, module, path, success in checks:
        # In a process of its own, as the compliance checker; its exit status is 0 whatever it finds.
        command = [sys.executable, "-m", f"mlperf_logging.{module}", path, "training", ruleset]
        command += ["--log_output", os.devnull]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        ok = done.returncode == 0 and success in done.stderr
        print(f"{'PASS' if ok else 'FAIL'} {title} (official checker, ruleset {ruleset}): {path}")
        for line in done.stderr.splitlines():
            if line.startswith(("WARNING - ", "ERROR - ")):
                print(f"  {line.partition(' - ')[2].strip()}")
        if done.returncode != 0:
            print(f"  the official checker broke off: {done.stderr.strip().rpartition(chr(10))[2]}")
        passed = passed and ok
    return passed


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m mlperf.submission", description="Build the folder of an MLPerf submission, and check it."
    )
    add = made.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="an MLPerf log, or a folder of result_*.txt, as a run's is")
    add("--org", required=True, help="who submits; the logs must say the same (--org of the runs)")
    add("--system", required=True, help="name of the system in the folder, such as DGXA100")
    add("--division", choices=rules.DIVISIONS, help="default: that of the logs")
    add("--ruleset", choices=rules.RULESETS, help=f"default: that of the runs' settings, or {rules.RULESETS[-1]}")
    add("--implementation", default="pytorch", help="name of this program in the folder (%(default)s)")
    add("--out", type=Path, default=Path("results/submission"), help="the folder is made in here (%(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the system description")
    add(
        "--system-file", type=Path, metavar="FILE", help="JSON with fields of the system description; --set comes first"
    )
    add("--repository", type=Path, default=ROOT, help="git repository of this program, with the runs' commit")
    return made


def _read(path: Path) -> Logged:
    try:
        run, events = score.read_run(path), read(path)
    except ValueError as error:
        raise InputError(f"{error}. Name logs of runs") from error
    first = {event.key: event for event in reversed(events)}
    config = first["config"].value if "config" in first and isinstance(first["config"].value, dict) else {}
    commit = first.get("commit")
    known = rules.hyperparameter_keys(run.entry.benchmark) if run.entry.benchmark in rules.BENCHMARKS else ()
    return Logged(
        run=run,
        status=str(first["submission_status"].value) if "submission_status" in first else "",
        cleared=bool("cache_clear" in first and first["cache_clear"].value),
        commit=commit.value if commit and re.fullmatch("[0-9a-f]{40}", str(commit.value)) else None,
        dirty=bool(commit and commit.metadata.get("dirty")),
        values={key: first[key].value for key in known if key in first},
        recipe={key: value for key, value in config.items() if key not in _OF_ONE_RUN},
    )


def _ruleset(found: Sequence[Logged], named: str | None) -> str:
    rulesets = sorted({logged.run.ruleset for logged in found if logged.run.ruleset})
    if named is None and len(rulesets) > 1:
        raise InputError(f"the runs are of several rulesets ({', '.join(rulesets)}): name one by --ruleset")
    ruleset = named or (rulesets[0] if rulesets else rules.RULESETS[-1])
    if ruleset not in rules.RULESETS:
        raise InputError(f"ruleset {ruleset} of the runs: name one of {', '.join(rules.RULESETS)} by --ruleset")
    return ruleset


def _by_benchmark(found: Sequence[Logged]) -> dict[str, list[Logged]]:
    groups: dict[str, list[Logged]] = {}
    for logged in found:
        groups.setdefault(logged.run.entry.benchmark, []).append(logged)
    return groups


def _differences(found: Sequence[Logged]) -> list[str]:
    """Where the logs are not of one system, and those of a benchmark not of one recipe."""
    entries = [logged.run.entry for logged in found]
    mistakes = [
        f"the logs differ in submission_{what}: {', '.join(sorted(values))}. Name those of one system"
        for what in ("platform", "division")
        if len(values := {getattr(entry, what) for entry in entries}) > 1
    ]
    if len({logged.run.path.resolve() for logged in found}) < len(found):
        mistakes.append("a log is named twice: name each once")
    for benchmark, (first, *others) in _by_benchmark(found).items():
        for other in others:
            recipes = [{**logged.values, **logged.recipe} for logged in (first, other)]
            keys = sorted(recipes[0].keys() | recipes[1].keys())
            different = [key for key in keys if recipes[0].get(key) != recipes[1].get(key)]
            if different:
                mistakes.append(
                    f"{benchmark}: {other.run.path} and {first.run.path} differ in {', '.join(different)}. "
                    "The runs of a result share one recipe"
                )
    return mistakes


def _commits(found: Sequence[Logged]) -> list[str]:
    mistakes = []
    for logged in found:
        if logged.commit is None:
            mistakes.append(
                f"{logged.run.path} names no commit, so that the code cannot be submitted with it. Run from the git "
                "repository, or in an image built with --build-arg COMMIT"
            )
        elif logged.dirty:
            mistakes.append(
                f"{logged.run.path}: files differed from commit {logged.commit[:12]} when it ran, so that the code is "
                "not to be had. Commit the changes and run again"
            )
    commits = sorted({logged.commit for logged in found if logged.commit})
    if len(commits) > 1:
        mistakes.append(f"the logs are of several commits ({', '.join(commits)}): the runs of a result share one")
    return mistakes


def _described(first: Logged, options: argparse.Namespace) -> dict[str, str]:
    """Every field of the system description; raises InputError with those that nobody has said."""
    for option, name in (
        ("--system", options.system),
        ("--org", options.org),
        ("--implementation", options.implementation),
    ):
        if not re.fullmatch(r"[\w.+-]+( [\w.+-]+)*", name) or name.startswith("."):
            raise InputError(f"{option} {name}: it names a folder; letters, digits and . _ + - will do")
    given: dict[str, Any] = {}
    if options.system_file:
        try:
            given = json.loads(options.system_file.read_text())
        except ValueError as error:
            raise InputError(f"--system-file {options.system_file}: it is no JSON ({error})") from error
        if not isinstance(given, dict):
            raise InputError(f"--system-file {options.system_file}: it should hold an object of fields and texts")
    for assignment in options.set:
        field, sign, value = assignment.partition("=")
        if not sign:
            raise InputError(f"--set {assignment}: write it as FIELD=VALUE")
        given[field] = value
    if unknown := sorted(given.keys() - set(system_desc.FIELDS)):
        raise InputError(f"{', '.join(unknown)}: no such field. There are: {', '.join(system_desc.FIELDS)}")
    entry = first.run.entry
    match = re.match(r"(\d+)x", entry.platform)
    own = {"submitter": entry.org, "division": entry.division, "status": first.status, "system_name": options.system}
    for field, value in own.items():
        if given.get(field) not in (None, value):
            raise InputError(f"{field}={given[field]}: it follows the logs and --system, which say {value}")
    facts = own | system_desc.describe(int(match[1]) if match else None)
    facts |= {field: str(value) for field, value in given.items() if value is not None}
    described = {field: facts[field] for field in system_desc.FIELDS}
    if missing := [field for field, value in described.items() if value is None]:
        draft = options.out / f"{options.system}.json"
        options.out.mkdir(parents=True, exist_ok=True)
        if not draft.exists():
            _write_json(draft, described)
        raise InputError(
            f"the machine does not tell {', '.join(missing)}. Say each by --set FIELD=VALUE (an empty value where it "
            f"does not apply), or fill in what is null in {draft} and pass --system-file {draft}"
        )
    return {field: str(value) for field, value in described.items()}


def _archive(source: Path, commit: str) -> bytes:
    """The files of a commit, as tar; raises InputError where git does not have it."""
    command = ["git", "-C", str(source), "-c", f"safe.directory={source.resolve()}", "archive", "--format=tar", commit]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise InputError(f"git cannot be started ({error.strerror}): it reads the code of the runs") from error
    if done.returncode != 0:
        why = done.stderr.decode(errors="replace").strip()
        raise InputError(f"--repository {source} does not give commit {commit} of the runs ({why}). Name one that does")
    return done.stdout


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
