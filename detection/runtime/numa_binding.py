"""Binding of ranks to the cores near their accelerator, if the system reports its NUMA node.

Memory follows: Linux allocates a page on the NUMA node of the core that first writes to it. Data workers run on the
cores of their rank. A "core" is a hardware thread, as Linux numbers them. Threads of one physical core are siblings.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Literal

import torch

from detection.config.settings import InputError, RankInfo
from detection.runtime.device import pci_address

BindingMode = Literal["off", "node", "exclusive"]


@dataclass(frozen=True)
class CpuTopology:
    """Cores of a machine that the run may use.

    nodes: usable cores of each NUMA node, without nodes that have none. siblings: core -> all threads of its physical
    core, including itself. A core that is missing has no siblings. quota: CPU time limit of all processes, in cores.
    """

    nodes: Mapping[int, frozenset[int]]
    siblings: Mapping[int, frozenset[int]]
    quota: float = math.inf

    def physical_cores(self, node: int) -> list[frozenset[int]]:
        """Return the usable threads of each physical core of a node, ordered by their lowest number."""
        groups = {self.siblings.get(core, frozenset({core})) for core in self.nodes[node]}
        return sorted((core & self.nodes[node] for core in groups), key=min)


@dataclass(frozen=True)
class CpuAffinity:
    """Cores of a rank, their NUMA node, and the number of compute threads."""

    cores: frozenset[int]
    node: int
    num_threads: int


def bind(mode: BindingMode, rank_info: RankInfo, device: torch.device) -> str:
    """Bind this process to the cores near its device and return a description. "off" does nothing and returns "".

    Call it before any computation. Raises InputError if there are too few cores.
    """
    if mode == "off":
        return ""
    topology = read_cpu_topology(os.sched_getaffinity(0))
    affinity = plan_affinity(mode, topology, accelerator_numa_nodes(rank_info, device))[rank_info.local_rank]
    for thread in os.listdir("/proc/self/task"):  # numpy has started some
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), affinity.cores)
    torch.set_num_threads(affinity.num_threads)
    threads = f"{affinity.num_threads} thread{'s' * (affinity.num_threads > 1)}"
    return f"rank {rank_info.rank}: cores {format_cpulist(affinity.cores)}, NUMA node {affinity.node}, {threads}"


def plan_affinity(mode: BindingMode, topology: CpuTopology, near_nodes: Sequence[int | None]) -> list[CpuAffinity]:
    """Return the affinity of each rank of a machine.

    near_nodes: NUMA node near each rank's accelerator, None if unknown. "node" gives a rank all cores of its node.
    "exclusive" gives it a disjoint part, and parts differ by at most one physical core. A rank gets one thread per
    physical core of its part, limited by the quota, and at least one.
    """
    nodes = assign_numa_nodes(topology, near_nodes)
    plan = []
    for rank, node in enumerate(nodes):
        physical_cores = topology.physical_cores(node)
        num_cores, num_ranks, rank_in_node = len(physical_cores), nodes.count(node), nodes[:rank].count(node)
        if mode == "exclusive" and num_cores < num_ranks:
            raise InputError(
                f"--numa-binding exclusive: NUMA node {node} has {num_cores} physical cores for {num_ranks} ranks. "
                "Pass --numa-binding node, or start fewer ranks."
            )
        rank_cores = physical_cores[num_cores * rank_in_node // num_ranks : num_cores * (rank_in_node + 1) // num_ranks]
        cores = frozenset().union(*rank_cores) if mode == "exclusive" else topology.nodes[node]
        num_threads = max(1, int(min(len(rank_cores), topology.quota / len(nodes))))
        plan.append(CpuAffinity(cores, node, num_threads))
    return plan


def assign_numa_nodes(topology: CpuTopology, near_nodes: Sequence[int | None]) -> list[int]:
    """Return the NUMA node of each rank: the one near its accelerator, if that has usable cores.

    The other ranks are distributed to maximize the cores per rank, with consecutive ranks on the same node.
    """
    preferred = [node if node in topology.nodes else None for node in near_nodes]
    ranks_on_node = {node: preferred.count(node) for node in topology.nodes}
    assigned = []
    for _ in range(preferred.count(None)):
        least_loaded = max(
            ranks_on_node, key=lambda node: (len(topology.nodes[node]) / (ranks_on_node[node] + 1), -node)
        )
        ranks_on_node[least_loaded] += 1
        assigned.append(least_loaded)
    remaining = iter(sorted(assigned))
    return [next(remaining) if node is None else node for node in preferred]


def accelerator_numa_nodes(rank_info: RankInfo, device: torch.device, root: Path = Path("/")) -> list[int | None]:
    """Return the NUMA node near the accelerator of each rank of this machine, None if unknown."""
    ranks = range(rank_info.local_world_size)
    one_per_rank = device.index == rank_info.local_rank  # else all share the given device
    devices = [torch.device(device.type, rank) for rank in ranks] if one_per_rank else [device for _ in ranks]
    return [numa_node(pci_address(rank_device), root) for rank_device in devices]


def numa_node(address: str | None, root: Path = Path("/")) -> int | None:
    """Return the NUMA node of a PCI device (0000:dc:00.0), or None if unknown."""
    with suppress(OSError, ValueError):
        node = int((root / f"sys/bus/pci/devices/{address}/numa_node").read_text())
        return node if node >= 0 else None
    return None


def read_cpu_topology(allowed: set[int], root: Path = Path("/")) -> CpuTopology:
    """Read the topology of the allowed cores. Without NUMA information, all of them are on one node."""
    nodes = {}
    for path in (root / "sys/devices/system/node").glob("node[0-9]*/cpulist"):
        if cores := frozenset(parse_cpulist(path.read_text()) & allowed):
            nodes[int(path.parent.name.removeprefix("node"))] = cores
    siblings = {}
    for core in allowed:
        with suppress(OSError):
            path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
            siblings[core] = frozenset(parse_cpulist(path.read_text()))
    return CpuTopology(dict(sorted(nodes.items())) or {0: frozenset(allowed)}, siblings, cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the CPU time limit of this process's control groups (cgroup v1 or v2), in cores. Infinity: no limit."""
    quotas = [math.inf]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "cpu" not in controllers.split(",") and controllers:
                continue
            # In a container, the path may be the host's while only its last part is mounted, as "/".
            groups = (group.relative_to("/") for group in (Path(path), *Path(path).parents))
            quotas += [_quota(root / "sys/fs/cgroup" / controllers / group) for group in groups]
    return min(quotas)


def _quota(group: Path) -> float:
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max" raises ValueError
    with suppress(OSError, ValueError):
        quota = (group / "cpu.cfs_quota_us").read_text()
        if int(quota) > 0:
            return int(quota) / int((group / "cpu.cfs_period_us").read_text())
    return math.inf


def parse_cpulist(text: str) -> set[int]:
    """Parse a core list in kernel format: `0-2,8` is 0, 1, 2 and 8."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def format_cpulist(cores: frozenset[int]) -> str:
    """Format cores as a list in kernel format."""
    position = count()
    runs = [list(run) for _, run in groupby(sorted(cores), key=lambda core: core - next(position))]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
