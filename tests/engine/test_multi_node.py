"""Multi-node runs on one machine: each network namespace is a node of torchrun."""

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

import processes
from detection import run_dir
from paths import ROOT

pytestmark = pytest.mark.hosts

Nodes = list[subprocess.Popen[str]]  # one per host

COMMON = ("--bn-group", "0", "--log-every", "1", "--checkpoint-every", "1 steps")
NUMBERS = itertools.count()
BATCH_OF_TWO = ("--batch-size", "4")
HANG_S = 10.0


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Context of hosts in separate network namespaces, with the addresses 10.77.0.1, 10.77.0.2, ..."""

    def __init__(self, count: int):
        self.switch = f"dt{os.getpid()}n{next(NUMBERS)}"
        self.names = [f"{self.switch}h{number}" for number in range(count)]
        self.created: list[str] = []

    def __enter__(self) -> Self:
        if os.geteuid() or not shutil.which("ip"):
            pytest.skip("network namespaces need root and ip (Debian: iproute2)")
        try:
            self.make(self.switch)
        except subprocess.CalledProcessError:
            pytest.skip("cannot create a network namespace")
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            self.make(name)
            port = ("link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", self.switch, *port)
            ip("-n", self.switch, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *_: Any) -> None:
        for number, name in enumerate(self.names):
            if name in self.created:
                self.kill(number)
        for name in self.created:
            ip("netns", "delete", name)

    def make(self, name: str) -> None:
        ip("netns", "add", name)
        self.created.append(name)
        ip("-n", name, "link", "set", "lo", "up")

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def kill(self, number: int) -> None:
        """Kill all processes of a host. The other hosts see their connections close."""
        for pid in ip("netns", "pids", self.names[number]).split():
            os.kill(int(pid), signal.SIGKILL)

    def disconnect(self, number: int) -> None:
        """Disconnect a host without closing its connections."""
        ip("-n", self.switch, "link", "set", f"port{number}", "down")

    def reconnect(self, number: int) -> None:
        ip("-n", self.switch, "link", "set", f"port{number}", "up")

    def start(self, run: Path, *flags: str, rendezvous: str = "static", restarts: int = 0, **extra: str) -> Nodes:
        """Start one rank on each host."""
        nodes = []
        for number, name in enumerate(self.names):
            launch = ["--nnodes", str(len(self.names)), "--max-restarts", str(restarts)]
            if rendezvous == "static":  # as in ./run_and_time.sh
                launch += ["--node-rank", str(number), "--master-addr", self.address(0), "--master-port", "29500"]
            else:  # torch would compare host names, which are the same in all namespaces
                launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.address(0)}:29500", "--rdzv-id", "run"]
                launch += ["--rdzv-conf", f"is_host={number == 0}", "--local-addr", self.address(number)]
            rank = processes.command(run, *COMMON, *flags, ranks=1, launch=tuple(launch))
            nodes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *rank],
                    env=processes.environment(GLOO_SOCKET_IFNAME="eth0", **extra),
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
        return nodes

    def run(self, run: Path, *flags: str, rendezvous: str = "static") -> None:
        """Run to the end on all hosts."""
        for status, _, err in finish(self.start(run, *flags, rendezvous=rendezvous)):
            assert status == 3, err


def finish(nodes: Nodes) -> list[tuple[int, str, str]]:
    return [processes.finish(node, timeout_s=120) for node in nodes]


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with Hosts(2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def uninterrupted_run(two, tmp_path_factory):
    """Folder of an uninterrupted run on two hosts."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    two.run(folder, *BATCH_OF_TWO)
    return folder


@pytest.fixture(scope="module")
def single_rank_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single_rank") / "run"
    status, _, err = processes.run(folder, *COMMON, "--batch-size", "8")
    assert status == 3, err
    return folder


def wait_for_step(run: Path, step: int, nodes: Nodes) -> None:
    """Wait for the checkpoint of a step."""
    end = time.monotonic() + 60
    while not any(saved.step >= step for saved in run_dir.list_checkpoints(run)):
        assert time.monotonic() < end
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.02)


def test_two_hosts_match_one_process(uninterrupted_run, single_rank_run):
    assert len(processes.losses(uninterrupted_run)) == 9
    np.testing.assert_allclose(processes.losses(uninterrupted_run), processes.losses(single_rank_run), rtol=1e-4)


def test_four_hosts_with_c10d_rendezvous_match_one_process(tmp_path, single_rank_run):
    """Let the c10d rendezvous assign node ranks in the order of arrival."""
    with Hosts(4) as four:
        four.run(tmp_path, "--batch-size", "2", rendezvous="c10d")
    np.testing.assert_allclose(processes.losses(tmp_path), processes.losses(single_rank_run), rtol=1e-4)


def test_disconnected_host_ends_the_run_on_both_sides_and_it_resumes(two, uninterrupted_run, tmp_path):
    nodes = two.start(tmp_path, *BATCH_OF_TWO, "--step-s", "0.5", "--step-timeout-s", str(HANG_S))
    wait_for_step(tmp_path, 4, nodes)
    two.disconnect(1)
    disconnect_s = time.monotonic()
    try:
        ended = finish(nodes)
    finally:
        two.reconnect(1)
    assert time.monotonic() - disconnect_s < HANG_S + 15
    for rank, (status, _, err) in enumerate(ended):
        assert status == 1
        assert f"rank {rank} completed no step within {HANG_S:g} s" in err
        assert "all_reduce" in err or "backward" in err, "where it waits for the other rank"
    saved = run_dir.list_checkpoints(tmp_path)[-1].step
    assert 4 <= saved < 9
    two.run(tmp_path, *BATCH_OF_TWO, "--resume", "auto")
    assert processes.steps(tmp_path) == processes.steps(uninterrupted_run)
    assert processes.bit_identical(processes.load_tensors(tmp_path), processes.load_tensors(uninterrupted_run))


@pytest.mark.parametrize("dies", [0, 1])
def test_dead_host_ends_the_run_within_seconds_and_it_resumes(two, uninterrupted_run, tmp_path, dies):
    nodes = two.start(tmp_path, *BATCH_OF_TWO, "--step-s", "0.5")
    wait_for_step(tmp_path, 4, nodes)
    two.kill(dies)
    died_s = time.monotonic()
    status, _, err = finish(nodes)[1 - dies]
    assert time.monotonic() - died_s < 15
    assert status == 1
    assert "another rank ended or is unreachable" in err
    assert "Traceback" not in err
    assert run_dir.list_checkpoints(tmp_path)[-1].step < 9
    two.run(tmp_path, *BATCH_OF_TWO, "--resume", "auto")
    assert processes.bit_identical(processes.load_tensors(tmp_path), processes.load_tensors(uninterrupted_run))


def test_launchers_restart_the_ranks_of_both_hosts(two, uninterrupted_run, tmp_path):
    run, mark = tmp_path / "run", tmp_path / "mark"
    flags = (*BATCH_OF_TWO, "--resume", "auto", "--step-timeout-s", str(HANG_S))
    ended = finish(two.start(run, *flags, restarts=1, FAULT="kill 1 5", FAULT_MARK=str(mark)))
    assert [status for status, _, _ in ended] == [3, 3], ended[1][2]
    assert "resuming from" in ended[0][1]
    assert processes.bit_identical(processes.load_tensors(run), processes.load_tensors(uninterrupted_run))
