"""The device a rank computes on, and what it is good at. The only module that knows devices by name."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from detection.config import InputError

# Collectives by device type; gloo carries whatever is not named here.
COLLECTIVES = {"cuda": "nccl", "mlu": "cncl", "npu": "hccl", "xpu": "xccl"}


def choose(name: str, local_rank: int) -> torch.device:
    """The device of a rank: "auto" takes the accelerator of the rank's number, or the CPU where there is none.

    Raises InputError where the device is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        name = accelerator.type if accelerator else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: torch {torch.__version__} knows no such device.") from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    if accelerator is None or wanted.type != accelerator.type:
        there = f"{torch.accelerator.device_count()} × {accelerator.type}" if accelerator else "no accelerator"
        raise InputError(f"--device {name}: torch {torch.__version__} sees {there} here. Pass --device auto or cpu.")
    index = local_rank if wanted.index is None else wanted.index
    if index >= torch.accelerator.device_count():
        raise InputError(
            f"DGXNGPU asks for {local_rank + 1} accelerators or more, {torch.accelerator.device_count()} are here. "
            "Set DGXNGPU in the config file to what this machine has."
        )
    device = torch.device(wanted.type, index)
    torch.accelerator.set_device_index(index)
    return device


def collective_backend(device: torch.device) -> str:
    """The library that moves tensors between ranks on devices of this type."""
    return COLLECTIVES.get(device.type, "gloo")


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
        name = "bf16" if multiplies_bf16(device) else "fp32" if device.type == "cpu" else "fp16"
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
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type in ("npu", "xpu")


def compiles(choice: str, device: torch.device) -> bool:
    """Whether the network is compiled: "auto" does it on an accelerator.

    On a CPU it gains 4 % for a minute of compiling.
    """
    return choice == "on" or (choice == "auto" and device.type != "cpu")


def eager() -> AbstractContextManager[Any]:
    """The context in which what is compiled runs as it is written: for shapes that are not worth compiling."""
    return torch.compiler.set_stance("force_eager")


def tune(device: torch.device) -> None:
    """Let the device choose its kernels for the fixed input size of this network."""
    torch.backends.cudnn.benchmark = device.type == "cuda"


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pci_address(device: torch.device) -> str | None:
    """An accelerator's PCI address, as the system writes it (0000:dc:00.0); None where torch does not tell."""
    if device.type == "cpu":
        return None
    properties = torch.get_device_module(device).get_device_properties(device.index)
    try:
        return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except AttributeError:
        return None


def describe(device: torch.device) -> str:
    """Name of the hardware, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
