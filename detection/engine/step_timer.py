"""Where the time of a step goes: into data, forward, backward, optimiser."""

import time
from collections import defaultdict

import torch

from detection.runtime import device


class Phases:
    """The time that each phase takes, on time.monotonic's clock.

    wait_for: the device that is waited for at the end of each phase, so that its work counts where it belongs; None
    never waits, and then an accelerator may be still at work on what has ended here. spent_s: seconds of each phase,
    since `begin`. end_s: when each has ended last.
    """

    def __init__(self, wait_for: torch.device | None = None):
        self.wait_for = wait_for
        self.end_s: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self.mark_s = time.monotonic()

    def end(self, phase: str) -> None:
        """What was done since the last phase ended, or since the beginning, was this one."""
        if self.wait_for is not None:
            device.synchronize(self.wait_for)
        now_s = self.end_s[phase] = time.monotonic()
        self.spent_s[phase] += now_s - self.mark_s
        self.mark_s = now_s
