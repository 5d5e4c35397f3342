"""Fake CUDA device without computation, made of torch's fake tensors.

A fake tensor has a shape, a dtype and a device, but no data. An operation on tensors of the CPU and the device fails as
on a GPU. If the host needs a value or a shape that only the device knows, it gets a dummy one, and the synchronization
is counted. Synchronizations inside a kernel are not visible.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import maskrcnn.anchors
import retinanet.anchors
import ssd.anchors
from perf.machine import ROOT

CUDA = torch.device("cuda", 0)
ANCHORS = (ssd.anchors.make_anchors, maskrcnn.anchors.make_anchors, retinanet.anchors.make_anchors)
PACKAGES = tuple(f"{ROOT / name}/" for name in ("ssd", "maskrcnn", "retinanet", "detection"))
DUMMY_ROWS = 3  # rows of a result whose number only the device knows
FUSED_UPDATES = {"aten::_fused_sgd_", "aten::_fused_adam_", "aten::_fused_adamw_"}  # have no fake kernel

DATA_DEPENDENT_OPS = {"aten::nonzero", "aten::_unique2", "aten::unique_consecutive", "torchvision::nms"}
"""Operations that synchronize, because the shape of their result depends on data."""


class SyncCounter(TorchDispatchMode):
    """Counter of host synchronizations, by function of the program and operation.

    dummy_rows: rows of a result whose number only the device knows.
    """

    def __init__(self, dummy_rows: int) -> None:
        super().__init__()
        self.dummy_rows = dummy_rows
        self.counts: Counter[tuple[str, str]] = Counter()

    def take(self) -> dict[tuple[str, str], int]:
        """Return the synchronizations since the last call."""
        counts, self.counts = dict(self.counts), Counter()
        return counts

    def record(self, operation: str) -> None:
        """Count a synchronization."""
        self.counts[calling_function(), operation] += 1

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operator._schema.name
        if name in FUSED_UPDATES:
            return reject_mixed_devices(args)
        if name == "aten::_local_scalar_dense" or name == "aten::equal" or name in DATA_DEPENDENT_OPS:
            if any(tensor.device == CUDA for tensor in tensors(args)):
                self.record(name)
            return dummy_result(name, args, self.dummy_rows)
        if name == "aten::index" and any(map(is_mask, args[1])):
            self.record(name)
            args = (args[0], [part for index in args[1] for part in expand_mask(index, self.dummy_rows)])
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if (
            torch.is_inference_mode_enabled()
            and name.startswith("aten::")
            and operator.has_kernel_for_dispatch_key(composite)
        ):
            with self:  # in inference mode, composite operations arrive undecomposed
                return operator.decompose(*args, **kwargs)
        result = operator(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            if source.device != result.device:
                self.record(f"from {source.device.type} to {result.device.type}")
        return result


def calling_function() -> str:
    """Return the innermost function of the program on the stack."""
    frame: Any = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGES):
            return f"{Path(code.co_filename).relative_to(ROOT)} {code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


def tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested values."""
    return [value for value in _pytree.tree_leaves(values) if isinstance(value, Tensor)]


def reject_mixed_devices(args: Any) -> None:
    """Raise RuntimeError for tensors on several devices, as a GPU does."""
    devices = {tensor.device for tensor in tensors(args)}
    if len(devices) > 1:
        raise RuntimeError(f"expected all tensors to be on the same device, but found {devices}")


def is_mask(index: Tensor | None) -> bool:
    """Return whether an index is a mask, whose number of elements only the device knows."""
    return index is not None and index.dtype == torch.bool


def expand_mask(index: Tensor | None, rows: int) -> Sequence[Tensor | None]:
    """Replace a mask by dummy indices for each of its dimensions. Return other indices unchanged."""
    return dummy_result("aten::nonzero", (index,), rows).unbind(1) if is_mask(index) else (index,)


def dummy_result(name: str, args: Any, rows: int) -> Any:
    """Return a plausible result of an operator, with so many rows if only the device knows their number."""
    x = args[0]
    if name in ("aten::_local_scalar_dense", "aten::equal"):
        return True if x.dtype == torch.bool else 1
    indices = x.new_empty(min(rows, len(x)), dtype=torch.int64)
    if name == "torchvision::nms":
        return indices
    if name == "aten::nonzero":
        return x.new_empty(min(rows, x.numel()), x.dim(), dtype=torch.int64)
    return x.new_empty(len(indices)), torch.empty_like(x, dtype=torch.int64), indices


def to_list(tensor: Tensor) -> Any:
    """Replace `Tensor.tolist`, which copies all values at once."""
    if tensor.device == CUDA:
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, SyncCounter):
                mode.record("tolist")
    return nested_ones(tensor.shape)


def nested_ones(shape: Sequence[int]) -> Any:
    """Return nested lists of ones."""
    return [nested_ones(shape[1:]) for _ in range(shape[0])] if shape else 1


class SavedTensors:
    """Tensors that the forward pass keeps for the backward pass. They are freed when their node has run."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.used: list[int] = []
        self.count = 0

    def pack(self, tensor: Tensor) -> int:
        """Keep a tensor and return its key."""
        self.count += 1
        self.kept[self.count] = tensor.detach()
        return self.count

    def unpack(self, key: int) -> Tensor:
        """Return a kept tensor."""
        self.used.append(key)
        return self.kept[key]

    def free_used(self) -> None:
        """Free the tensors that were returned since the last call."""
        for key in self.used:
            self.kept.pop(key, None)
        self.used.clear()

    @torch.no_grad()
    def backward(self, loss: Tensor) -> None:
        """Replace `Tensor.backward`, whose threads need a real device: run node after node in this thread."""
        root: Any = loss.grad_fn
        stack, pending = [root], Counter({root: 0})
        while stack:
            for node, _ in stack.pop().next_functions:
                if node is not None:
                    stack += [] if node in pending else [node]
                    pending[node] += 1
        gradients: dict[Any, dict[int, Tensor]] = {node: {} for node in pending}
        gradients[root][0] = torch.ones_like(loss)
        ready = [root]
        while ready:
            node = ready.pop()
            by_index = gradients.pop(node)
            inputs = [by_index.pop(index, None) for index in range(len(node._input_metadata))]
            if hasattr(node, "variable"):
                if inputs[0] is not None:
                    previous = node.variable.grad
                    node.variable.grad = inputs[0].detach() if previous is None else previous + inputs[0]
                continue
            if all(gradient is None for gradient in inputs):
                results: Any = [None] * len(node.next_functions)
            elif callable(node):
                results = node(*inputs)
            else:  # written in Python, with a result for each argument, of which the tensors come first
                results = node.apply(*inputs)[: len(node.next_functions)]
            del inputs
            self.free_used()
            results = results if isinstance(results, (tuple, list)) else [results]
            for (successor, index), result in zip(node.next_functions, results, strict=True):
                if successor is None:
                    continue
                if result is not None:
                    expected = successor._input_metadata[index]
                    result = result.sum_to_size(expected.shape).to(expected.dtype)
                    previous = gradients[successor].get(index)
                    gradients[successor][index] = result if previous is None else previous + result
                pending[successor] -= 1
                if not pending[successor]:
                    ready.append(successor)
            del results


def apply(module: nn.Module, function: Any) -> nn.Module:
    """Replace `Module._apply`, creating new parameters: torch cannot modify fake ones in place."""
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
def fake_cuda_device(dummy_rows: int = DUMMY_ROWS) -> Iterator[SyncCounter]:
    """Make every tensor created inside fake, and CUDA available.

    dummy_rows: rows of a result whose number only the device knows.
    """
    for anchors in ANCHORS:
        anchors.cache_clear()
    previous = torch._C._only_lift_cpu_tensors()
    saved = SavedTensors()
    with (
        patch.object(Tensor, "backward", lambda loss: saved.backward(loss)),
        patch.object(FakeTensor, "tolist", to_list),
        patch.object(nn.Module, "_apply", apply),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        FakeTensorMode(),
        SyncCounter(dummy_rows) as syncs,
        torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack),
    ):
        torch._C._set_only_lift_cpu_tensors(True)  # count copies of constants, also on a machine with a GPU
        try:
            yield syncs
        finally:
            torch._C._set_only_lift_cpu_tensors(previous)
            for anchors in ANCHORS:
                anchors.cache_clear()
