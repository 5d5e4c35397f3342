"""Ranks bound to cores: on machines made up in every shape, on files as the kernel writes them, and on this machine."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detection.config.settings import InputError, Topology
from detection.runtime import numa_binding
from detection.runtime.numa_binding import Machine, accelerator_nodes, homes, numbers, places, ranges, read_machine
from paths import ROOT


def made_up(num_nodes, cores_per_node, threads_per_core=1, allowed=None, quota=math.inf):
    """A machine whose second hardware threads are numbered after all the first, as Linux does it on x86."""
    num_cores = num_nodes * cores_per_node
    siblings, nodes = {}, {}
    for core in range(num_cores):
        group = frozenset(range(core, num_cores * threads_per_core, num_cores))
        siblings |= dict.fromkeys(group, group)
        usable = group if allowed is None else group & allowed
        nodes[core // cores_per_node] = nodes.get(core // cores_per_node, frozenset()) | usable
    return Machine({node: cores for node, cores in nodes.items() if cores}, siblings, quota)


@st.composite
def machines(draw):
    num_nodes, cores, threads = draw(st.integers(1, 8)), draw(st.integers(1, 12)), draw(st.integers(1, 2))
    everything = range(num_nodes * cores * threads)
    missing = draw(st.sets(st.sampled_from(everything), max_size=len(everything) - 1))  # offline, or another's cpuset
    quota = draw(st.sampled_from([math.inf, 0.5, 2, 7.3, 64]))
    return made_up(num_nodes, cores, threads, set(everything) - missing, quota)


@st.composite
def loaded(draw):
    """A machine and the NUMA node near each rank's accelerator, which may have no cores to use, or be unknown."""
    return draw(machines()), draw(st.lists(st.none() | st.integers(0, 8), min_size=1, max_size=16))


@given(loaded())
def test_node_gives_all_cores_of_the_accelerators_node_where_it_has_any(case):
    machine, wanted = case
    for place, node in zip(places("node", machine, wanted), wanted, strict=True):
        assert place.cores == machine.nodes[place.node] != frozenset()
        if node in machine.nodes:
            assert place.node == node


@given(loaded())
def test_exclusive_cuts_a_node_into_equal_shares_of_whole_cores_or_says_that_it_cannot(case):
    machine, wanted = case
    ranks_of = {node: homes(machine, wanted).count(node) for node in machine.nodes}
    if any(ranks > len(machine.physical(node)) for node, ranks in ranks_of.items()):
        with pytest.raises(InputError, match=r"NUMA node \d+ has \d+ physical cores for \d+ ranks"):
            places("exclusive", machine, wanted)
        return
    found = places("exclusive", machine, wanted)
    assert [place.node for place in found] == homes(machine, wanted)
    for node, ranks in ranks_of.items():
        shares = [place.cores for place in found if place.node == node]
        assert sum(map(len, shares)) == (len(machine.nodes[node]) if ranks else 0)
        assert frozenset().union(*shares) == (machine.nodes[node] if ranks else frozenset())
        whole = [[core for core in machine.physical(node) if core & share] for share in shares]
        assert all(core <= share for cores, share in zip(whole, shares, strict=True) for core in cores)
        assert max(map(len, whole), default=0) - min(map(len, whole), default=0) <= 1


@given(loaded(), st.sampled_from(["node", "exclusive"]))
def test_there_are_no_more_threads_than_cores_or_time_unless_a_rank_would_have_none(case, choice):
    machine, wanted = case
    try:
        found = places(choice, machine, wanted)
    except InputError:
        return
    physical = sum(len(machine.physical(node)) for node in machine.nodes)
    assert all(place.num_threads >= 1 for place in found)
    assert sum(place.num_threads for place in found if place.num_threads > 1) <= min(physical, machine.quota)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 8))
def test_ranks_whose_node_is_unknown_are_spread_evenly_and_in_order(num_nodes, ranks_per_node, cores):
    found = homes(made_up(num_nodes, cores), [None] * (num_nodes * ranks_per_node))
    assert found == sorted(found)
    assert all(found.count(node) == ranks_per_node for node in range(num_nodes))


def test_a_node_with_more_cores_takes_more_of_the_ranks_that_may_go_anywhere():
    machine = made_up(2, 8, allowed=set(range(8)) | {8, 9})
    assert homes(machine, [None] * 5) == [0, 0, 0, 0, 1]


@given(st.sets(st.integers(0, 300)))
def test_a_list_of_cores_reads_back(cores):
    assert numbers(ranges(frozenset(cores)) + "\n") == cores


def test_eight_accelerators_on_every_second_of_eight_nodes():
    # The DGX A100: 2 sockets × 4 nodes × 16 cores × 2 threads; accelerators 0 and 1 are on node 3, and so on.
    machine = made_up(8, 16, threads_per_core=2)
    found = places("exclusive", machine, [3, 3, 1, 1, 7, 7, 5, 5])
    assert [place.node for place in found] == [3, 3, 1, 1, 7, 7, 5, 5]
    assert [ranges(place.cores) for place in found[:3]] == ["48-55,176-183", "56-63,184-191", "16-23,144-151"]
    assert {place.num_threads for place in found} == {8}
    assert ranges(places("node", machine, [3] * 8)[0].cores) == "48-63,176-191"


def test_a_container_with_the_cores_of_one_socket_keeps_all_ranks_there():
    found = places("exclusive", made_up(2, 20, allowed=set(range(20))), [0, 0, 0, 0, 1, 1, 1, 1])
    assert {place.node for place in found} == {0}
    assert sorted(len(place.cores) for place in found) == [2, 2, 2, 2, 3, 3, 3, 3]


def test_a_quota_of_time_bounds_the_threads_and_not_the_cores():
    place, *_ = places("node", made_up(1, 64, quota=8), [None] * 4)
    assert (len(place.cores), place.num_threads) == (64, 2)


@pytest.fixture
def system(tmp_path):
    """The files of a machine of two nodes with four cores of two threads each; cores 3 and 11 are offline."""

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    for node, cores in enumerate(("0-2,8-10", "4-7,12-15")):
        write(f"sys/devices/system/node/node{node}/cpulist", cores + "\n")
    write("sys/devices/system/node/node2/cpulist", "\n")  # memory alone
    write("sys/devices/system/node/possible", "0-2\n")
    for core in range(16):
        if core % 8 != 3:
            write(f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list", f"{core % 8},{core % 8 + 8}\n")
    write("sys/bus/pci/devices/0000:dc:00.0/numa_node", "1\n")
    write("sys/bus/pci/devices/0000:01:00.0/numa_node", "-1\n")
    write("proc/self/cgroup", "0::/\n")
    return tmp_path


def test_a_machine_is_read_from_the_kernels_files(system):
    machine = read_machine(set(range(16)) - {3, 11}, system)
    assert machine.nodes == {0: {0, 1, 2, 8, 9, 10}, 1: {4, 5, 6, 7, 12, 13, 14, 15}}
    assert machine.siblings[13] == {5, 13}
    assert machine.quota == math.inf


def test_only_what_the_process_may_use_is_read(system):
    assert read_machine({4, 5}, system).nodes == {1: {4, 5}}


def test_a_system_that_tells_nothing_is_one_node(tmp_path):
    assert read_machine({2, 3}, tmp_path) == Machine({0: frozenset({2, 3})}, {})


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4),  # a parent's counts
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
def test_the_quota_of_control_groups(system, cgroup, files, quota):
    (system / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = system / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert numa_binding.cpu_quota(system) == quota


def test_an_accelerator_is_near_the_node_that_its_address_names(system):
    assert numa_binding.numa_node("0000:dc:00.0", system) == 1
    assert numa_binding.numa_node("0000:01:00.0", system) is None  # -1: the firmware does not tell
    assert numa_binding.numa_node("0000:99:00.0", system) is None
    assert numa_binding.numa_node(None, system) is None


def test_each_rank_has_the_accelerator_of_its_number_or_all_the_one_that_was_named(system, monkeypatch):
    addresses = {0: "0000:dc:00.0", 1: "0000:01:00.0", 2: None}
    monkeypatch.setattr(numa_binding, "pci_address", lambda device: addresses[device.index])
    second = Topology(1, 1, 3, 3)
    assert accelerator_nodes(second, torch.device("cuda", 1), system) == [1, None, None]
    assert accelerator_nodes(second, torch.device("cuda", 0), system) == [1, 1, 1]


CHILD = """
import json, multiprocessing, os, sys, torch
from detection.runtime.numa_binding import bind
from detection.config.settings import Topology

def cores():
    return sorted(os.sched_getaffinity(0))

if __name__ == "__main__":
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # starts threads
    before, rank, size = cores(), int(sys.argv[2]), int(sys.argv[3])
    line = bind(sys.argv[1], Topology(rank, rank, size, size), torch.device("cpu"))
    threads = [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]
    with multiprocessing.Pool(1) as pool:
        child = pool.apply(cores)
    print(json.dumps([line, before, cores(), threads, child, torch.get_num_threads()]))
"""


def bound(tmp_path, choice, rank, size):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), choice, str(rank), str(size)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    return json.loads(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout)


def test_this_process_all_its_threads_and_its_children_are_bound(tmp_path):
    size = min(2, len(os.sched_getaffinity(0)))
    line, before, after, threads, child, num_threads = bound(tmp_path, "exclusive", size - 1, size)
    assert after == child
    assert all(cores == after for cores in threads)
    assert len(after) < len(before) or size == 1
    assert line.startswith(f"rank {size - 1}: cores {ranges(frozenset(after))}, NUMA node ")
    assert num_threads <= len(after)


def test_off_says_nothing_and_binds_nothing(tmp_path):
    line, before, after, _, _, num_threads = bound(tmp_path, "off", 0, 2)
    assert (line, after, num_threads) == ("", before, 2)
