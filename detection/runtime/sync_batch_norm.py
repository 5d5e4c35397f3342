"""Batch norm over several ranks: its running statistics as one tensor, and shared statistics for devices without.

On accelerators torch.nn.SyncBatchNorm does the sharing; it refuses CPU tensors, on which runs are tried out.
C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

AllReduce = Callable[[Tensor], Any]
"""Sums a tensor over ranks, in place."""


def statistics(model: nn.Module) -> Tensor:
    """All running means and variances of a model, (S,)."""
    return torch.cat([buffer.flatten() for buffer in running(model)] or [torch.zeros(0)])


def set_statistics(model: nn.Module, flat: Tensor) -> None:
    """Put back what `statistics` gave."""
    buffers = running(model)
    if buffers:
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def running(model: nn.Module) -> list[Tensor]:
    """The buffers of batch norm's running means and variances."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


def convert(module: nn.Module, all_reduce: AllReduce) -> nn.Module:
    """Replace each BatchNorm2d of a module, with its parameters and buffers, by one of shared statistics."""
    for name, child in module.named_children():
        setattr(module, name, convert(child, all_reduce))
    if not isinstance(module, nn.BatchNorm2d):
        return module
    shared = SharedBatchNorm2d(module.num_features, module.eps, module.momentum, all_reduce=all_reduce)
    shared.weight, shared.bias = module.weight, module.bias
    shared.running_mean, shared.running_var = module.running_mean, module.running_var
    shared.num_batches_tracked = module.num_batches_tracked
    return shared.train(module.training)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of several ranks, which may have different numbers of them."""

    def __init__(self, num_features: int, eps: float, momentum: float | None, *, all_reduce: AllReduce):
        super().__init__(num_features, eps, momentum)
        self.all_reduce = all_reduce

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised, in the type of x; in evaluation like any other batch norm."""
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_full((1,), x.numel() // x.shape[1])
        total = SumOverRanks.apply(torch.cat([wide.sum(dim=(0, 2, 3)), count]), self.all_reduce)
        num_values = total[-1]
        mean = total[:-1] / num_values
        centred = wide - mean[:, None, None]
        # In two passes: the mean of squares less the square of the mean cancels.
        variance = SumOverRanks.apply(centred.square().sum(dim=(0, 2, 3)), self.all_reduce) / num_values
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * num_values / (num_values - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class SumOverRanks(torch.autograd.Function):
    """The sum over ranks of a tensor; its gradient is the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, all_reduce: AllReduce) -> Tensor:
        """Sum, leaving `tensor` as it is."""
        ctx.all_reduce = all_reduce
        total = tensor.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sum the gradients."""
        total = gradient.clone()
        ctx.all_reduce(total)
        return total, None
