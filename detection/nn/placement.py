"""Placement of a network on a device: memory layout and algorithms."""

from typing import TypeVar

import torch
from torch import nn

from detection.nn.winograd import use_winograd
from detection.runtime.device import Precision, select_memory_format, should_use_winograd

Model = TypeVar("Model", bound=nn.Module)


def place_model(
    model: Model,
    device: torch.device,
    precision: Precision,
    channels_last: str = "auto",
    *,
    trains_batch_norm: bool,
    compiled: bool = False,
) -> Model:
    """Move a model to a device, in the memory layout of a run and with its algorithms."""
    memory_format = select_memory_format(channels_last, precision, device, trains_batch_norm=trains_batch_norm)
    model = model.to(device).to(memory_format=memory_format)
    if should_use_winograd(precision, device, compiled=compiled):
        use_winograd(model)
    return model
