"""Watchdog that aborts a hung rank after dumping its stack traces."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

# A hung rank also blocks the others. All of them need time to dump their stack traces, since the launcher terminates
# every rank as soon as one exits. `faulthandler.dump_traceback_later(exit=True)` alone exits at once.
STACK_DUMP_GRACE_S = 5.0
EVAL_TIMEOUT_FACTOR = 10.0  # ratio of the time limits of an evaluation and a step


class Watchdog:
    """Context with a thread that aborts the process if no step completes within `timeout_s`.

    If a hung library call holds the interpreter lock, the thread cannot run. Then faulthandler's timer, which the
    thread no longer restarts, dumps the stack traces and exits.
    """

    def __init__(self, rank: int, timeout_s: float):
        self.rank, self.timeout_s = rank, timeout_s
        self.current_timeout_s = timeout_s
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
            faulthandler.dump_traceback_later(self.current_timeout_s + STACK_DUMP_GRACE_S, exit=True, file=2)
            if time.monotonic() - self.last_heartbeat_s > self.current_timeout_s:
                print(
                    f"error: rank {self.rank} completed no step within {self.current_timeout_s:g} s "
                    "(--step-timeout-s). Stack traces, most recent call first:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                time.sleep(STACK_DUMP_GRACE_S)
                os._exit(1)
