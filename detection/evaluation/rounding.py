"""Simulation of a precision: a network in double precision whose values are rounded as that precision rounds them.

It shows what rounding alone does to a network. Its error against exact numbers is what a device may have. The spacing
of the rounded values can be changed: the errors are then independent, and of the same size.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from detection.runtime.device import Precision

MATRIX_FUNCTIONS = {
    *(torch.conv2d, torch.conv_transpose2d, F.conv2d, F.conv_transpose2d),
    *(F.linear, torch.matmul, torch.einsum),
}
CONVERSIONS = {Tensor.to, Tensor.type_as}
TF32_DROPPED_BITS = 13  # of float32's mantissa of 23


@dataclass(frozen=True)
class SimulatedPrecision(Precision):
    """Precision of a network in double precision. Each result is rounded, and so is its gradient.

    spacing: of the rounded values, relative to the precision's own; from 1 to 2.
    """

    spacing: float = 1.0

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context for the forward pass."""
        return RoundedFunctions(self)


class RoundedFunctions(TorchFunctionMode):
    """Functions that round as autocast to a precision: operands of matrix products, and for bf16 and fp16 all results.

    Results with a float32 operand become float32 instead: there the network computes in float32 on purpose.
    """

    def __init__(self, precision: SimulatedPrecision) -> None:
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MATRIX_FUNCTIONS:
            args, kwargs = tree_map(self.round_operand, (args, kwargs or {}))
        if func is Tensor.__setitem__:
            target, index, values = args
            args = (target, index, values.to(target.dtype) if isinstance(values, Tensor) else values)
        result = func(*args, **(kwargs or {}))
        dtypes = {value.dtype for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        # New tensors are exact: constants, such as anchors, may be kept for other runs.
        is_new = not any(dtype.is_floating_point for dtype in dtypes)
        if is_new or self.precision.name == "tf32":
            return result
        # torch promotes to float32. A conversion is not a promotion.
        promotes = torch.float32 in dtypes and func not in CONVERSIONS
        return tree_map(to_float32 if promotes else self.round_result, result)

    def round_operand(self, value: Any) -> Any:
        """Round an operand of a matrix product, also one in float32."""
        if isinstance(value, Tensor) and value.is_floating_point():
            return Round.apply(value.double(), self.precision)
        return value

    def round_result(self, value: Any) -> Any:
        """Round a result, unless it is a view, whose values are rounded already."""
        if isinstance(value, Tensor) and value.dtype == torch.float64 and value._base is None:
            return Round.apply(value, self.precision)
        return value


class Round(torch.autograd.Function):
    """Rounding of values and of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, precision: SimulatedPrecision) -> Tensor:
        """Return rounded values."""
        ctx.precision = precision
        return round_to(values, precision)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Return rounded gradients."""
        return round_to(grad_outputs[0], ctx.precision), None


def to_float32(value: Any) -> Any:
    """Convert a result in double precision to float32."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def round_to(values: Tensor, precision: SimulatedPrecision) -> Tensor:
    """Return float64 values rounded to a precision, as float64.

    Values that the precision has, such as 0, 1 and powers of 2, stay exact with any spacing, since a device does not
    change them either.
    """
    rounded = round_mantissa(values, precision.name)
    if precision.spacing == 1:
        return rounded
    spaced = round_mantissa(values / precision.spacing, precision.name) * precision.spacing
    return torch.where(rounded == values, values, spaced)


def round_mantissa(values: Tensor, precision_name: str) -> Tensor:
    """Return float64 values rounded to the mantissa of bf16, fp16 or tf32, as float64."""
    match precision_name:
        case "bf16":
            return values.bfloat16().double()
        case "fp16":
            return values.half().double()
        case "tf32":
            bits = values.float().view(torch.int32)
            half = 1 << (TF32_DROPPED_BITS - 1)
            return ((bits + half) & -(1 << TF32_DROPPED_BITS)).view(torch.float32).double()
    raise ValueError(precision_name)
