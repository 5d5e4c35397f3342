"""Training state, and the context of the run around it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from detection.checkpoint.resume import ResumePoint
from detection.config.run_config import RunConfig
from detection.data.coco import Category
from detection.engine.run_logger import RunLogger
from detection.engine.step_timer import StepTimer
from detection.runtime.device import Precision
from detection.runtime.distributed import DistContext
from detection.runtime.signals import SignalHandler
from detection.runtime.watchdog import Watchdog
from mlperf.log import MlperfLog


@dataclass
class TrainState:
    """Model, optimizer and progress of training.

    step: completed steps. epoch: current or last epoch, from 1. images_in_epoch: images of it trained so far.
    epoch_evaluated: the epoch and its evaluation are complete. skipped_steps: number of steps whose update the gradient
    scaler skipped, () on the device.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    skipped_steps: Tensor
    step: int = 0
    epoch: int = 0
    images_in_epoch: int = 0
    epoch_evaluated: bool = True
    categories: tuple[Category, ...] = ()
    """Categories of the labels 1, 2, ..., known once the data set is open, and saved in checkpoints."""
    step_timer: StepTimer = field(default_factory=StepTimer)

    def start_epoch(self, epoch: int) -> None:
        """Start an epoch."""
        self.epoch, self.images_in_epoch, self.epoch_evaluated = epoch, 0, False


@dataclass(frozen=True)
class RunContext:
    """Context of a run: configuration, ranks, loggers and run folder.

    resume_point: the checkpoint to resume from, if any. flags: settings that flags set.
    """

    config: RunConfig
    ranks: DistContext
    log: MlperfLog
    logger: RunLogger
    signals: SignalHandler
    watchdog: Watchdog
    folder: Path
    seed: int
    resume_point: ResumePoint | None = None
    flags: Sequence[str] = ()

    @property
    def appends_to_log(self) -> bool:
        """Return whether the run continues its own earlier log."""
        return self.resume_point is not None and self.resume_point.appends_to_log
