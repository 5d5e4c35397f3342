"""What is trained and how far it has come, and what surrounds it."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from detection.checkpoint.resume import Resumed
from detection.config.run_config import RunConfig
from detection.data.coco import Category
from detection.engine.run_logger import Progress
from detection.engine.step_timer import Phases
from detection.runtime.device import Precision
from detection.runtime.distributed import Ranks
from detection.runtime.signals import Interruption
from detection.runtime.watchdog import Watchdog
from mlperf.log import MlperfLog


@dataclass
class State:
    """What is trained, and how far training has come.

    step: those made so far. epoch: the one in progress, from 1, or the last; samples: images of it that are
    trained; evaluated: whether it is over and its evaluation too.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    step: int = 0
    epoch: int = 0
    samples: int = 0
    evaluated: bool = True
    categories: tuple[Category, ...] = ()
    """What the labels 1, 2, ... stand for, once the data are open; it travels in the checkpoints."""
    phases: Phases = field(default_factory=Phases)

    def begin(self, epoch: int) -> None:
        """An epoch starts."""
        self.epoch, self.samples, self.evaluated = epoch, 0, False


@dataclass(frozen=True)
class Run:
    """What surrounds the training: who takes part, and what it tells and leaves.

    resumed: the checkpoint that the run goes on from, if it does.
    """

    config: RunConfig
    ranks: Ranks
    log: MlperfLog
    progress: Progress
    interruption: Interruption
    watchdog: Watchdog
    folder: Path
    seed: int
    resumed: Resumed | None = None

    @property
    def continues(self) -> bool:
        """Whether the log has a beginning already."""
        return self.resumed is not None and self.resumed.continues
