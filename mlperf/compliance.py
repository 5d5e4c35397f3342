"""The official compliance checker, as a function: what a log must say and keep to."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mlperf.rules import RULESETS

_MESSAGE_CHARS = 600  # the checker repeats its whole state
_LIST = re.compile(r"\[\n.*?(?:\]|\Z)", re.DOTALL)  # and, of 119 tensors, each name


@dataclass(frozen=True)
class Verdict:
    """What the official compliance checker says of one log; messages are its warnings and errors."""

    passed: bool
    ruleset: str
    messages: list[str]


def check(path: Path, ruleset: str) -> Verdict:
    """Run mlperf_logging's compliance checker on a log.

    A log that passes is complete and keeps the rules; its run need not have reached the target: in the open
    division of the rulesets from 1.0 an aborted run passes too. Line numbers in messages count the log's
    MLPerf lines, from 0. Raises ValueError for an unknown ruleset, OSError for a file that cannot be read.
    """
    if ruleset not in RULESETS:
        raise ValueError(f"unknown ruleset {ruleset!r}: choose one of {', '.join(RULESETS)}.")
    with open(path, encoding="utf-8", errors="replace") as log:
        resumed = any('"key": "resumed"' in line for line in log)
    # In a process of its own: the checker keeps state in module globals and sets up the root logger.
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training"]
    command += ["--ruleset", ruleset, "--log_output", os.devnull, str(path.resolve())]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    messages = _messages(done.stderr)
    if done.returncode != 0 and "ERROR - FAILED" not in done.stderr:
        reason = done.stderr.strip().rpartition("\n")[2]
        messages.append(f"the official checker broke off on this log: {reason}")
    if resumed:
        messages.insert(0, "the run was resumed: it is no MLPerf result")
    return Verdict(done.returncode == 0 and not resumed, ruleset, messages)


def _messages(stderr: str) -> list[str]:
    """Return the warnings in the checker's output, one for each rule, without its dump of internal state."""
    messages = []
    for record in re.split(r"^(?=(?:INFO|WARNING|ERROR) - )", stderr, flags=re.MULTILINE):
        if record.startswith("WARNING - "):
            for text in record.removeprefix("WARNING - ").split("\n" + "-" * 30 + "\n"):
                message = text.partition("\ncurrent context[s]=")[0].strip()
                message = _LIST.sub("[…]", message)
                messages.append(message if len(message) <= _MESSAGE_CHARS else message[:_MESSAGE_CHARS] + " …")
    return messages
