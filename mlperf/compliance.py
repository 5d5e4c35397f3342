"""The official compliance checker as a function."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlperf.log import find_clock_error, read
from mlperf.requirements import RULESETS

_MAX_MESSAGE_CHARS = 600  # the checker repeats its whole state
_LIST = re.compile(r"\[\n.*?(?:\]|\Z)", re.DOTALL)  # and the names of all 119 tensors


@dataclass(frozen=True)
class Verdict:
    """Result of the official compliance checker for one log.

    messages: its warnings and errors. disqualified: why the run is no result although that checker accepts its log.
    """

    passed: bool
    ruleset: str
    messages: list[str]
    disqualified: str = ""


def check(path: Path, ruleset: str) -> Verdict:
    """Run mlperf_logging's compliance checker on a log.

    A log that passes is complete and follows the rules. Its run may have missed the target: in the open division, from
    ruleset 1.0, an aborted run also passes. Line numbers in messages count the log's MLPerf lines, from 0. Raises
    ValueError for an unknown ruleset and OSError for an unreadable file.
    """
    if ruleset not in RULESETS:
        raise ValueError(f"unknown ruleset {ruleset!r}: choose one of {', '.join(RULESETS)}.")
    events = read(path, errors=[])
    clock_error = find_clock_error(events)
    disqualified = f"{clock_error}: the run has no valid time" if clock_error else ""
    if any(event.key == "resumed" for event in events):
        disqualified = "the run was resumed: it is not an MLPerf result"
    from mlperf_logging.compliance_checker import mlp_compliance

    mlp_compliance.enqueued_configs.clear()  # left by a log on which it crashed
    checker = mlp_compliance.make_checker("training", ruleset, quiet=False, werror=False)
    passed = False
    messages = [disqualified] if disqualified else []
    with captured_logs(logging.WARNING) as records:
        try:
            passed = checker.check_file(path, f"training_{ruleset}/common.yaml")
        except Exception as error:  # it evaluates values without validation
            checker.log_messages()
            logging.error("the official checker crashed on this log: %r", error)
    messages += [
        _shorten(message) for record in records for message in record.getMessage().split("\n" + "-" * 30 + "\n")
    ]
    return Verdict(passed and not disqualified, ruleset, messages, disqualified)


@contextmanager
def captured_logs(level: int) -> Iterator[list[logging.LogRecord]]:
    """Capture what the official checkers log from a level on. Otherwise they would set up the root logger and print."""
    records: list[logging.LogRecord] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    root = logging.getLogger()
    previous_handlers, previous_level = root.handlers[:], root.level
    root.handlers[:] = [Collector()]
    root.setLevel(level)
    try:
        yield records
    finally:
        root.handlers[:] = previous_handlers
        root.setLevel(previous_level)


def _shorten(message: str) -> str:
    """Return a message of the checker without its dump of internal state."""
    message = _LIST.sub("[…]", message.partition("\ncurrent context[s]=")[0].strip())
    return message if len(message) <= _MAX_MESSAGE_CHARS else message[:_MAX_MESSAGE_CHARS] + " …"
