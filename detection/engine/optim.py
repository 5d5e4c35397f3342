"""Optimizer and learning-rate schedules.

A schedule returns the learning rate of a step (from 0) in an epoch (from 1) of so many steps, for weights whose rate
has a factor.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from detection.config.settings import InputError

# With torch's default betas (0.9, 0.999) and epsilon (1e-8), as in MLPerf's RetinaNet.
TORCH_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def build_optimizer(
    model: nn.Module,
    *,
    name: str = "sgd",
    backend: str = "torch",
    momentum: float,
    weight_decay: float,
    weight_decay_on_bias_and_norm: bool = True,
    bias_lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """Build an optimizer over all trained parameters, with a learning rate of 0 until `set_learning_rates`.

    name: one of `TORCH_OPTIMIZERS`. backend: fused update of "torch" or, for SGD, of "apex", which compute the same.
    momentum: of SGD. The other arguments: as in `group_parameters`. Raise InputError if apex is not installed. On
    devices without torch's fused kernel the update is not fused: slower, and equal up to rounding.
    """
    parameters = group_parameters(
        model,
        weight_decay=weight_decay,
        weight_decay_on_bias_and_norm=weight_decay_on_bias_and_norm,
        bias_lr_factor=bias_lr_factor,
    )
    if backend == "torch":
        optimizer_class = TORCH_OPTIMIZERS[name]
        arguments: dict[str, Any] = {"momentum": momentum} if name == "sgd" else {}
        devices = {parameter.device for group in parameters for parameter in group["params"]}
        fused = all(supports_fused(optimizer_class, device) for device in devices)
        optimizer = optimizer_class(parameters, lr=0.0, weight_decay=weight_decay, fused=fused, **arguments)
        reset_optimizer_state(optimizer)
        return optimizer
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise InputError(
            f"--optimizer-backend apex: apex cannot be imported ({error}). "
            "Install it, or pass --optimizer-backend torch."
        ) from error
    sgd: torch.optim.Optimizer = FusedSGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay)
    return sgd


def group_parameters(
    model: nn.Module, *, weight_decay: float, weight_decay_on_bias_and_norm: bool, bias_lr_factor: float
) -> list[dict[str, Any]]:
    """Return the parameter groups of all trained parameters.

    weight_decay_on_bias_and_norm: apply weight decay to biases and batch norm, too. bias_lr_factor: factor on the
    learning rate of these. If either differs, they form their own group.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay_on_bias_and_norm and bias_lr_factor == 1:
        return [{"params": trained}]
    decay = weight_decay if weight_decay_on_bias_and_norm else 0.0
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1]},
        {
            "params": [parameter for parameter in trained if parameter.dim() <= 1],
            "weight_decay": decay,
            "lr_factor": bias_lr_factor,
        },
    ]


def reset_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Reset the optimizer to its state before the first step.

    For torch's fused update the momentum is set to zeros, which gives the same result as none. Otherwise the fused
    update allocates it uninitialized and leaves it so if it skips the first step, as fp16 often does (torch 2.4 to
    2.15).
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def supports_fused(optimizer_class: Callable[..., torch.optim.Optimizer], device: torch.device) -> bool:
    """Try torch's fused update on a device: torch lists every third-party device as supported."""
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer_class([parameter], lr=0.0, fused=True).step()
    except RuntimeError:  # includes NotImplementedError
        return False
    return True


def set_learning_rates(optimizer: torch.optim.Optimizer, schedule: Callable[[float], float]) -> float:
    """Set the rate of each parameter group to the schedule's for its `lr_factor`. Return that of a factor of 1."""
    for group in optimizer.param_groups:
        group["lr"] = schedule(group.get("lr_factor", 1.0))
    return schedule(1.0)


def multistep_lr(
    step: int,
    epoch: int,
    steps_per_epoch: int,
    lr_factor: float = 1.0,
    *,
    peak: float,
    warmup_steps: int,
    warmup_factor: float,
    warmup_method: str,
    decay_steps: tuple[int, ...],
    lr_decay_factor: float,
    steps_ahead: int,
) -> float:
    """Return the learning rate of a step, independent of its epoch: that of step + steps_ahead in Detectron's schedule.

    Linear warm-up over the first `warmup_steps`, multiplied by `lr_decay_factor` from each of `decay_steps` on. The
    method "linear" starts at `warmup_factor` times the rate. "mlperf_linear" adds `warmup_factor` at each step for any
    `lr_factor`, so that the rate of biases starts higher.
    """
    step += steps_ahead
    rate = lr_factor * peak * lr_decay_factor ** sum(step >= boundary for boundary in decay_steps)
    if step >= warmup_steps:
        return rate
    if warmup_method == "mlperf_linear":
        return rate - (warmup_steps - step) * warmup_factor
    progress = step / warmup_steps
    return rate * (warmup_factor * (1 - progress) + progress)


def linear_warmup_lr(
    step: int,
    epoch: int,
    steps_per_epoch: int,
    lr_factor: float = 1.0,
    *,
    peak: float,
    warmup_epochs: float,
    warmup_start_factor: float,
) -> float:
    """Return the learning rate of a step: linear warm-up over so many epochs, then constant.

    Warm-up starts at peak·warmup_start_factor (MLPerf's RetinaNet).
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    progress = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return lr_factor * peak * (warmup_start_factor * (1 - progress) + progress)


def mlperf_ssd_lr(
    step: int,
    epoch: int,
    steps_per_epoch: int,
    lr_factor: float = 1.0,
    *,
    peak: float,
    warmup_steps: int,
    warmup_factor: float,
    lr_decay_epochs: tuple[int, ...],
    lr_decay_factor: float,
) -> float:
    """Return the learning rate of a step in an epoch.

    Linear warm-up from peak·(1 - 2^-factor) over the first `warmup_steps`, multiplied by `lr_decay_factor` after
    each of `lr_decay_epochs` (MLPerf's rules; in the reference the rate stays at that of the last warm-up step).
    """
    rate = peak * lr_decay_factor ** sum(epoch > boundary for boundary in lr_decay_epochs)
    if step < warmup_steps:
        rate -= (warmup_steps - step) * rate / (warmup_steps * 2**warmup_factor)
    return rate * lr_factor


def freeze_batch_norm(model: nn.Module) -> None:
    """Freeze batch norm: use its running statistics, and train neither weights nor biases."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
