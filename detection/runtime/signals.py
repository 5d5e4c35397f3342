"""Graceful shutdown on Ctrl-C, or on SIGTERM from the launcher or the scheduler."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch

from detection.runtime.distributed import DistContext

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_INTERVAL_S = 1.0
FORCED_EXIT_GRACE_S = 1.0  # for log and files, after a second signal
DUPLICATE_S = 0.3  # a launcher and a scheduler may both pass on the same signal


class RunInterrupted(KeyboardInterrupt):
    """Termination of the run by a signal."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class SignalHandler:
    """Context that handles SIGINT and SIGTERM.

    A signal raises RunInterrupted at once, except for a first one within `deferred`. That one stays pending until
    `poll` returns it, so that training stops between two steps and saves a checkpoint. After `finish`, signals raise
    nothing. In every phase, a second signal ends the process within FORCED_EXIT_GRACE_S, even if its main thread waits
    for another rank.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.is_deferring = self.is_finishing = False
        self.first_signal_s = math.inf
        self.steps_left = self.interval = 1
        self.last_poll_s = time.monotonic()

    def __enter__(self) -> Self:
        self.previous_handlers = {number: signal.signal(number, self.on_signal) for number in SIGNALS}
        read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.write_fd, False)
        self.previous_fd = signal.set_wakeup_fd(self.write_fd, warn_on_full_buffer=False)
        threading.Thread(target=force_exit, args=(read_fd,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.previous_fd)
        os.close(self.write_fd)

    def on_signal(self, signal_number: int, _: FrameType | None) -> None:
        """Store the signal as pending, or raise RunInterrupted."""
        self.first_signal_s = min(self.first_signal_s, time.monotonic())
        is_first = time.monotonic() - self.first_signal_s < DUPLICATE_S
        if not self.is_finishing and not (is_first and self.is_deferring):
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

    def finish(self) -> None:
        """Ignore a first signal from here on, so that the process exits with its own status."""
        self.is_finishing = True

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


def force_exit(wakeup_fd: int) -> None:
    """Exit the process shortly after its second signal. The interpreter writes each signal number to the pipe."""
    with os.fdopen(wakeup_fd, "rb", buffering=0) as pipe:
        first_s = math.inf
        while number := pipe.read(1):
            if number[0] in SIGNALS:
                first_s = min(first_s, time.monotonic())
                if time.monotonic() - first_s > DUPLICATE_S:
                    time.sleep(FORCED_EXIT_GRACE_S)
                    os._exit(128 + number[0])
