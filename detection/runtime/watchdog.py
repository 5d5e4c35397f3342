"""Watchdog that aborts a hung rank after dumping its stack traces."""

import faulthandler
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

# A hung rank also blocks the others. All of them need time to dump their stack traces, since the launcher terminates
# every rank as soon as one exits. `faulthandler.dump_traceback_later(exit=True)` alone exits at once.
STACK_DUMP_GRACE_S = 5.0
EVAL_TIMEOUT_FACTOR = 10.0  # ratio of the time limits of an evaluation and a step


class Watchdog:
    """Context with a thread that aborts the process if no step completes within `timeout_s`.

    The stack traces go to standard error and, once `folder` is set, to `hang_rank_N.txt` there. If a hung library call
    holds the interpreter lock, the thread cannot run. Then faulthandler's timer, which the thread no longer restarts,
    dumps the stack traces to standard error and exits.
    """

    def __init__(self, rank: int, timeout_s: float):
        self.rank, self.timeout_s = rank, timeout_s
        self.current_timeout_s = timeout_s
        self.folder: Path | None = None
        self.stderr = open_nonblocking_stderr()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._loop, name="watchdog", daemon=True)
        self.heartbeat()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self.stderr != 2:
            os.close(self.stderr)

    def heartbeat(self) -> None:
        """Report a completed step."""
        self.last_heartbeat_s = time.monotonic()

    @contextmanager
    def extended(self) -> Iterator[None]:
        """Extend the time limit for work that takes longer than a step."""
        self.current_timeout_s = EVAL_TIMEOUT_FACTOR * self.timeout_s
        try:
            yield
        finally:
            self.heartbeat()
            self.current_timeout_s = self.timeout_s

    def _loop(self) -> None:
        """Wait until the run stops or a heartbeat is overdue. Then exit the process with status 1."""
        while not self.stopped.wait(min(1.0, self.timeout_s / 4)):
            faulthandler.dump_traceback_later(self.current_timeout_s + STACK_DUMP_GRACE_S, exit=True, file=self.stderr)
            if time.monotonic() - self.last_heartbeat_s > self.current_timeout_s:
                threading.Thread(target=self._report, daemon=True).start()  # a file system may hang, too
                time.sleep(STACK_DUMP_GRACE_S)
                os._exit(1)

    def _report(self) -> None:
        """Write the error and all stack traces to standard error and to the run folder."""
        text = (
            f"error: rank {self.rank} completed no step within {self.current_timeout_s:g} s "
            f"(--step-timeout-s). Stack traces, most recent call first:\n{format_stacks()}"
        )
        print(text, file=sys.stderr, flush=True)
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / f"hang_rank_{self.rank}.txt").write_text(text)


def open_nonblocking_stderr() -> int:
    """Return a file descriptor of standard error whose writes do not wait for the reader of a pipe or terminal."""
    with suppress(OSError):
        mode = os.fstat(2).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return 2


def format_stacks() -> str:
    """Return the stack of every thread, most recent call first, in the format of faulthandler."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, top in sys._current_frames().items():
        lines.append(f"\nThread {names.get(ident, ident)}:")
        frame: FrameType | None = top
        while frame is not None:
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
            frame = frame.f_back
    return "\n".join(lines)
