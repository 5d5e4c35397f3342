"""Device of a rank and its capabilities. The only module with code for specific device types.

Supports torch 2.4 and later, since some vendors build for no newer one. Before torch.accelerator (2.6), the module of
each device type, such as torch.cuda, provides the same information.
"""

import re
import resource
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.config.device_names import COLLECTIVE_BACKENDS, DEVICE_TYPES
from detection.config.settings import InputError


def select_device(name: str, local_rank: int) -> torch.device:
    """Return the device of a rank. "auto" selects the accelerator with the rank's number, or the CPU if there is none.

    Raises InputError if the device is not available.
    """
    accelerator = current_accelerator()
    if name == "auto":
        name = accelerator.type if accelerator else "cpu"
    try:
        requested = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: unknown device type in torch {torch.__version__}.") from error
    if requested.type == "cpu":
        return torch.device("cpu")
    count = backend_module(accelerator).device_count() if accelerator else 0
    if accelerator is None or requested.type != accelerator.type:
        available = f"{count} × {accelerator.type}" if accelerator else "no accelerator"
        raise InputError(f"--device {name}: torch {torch.__version__} finds {available}. Pass --device auto or cpu.")
    index = local_rank if requested.index is None else requested.index
    if index >= count:
        raise InputError(
            f"DGXNGPU requires at least {local_rank + 1} accelerators, but {count} are available. "
            "Set DGXNGPU in the config file to the number of accelerators."
        )
    if hasattr(backend_module(accelerator), "set_device"):
        backend_module(accelerator).set_device(index)
    return torch.device(requested.type, index)


def current_accelerator() -> torch.device | None:
    """Return the accelerator type that torch finds on this machine, or None."""
    if hasattr(torch, "accelerator"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    load_backends()
    return next((torch.device(name) for name in (*DEVICE_TYPES, privateuse1_name()) if is_available(name)), None)


@cache
def load_backends() -> None:
    """Import the packages that add a device type to torch, as torch 2.5 and later do by themselves.

    Raises InputError if one of them fails to load.
    """
    if hasattr(torch, "_is_device_backend_autoload_enabled"):
        return
    for backend in entry_points(group="torch.backends"):
        try:
            backend.load()()
        except Exception as error:  # vendor packages raise anything
            raise InputError(f"{backend.name}: this torch backend failed to load ({error}).") from error


def privateuse1_name() -> str:
    """Return the name that a vendor's package gave to its device type."""
    return torch._C._get_privateuse1_backend_name()


def is_available(device_type: str) -> bool:
    """Return whether a device of this type is available."""
    backend = getattr(torch, device_type, None)
    if not hasattr(backend, "is_available"):  # older versions of torch.mps
        backend = getattr(torch.backends, device_type, None)
    return backend is not None and backend.is_available()


def backend_module(device: torch.device) -> Any:
    """Return the torch module of a device type, such as torch.cuda."""
    return getattr(torch, device.type)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type != "cpu":
        backend_module(device).synchronize()


def device_constant(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `values` (N,) as a tensor, filled on the device. A copy from the host would wait for all queued work."""
    return torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])


def has_streams(device: torch.device) -> bool:
    """Return whether copies can overlap with computation."""
    return all(hasattr(backend_module(device), name) for name in ("Stream", "stream", "current_stream"))


def rng_state(device: torch.device) -> Tensor | None:
    """Return the state of the device's random number generator, or None if it has none."""
    if device.type == "cpu" or not hasattr(backend_module(device), "get_rng_state"):
        return None
    state: Tensor = backend_module(device).get_rng_state(*device_args(device))
    return state


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Restore the state of the device's random number generator."""
    backend_module(device).set_rng_state(state, *device_args(device))


def device_args(device: torch.device) -> tuple[torch.device, ...]:
    """Return the device as an argument tuple, empty for types with a single device."""
    return () if device.type == "mps" else (device,)


def supports_float64(device: torch.device) -> bool:
    """Return whether the device supports double precision."""
    return device.type != "mps"


def collective_backend(device: torch.device) -> str | None:
    """Return the known collective library for this device type, or None."""
    return "gloo" if device.type == "cpu" else COLLECTIVE_BACKENDS.get(device.type)


@dataclass(frozen=True)
class Precision:
    """Data type of the network's matrix products, and whether gradients need loss scaling."""

    name: str
    dtype: torch.dtype | None = None
    scale_gradients: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context for the forward pass. Weights stay float32."""
        return torch.autocast(device.type, self.dtype) if self.dtype else nullcontext()


def select_precision(name: str, device: torch.device) -> Precision:
    """Set up a precision by name. "auto" selects the fastest one that trains to the same accuracy.

    That is bf16 if the hardware has native bf16, else fp16 with loss scaling on an accelerator, else fp32.
    """
    if name == "auto":
        name = "bf16" if has_native_bf16(device) else "fp32" if device.type in ("cpu", "mps") else "fp16"
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    match name:
        case "bf16":
            return Precision(name, torch.bfloat16)
        case "fp16":
            return Precision(name, torch.float16, scale_gradients=True)
        case _:
            return Precision(name)


def select_memory_format(
    choice: str, precision: Precision, device: torch.device, *, trains_batch_norm: bool
) -> torch.memory_format:
    """Return the memory layout of the network's weights. "auto" is channels-last where batch norm is precise with it.

    torch's batch norm on a CPU adds float32 values in float64 if they are contiguous, but in float32 if they are
    channels-last: 120 times the rounding error on 4 x 64 x 150 x 150 values, and up to 300 times elsewhere. The bf16
    kernels of both layouts have the same error, since they round their input and output to 8 bits.
    """
    if choice == "auto":
        is_imprecise = device.type == "cpu" and precision.dtype is None and trains_batch_norm
        choice = "off" if is_imprecise else "on"
    return torch.channels_last if choice == "on" else torch.contiguous_format


def should_use_winograd(precision: Precision, device: torch.device, *, compiled: bool) -> bool:
    """Return whether 3×3 convolutions use Winograd's algorithm. Accelerators' libraries select it by themselves.

    Compiled networks do not: torch.compile would generate code for each block, in ten minutes instead of two.
    """
    return device.type == "cpu" and precision.dtype is None and not compiled


def match_memory_format(images: Tensor, conv_weight: Tensor) -> Tensor:
    """Return images, maps or gradients (B, C, H, W) in the memory layout of a convolution's weights.

    A convolution computes in channels-last layout if either its images or its weights have it.
    """
    is_channels_last = conv_weight.is_contiguous(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)


def has_native_bf16(device: torch.device) -> bool:
    """Return whether the hardware has bf16 matrix instructions (not emulated)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)  # older torch lacks them
    return device.type in ("npu", "xpu")


# Running a smaller batch in eager mode after compiling for a full batch requires torch 2.6.
CAN_COMPILE = hasattr(torch.compiler, "set_stance")


def should_compile(choice: str, device: torch.device) -> bool:
    """Return whether to compile the network. "auto" compiles on an accelerator.

    On a CPU, compiling takes a minute and gains 4%. Raises InputError if `choice` is "on" and torch is too old.
    """
    if choice == "on" and not CAN_COMPILE:
        raise InputError(f"--compile on: requires torch 2.6, this is {torch.__version__}. Pass --compile off.")
    return CAN_COMPILE and (choice == "on" or (choice == "auto" and device.type != "cpu"))


def force_eager() -> AbstractContextManager[Any]:
    """Run compiled code in eager mode, within a context or from now on. For shapes not worth compiling."""
    return torch.compiler.set_stance("force_eager") if CAN_COMPILE else nullcontext()


def set_kernel_autotune(device: torch.device, *, fixed_input_size: bool) -> None:
    """Enable kernel autotuning if all batches have the same size. Each new size would be autotuned again."""
    torch.backends.cudnn.benchmark = fixed_input_size and device.type == "cuda"


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process: on the device if torch reports it, else on the host."""
    if device.type != "cpu" and hasattr(backend_module(device), "max_memory_allocated"):
        return backend_module(device).max_memory_allocated(*device_args(device)) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)


def total_memory_gib(device: torch.device) -> float | None:
    """Return the total memory of the device, or None if torch does not report it."""
    if device.type == "cpu":
        return None
    size = getattr(device_properties(device), "total_memory", None)
    return None if size is None else size / 2**30


def device_properties(device: torch.device) -> Any:
    """Return the properties of an accelerator, or None if its backend reports none."""
    read = getattr(backend_module(device), "get_device_properties", None)
    return read(device.index) if read else None


def free_memory_bytes(device: torch.device) -> int | None:
    """Return the free memory of an accelerator, or None if torch does not report it."""
    if not hasattr(backend_module(device), "mem_get_info"):
        return None
    free: int = backend_module(device).mem_get_info(device)[0]
    return free


def has_own_kernel(operator: str, device: torch.device) -> bool:
    """Return whether an operator, such as "torchvision::nms", has a kernel for the device. A fallback is none."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, torch._C._dispatch_key_for_device(device.type))


def supports_jpeg_decode(device: torch.device) -> bool:
    """Return whether torchcodec decodes JPEG files on the device."""
    return device.type == "cuda" and torch.version.hip is None


OUT_OF_MEMORY_PATTERN = re.compile(
    r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE
)


def is_out_of_memory(text: str) -> bool:
    """Return whether an error message of any device type reports exhausted memory."""
    return OUT_OF_MEMORY_PATTERN.search(text) is not None


@dataclass(frozen=True)
class DriverVersion:
    """Platform version (major, minor) of the torch build, and the latest that the driver supports. None: unknown."""

    kind: str
    built_for: tuple[int, int] | None
    max_supported: tuple[int, int] | None


def read_driver_version() -> DriverVersion:
    """Return the CUDA or ROCm versions of this torch build and of this machine's driver."""
    kind, text = ("ROCm", torch.version.hip) if torch.version.hip else ("CUDA", torch.version.cuda)
    if not text:
        return DriverVersion("", None, None)
    major, minor = (int(part) for part in text.split(".")[:2])
    number = getattr(torch._C, "_cuda_getDriverVersion", int)()  # 12040 is CUDA 12.4, 60032830 ROCm 6.0
    max_supported = divmod(number // (100_000 if kind == "ROCm" else 10), 100)
    return DriverVersion(kind, (major, minor), max_supported if number else None)


def accelerator_driver_loaded() -> bool:
    """Return whether an accelerator's kernel driver is loaded, even if torch cannot use it."""
    return any(Path("/sys/module", name).exists() for name in ("nvidia", "amdgpu"))


def pci_address(device: torch.device) -> str | None:
    """Return an accelerator's PCI address in sysfs form (0000:dc:00.0), or None if torch does not report it."""
    if device.type == "cpu":
        return None
    properties = device_properties(device)
    try:
        return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except AttributeError:
        return None


def device_name(device: torch.device) -> str:
    """Return a readable name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
