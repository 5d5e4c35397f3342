"""Fake third-party accelerator "standin" on torch's privateuse1 backend, in pure Python.

It uses the CPU's memory and kernels, but torch treats its tensors as those of another device: an operation on tensors
of both fails as on any accelerator. It lacks features that third parties may lack: streams, a fused SGD, autocast
kernels. `autoload` is its entry point in the group "torch.backends", and `install` creates a package with it.

DLPack moves memory between the device types, since it accepts any address and any type.
"""

import ctypes
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree, backend_registration

DEVICE_TYPE = "standin"
CPU, PRIVATEUSE1 = 1, 12  # device types in dlpack.h

# Type codes in dlpack.h. Others are 0, signed integer, or 2, floating point.
DLPACK_CODES = {torch.bool: 6, torch.uint8: 1, torch.bfloat16: 4}

CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # view kernels, which only change metadata


class DLTensor(ctypes.Structure):
    """Structure of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DLManagedTensor(ctypes.Structure):
    """Structure of dlpack.h."""

    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


keep_alive: dict[int, Any] = {}
"""Objects to keep alive as long as their tensor, by the address of its descriptor."""


@DELETER
def release(address: int) -> None:
    """Release the memory of a tensor."""
    keep_alive.pop(address, None)


make_capsule = ctypes.pythonapi.PyCapsule_New
make_capsule.restype, make_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def as_device_type(tensor: Tensor, device_type: int) -> Tensor:
    """Return a tensor on another device type with the same memory, shape and strides, without its gradient."""
    return make_tensor(
        tensor.untyped_storage(), tensor.data_ptr(), *shape_and_strides(tensor), tensor.dtype, device_type
    )


def make_tensor(storage: Any, start: int, shape: Any, strides: Any, dtype: torch.dtype, device_type: int) -> Tensor:
    """Return a tensor on a device type, in the memory of a storage from the address `start`."""
    code = DLPACK_CODES.get(dtype, 2 if dtype.is_floating_point else 0)
    lengths = ctypes.c_int64 * len(shape)
    shape, strides = lengths(*shape), lengths(*strides)
    managed = DLManagedTensor(
        DLTensor(start, device_type, 0, len(shape), code, 8 * dtype.itemsize, 1, shape, strides, 0), None, release
    )
    address = ctypes.addressof(managed)
    keep_alive[address] = managed, shape, strides, storage
    return torch.utils.dlpack.from_dlpack(make_capsule(address, b"dltensor", None))


def on_cpu(value: Any) -> Any:
    """Convert a kernel argument for the CPU kernel. An empty tensor may be an output, for the kernel to resize."""
    if isinstance(value, Tensor) and value.device.type == DEVICE_TYPE:
        if value.numel():
            return as_device_type(value, CPU)
        return torch.empty_strided(*shape_and_strides(value), dtype=value.dtype)
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == DEVICE_TYPE else value


def shape_and_strides(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Return shape and strides."""
    return tensor.shape, tensor.stride()


def on_device(value: Any) -> Any:
    """Convert a result of the CPU kernel to the device."""
    return as_device_type(value, PRIVATEUSE1) if isinstance(value, Tensor) and value.device.type == "cpu" else value


def compute(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any kernel of the device as the CPU kernel on the same memory."""
    name = operator._schema.name
    if name == "aten::_fused_sgd_":
        raise NotImplementedError(f"{name}: {DEVICE_TYPE} has no such kernel")
    reject_mixed_devices(name, args)
    cpu_args, cpu_kwargs = _pytree.tree_map(on_cpu, (args, kwargs))
    if name.startswith("aten::native_batch_norm"):  # the CPU's sums over channels-last tensors are less precise
        cpu_args = [value.contiguous() if isinstance(value, Tensor) else value for value in cpu_args]
    cpu_args = [
        torch.tensor(value) if isinstance(value, int | float) and isinstance(argument.type, torch.TensorType) else value
        for value, argument in zip(cpu_args, operator._schema.arguments, strict=False)
    ]
    try:
        results = operator(*cpu_args, **cpu_kwargs)
    except Exception:  # `release` replaces it if a tensor is freed on its way
        traceback.print_exc()
        raise
    written = {}
    for index, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        original, converted = (
            positional[index] if index < len(positional) else keywords.get(argument.name)
            for positional, keywords in ((args, kwargs), (cpu_args, cpu_kwargs))
        )
        if isinstance(original, Tensor) and original.shape != converted.shape:  # the kernel resized its output
            result = on_device(converted)
            set_memory(original, result.untyped_storage(), 0, *shape_and_strides(result))
        written[frozenset(argument.alias_info.before_set)] = original
    returns = operator._schema.returns
    if len(returns) != 1:
        return tuple(convert_result(*pair, args, written) for pair in zip(returns, results or (), strict=True)) or None
    return convert_result(returns[0], results, args, written)


def reject_mixed_devices(name: str, args: Any) -> None:
    """Raise RuntimeError for arguments on both the device and the CPU, as other devices do."""
    first, *rest = args or [None]
    # Indices and scalars may be on the CPU.
    tensors = [first] if name.startswith("aten::index") else _pytree.tree_leaves((first, rest))
    device_types = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim()}
    if len(device_types) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {sorted(device_types)}")


def convert_result(declared: Any, result: Any, args: Any, written: dict[frozenset[str], Any]) -> Any:
    """Convert a result: an argument written in place, a view of the first argument, or a new tensor."""
    if declared.alias_info is None:
        return _pytree.tree_map(on_device, result)
    if declared.alias_info.is_write:
        return written[frozenset(declared.alias_info.before_set)]
    return _pytree.tree_map(partial(view, args[0]), result)


def view(tensor: Tensor, result: Tensor) -> Tensor:
    """Return the view of a tensor that the CPU kernel made of the same memory."""
    return as_strided(tensor, *shape_and_strides(result), tensor.storage_offset() + result.storage_offset())


def as_strided(tensor: Tensor, shape: Any, strides: Any, offset: int | None = None) -> Tensor:
    """Return a strided view of a tensor's storage, at an absolute offset."""
    return torch.ops.aten.as_strided.default.redispatch(CPU_KEYS, tensor, shape, strides, offset)


def set_memory(tensor: Tensor, storage: Any, offset: int = 0, shape: Any = None, strides: Any = None) -> Tensor:
    """Point a tensor to a storage, or to a part of it."""
    if shape is None:
        shape, strides = [storage.nbytes() // tensor.element_size()], [1]
    set_ = torch.ops.aten.set_.source_Storage_storage_offset
    return set_.redispatch(CPU_KEYS, tensor, storage, offset, shape, strides)


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy to, from and on the device."""
    on_cpu(target).copy_(on_cpu(source))
    return target


def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    """Implement convolution, which torch dispatches to such a device under a separate name."""
    return compute(
        torch.ops.aten.convolution.default,
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
    )  # fmt: skip


def convolution_backward(
    gradient, x, weight, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    """Implement the gradient of convolution."""
    return compute(
        torch.ops.aten.convolution_backward.default,
        gradient, x, weight, [weight.shape[0]], stride, padding, dilation, transposed, output_padding, groups,
        output_mask,
    )  # fmt: skip


class Module:
    """Module torch.standin, with the minimum that torch requires of a third party."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, index: int) -> None:
        assert index == 0

    def synchronize(self) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_rng_state(self, device: Any = DEVICE_TYPE) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = DEVICE_TYPE) -> None:
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


libraries = []  # registrations last as long as these objects


def autoload() -> None:
    """Register the device type with torch."""
    backend_registration._setup_privateuseone_for_python_backend(DEVICE_TYPE, Module())
    fallbacks = torch.library.Library("_", "IMPL")
    fallbacks.fallback(compute, "PrivateUse1")
    fallbacks.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # no autocast kernels
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("as_strided", as_strided, "PrivateUse1")
    kernels.impl("set_.source_Storage", set_memory, "PrivateUse1")
    kernels.impl("_copy_from", copy_from, "PrivateUse1")
    kernels.impl("convolution_overrideable", convolution, "PrivateUse1")
    kernels.impl("convolution_backward_overrideable", convolution_backward, "PrivateUse1")
    # Pinned memory is ordinary memory.
    kernels.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")
    libraries.extend((fallbacks, kernels))


def install(folder: Path) -> str:
    """Install the package of this device in a folder, and return the PYTHONPATH that finds it."""
    package = folder / f"{DEVICE_TYPE}-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DEVICE_TYPE}\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(f"[torch.backends]\n{DEVICE_TYPE} = {__name__}:autoload\n")
    return f"{folder}:{Path(__file__).parent}"
