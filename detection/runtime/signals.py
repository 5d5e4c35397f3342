"""Graceful shutdown on Ctrl-C, or on SIGTERM from the launcher or the scheduler."""

import ctypes
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch

from detection.runtime.distributed import DistContext

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_INTERVAL_S = 1.0


def set_parent_death_signal() -> None:
    """Make the kernel send SIGTERM to this process when the launcher dies, to leave no orphans."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class RunInterrupted(KeyboardInterrupt):
    """Termination of the run by a signal."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class SignalHandler:
    """Context that handles SIGINT and SIGTERM.

    A signal raises RunInterrupted at once, except for a first one within `deferred`. That one stays pending until
    `poll` returns it, so that training stops between two steps and saves a checkpoint.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.is_deferring = False
        self.steps_left = self.interval = 1
        self.last_poll_s = time.monotonic()

    def __enter__(self) -> Self:
        self.previous_handlers = {number: signal.signal(number, self.on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def on_signal(self, signal_number: int, _: FrameType | None) -> None:
        """Store the signal as pending, or raise RunInterrupted."""
        if self.pending is not None or not self.is_deferring:
            raise RunInterrupted(signal_number)
        self.pending = signal_number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep a first signal pending until `poll`."""
        self.is_deferring = True
        try:
            yield
        finally:
            self.is_deferring = False

    def ignore_signals(self) -> None:
        """Ignore further signals, so that the process exits with its own status."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def poll(self, ranks: DistContext, *, blocking: bool = False) -> int | None:
        """Return the pending signal of any rank. Every rank must call this after each step and gets the same result.

        Ranks synchronize about once a second instead of every step, since that waits for the device. blocking:
        synchronize now.
        """
        if not ranks.is_distributed:
            return self.pending
        self.steps_left -= 1
        if self.steps_left > 0 and not blocking:
            return None
        now_s = time.monotonic()
        local_values = torch.tensor(
            [self.pending or 0, (now_s - self.last_poll_s) / self.interval], device=ranks.device
        )
        pending, step_s = ranks.all_reduce_max(local_values).tolist()
        self.interval = self.steps_left = min(1000, max(1, int(POLL_INTERVAL_S / max(step_s, 1e-6))))
        self.last_poll_s = now_s
        return int(pending) or None
