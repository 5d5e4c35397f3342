"""The device a rank computes on, and what it is good at. The only module that treats one kind unlike another.

It works from torch 2.4 on, the newest that some vendors build for. There, what torch.accelerator says since 2.6 is
asked of the module that every kind of device has, such as torch.cuda.
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

from detection.config.device_names import COLLECTIVES, KINDS
from detection.config.settings import InputError


def choose(name: str, local_rank: int) -> torch.device:
    """The device of a rank: "auto" takes the accelerator of the rank's number, or the CPU where there is none.

    Raises InputError where the device is not there.
    """
    there = accelerator()
    if name == "auto":
        name = there.type if there else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: torch {torch.__version__} knows no such device.") from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    count = module(there).device_count() if there else 0
    if there is None or wanted.type != there.type:
        found = f"{count} × {there.type}" if there else "no accelerator"
        raise InputError(f"--device {name}: torch {torch.__version__} sees {found} here. Pass --device auto or cpu.")
    index = local_rank if wanted.index is None else wanted.index
    if index >= count:
        raise InputError(
            f"DGXNGPU asks for {local_rank + 1} accelerators or more, {count} are here. "
            "Set DGXNGPU in the config file to what this machine has."
        )
    if hasattr(module(there), "set_device"):
        module(there).set_device(index)
    return torch.device(wanted.type, index)


def accelerator() -> torch.device | None:
    """The kind of accelerator that torch sees on this machine, if there is one."""
    if hasattr(torch, "accelerator"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    load_vendors()
    return next((torch.device(kind) for kind in (*KINDS, privateuse1()) if is_available(kind)), None)


@cache
def load_vendors() -> None:
    """Import the packages that add a kind of device to torch, as torch itself does from 2.5 on.

    Raises InputError where one of them cannot be loaded.
    """
    if hasattr(torch, "_is_device_backend_autoload_enabled"):
        return
    for backend in entry_points(group="torch.backends"):
        try:
            backend.load()()
        except Exception as error:  # whatever a vendor's package stumbles over
            raise InputError(f"{backend.name}: this backend of torch cannot be loaded ({error}).") from error


def privateuse1() -> str:
    """What a vendor's package called the kind of device that it adds."""
    return torch._C._get_privateuse1_backend_name()


def is_available(kind: str) -> bool:
    """Whether a device of this kind is here."""
    of_kind = getattr(torch, kind, None)
    if not hasattr(of_kind, "is_available"):  # older ones of torch.mps do not say
        of_kind = getattr(torch.backends, kind, None)
    return of_kind is not None and of_kind.is_available()


def module(device: torch.device) -> Any:
    """What torch has for a kind of device: torch.cuda, say."""
    return getattr(torch, device.type)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        module(device).synchronize()


def constant(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers (N,) on the device, written there: a copy from the host would wait for all that it was told."""
    return torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])


def has_streams(device: torch.device) -> bool:
    """Whether copies can run beside the computation."""
    return all(hasattr(module(device), name) for name in ("Stream", "stream", "current_stream"))


def random_state(device: torch.device) -> Tensor | None:
    """The state of the device's generator of random numbers, where it has one of its own."""
    if device.type == "cpu" or not hasattr(module(device), "get_rng_state"):
        return None
    state: Tensor = module(device).get_rng_state(*which(device))
    return state


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Put the device's generator back to where it was."""
    module(device).set_rng_state(state, *which(device))


def which(device: torch.device) -> tuple[torch.device, ...]:
    """The device as an argument, where there can be several of its kind."""
    return () if device.type == "mps" else (device,)


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in double precision."""
    return device.type != "mps"


def collective_backend(device: torch.device) -> str | None:
    """The library that moves tensors between ranks on devices of this type, if one is known."""
    return "gloo" if device.type == "cpu" else COLLECTIVES.get(device.type)


@dataclass(frozen=True)
class Precision:
    """How the network computes: the type of its matrix products, and whether gradients need scaling."""

    name: str
    dtype: torch.dtype | None = None
    scale_gradients: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which the network runs; weights stay float32 outside of it."""
        return torch.autocast(device.type, self.dtype) if self.dtype else nullcontext()


def precision(name: str, device: torch.device) -> Precision:
    """Set up a precision by name; "auto" takes the fastest that trains to the same accuracy.

    That is bf16 where the hardware multiplies it, else fp16 with loss scaling on an accelerator, else fp32.
    """
    if name == "auto":
        name = "bf16" if multiplies_bf16(device) else "fp32" if device.type in ("cpu", "mps") else "fp16"
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    match name:
        case "bf16":
            return Precision(name, torch.bfloat16)
        case "fp16":
            return Precision(name, torch.float16, scale_gradients=True)
        case _:
            return Precision(name)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 matrix instructions (and does not emulate them)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, test, bool)() for test in tests)  # an older torch cannot say
    return device.type in ("npu", "xpu")


# To compute a smaller batch without what was compiled for a whole one needs torch 2.6.
CAN_COMPILE = hasattr(torch.compiler, "set_stance")


def compiles(choice: str, device: torch.device) -> bool:
    """Whether the network is compiled: "auto" does it on an accelerator.

    On a CPU it gains 4 % for a minute of compiling. Raises InputError where it was asked for of an older torch.
    """
    if choice == "on" and not CAN_COMPILE:
        raise InputError(f"--compile on: needs torch 2.6 or later, this is {torch.__version__}. Pass --compile off.")
    return CAN_COMPILE and (choice == "on" or (choice == "auto" and device.type != "cpu"))


def eager() -> AbstractContextManager[Any]:
    """What is compiled runs as it is written: as a context, for shapes not worth compiling, or from now on."""
    return torch.compiler.set_stance("force_eager") if CAN_COMPILE else nullcontext()


def tune(device: torch.device, *, one_size: bool) -> None:
    """Let the device try its kernels where all batches have the same sizes: it does so again for any other."""
    torch.backends.cudnn.benchmark = one_size and device.type == "cuda"


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has taken so far: the device's own where it tells, else the machine's."""
    if device.type != "cpu" and hasattr(module(device), "max_memory_allocated"):
        return module(device).max_memory_allocated(*which(device)) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)


def total_memory_gib(device: torch.device) -> float | None:
    """The memory of the device; None where torch does not tell."""
    if device.type == "cpu":
        return None
    properties = module(device).get_device_properties(device.index)
    size = getattr(properties, "total_memory", None)
    return None if size is None else size / 2**30


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory of an accelerator that nobody has taken; None where torch does not tell."""
    if not hasattr(module(device), "mem_get_info"):
        return None
    free: int = module(device).mem_get_info(device)[0]
    return free


def decodes_jpeg(device: torch.device) -> bool:
    """Whether torchcodec decodes JPEG files on the device."""
    return device.type == "cuda" and torch.version.hip is None


OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE
)


def is_out_of_memory(text: str) -> bool:
    """Whether a message, of whatever device, says that memory was used up."""
    return OUT_OF_MEMORY.search(text) is not None


@dataclass(frozen=True)
class Driver:
    """What torch was built for, and the newest that the accelerator's driver runs: (major, minor), None if not told."""

    kind: str
    built_for: tuple[int, int] | None
    runs: tuple[int, int] | None


def driver() -> Driver:
    """The versions of CUDA, or of ROCm, that this torch and this machine's driver have."""
    kind, text = ("ROCm", torch.version.hip) if torch.version.hip else ("CUDA", torch.version.cuda)
    if not text:
        return Driver("", None, None)
    major, minor = (int(part) for part in text.split(".")[:2])
    number = getattr(torch._C, "_cuda_getDriverVersion", int)()  # 12040 is CUDA 12.4, 60032830 ROCm 6.0
    runs = divmod(number // (100_000 if kind == "ROCm" else 10), 100)
    return Driver(kind, (major, minor), runs if number else None)


def has_card() -> bool:
    """Whether the system has loaded the driver of an accelerator, which torch may be unable to use."""
    return any(Path("/sys/module", name).exists() for name in ("nvidia", "amdgpu"))


def pci_address(device: torch.device) -> str | None:
    """An accelerator's PCI address, as the system writes it (0000:dc:00.0); None where torch does not tell."""
    if device.type == "cpu":
        return None
    properties = module(device).get_device_properties(device.index)
    try:
        return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except AttributeError:
        return None


def describe(device: torch.device) -> str:
    """Name of the hardware, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
