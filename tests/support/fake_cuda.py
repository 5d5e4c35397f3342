"""An accelerator that computes nothing: torch's fake tensors, which say that they are on CUDA.

A fake tensor has a shape, a type and a device, and no numbers. What takes one of the device and one of the CPU is
refused as on a GPU. Where the host needs a number, or a shape, that only the device knows, it gets a made-up one, and
that it waits is noted. What a kernel waits for inside of itself is not seen.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import maskrcnn.anchors
import ssd.anchors
from paths import ROOT

CUDA = torch.device("cuda", 0)
ANCHORS = (ssd.anchors.make_anchors, maskrcnn.anchors.make_anchors)
PACKAGES = tuple(f"{ROOT / name}/" for name in ("ssd", "maskrcnn", "detection"))
COUNTED = 3  # rows of whatever the device alone can count

COUNTS = {"aten::nonzero", "aten::_unique2", "aten::unique_consecutive", "torchvision::nms"}
"""Operations that wait for the device, since the shape of what they return depends on numbers."""


class Waits(TorchDispatchMode):
    """Counts in `of` what makes the host wait for the device, by the function of the program and the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[tuple[str, str]] = Counter()

    def taken(self) -> dict[tuple[str, str], int]:
        """What was waited for since the last time."""
        of, self.of = dict(self.of), Counter()
        return of

    def note(self, what: str) -> None:
        self.of[place(), what] += 1

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operator._schema.name
        if name == "aten::_fused_sgd_":  # torch cannot fake it
            return refuse_mixed(args)
        if name == "aten::_local_scalar_dense" or name == "aten::equal" or name in COUNTS:
            if any(tensor.device == CUDA for tensor in tensors(args)):
                self.note(name)
            return made_up(name, args)
        if name == "aten::index" and any(map(is_mask, args[1])):
            self.note(name)
            args = (args[0], [column for index in args[1] for column in columns(index)])
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if (
            torch.is_inference_mode_enabled()
            and name.startswith("aten::")
            and operator.has_kernel_for_dispatch_key(composite)
        ):
            with self:  # in that mode, what is made of several operations comes as one
                return operator.decompose(*args, **kwargs)
        result = operator(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            if source.device != result.device:
                self.note(f"from {source.device.type} to {result.device.type}")
        return result


def place() -> str:
    """The function of the program that is running."""
    frame: Any = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGES):
            return f"{Path(code.co_filename).relative_to(ROOT)} {code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


def tensors(values: Any) -> list[Tensor]:
    return [value for value in _pytree.tree_leaves(values) if isinstance(value, Tensor)]


def refuse_mixed(args: Any) -> None:
    kinds = {tensor.device for tensor in tensors(args)}
    if len(kinds) > 1:
        raise RuntimeError(f"expected all tensors to be on the same device, but found {kinds}")


def is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def columns(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index as it is, but a mask as numbers for each of its dimensions, made up."""
    return made_up("aten::nonzero", (index,)).unbind(1) if is_mask(index) else (index,)


def made_up(name: str, args: Any) -> Any:
    """What the operator might have returned."""
    x = args[0]
    if name in ("aten::_local_scalar_dense", "aten::equal"):
        return True if x.dtype == torch.bool else 1
    numbers = x.new_empty(min(COUNTED, len(x)), dtype=torch.int64)
    if name == "torchvision::nms":
        return numbers
    if name == "aten::nonzero":
        return x.new_empty(min(COUNTED, x.numel()), x.dim(), dtype=torch.int64)
    return x.new_empty(len(numbers)), torch.empty_like(x, dtype=torch.int64), numbers


def to_list(tensor: Tensor) -> Any:
    """As `Tensor.tolist`, which copies all numbers at once."""
    if tensor.device == CUDA:
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Waits):
                mode.note("tolist")
    return ones(tensor.shape)


def ones(shape: Sequence[int]) -> Any:
    return [ones(shape[1:]) for _ in range(shape[0])] if shape else 1


def backward(loss: Tensor) -> None:
    """As `Tensor.backward`, whose threads refuse a device that is not there: node after node, in this one."""
    root: Any = loss.grad_fn
    ahead, missing = [root], Counter({root: 0})
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if node is not None:
                ahead += [] if node in missing else [node]
                missing[node] += 1
    arrived: dict[Any, dict[int, Tensor]] = {node: {} for node in missing}
    arrived[root][0] = torch.ones_like(loss)
    ready = [root]
    while ready:
        node = ready.pop()
        given = [arrived[node].get(number) for number in range(len(node._input_metadata))]
        if hasattr(node, "variable"):
            if given[0] is not None:
                before = node.variable.grad
                node.variable.grad = given[0].detach() if before is None else before + given[0]
            continue
        results = node(*given) if arrived[node] else [None] * len(node.next_functions)
        results = results if isinstance(results, (tuple, list)) else [results]
        for (after, number), result in zip(node.next_functions, results, strict=True):
            if after is None:
                continue
            if result is not None:
                wanted = after._input_metadata[number]
                result = result.sum_to_size(wanted.shape).to(wanted.dtype)
                before = arrived[after].get(number)
                arrived[after][number] = result if before is None else before + result
            missing[after] -= 1
            if not missing[after]:
                ready.append(after)


def apply(module: nn.Module, function: Any) -> nn.Module:
    """As `Module._apply`, with new parameters: torch refuses to change those that are fake."""
    for child in module.children():
        apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


@contextmanager
def pretend() -> Iterator[Waits]:
    """All that is made inside is fake, and CUDA is there."""
    for anchors in ANCHORS:
        anchors.cache_clear()
    copies_first = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), Waits() as waits:
        torch._C._set_only_lift_cpu_tensors(True)  # where there is a GPU, too: constants are seen to be copied
        patch.setattr(Tensor, "backward", backward)
        patch.setattr(FakeTensor, "tolist", to_list)
        patch.setattr(nn.Module, "_apply", apply)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        try:
            yield waits
        finally:
            torch._C._set_only_lift_cpu_tensors(copies_first)
            for anchors in ANCHORS:
                anchors.cache_clear()
