"""Batch norm over several ranks: running statistics as one tensor, and synchronized batch norm for CPUs.

On accelerators, torch.nn.SyncBatchNorm does this. It rejects CPU tensors, which trial runs use.
C: channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

AllReduce = Callable[[Tensor], Any]
"""Function that sums a tensor over ranks, in place."""


def running_stats(model: nn.Module) -> Tensor:
    """Return all running means and variances of a model, (S,)."""
    return torch.cat([buffer.flatten() for buffer in running_buffers(model)] or [torch.zeros(0)])


def set_running_stats(model: nn.Module, flat: Tensor) -> None:
    """Set all running means and variances of a model, in the layout of `running_stats`."""
    buffers = running_buffers(model)
    if buffers:
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def running_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers of the running means and variances."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


def convert_cpu_sync_batchnorm(module: nn.Module, all_reduce: AllReduce) -> nn.Module:
    """Replace each BatchNorm2d of a module by a synchronized one with the same parameters and buffers."""
    for name, child in module.named_children():
        setattr(module, name, convert_cpu_sync_batchnorm(child, all_reduce))
    if not isinstance(module, nn.BatchNorm2d):
        return module
    sync = CpuSyncBatchNorm2d(module.num_features, module.eps, module.momentum, all_reduce=all_reduce)
    sync.weight, sync.bias = module.weight, module.bias
    sync.running_mean, sync.running_var = module.running_mean, module.running_var
    sync.num_batches_tracked = module.num_batches_tracked
    return sync.train(module.training)


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of several ranks. The number of images may differ between ranks."""

    def __init__(self, num_features: int, eps: float, momentum: float | None, *, all_reduce: AllReduce):
        super().__init__(num_features, eps, momentum)
        self.all_reduce = all_reduce

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (B, C, H, W), keeping its data type. In eval mode, use the running statistics."""
        if not self.training:
            return super().forward(x)
        x_upcast = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x_upcast.new_full((1,), x.numel() // x.shape[1])
        total = AllReduceSum.apply(torch.cat([x_upcast.sum(dim=(0, 2, 3)), count]), self.all_reduce)
        num_values = total[-1]
        mean = total[:-1] / num_values
        centered = x_upcast - mean[:, None, None]
        # Use two passes, since the mean of squares minus the squared mean loses precision by cancellation.
        variance = AllReduceSum.apply(centered.square().sum(dim=(0, 2, 3)), self.all_reduce) / num_values
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * num_values / (num_values - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class AllReduceSum(torch.autograd.Function):
    """Sum of a tensor over ranks. Its gradient is the sum of the gradients over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, all_reduce: AllReduce) -> Tensor:
        """Return the sum and keep `tensor` unchanged."""
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
