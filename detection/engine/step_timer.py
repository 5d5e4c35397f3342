"""Time of each phase of a step: data, forward, backward, optimizer."""

import time
from collections import defaultdict

import torch

from detection.runtime import device


class StepTimer:
    """Seconds per phase, on the clock of time.monotonic.

    sync_device: device to synchronize at the end of each phase. Without one, the work of an accelerator may count in a
    later phase. elapsed_s: seconds of each phase since `start`. last_end_s: last end of each phase.
    """

    def __init__(self, sync_device: torch.device | None = None):
        self.sync_device = sync_device
        self.last_end_s: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Reset the timer."""
        self.elapsed_s: defaultdict[str, float] = defaultdict(float)
        self.last_s = time.monotonic()

    def lap(self, phase: str) -> None:
        """Attribute the time since the previous call to `phase`."""
        if self.sync_device is not None:
            device.synchronize(self.sync_device)
        now_s = self.last_end_s[phase] = time.monotonic()
        self.elapsed_s[phase] += now_s - self.last_s
        self.last_s = now_s
