"""Modes of the model: training and evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from detection.config.run_config import RunConfig
from detection.engine import optim
from detection.engine.state import RunContext, TrainState
from detection.runtime import device


def set_train_mode(model: nn.Module, config: RunConfig) -> None:
    """Set the model to training mode, except frozen batch norm."""
    model.train()
    if config.freeze_batch_norm:
        optim.freeze_batch_norm(model)


@contextmanager
def eval_mode(state: TrainState, run: RunContext) -> Iterator[nn.Module]:
    """Provide the unwrapped model in evaluation mode: no gradients, eager, autocast, a longer watchdog timeout."""
    model = run.ranks.unwrap(state.model)
    model.eval()
    with (
        torch.inference_mode(),
        run.watchdog.extended(),
        device.force_eager(),
        state.precision.autocast(run.ranks.device),
    ):
        yield model
