"""Binding of ranks to cores: on synthetic machines of every shape, on files in kernel format, and on this machine."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detection.config.settings import InputError, RankInfo
from detection.runtime import numa_binding
from detection.runtime.numa_binding import (
    CpuTopology,
    accelerator_numa_nodes,
    assign_numa_nodes,
    format_cpulist,
    parse_cpulist,
    plan_affinity,
    read_cpu_topology,
)
from paths import ROOT


def make_topology(num_nodes, cores_per_node, threads_per_core=1, allowed=None, quota=math.inf):
    """Return a topology that numbers the second hardware threads after all first ones, as Linux does on x86."""
    num_cores = num_nodes * cores_per_node
    siblings, nodes = {}, {}
    for core in range(num_cores):
        group = frozenset(range(core, num_cores * threads_per_core, num_cores))
        siblings |= dict.fromkeys(group, group)
        usable = group if allowed is None else group & allowed
        nodes[core // cores_per_node] = nodes.get(core // cores_per_node, frozenset()) | usable
    return CpuTopology({node: cores for node, cores in nodes.items() if cores}, siblings, quota)


@st.composite
def topologies(draw):
    num_nodes, cores, threads = draw(st.integers(1, 8)), draw(st.integers(1, 12)), draw(st.integers(1, 2))
    everything = range(num_nodes * cores * threads)
    missing = draw(st.sets(st.sampled_from(everything), max_size=len(everything) - 1))  # offline, or in another cpuset
    quota = draw(st.sampled_from([math.inf, 0.5, 2, 7.3, 64]))
    return make_topology(num_nodes, cores, threads, set(everything) - missing, quota)


@st.composite
def cases(draw):
    """Draw a topology and the NUMA node near each rank's accelerator, which may be unknown or have no usable cores."""
    return draw(topologies()), draw(st.lists(st.none() | st.integers(0, 8), min_size=1, max_size=16))


@given(cases())
def test_node_binds_to_all_cores_of_the_accelerators_node(case):
    topology, near_nodes = case
    for affinity, node in zip(plan_affinity("node", topology, near_nodes), near_nodes, strict=True):
        assert affinity.cores == topology.nodes[affinity.node] != frozenset()
        if node in topology.nodes:
            assert affinity.node == node


@given(cases())
def test_exclusive_splits_a_node_into_equal_parts_of_physical_cores(case):
    topology, near_nodes = case
    ranks_of = {node: assign_numa_nodes(topology, near_nodes).count(node) for node in topology.nodes}
    if any(ranks > len(topology.physical_cores(node)) for node, ranks in ranks_of.items()):
        with pytest.raises(InputError, match=r"NUMA node \d+ has \d+ physical cores for \d+ ranks"):
            plan_affinity("exclusive", topology, near_nodes)
        return
    plan = plan_affinity("exclusive", topology, near_nodes)
    assert [affinity.node for affinity in plan] == assign_numa_nodes(topology, near_nodes)
    for node, ranks in ranks_of.items():
        parts = [affinity.cores for affinity in plan if affinity.node == node]
        assert sum(map(len, parts)) == (len(topology.nodes[node]) if ranks else 0)
        assert frozenset().union(*parts) == (topology.nodes[node] if ranks else frozenset())
        physical_cores = [[core for core in topology.physical_cores(node) if core & part] for part in parts]
        assert all(core <= part for cores, part in zip(physical_cores, parts, strict=True) for core in cores)
        assert max(map(len, physical_cores), default=0) - min(map(len, physical_cores), default=0) <= 1


@given(cases(), st.sampled_from(["node", "exclusive"]))
def test_threads_are_limited_by_cores_and_quota(case, mode):
    topology, near_nodes = case
    try:
        plan = plan_affinity(mode, topology, near_nodes)
    except InputError:
        return
    physical = sum(len(topology.physical_cores(node)) for node in topology.nodes)
    assert all(affinity.num_threads >= 1 for affinity in plan)
    assert sum(affinity.num_threads for affinity in plan if affinity.num_threads > 1) <= min(physical, topology.quota)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 8))
def test_ranks_without_a_known_node_are_distributed_evenly_in_order(num_nodes, ranks_per_node, cores):
    plan = assign_numa_nodes(make_topology(num_nodes, cores), [None] * (num_nodes * ranks_per_node))
    assert plan == sorted(plan)
    assert all(plan.count(node) == ranks_per_node for node in range(num_nodes))


def test_larger_nodes_receive_more_of_the_unassigned_ranks():
    topology = make_topology(2, 8, allowed=set(range(8)) | {8, 9})
    assert assign_numa_nodes(topology, [None] * 5) == [0, 0, 0, 0, 1]


@given(st.sets(st.integers(0, 300)))
def test_core_lists_round_trip(cores):
    assert parse_cpulist(format_cpulist(frozenset(cores)) + "\n") == cores


def test_dgx_a100_with_accelerators_on_four_of_eight_nodes():
    # The DGX A100: 2 sockets × 4 nodes × 16 cores × 2 threads; accelerators 0 and 1 are on node 3, and so on.
    topology = make_topology(8, 16, threads_per_core=2)
    plan = plan_affinity("exclusive", topology, [3, 3, 1, 1, 7, 7, 5, 5])
    assert [affinity.node for affinity in plan] == [3, 3, 1, 1, 7, 7, 5, 5]
    assert [format_cpulist(affinity.cores) for affinity in plan[:3]] == [
        "48-55,176-183",
        "56-63,184-191",
        "16-23,144-151",
    ]
    assert {affinity.num_threads for affinity in plan} == {8}
    assert format_cpulist(plan_affinity("node", topology, [3] * 8)[0].cores) == "48-63,176-191"


def test_a_container_with_one_socket_keeps_all_ranks_on_it():
    plan = plan_affinity("exclusive", make_topology(2, 20, allowed=set(range(20))), [0, 0, 0, 0, 1, 1, 1, 1])
    assert {affinity.node for affinity in plan} == {0}
    assert sorted(len(affinity.cores) for affinity in plan) == [2, 2, 2, 2, 3, 3, 3, 3]


def test_a_cpu_quota_limits_threads_but_not_cores():
    affinity, *_ = plan_affinity("node", make_topology(1, 64, quota=8), [None] * 4)
    assert (len(affinity.cores), affinity.num_threads) == (64, 2)


@pytest.fixture
def system(tmp_path):
    """Write the files of a machine with two nodes of four cores with two threads each. Cores 3 and 11 are offline."""

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    for node, cores in enumerate(("0-2,8-10", "4-7,12-15")):
        write(f"sys/devices/system/node/node{node}/cpulist", cores + "\n")
    write("sys/devices/system/node/node2/cpulist", "\n")  # memory only
    write("sys/devices/system/node/possible", "0-2\n")
    for core in range(16):
        if core % 8 != 3:
            write(f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list", f"{core % 8},{core % 8 + 8}\n")
    write("sys/bus/pci/devices/0000:dc:00.0/numa_node", "1\n")
    write("sys/bus/pci/devices/0000:01:00.0/numa_node", "-1\n")
    write("proc/self/cgroup", "0::/\n")
    return tmp_path


def test_cpu_topology_is_read_from_sysfs(system):
    topology = read_cpu_topology(set(range(16)) - {3, 11}, system)
    assert topology.nodes == {0: {0, 1, 2, 8, 9, 10}, 1: {4, 5, 6, 7, 12, 13, 14, 15}}
    assert topology.siblings[13] == {5, 13}
    assert topology.quota == math.inf


def test_only_allowed_cores_are_read(system):
    assert read_cpu_topology({4, 5}, system).nodes == {1: {4, 5}}


def test_a_system_without_numa_information_is_one_node(tmp_path):
    assert read_cpu_topology({2, 3}, tmp_path) == CpuTopology({0: frozenset({2, 3})}, {})


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4),  # parent limit
        ("0::/host/path/of/a/container\n", {"cpu.max": "150000 100000\n"}, 1.5),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("2:cpuset:/\n", {"cpu.max": "1 1\n"}, math.inf),
    ],
)
def test_cpu_quota_is_read_from_control_groups(system, cgroup, files, quota):
    (system / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = system / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert numa_binding.cpu_quota(system) == quota


def test_the_numa_node_is_read_from_the_pci_address(system):
    assert numa_binding.numa_node("0000:dc:00.0", system) == 1
    assert numa_binding.numa_node("0000:01:00.0", system) is None  # -1: unknown to the firmware
    assert numa_binding.numa_node("0000:99:00.0", system) is None
    assert numa_binding.numa_node(None, system) is None


def test_ranks_use_the_accelerator_of_their_number_or_share_the_given_one(system, monkeypatch):
    addresses = {0: "0000:dc:00.0", 1: "0000:01:00.0", 2: None}
    monkeypatch.setattr(numa_binding, "pci_address", lambda device: addresses[device.index])
    second = RankInfo(1, 1, 3, 3)
    assert accelerator_numa_nodes(second, torch.device("cuda", 1), system) == [1, None, None]
    assert accelerator_numa_nodes(second, torch.device("cuda", 0), system) == [1, 1, 1]


CHILD = """
import json, multiprocessing, os, sys, torch
from detection.runtime.numa_binding import bind
from detection.config.settings import RankInfo

def cores():
    return sorted(os.sched_getaffinity(0))

if __name__ == "__main__":
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # starts threads
    before, rank, size = cores(), int(sys.argv[2]), int(sys.argv[3])
    line = bind(sys.argv[1], RankInfo(rank, rank, size, size), torch.device("cpu"))
    threads = [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]
    with multiprocessing.Pool(1) as pool:
        child = pool.apply(cores)
    print(json.dumps([line, before, cores(), threads, child, torch.get_num_threads()]))
"""


def bound(tmp_path, mode, rank, size):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), mode, str(rank), str(size)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    return json.loads(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout)


def test_binding_applies_to_all_threads_and_child_processes(tmp_path):
    size = min(2, len(os.sched_getaffinity(0)))
    line, before, after, threads, child, num_threads = bound(tmp_path, "exclusive", size - 1, size)
    assert after == child
    assert all(cores == after for cores in threads)
    assert len(after) < len(before) or size == 1
    assert line.startswith(f"rank {size - 1}: cores {format_cpulist(frozenset(after))}, NUMA node ")
    assert num_threads <= len(after)


def test_off_does_not_bind(tmp_path):
    line, before, after, _, _, num_threads = bound(tmp_path, "off", 0, 2)
    assert (line, after, num_threads) == ("", before, 2)
