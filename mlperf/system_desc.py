"""System description of a submission: fields read from this machine, and fields that people must fill in."""

import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FIELDS = (
    "submitter", "division", "status", "system_name", "number_of_nodes", "host_processors_per_node",
    "host_processor_model_name", "host_processor_core_count", "host_processor_vcpu_count", "host_processor_frequency",
    "host_processor_caches", "host_processor_interconnect", "host_memory_capacity", "host_storage_type",
    "host_storage_capacity", "host_networking", "host_networking_topology", "host_memory_configuration",
    "accelerators_per_node", "accelerator_model_name", "accelerator_host_interconnect", "accelerator_frequency",
    "accelerator_on-chip_memories", "accelerator_memory_configuration", "accelerator_memory_capacity",
    "accelerator_interconnect", "accelerator_interconnect_topology", "cooling", "hw_notes", "framework",
    "other_software_stack", "operating_system", "sw_notes",
)  # fmt: skip
"""Fields that the official checker of system descriptions requires. Each is a string."""

_AVAILABILITY_SINCE_4_0 = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "research": "Research, Development, or Internal (RDI)",
    "preview": "Preview",
}
_NOT_APPLICABLE = "N/A"
_PACKAGES = ("torchvision", "torchcodec", "numpy", "pillow", "pycocotools", "hotcoco")
_IGNORED_DISK_PREFIXES = ("loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd")


def system_description(nodes: int | None, root: Path = Path("/")) -> dict[str, str | None]:
    """Return the fields from number_of_nodes on, read from this machine. A field it does not report is None.

    nodes: number of machines, if known. root: parent of /proc and /sys. Core counts are per processor.
    """
    fields: dict[str, str | None] = dict.fromkeys(FIELDS[FIELDS.index("number_of_nodes") :])
    fields |= {"number_of_nodes": str(nodes) if nodes else None, "hw_notes": "", "sw_notes": ""}
    if nodes == 1:
        fields |= dict.fromkeys(("host_networking", "host_networking_topology"), f"{_NOT_APPLICABLE}: one node")
    fields |= _read_processors(root) | _read_memory(root) | _read_disks(root)
    return fields | _read_accelerators() | _read_software()


def availability(status: str, ruleset: str) -> str:
    """Return the status of a system as its description states it. status: as in the log."""
    return _AVAILABILITY_SINCE_4_0.get(status, status) if ruleset >= "4" else status


def system_summary(root: Path = Path("/")) -> dict[str, str]:
    """Return a short description of this machine, without unknown fields. root: parent of /proc and /sys."""
    fields = _read_processors(root) | _read_memory(root) | _read_software()
    processors = ("host_processors_per_node", "host_processor_model_name", "host_processor_core_count")
    sockets, model, cores = (fields[field] for field in processors)
    summary = {
        "processors": f"{sockets} × {model}, {cores} cores each" if sockets and model and cores else model,
        "memory": fields["host_memory_capacity"],
        "operating_system": fields["operating_system"],
        "software": fields["other_software_stack"],
    }
    return {name: text for name, text in summary.items() if text}


def _read_processors(root: Path) -> dict[str, str | None]:
    cores, packages = [], []
    for folder in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology")):
        with suppress(OSError):
            package = (folder / "physical_package_id").read_text().strip()
            cores.append((package, (folder / "core_id").read_text().strip()))
            packages.append(package)
    info = _read(root / "proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info, re.MULTILINE)
    mhz = re.search(r"^cpu MHz\s*: ([\d.]+)$", info, re.MULTILINE)
    max_khz = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    frequency = f"up to {int(max_khz) / 1e6:.2f} GHz" if max_khz else f"{float(mhz[1]) / 1e3:.2f} GHz" if mhz else None
    sockets = len(set(packages))
    return {
        "host_processors_per_node": str(sockets) if sockets else None,
        "host_processor_model_name": model[1] if model else None,
        "host_processor_core_count": str(len(set(cores)) // sockets) if sockets else None,
        "host_processor_vcpu_count": str(len(cores) // sockets) if sockets else None,
        "host_processor_frequency": frequency,
        "host_processor_caches": _read_caches(root),
        "host_processor_interconnect": f"{_NOT_APPLICABLE}: one processor" if sockets == 1 else None,
    }


def _read_caches(root: Path) -> str | None:
    caches = []
    for folder in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if level and size:
            caches.append(f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') } {size}")
    return ", ".join(caches) or None


def _read_memory(root: Path) -> dict[str, str | None]:
    match = re.search(r"^MemTotal:\s*(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    return {"host_memory_capacity": f"{int(match[1]) / 2**20:.0f} GiB" if match else None}


def _read_disks(root: Path) -> dict[str, str | None]:
    kinds, sizes_gb = set(), []
    for folder in sorted((root / "sys/block").glob("*")):
        sectors = _read(folder / "size")
        if folder.name.startswith(_IGNORED_DISK_PREFIXES) or not sectors.isdecimal() or int(sectors) == 0:
            continue
        is_rotational = _read(folder / "queue/rotational") == "1"  # virtual disks also report 1
        kind = {"nv": "NVMe SSD", "vd": "virtual disk"}.get(folder.name[:2])
        kinds.add(kind or ("HDD" if is_rotational else "SSD"))
        sizes_gb.append(int(sectors) * 512 / 1e9)  # the kernel counts sectors of 512 bytes on any disk
    capacity = " + ".join(f"{size:.0f} GB" for size in sizes_gb)
    return {"host_storage_type": ", ".join(sorted(kinds)) or None, "host_storage_capacity": capacity or None}


def _read_accelerators() -> dict[str, str | None]:
    names = [field for field in FIELDS if field.startswith("accelerator")]
    fields: dict[str, str | None] = dict.fromkeys(names)
    device = _current_accelerator()
    if device is None:
        return fields | dict.fromkeys(names, f"{_NOT_APPLICABLE}: no accelerator") | {"accelerators_per_node": "0"}
    module = torch.get_device_module(device)
    fields["accelerators_per_node"] = str(module.device_count())
    with suppress(AttributeError, RuntimeError):  # optional in a vendor's module
        fields["accelerator_model_name"] = module.get_device_name(0)
        fields["accelerator_memory_capacity"] = f"{module.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    if fields["accelerators_per_node"] == "1":
        links = ("accelerator_interconnect", "accelerator_interconnect_topology")
        fields |= dict.fromkeys(links, f"{_NOT_APPLICABLE}: one accelerator")
    return fields


def _current_accelerator() -> torch.device | None:
    if not hasattr(torch, "accelerator") or not torch.accelerator.is_available():  # since torch 2.6
        return None
    return torch.accelerator.current_accelerator()


def _read_software() -> dict[str, str | None]:
    name = None
    with suppress(OSError):
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    packages = []
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            packages.append(f"{package} {version(package)}")
    return {
        "framework": f"PyTorch {torch.__version__}",
        "other_software_stack": ", ".join((f"Python {platform.python_version()}", *packages)),
        "operating_system": " ".join(filter(None, (name, platform.system(), platform.release()))),
    }


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""
