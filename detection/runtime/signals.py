"""The wish from outside that a run ends: Ctrl-C, SIGTERM from the launcher or the scheduler."""

import ctypes
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch

from detection.runtime.distributed import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CHECK_EVERY_S = 1.0


def end_with_parent() -> None:
    """Have the system send this process SIGTERM when the launcher dies, so that none is left without one."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ends the run."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Interruption:
    """Takes the signals that end a run, as a context.

    They raise Interrupted at once, but for a first one that comes inside of `deferred`: that is noted, for
    `asked` to tell, so that training can end between two steps and save what it has reached.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self.defers = False
        self.steps_left = self.interval = 1
        self.mark_s = time.monotonic()

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, signal_number: int, _: FrameType | None) -> None:
        """Note the signal, or raise Interrupted."""
        if self.noted is not None or not self.defers:
            raise Interrupted(signal_number)
        self.noted = signal_number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a first signal wait for `asked`."""
        self.defers = True
        try:
            yield
        finally:
            self.defers = False

    def ignore(self) -> None:
        """From now on the process ends by itself, with a status of its own, whatever the launcher sends."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def asked(self, ranks: Ranks, *, at_once: bool = False) -> int | None:
        """The signal that any rank has noted; every rank must ask after each step and gets the same answer.

        The ranks agree about once a second, not every step, since the answer waits for the device; or `at_once`.
        """
        if not ranks.together:
            return self.noted
        self.steps_left -= 1
        if self.steps_left > 0 and not at_once:
            return None
        now_s = time.monotonic()
        facts = torch.tensor([self.noted or 0, (now_s - self.mark_s) / self.interval], device=ranks.device)
        noted, step_s = ranks.greatest(facts).tolist()
        self.interval = self.steps_left = min(1000, max(1, int(CHECK_EVERY_S / max(step_s, 1e-6))))
        self.mark_s = now_s
        return int(noted) or None
