"""The optimiser and its learning rate."""

from typing import Any

import torch
from torch import nn

from detection.config.settings import InputError


def make_sgd(
    model: nn.Module,
    *,
    kernels: str,
    momentum: float,
    weight_decay: float,
    weight_decay_on_bias_and_norm: bool = True,
    bias_lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD over all trained parameters; the loop sets the learning rate, `set_learning_rate`.

    kernels: whose fused update, "torch" or "apex"; both compute the same. weight_decay_on_bias_and_norm: whether biases and batch
    norm decay, too; bias_lr_factor: how much faster they learn; where they differ, they make a group of their own.
    InputError where apex is not installed.
    On devices without torch's it is not fused: the same numbers to a rounding, slower.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters: list[dict[str, Any]] = [{"params": trained}]
    if not weight_decay_on_bias_and_norm or bias_lr_factor != 1:
        decay = weight_decay if weight_decay_on_bias_and_norm else 0.0
        biases = [parameter for parameter in trained if parameter.dim() <= 1]
        parameters = [
            {"params": [parameter for parameter in trained if parameter.dim() > 1]},
            {"params": biases, "weight_decay": decay, "lr_factor": bias_lr_factor},
        ]
    if kernels == "torch":
        fused = all(fuses_sgd(device) for device in {parameter.device for parameter in trained})
        sgd = torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=fused)
        forget(sgd)
        return sgd
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise InputError(
            f"--optimizer-backend apex: apex cannot be imported ({error}). Install it, or pass --optimizer-backend torch."
        ) from error
    optimizer: torch.optim.Optimizer = FusedSGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay)
    return optimizer


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Put the momentum back to where it is before the first step.

    For torch's fused update that is to zeros, which give the same: without, it makes room and leaves there whatever
    was in the memory where the first step is skipped, as the first ones in fp16 often are (torch 2.4 to 2.15).
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if group.get("fused") and group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def fuses_sgd(device: torch.device) -> bool:
    """Whether torch's fused update runs on a device: tried, since torch lists any third party's as one that does."""
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        torch.optim.SGD([parameter], lr=0.0, momentum=0.9, fused=True).step()
    except RuntimeError:  # which NotImplementedError is, too
        return False
    return True


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter, of those of a group with a factor to so many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def learning_rate_by_steps(
    step: int,
    epoch: int,
    *,
    peak: float,
    warmup_steps: int,
    warmup_share: float,
    decay_steps: tuple[int, ...],
    lr_decay_factor: float,
) -> float:
    """Learning rate of a step (from 0), whatever its epoch.

    Linear warm-up from peak·share over the first `warmup_steps`, multiplied by `lr_decay_factor` from each of
    `decay_steps` on (Detectron).
    """
    rate = peak * lr_decay_factor ** sum(step >= boundary for boundary in decay_steps)
    done = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return rate * (warmup_share * (1 - done) + done)


def learning_rate(
    step: int,
    epoch: int,
    *,
    peak: float,
    warmup_steps: int,
    warmup_factor: float,
    lr_decay_epochs: tuple[int, ...],
    lr_decay_factor: float,
) -> float:
    """Learning rate of a step (from 0) in an epoch (from 1).

    Linear warm-up from peak·(1 - 2^-factor) over the first `warmup_steps`, multiplied by `lr_decay_factor` after
    each of `lr_decay_epochs` (MLPerf reference).
    """
    rate = peak * lr_decay_factor ** sum(epoch > boundary for boundary in lr_decay_epochs)
    if step < warmup_steps:
        rate -= (warmup_steps - step) * rate / (warmup_steps * 2**warmup_factor)
    return rate


def freeze_batch_norm(model: nn.Module) -> None:
    """Make batch norm use its running statistics, and train neither its weights nor its biases."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
