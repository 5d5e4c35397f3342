"""Several hosts on one machine: network namespaces joined by a switch, each a node of torchrun's."""

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

Nodes = list[subprocess.Popen[str]]  # in the order of hosts

SAME = ("--bn-group", "0", "--log-every", "1", "--checkpoint-every", "1 steps")
NUMBERS = itertools.count()
BATCH_OF_TWO = ("--batch-size", "4")
HANG_S = 10.0


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Hosts in namespaces of their own, with the addresses 10.77.0.1, .2, ...: a context."""

    def __init__(self, count: int):
        self.switch = f"dt{os.getpid()}n{next(NUMBERS)}"
        self.names = [f"{self.switch}h{number}" for number in range(count)]
        self.made: list[str] = []

    def __enter__(self) -> Self:
        if os.geteuid() or not shutil.which("ip"):
            pytest.skip("network namespaces need root and ip (Debian: iproute2)")
        try:
            self.make(self.switch)
        except subprocess.CalledProcessError:
            pytest.skip("a network namespace cannot be made here")
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
            if name in self.made:
                self.kill(number)
        for name in self.made:
            ip("netns", "delete", name)

    def make(self, name: str) -> None:
        ip("netns", "add", name)
        self.made.append(name)
        ip("-n", name, "link", "set", "lo", "up")

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def kill(self, number: int) -> None:
        """What a kernel that dies does to its processes; the others are told that their connections are closed."""
        for pid in ip("netns", "pids", self.names[number]).split():
            os.kill(int(pid), signal.SIGKILL)

    def cut_off(self, number: int) -> None:
        """Pull the cable out of the switch: nobody is told."""
        ip("-n", self.switch, "link", "set", f"port{number}", "down")

    def plug_in(self, number: int) -> None:
        ip("-n", self.switch, "link", "set", f"port{number}", "up")

    def start(self, run: Path, *flags: str, rendezvous: str = "static", restarts: int = 0, **extra: str) -> Nodes:
        """One rank on each host."""
        nodes = []
        for number, name in enumerate(self.names):
            launch = ["--nnodes", str(len(self.names)), "--max-restarts", str(restarts)]
            if rendezvous == "static":  # as ./run_and_time.sh does
                launch += ["--node-rank", str(number), "--master-addr", self.address(0), "--master-port", "29500"]
            else:  # torch goes by the machine's name, which is the same in all namespaces
                launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.address(0)}:29500", "--rdzv-id", "run"]
                launch += ["--rdzv-conf", f"is_host={number == 0}", "--local-addr", self.address(number)]
            rank = processes.command(run, *SAME, *flags, ranks=1, launch=tuple(launch))
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
        """A run that all hosts come to the end of."""
        for status, _, err in finish(self.start(run, *flags, rendezvous=rendezvous)):
            assert status == 3, err


def finish(nodes: Nodes) -> list[tuple[int, str, str]]:
    return [processes.finish(node, timeout_s=120) for node in nodes]


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with Hosts(2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """A run over two hosts that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    two.run(folder, *BATCH_OF_TWO)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    status, _, err = processes.run(folder, *SAME, "--batch-size", "8")
    assert status == 3, err
    return folder


def wait_for_step(run: Path, step: int, nodes: Nodes) -> None:
    """Wait for the checkpoint of a step."""
    end = time.monotonic() + 60
    while not any(saved.step >= step for saved in run_dir.checkpoints(run)):
        assert time.monotonic() < end
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.02)


def test_two_hosts_train_as_one_process_does(whole, alone):
    assert len(processes.losses(whole)) == 9
    np.testing.assert_allclose(processes.losses(whole), processes.losses(alone), rtol=1e-4)


def test_four_hosts_that_meet_at_an_address_train_as_one_process_does(tmp_path, alone):
    """The rendezvous that numbers the hosts as they come."""
    with Hosts(4) as four:
        four.run(tmp_path, "--batch-size", "2", rendezvous="c10d")
    np.testing.assert_allclose(processes.losses(tmp_path), processes.losses(alone), rtol=1e-4)


def test_a_host_that_is_cut_off_ends_the_run_on_both_sides_and_it_goes_on(two, whole, tmp_path):
    nodes = two.start(tmp_path, *BATCH_OF_TWO, "--step-s", "0.5", "--step-timeout-s", str(HANG_S))
    wait_for_step(tmp_path, 4, nodes)
    two.cut_off(1)
    cut_s = time.monotonic()
    try:
        ended = finish(nodes)
    finally:
        two.plug_in(1)
    assert time.monotonic() - cut_s < HANG_S + 15
    for rank, (status, _, err) in enumerate(ended):
        assert status == 1
        assert f"rank {rank} has made no step for {HANG_S:g} s" in err
        assert "all_reduce" in err or "backward" in err, "where it waits for the other"
    saved = run_dir.checkpoints(tmp_path)[-1].step
    assert 4 <= saved < 9
    two.run(tmp_path, *BATCH_OF_TWO, "--resume", "auto")
    assert processes.steps(tmp_path) == processes.steps(whole)
    assert processes.equal(processes.weights(tmp_path), processes.weights(whole))


@pytest.mark.parametrize("dies", [0, 1])
def test_a_host_that_dies_is_missed_by_the_other_at_once_and_the_run_goes_on(two, whole, tmp_path, dies):
    nodes = two.start(tmp_path, *BATCH_OF_TWO, "--step-s", "0.5")
    wait_for_step(tmp_path, 4, nodes)
    two.kill(dies)
    died_s = time.monotonic()
    status, _, err = finish(nodes)[1 - dies]
    assert time.monotonic() - died_s < 15
    assert status == 1
    assert "another rank has ended or cannot be reached" in err
    assert "Traceback" not in err
    assert run_dir.checkpoints(tmp_path)[-1].step < 9
    two.run(tmp_path, *BATCH_OF_TWO, "--resume", "auto")
    assert processes.equal(processes.weights(tmp_path), processes.weights(whole))


def test_the_launchers_start_the_ranks_of_both_hosts_again_when_one_of_them_died(two, whole, tmp_path):
    run, mark = tmp_path / "run", tmp_path / "mark"
    flags = (*BATCH_OF_TWO, "--resume", "auto", "--step-timeout-s", str(HANG_S))
    ended = finish(two.start(run, *flags, restarts=1, FAULT="kill 1 5", FAULT_MARK=str(mark)))
    assert [status for status, _, _ in ended] == [3, 3], ended[1][2]
    assert "resuming from" in ended[0][1]
    assert processes.equal(processes.weights(run), processes.weights(whole))
