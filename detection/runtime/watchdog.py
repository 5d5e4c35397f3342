"""Ends a rank that hangs, after it has said where."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

# A rank that hangs makes the others wait for it until they hang, too. Each is to say where before the launcher,
# which ends them all as soon as one has ended, gets to it.
LAST_WORDS_S = 5.0
PATIENCE = 10.0  # an evaluation may take as many times as long as a step


class Watchdog:
    """A thread that ends the process when no step was made in `timeout_s`, as a context."""

    def __init__(self, rank: int, timeout_s: float):
        self.rank, self.timeout_s = rank, timeout_s
        self.allowed_s = timeout_s
        self.over = threading.Event()
        self.beat()

    def __enter__(self) -> Self:
        threading.Thread(target=self.watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()

    def beat(self) -> None:
        """A step was made."""
        self.beat_s = time.monotonic()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Allow for what takes longer than a step."""
        self.allowed_s = PATIENCE * self.timeout_s
        try:
            yield
        finally:
            self.beat()
            self.allowed_s = self.timeout_s

    def watch(self) -> None:
        """Wait for the end of the run, or for a beat that does not come."""
        while not self.over.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() - self.beat_s > self.allowed_s:
                self.end()

    def end(self) -> None:
        """Print the stack of every thread and end the process, whatever it is doing."""
        print(
            f"error: rank {self.rank} has made no step for {self.allowed_s:g} s (--step-timeout-s). "
            "It is here, the most recent call first:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        time.sleep(LAST_WORDS_S)
        os._exit(1)
