"""The optimiser and its learning rate."""

from typing import Any

import torch
from torch import nn

from detection.config import InputError


def make_sgd(
    model: nn.Module, *, kernels: str, momentum: float, weight_decay: float, decay_biases: bool = True
) -> torch.optim.Optimizer:
    """SGD over all trained parameters; the loop sets the learning rate.

    kernels: whose fused update, "torch" or "apex"; both compute the same. decay_biases: whether biases and batch
    norm decay, too; if not, they make a group of their own. InputError where apex is not installed.
    On devices without torch's it is not fused: the same numbers to a rounding, slower.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters: list[dict[str, Any]] = [{"params": trained}]
    if not decay_biases:
        parameters = [
            {"params": [parameter for parameter in trained if parameter.dim() > 1]},
            {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
        ]
    if kernels == "torch":
        fused = all(fuses_sgd(device) for device in {parameter.device for parameter in trained})
        return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=fused)
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise InputError(f"--sgd apex: apex cannot be imported ({error}). Install it, or pass --sgd torch.") from error
    optimizer: torch.optim.Optimizer = FusedSGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay)
    return optimizer


def fuses_sgd(device: torch.device) -> bool:
    """Whether torch's fused update runs on a device: tried, since torch lists any third party's as one that does."""
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        torch.optim.SGD([parameter], lr=0.0, momentum=0.9, fused=True).step()
    except RuntimeError:  # which NotImplementedError is, too
        return False
    return True


def learning_rate(
    step: int,
    epoch: int,
    *,
    peak: float,
    warmup_steps: int,
    warmup_factor: float,
    decay_epochs: tuple[int, ...],
    decay_factor: float,
) -> float:
    """Learning rate of a step (from 0) in an epoch (from 1).

    Linear warm-up from peak·(1 - 2^-factor) over the first `warmup_steps`, multiplied by `decay_factor` after
    each of `decay_epochs` (MLPerf reference).
    """
    rate = peak * decay_factor ** sum(epoch > boundary for boundary in decay_epochs)
    if step < warmup_steps:
        rate -= (warmup_steps - step) * rate / (warmup_steps * 2**warmup_factor)
    return rate


def freeze_batch_norm(model: nn.Module) -> None:
    """Make batch norm use its running statistics, and train neither its weights nor its biases."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
