"""The description of a machine that a submission has: what this one tells of itself, and what people must say."""

import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FIELDS = (
    "submitter",
    "division",
    "status",
    "system_name",
    "number_of_nodes",
    "host_processors_per_node",
    "host_processor_model_name",
    "host_processor_core_count",
    "host_processor_vcpu_count",
    "host_processor_frequency",
    "host_processor_caches",
    "host_processor_interconnect",
    "host_memory_capacity",
    "host_storage_type",
    "host_storage_capacity",
    "host_networking",
    "host_networking_topology",
    "host_memory_configuration",
    "accelerators_per_node",
    "accelerator_model_name",
    "accelerator_host_interconnect",
    "accelerator_frequency",
    "accelerator_on-chip_memories",
    "accelerator_memory_configuration",
    "accelerator_memory_capacity",
    "accelerator_interconnect",
    "accelerator_interconnect_topology",
    "cooling",
    "hw_notes",
    "framework",
    "other_software_stack",
    "operating_system",
    "sw_notes",
)
"""The fields that the official checker of system descriptions asks for; each is a text."""

_NONE = "N/A"
_PACKAGES = ("torchvision", "torchcodec", "numpy", "pillow", "pycocotools", "hotcoco")
_NO_DISKS = ("loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd")


def describe(nodes: int | None, root: Path = Path("/")) -> dict[str, str | None]:
    """What this machine tells of the fields from number_of_nodes on; None where it does not.

    nodes: machines that the runs took, where that is known. root: of the file systems /proc and /sys. Counts of cores
    are those of one processor.
    """
    found: dict[str, str | None] = dict.fromkeys(FIELDS[FIELDS.index("number_of_nodes") :])
    found |= {"number_of_nodes": str(nodes) if nodes else None, "hw_notes": "", "sw_notes": ""}
    if nodes == 1:
        found |= dict.fromkeys(("host_networking", "host_networking_topology"), f"{_NONE}: one node")
    return found | _processors(root) | _memory(root) | _disks(root) | _accelerators() | _software()


def summary(root: Path = Path("/")) -> dict[str, str]:
    """What a run says of its machine: what `describe` finds, in a few words. root: as there; absent is left out."""
    found = _processors(root) | _memory(root) | _software()
    processors = ("host_processors_per_node", "host_processor_model_name", "host_processor_core_count")
    number, model, cores = (found[field] for field in processors)
    told = {
        "processors": f"{number} × {model}, {cores} cores each" if number and model and cores else model,
        "memory": found["host_memory_capacity"],
        "operating_system": found["operating_system"],
        "software": found["other_software_stack"],
    }
    return {name: text for name, text in told.items() if text}


def _processors(root: Path) -> dict[str, str | None]:
    cores, packages = [], []
    for folder in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology")):
        with suppress(OSError):
            package = (folder / "physical_package_id").read_text().strip()
            cores.append((package, (folder / "core_id").read_text().strip()))
            packages.append(package)
    info = _read(root / "proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info, re.MULTILINE)
    mhz = re.search(r"^cpu MHz\s*: ([\d.]+)$", info, re.MULTILINE)
    most_khz = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    frequency = (
        f"{int(most_khz) / 1e6:.2f} GHz at most" if most_khz else f"{float(mhz[1]) / 1e3:.2f} GHz" if mhz else None
    )
    sockets = len(set(packages))
    return {
        "host_processors_per_node": str(sockets) if sockets else None,
        "host_processor_model_name": model[1] if model else None,
        "host_processor_core_count": str(len(set(cores)) // sockets) if sockets else None,
        "host_processor_vcpu_count": str(len(cores) // sockets) if sockets else None,
        "host_processor_frequency": frequency,
        "host_processor_caches": _caches(root),
        "host_processor_interconnect": f"{_NONE}: one processor" if sockets == 1 else None,
    }


def _caches(root: Path) -> str | None:
    found = []
    for folder in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if level and size:
            found.append(f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') } {size}")
    return ", ".join(found) or None


def _memory(root: Path) -> dict[str, str | None]:
    match = re.search(r"^MemTotal:\s*(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    return {"host_memory_capacity": f"{int(match[1]) / 2**20:.0f} GiB" if match else None}


def _disks(root: Path) -> dict[str, str | None]:
    kinds, sizes_gb = set(), []
    for folder in sorted((root / "sys/block").glob("*")):
        sectors = _read(folder / "size")
        if folder.name.startswith(_NO_DISKS) or not sectors.isdecimal() or int(sectors) == 0:
            continue
        spins = _read(folder / "queue/rotational") == "1"  # as virtual disks say, whatever they lie on
        named = {"nv": "NVMe SSD", "vd": "virtual disk"}.get(folder.name[:2])
        kinds.add(named or ("HDD" if spins else "SSD"))
        sizes_gb.append(int(sectors) * 512 / 1e9)  # the kernel counts in sectors of 512 bytes, whatever the disk's
    capacity = " + ".join(f"{size:.0f} GB" for size in sizes_gb)
    return {"host_storage_type": ", ".join(sorted(kinds)) or None, "host_storage_capacity": capacity or None}


def _accelerators() -> dict[str, str | None]:
    names = [field for field in FIELDS if field.startswith("accelerator")]
    kind = _accelerator()
    found: dict[str, str | None] = dict.fromkeys(names)
    if kind is None:
        return found | dict.fromkeys(names, f"{_NONE}: no accelerator") | {"accelerators_per_node": "0"}
    module = torch.get_device_module(kind)
    found["accelerators_per_node"] = str(module.device_count())
    with suppress(AttributeError, RuntimeError):  # a vendor's module need not have them
        found["accelerator_model_name"] = module.get_device_name(0)
        found["accelerator_memory_capacity"] = f"{module.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    if found["accelerators_per_node"] == "1":
        links = ("accelerator_interconnect", "accelerator_interconnect_topology")
        found |= dict.fromkeys(links, f"{_NONE}: one accelerator")
    return found


def _accelerator() -> torch.device | None:
    if not hasattr(torch, "accelerator") or not torch.accelerator.is_available():  # since torch 2.6
        return None
    return torch.accelerator.current_accelerator()


def _software() -> dict[str, str | None]:
    name = None
    with suppress(OSError):
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    packages = (f"{package} {number}" for package, number in _installed(_PACKAGES))
    return {
        "framework": f"PyTorch {torch.__version__}",
        "other_software_stack": ", ".join((f"Python {platform.python_version()}", *packages)),
        "operating_system": " ".join(filter(None, (name, platform.system(), platform.release()))),
    }


def _installed(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        with suppress(PackageNotFoundError):
            yield package, version(package)


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""
