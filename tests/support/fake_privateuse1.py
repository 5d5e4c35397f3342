"""A kind of accelerator that is none: "standin", as a third party would add it to torch, in Python alone.

It is torch's privateuse1. Its memory is the CPU's and so are its kernels, but torch does not know that: a tensor on
it is not a CPU tensor, and what takes one of each is refused as on any accelerator. It lacks what third parties may
lack: streams, a fused SGD, casts of their own for autocast. `autoload` is its entry point in the group
"torch.backends", and `install` makes the package of which it is one.

DLPack carries the memory from one kind of device to the other, since it names any address and any kind.
"""

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree, backend_registration

KIND = "standin"
CPU, PRIVATEUSE1 = 1, 12  # the kinds of device in dlpack.h

CODES = {torch.bool: 6, torch.uint8: 1, torch.bfloat16: 4}  # in dlpack.h; the rest are 0, signed, and 2, floating point

AS_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # kernels that only describe memory, for whatever device


class DLTensor(ctypes.Structure):
    """As in dlpack.h."""

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
    """As in dlpack.h."""

    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


lent: dict[int, Any] = {}
"""What must live as long as the tensor that was made of it: its memory, by the address of its description."""


@DELETER
def give_back(address: int) -> None:
    """Called when a tensor's memory is no longer used."""
    lent.pop(address, None)


make_capsule = ctypes.pythonapi.PyCapsule_New
make_capsule.restype, make_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def as_kind(tensor: Tensor, kind: int) -> Tensor:
    """The same memory, shape and strides as a tensor on another kind of device; without its gradient."""
    return lend(tensor.untyped_storage(), tensor.data_ptr(), *layout(tensor), tensor.dtype, kind)


def lend(storage: Any, start: int, shape: Any, strides: Any, dtype: torch.dtype, kind: int) -> Tensor:
    """A tensor on a kind of device, in the memory of a storage from the address `start` on."""
    code = CODES.get(dtype, 2 if dtype.is_floating_point else 0)
    lengths = ctypes.c_int64 * len(shape)
    shape, strides = lengths(*shape), lengths(*strides)
    managed = DLManagedTensor(
        DLTensor(start, kind, 0, len(shape), code, 8 * dtype.itemsize, 1, shape, strides, 0), None, give_back
    )
    address = ctypes.addressof(managed)
    lent[address] = managed, shape, strides, storage
    return torch.utils.dlpack.from_dlpack(make_capsule(address, b"dltensor", None))


def on_cpu(value: Any) -> Any:
    """An argument of a kernel as the CPU's kernel takes it; what is empty may be a result, for it to resize."""
    if isinstance(value, Tensor) and value.device.type == KIND:
        return as_kind(value, CPU) if value.numel() else torch.empty_strided(*layout(value), dtype=value.dtype)
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == KIND else value


def layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Shape and strides."""
    return tensor.shape, tensor.stride()


def on_device(value: Any) -> Any:
    """A result of the CPU's kernel as one of the device's."""
    return as_kind(value, PRIVATEUSE1) if isinstance(value, Tensor) and value.device.type == "cpu" else value


def compute(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Every kernel of the device: the CPU's, on the same memory."""
    name = operator._schema.name
    if name == "aten::_fused_sgd_":
        raise NotImplementedError(f"{name}: {KIND} has no such kernel")
    refuse_mixed(name, args)
    cpu_args, cpu_kwargs = _pytree.tree_map(on_cpu, (args, kwargs))
    results = operator(*cpu_args, **cpu_kwargs)
    written = {}
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        ours, theirs = (
            given[place] if place < len(given) else named.get(argument.name)
            for given, named in ((args, kwargs), (cpu_args, cpu_kwargs))
        )
        if isinstance(ours, Tensor) and ours.shape != theirs.shape:  # a kernel makes room for its result
            result = on_device(theirs)
            set_memory(ours, result.untyped_storage(), 0, *layout(result))
        written[frozenset(argument.alias_info.before_set)] = ours
    returns = operator._schema.returns
    if len(returns) != 1:
        return tuple(returned(*pair, args, written) for pair in zip(returns, results or (), strict=True)) or None
    return returned(returns[0], results, args, written)


def refuse_mixed(name: str, args: Any) -> None:
    """Raise RuntimeError where one argument is on the device and another on the CPU, as other devices do."""
    first, *rest = args or [None]
    # Indices may be on the CPU, and so may single numbers.
    tensors = [first] if name.startswith("aten::index") else _pytree.tree_leaves((first, rest))
    kinds = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim()}
    if len(kinds) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {sorted(kinds)}")


def returned(declared: Any, result: Any, args: Any, written: dict[frozenset[str], Any]) -> Any:
    """What an operator returns: the argument that it wrote into, a view of its first one, or what is new."""
    if declared.alias_info is None:
        return _pytree.tree_map(on_device, result)
    if declared.alias_info.is_write:
        return written[frozenset(declared.alias_info.before_set)]
    return _pytree.tree_map(partial(view, args[0]), result)


def view(tensor: Tensor, result: Tensor) -> Tensor:
    """A view of a tensor that is what the CPU's kernel has made of the same memory, which for it began there."""
    return as_strided(tensor, *layout(result), tensor.storage_offset() + result.storage_offset())


def as_strided(tensor: Tensor, shape: Any, strides: Any, offset: int | None = None) -> Tensor:
    """A part of the memory that a tensor lies in, of which the CPU's kernel is never told the beginning."""
    return torch.ops.aten.as_strided.default.redispatch(AS_ON_CPU, tensor, shape, strides, offset)


def set_memory(tensor: Tensor, storage: Any, offset: int = 0, shape: Any = None, strides: Any = None) -> Tensor:
    """Make a tensor one of all memory of a storage, or of a part of it."""
    if shape is None:
        shape, strides = [storage.nbytes() // tensor.element_size()], [1]
    set_ = torch.ops.aten.set_.source_Storage_storage_offset
    return set_.redispatch(AS_ON_CPU, tensor, storage, offset, shape, strides)


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copies to the device, from it and on it."""
    on_cpu(target).copy_(on_cpu(source))
    return target


def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    """Convolution, which torch leaves to such a device under a name of its own."""
    return compute(
        torch.ops.aten.convolution.default,
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
    )  # fmt: skip


def convolution_backward(
    gradient, x, weight, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    """Its gradient."""
    return compute(
        torch.ops.aten.convolution_backward.default,
        gradient, x, weight, [weight.shape[0]], stride, padding, dilation, transposed, output_padding, groups,
        output_mask,
    )  # fmt: skip


class Module:
    """What is to be torch.standin, with no more than a third party's module has to have."""

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

    def get_rng_state(self, device: Any = KIND) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = KIND) -> None:
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


libraries = []  # what they register lasts as long as they do


def autoload() -> None:
    """Add the kind of device to torch."""
    backend_registration._setup_privateuseone_for_python_backend(KIND, Module())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(compute, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # what casts nothing
    own = torch.library.Library("aten", "IMPL")
    own.impl("as_strided", as_strided, "PrivateUse1")
    own.impl("set_.source_Storage", set_memory, "PrivateUse1")
    own.impl("_copy_from", copy_from, "PrivateUse1")
    own.impl("convolution_overrideable", convolution, "PrivateUse1")
    own.impl("convolution_backward_overrideable", convolution_backward, "PrivateUse1")
    # Pinned memory is memory like any other.
    own.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")
    libraries.extend((everything, own))


def install(folder: Path) -> str:
    """Make a folder that on PYTHONPATH is the installed package of this device, and return what PYTHONPATH is to be."""
    package = folder / f"{KIND}-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {KIND}\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(f"[torch.backends]\n{KIND} = {__name__}:autoload\n")
    return f"{folder}:{Path(__file__).parent}"
