"""Ranks bound to the cores near their accelerator, as far as the machine tells where that is.

Memory follows: Linux takes a page from the NUMA node of the core that first writes to it, and data workers run on the
cores of their rank. A core here is what the system numbers, a hardware thread; those of one physical core are siblings.
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

from detection.config.settings import InputError, Topology
from detection.runtime.device import pci_address

Choice = Literal["off", "node", "exclusive"]


@dataclass(frozen=True)
class Machine:
    """What the processes of a run may use of a machine.

    nodes: the cores of each NUMA node, those that are no one's to use left out, and so nodes without any. siblings: of
    a core, itself among them; a core that is missing has none. quota: cores' worth of time that all may take together.
    """

    nodes: Mapping[int, frozenset[int]]
    siblings: Mapping[int, frozenset[int]]
    quota: float = math.inf

    def physical(self, node: int) -> list[frozenset[int]]:
        """The physical cores of a node, in the order of their lowest number: of each the cores that may be used."""
        whole = {self.siblings.get(core, frozenset({core})) for core in self.nodes[node]}
        return sorted((core & self.nodes[node] for core in whole), key=min)


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its cores, the NUMA node that they are on, and how many threads it computes with."""

    cores: frozenset[int]
    node: int
    num_threads: int


def bind(choice: Choice, topology: Topology, device: torch.device) -> str:
    """Bind this process to the cores near its device, and say to which; "off" leaves it alone and says nothing.

    To be called before anything computes. Raises InputError where there are too few cores.
    """
    if choice == "off":
        return ""
    machine = read_machine(os.sched_getaffinity(0))
    place = places(choice, machine, accelerator_nodes(topology, device))[topology.local_rank]
    for thread in os.listdir("/proc/self/task"):  # numpy has started some
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), place.cores)
    torch.set_num_threads(place.num_threads)
    threads = f"{place.num_threads} thread{'s' * (place.num_threads > 1)}"
    return f"rank {topology.rank}: cores {ranges(place.cores)}, NUMA node {place.node}, {threads}"


def places(choice: Choice, machine: Machine, wanted: Sequence[int | None]) -> list[Place]:
    """Where each rank of a machine runs.

    wanted: the NUMA node near each rank's accelerator, None where that is not known. "node" gives a rank all cores of
    its node, "exclusive" a share that no other rank has, of equal size but for one physical core. A rank has a thread
    for each physical core of its share, as far as the quota goes, and one at least.
    """
    nodes = homes(machine, wanted)
    found = []
    for rank, node in enumerate(nodes):
        physical, among, before = machine.physical(node), nodes.count(node), nodes[:rank].count(node)
        if choice == "exclusive" and len(physical) < among:
            raise InputError(
                f"--numa-binding exclusive: NUMA node {node} has {len(physical)} physical cores for {among} ranks. "
                "Pass --numa-binding node, or start fewer ranks."
            )
        share = physical[len(physical) * before // among : len(physical) * (before + 1) // among]
        cores = frozenset().union(*share) if choice == "exclusive" else machine.nodes[node]
        num_threads = max(1, int(min(len(share), machine.quota / len(nodes))))
        found.append(Place(cores, node, num_threads))
    return found


def homes(machine: Machine, wanted: Sequence[int | None]) -> list[int]:
    """The NUMA node of each rank: the one near its accelerator, where that has cores to use.

    The others are spread so that ranks have as many cores each as can be, those that follow each other side by side.
    """
    near = [node if node in machine.nodes else None for node in wanted]
    crowd = {node: near.count(node) for node in machine.nodes}
    spread = []
    for _ in range(near.count(None)):
        roomiest = max(crowd, key=lambda node: (len(machine.nodes[node]) / (crowd[node] + 1), -node))
        crowd[roomiest] += 1
        spread.append(roomiest)
    rest = iter(sorted(spread))
    return [next(rest) if node is None else node for node in near]


def accelerator_nodes(topology: Topology, device: torch.device, root: Path = Path("/")) -> list[int | None]:
    """The NUMA node near the accelerator of each rank of this machine, None where the system does not tell."""
    ranks = range(topology.local_world_size)
    numbered = device.index == topology.local_rank  # else all share the one that was named
    devices = [torch.device(device.type, rank) for rank in ranks] if numbered else [device for _ in ranks]
    return [numa_node(pci_address(one), root) for one in devices]


def numa_node(address: str | None, root: Path = Path("/")) -> int | None:
    """The NUMA node of a device on the PCI bus (0000:dc:00.0), None where the system does not tell."""
    with suppress(OSError, ValueError):
        node = int((root / f"sys/bus/pci/devices/{address}/numa_node").read_text())
        return node if node >= 0 else None
    return None


def read_machine(allowed: set[int], root: Path = Path("/")) -> Machine:
    """What the system says of the cores that this process may use; all are on one node where it says nothing."""
    nodes = {}
    for path in (root / "sys/devices/system/node").glob("node[0-9]*/cpulist"):
        if cores := frozenset(numbers(path.read_text()) & allowed):
            nodes[int(path.parent.name.removeprefix("node"))] = cores
    siblings = {}
    for core in allowed:
        with suppress(OSError):
            path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
            siblings[core] = frozenset(numbers(path.read_text()))
    return Machine(dict(sorted(nodes.items())) or {0: frozenset(allowed)}, siblings, cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that the control groups of this process leave it (cgroup 2, or 1): infinity without."""
    quotas = [math.inf]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "cpu" not in controllers.split(",") and controllers:
                continue
            # In a container the path may be the host's, and what is mounted its end: then only "/" is there.
            groups = (group.relative_to("/") for group in (Path(path), *Path(path).parents))
            quotas += [_quota(root / "sys/fs/cgroup" / controllers / group) for group in groups]
    return min(quotas)


def _quota(group: Path) -> float:
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max" is no number
    with suppress(OSError, ValueError):
        quota = (group / "cpu.cfs_quota_us").read_text()
        if int(quota) > 0:
            return int(quota) / int((group / "cpu.cfs_period_us").read_text())
    return math.inf


def numbers(text: str) -> set[int]:
    """Read a list as the kernel writes it: `0-2,8` is 0, 1, 2 and 8."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def ranges(cores: frozenset[int]) -> str:
    """Write a list as the kernel does."""
    position = count()
    runs = [list(run) for _, run in groupby(sorted(cores), key=lambda core: core - next(position))]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
