"""Writer and reader of MLPerf logs, one per run, in the format of `mlperf_logging`.

The reader needs no package and Python 3.8, since run_with_docker.sh and run.sub read logs outside the container.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

_TOKEN = ":::MLLOG "
_REPOSITORY = Path(__file__).resolve().parent.parent
_MAX_DISORDER_MS = 1000  # processes of one machine write to published logs with up to 45 ms


class MlperfLog:
    """Writer of one run's MLPerf log, flushed after each line.

    path: the log file. None makes a silent log that writes nowhere, for every rank but the first.
    append: continue an existing file (a resumed run). Otherwise an existing file raises ValueError, since a log holds
    one run.
    echo: called with each line, to print it as well.

    `start`, `end` and `event` record their caller's position, relative to the repository. Values and metadata
    are JSON values, NumPy numbers or arrays, or tensors. NaN and infinity, which JSON lacks, raise ValueError.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        append: bool = False,
        echo: Callable[[str], None] | None = None,
    ) -> None:
        from mlperf_logging.mllog.mllog import MLLogger

        self.path = path
        self.write_error: OSError | None = None
        """Error of a line that could not be written. The run continues, but its log is incomplete."""
        self._echo = echo
        self._line = _LineLogger("mlperf")
        # A clock that nobody can set, and that counts the time of a suspended machine where the system has one.
        self._clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self._clock_offset_s = time.time() - time.clock_gettime(self._clock)
        # mllog uses root_dir as a regular expression, hence the escape. Offset 2 skips our own method.
        self._mllog = MLLogger(self._line, default_stack_offset=2, root_dir=re.escape(str(_REPOSITORY)))
        if path is None:
            self._file = None
            return
        try:
            self._file = open(path, "a" if append else "x", buffering=1, encoding="utf-8")  # noqa: SIM115
        except FileExistsError:
            raise ValueError(
                f"{path} already exists, and an MLPerf log holds one run. Choose another folder for this run,"
                " or resume the run in this one."
            ) from None

    def start(self, key: str, value: object = None, **metadata: object) -> None:
        """Log `<key>_start`, the start of an interval, such as init, run, block, epoch or eval."""
        if self._file is not None:
            self._mllog.start(f"{key}_start", *self._fields(key, value, metadata))
            self._write()

    def end(self, key: str, value: object = None, **metadata: object) -> None:
        """Log `<key>_stop`, the end of an interval."""
        if self._file is not None:
            self._mllog.end(f"{key}_stop", *self._fields(key, value, metadata))
            self._write()

    def event(self, key: str, value: object = None, **metadata: object) -> None:
        """Log a point in time, such as a hyperparameter or `eval_accuracy`."""
        if self._file is not None:
            self._mllog.event(key, *self._fields(key, value, metadata))
            self._write()

    def file_offset(self) -> int:
        """Return the size of the file in bytes, or 0 for a silent log."""
        return os.fstat(self._file.fileno()).st_size if self._file is not None else 0

    def close(self) -> None:
        """Close the file. Logging after that is an error."""
        if self._file is not None:
            with suppress(OSError):  # a full disk, already recorded in `write_error`
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fields(self, key: str, value: object, metadata: object) -> tuple[Any, Any, None, int]:
        """Return value, metadata, namespace and milliseconds since 1970 of an event."""
        time_ms = int(1000 * (self._clock_offset_s + time.clock_gettime(self._clock)))
        return _to_json_value(key, value), _to_json_value(key, metadata), None, time_ms

    def _write(self) -> None:
        assert self._file is not None
        try:
            self._file.write(self._line.text + "\n")
        except OSError as error:
            if self.write_error is None:
                print(f"warning: {self.path} is incomplete from here: {error.strerror}", file=sys.stderr, flush=True)
            self.write_error = error
        if self._echo is not None:
            self._echo(self._line.text)


class _LineLogger(logging.Logger):
    """Logger for mllog that keeps the line. Logging handlers would swallow the error of a full disk."""

    text = ""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        self.text = str(msg)


def _to_json_value(key: str, value: object) -> Any:
    """Convert a value to JSON data, or raise ValueError or TypeError. mllog would log its own failure and continue."""

    def from_array(array: Any) -> object:
        if not hasattr(array, "tolist"):
            raise TypeError(f"{key}: {array!r} cannot be stored in an MLPerf log")
        return array.tolist()

    try:
        return json.loads(json.dumps(value, allow_nan=False, default=from_array))
    except ValueError:
        raise ValueError(
            f"{key} is {value}: an MLPerf log holds finite numbers only, since JSON has no NaN or infinity."
        ) from None


@dataclass(frozen=True)
class Event:
    """One line of an MLPerf log.

    time_ms: milliseconds since 1970. event_type: INTERVAL_START, INTERVAL_END or POINT_IN_TIME.
    key: includes its `_start` or `_stop`. line: line number in the file, from 1.
    """

    time_ms: int
    event_type: str
    key: str
    value: Any
    metadata: dict[str, Any]
    line: int


def read(path: Path, errors: list[str] | None = None) -> list[Event]:
    """Read the MLPerf log lines of a text file, in order.

    Published logs hold other output between the lines and before the token, which is skipped. They log some events
    once per rank, and all of these are returned. Raises OSError for an unreadable file, and ValueError with file and
    line number for a line with the token but without an event. If `errors` is a list, that message is appended to it
    instead, and reading continues.
    """
    events = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            _, token, text = line.rpartition(_TOKEN)  # the last one, as the official parser does
            if not token:
                continue
            try:
                fields = json.loads(text)
                event = Event(
                    time_ms=int(fields["time_ms"]),
                    event_type=fields["event_type"],
                    key=fields["key"],
                    value=fields["value"],
                    metadata=dict(fields["metadata"]),
                    line=number,
                )
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                message = f"{path}, line {number}: not an MLPerf log line ({error!r})."
                if errors is None:
                    raise ValueError(message) from error
                errors.append(message)
                continue
            events.append(event)
    return events


def find_clock_error(events: list[Event]) -> str:
    """Return why a run has no valid time, or "". A clock that was set back makes a run look faster than it was."""
    latest_ms = start_ms = None
    for event in events:
        if latest_ms is not None and latest_ms - event.time_ms > _MAX_DISORDER_MS:
            seconds = (latest_ms - event.time_ms) / 1000
            return f"the clock was set back by {seconds:,.0f} s before line {event.line} ({event.key})"
        latest_ms = event.time_ms if latest_ms is None else max(latest_ms, event.time_ms)
        if event.key == "run_start" and start_ms is None:
            start_ms = event.time_ms
        elif event.key == "run_stop" and start_ms is not None and event.time_ms < start_ms:
            return f"line {event.line}: run_stop is before run_start"
    return ""
