"""The official compliance checker as a function."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mlperf.rules import RULESETS

_MAX_MESSAGE_CHARS = 600  # the checker repeats its whole state
_LIST = re.compile(r"\[\n.*?(?:\]|\Z)", re.DOTALL)  # and the names of all 119 tensors


@dataclass(frozen=True)
class Verdict:
    """Result of the official compliance checker for one log. messages: its warnings and errors."""

    passed: bool
    ruleset: str
    messages: list[str]


def check(path: Path, ruleset: str) -> Verdict:
    """Run mlperf_logging's compliance checker on a log.

    A log that passes is complete and follows the rules. Its run may have missed the target: in the open division, from
    ruleset 1.0, an aborted run also passes. Line numbers in messages count the log's MLPerf lines, from 0. Raises
    ValueError for an unknown ruleset and OSError for an unreadable file.
    """
    if ruleset not in RULESETS:
        raise ValueError(f"unknown ruleset {ruleset!r}: choose one of {', '.join(RULESETS)}.")
    with open(path, encoding="utf-8", errors="replace") as log:
        resumed = any('"key": "resumed"' in line for line in log)
    process = run_checker("compliance_checker", "--usage", "training", "--ruleset", ruleset, str(path.resolve()))
    messages = _parse_warnings(process.stderr)
    if process.returncode != 0 and "ERROR - FAILED" not in process.stderr:
        reason = process.stderr.strip().rpartition("\n")[2]
        messages.append(f"the official checker crashed on this log: {reason}")
    if resumed:
        messages.insert(0, "the run was resumed: it is not an MLPerf result")
    return Verdict(process.returncode == 0 and not resumed, ruleset, messages)


def run_checker(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an official checker in a separate process: it keeps state in module globals and sets up the root logger."""
    command = [sys.executable, "-m", f"mlperf_logging.{name}", *arguments, "--log_output", os.devnull]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)


def _parse_warnings(stderr: str) -> list[str]:
    """Return the warnings in the checker's output, one per rule, without its dump of internal state."""
    messages = []
    for record in re.split(r"^(?=(?:INFO|WARNING|ERROR) - )", stderr, flags=re.MULTILINE):
        if record.startswith("WARNING - "):
            for text in record.removeprefix("WARNING - ").split("\n" + "-" * 30 + "\n"):
                message = text.partition("\ncurrent context[s]=")[0].strip()
                message = _LIST.sub("[…]", message)
                messages.append(message if len(message) <= _MAX_MESSAGE_CHARS else message[:_MAX_MESSAGE_CHARS] + " …")
    return messages
