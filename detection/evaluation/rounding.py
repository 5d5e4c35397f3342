"""Simulation of a precision: a network in double precision whose values are rounded as that precision rounds them.

It shows what rounding alone does to a network. Its error against exact numbers is what a device may have.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from detection.runtime.device import Precision

MATRIX_FUNCTIONS = {
    *(torch.conv2d, torch.conv_transpose2d, F.conv2d, F.conv_transpose2d),
    *(F.linear, torch.matmul, torch.einsum),
}
TF32_DROPPED_BITS = 13  # of float32's mantissa of 23


class SimulatedPrecision(Precision):
    """Precision of a network in double precision. Each result is rounded, and so is its gradient."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context for the forward pass."""
        return RoundedFunctions(self.name)


class RoundedFunctions(TorchFunctionMode):
    """Functions that round as autocast to a precision: operands of matrix products, and for bf16 and fp16 all results.

    Only results in double precision are rounded, since a network computes in float32 on purpose elsewhere.
    """

    def __init__(self, precision_name: str) -> None:
        super().__init__()
        self.precision_name = precision_name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MATRIX_FUNCTIONS:
            args, kwargs = tree_map(self.round_operand, (args, kwargs or {}))
        if func is Tensor.__setitem__:
            target, index, values = args
            args = (target, index, values.to(target.dtype) if isinstance(values, Tensor) else values)
        result = func(*args, **(kwargs or {}))
        return result if self.precision_name == "tf32" else tree_map(self.round_result, result)

    def round_operand(self, value: Any) -> Any:
        """Round an operand of a matrix product, also one in float32."""
        if isinstance(value, Tensor) and value.is_floating_point():
            return Round.apply(value.double(), self.precision_name)
        return value

    def round_result(self, value: Any) -> Any:
        """Round a result, unless it is a view, whose values are rounded already."""
        if isinstance(value, Tensor) and value.dtype == torch.float64 and value._base is None:
            return Round.apply(value, self.precision_name)
        return value


class Round(torch.autograd.Function):
    """Rounding of values and of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, precision_name: str) -> Tensor:
        """Return rounded values."""
        ctx.precision_name = precision_name
        return round_to(values, precision_name)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Return rounded gradients."""
        return round_to(grad_outputs[0], ctx.precision_name), None


def round_to(values: Tensor, precision_name: str) -> Tensor:
    """Return float64 values rounded to bf16, fp16 or tf32, as float64."""
    match precision_name:
        case "bf16":
            return values.bfloat16().double()
        case "fp16":
            return values.half().double()
        case "tf32":
            bits = values.float().contiguous(memory_format=torch.preserve_format).view(torch.int32)
            half = 1 << (TF32_DROPPED_BITS - 1)
            return ((bits + half) & -(1 << TF32_DROPPED_BITS)).view(torch.float32).double()
    raise ValueError(precision_name)
