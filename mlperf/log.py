"""The MLPerf log of one run, as `mlperf_logging` words it: written by one rank, and read back."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlperf_logging.mllog.mllog import MLLogger

_TOKEN = ":::MLLOG "
_LENGTHY = ("config", "weights_initialization")
_REPOSITORY = Path(__file__).resolve().parent.parent


class MlperfLog:
    """Writes the events of a run as MLPerf log lines, each flushed at once.

    path: the log file; None makes a silent log that writes nowhere, for every rank but the first.
    echo: also print each line on standard output.
    append: continue an existing file (a resumed run); otherwise an existing file is refused with ValueError,
    since a log holds one run.
    before_echo: called before a line is printed, to clear a progress bar away, since a line must start at
    column 0; may be set later. If standard output is a terminal, its current line is cleared in any case,
    and the 120 lines of the configuration and of the weights' names are left out there: the file has them.

    `start`, `end` and `point` note the place of their caller, relative to the repository. Values and metadata
    are JSON values, NumPy numbers or arrays, or tensors; NaN and infinity, which JSON lacks, are refused with
    ValueError.
    """

    def __init__(
        self,
        path: Path | None,
        echo: bool = True,
        *,
        append: bool = False,
        before_echo: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self.broken: OSError | None = None
        """Why a line could not be written, if one could not: the run went on, and its log is no proof of it."""
        self._echo = echo
        self.before_echo = before_echo
        self._line = _Line("mlperf")
        # mllog uses root_dir as a regular expression, whence the escape; offset 2 steps over our own method.
        self._mllog = MLLogger(self._line, default_stack_offset=2, root_dir=re.escape(str(_REPOSITORY)))
        if path is None:
            self._file = None
            return
        try:
            self._file = open(path, "a" if append else "x", buffering=1, encoding="utf-8")  # noqa: SIM115
        except FileExistsError:
            raise ValueError(
                f"{path} exists already, and an MLPerf log holds one run. Choose another folder for this run,"
                " or resume the run that is in it."
            ) from None

    def start(self, key: str, value: object = None, **metadata: object) -> None:
        """Log `<key>_start`, the start of an interval, such as init, run, block, epoch or eval."""
        if self._file is not None:
            self._mllog.start(f"{key}_start", _plain(key, value), _plain(key, metadata))
            self._write(key)

    def end(self, key: str, value: object = None, **metadata: object) -> None:
        """Log `<key>_stop`, the end of an interval."""
        if self._file is not None:
            self._mllog.end(f"{key}_stop", _plain(key, value), _plain(key, metadata))
            self._write(key)

    def point(self, key: str, value: object = None, **metadata: object) -> None:
        """Log a point in time, such as a hyperparameter or eval_accuracy."""
        if self._file is not None:
            self._mllog.event(key, _plain(key, value), _plain(key, metadata))
            self._write(key)

    def position(self) -> int:
        """How long the file is now, in bytes; 0 of a silent log."""
        return os.fstat(self._file.fileno()).st_size if self._file is not None else 0

    def close(self) -> None:
        """Close the file; logging after that is an error."""
        if self._file is not None:
            with suppress(OSError):  # a full disk, which `broken` tells of
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, key: str) -> None:
        assert self._file is not None
        try:
            self._file.write(self._line.text + "\n")
        except OSError as error:
            if self.broken is None:
                print(f"warning: {self.path} has a gap from here on: {error.strerror}", file=sys.stderr, flush=True)
            self.broken = error
        on_terminal = sys.stdout.isatty()
        if self._echo and not (on_terminal and key in _LENGTHY):
            if self.before_echo is not None:
                self.before_echo()
            clear = "\r\033[K" if on_terminal else ""
            print(clear + self._line.text, flush=True)


class _Line(logging.Logger):
    """The logger that mllog asks for; it keeps the line, since handlers would swallow a full disk's error."""

    text = ""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        self.text = str(msg)


def _plain(key: str, value: object) -> Any:
    """Return value as plain JSON data, or refuse it: mllog itself would log that it failed, and go on."""

    def from_array(array: Any) -> object:
        if not hasattr(array, "tolist"):
            raise TypeError(f"{key}: {array!r} is not a value that a log can hold")
        return array.tolist()

    try:
        return json.loads(json.dumps(value, allow_nan=False, default=from_array))
    except ValueError:
        raise ValueError(
            f"{key} is {value}: an MLPerf log holds finite numbers only, for JSON has no NaN or infinity."
        ) from None


@dataclass(frozen=True)
class Event:
    """One line of an MLPerf log.

    time_ms: milliseconds since 1970. event_type: INTERVAL_START, INTERVAL_END or POINT_IN_TIME.
    key: with its `_start` or `_stop`. line: its number in the file, from 1.
    """

    time_ms: int
    event_type: str
    key: str
    value: Any
    metadata: dict[str, Any]
    line: int


def read(path: Path, damage: list[str] | None = None) -> list[Event]:
    """Read the MLPerf log lines out of a text file, in the file's order, whatever else is in it.

    Published logs hold other output between the lines and before the token, which is skipped, and for some
    events one line per rank, which are all returned. Raises OSError for a file that cannot be read, and
    ValueError with file and line for a line that has the token and holds no event; where a list is given for
    `damage`, it gets that message, and reading goes on.
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
                if damage is None:
                    raise ValueError(message) from error
                damage.append(message)
                continue
            events.append(event)
    return events
