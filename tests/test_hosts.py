"""Several hosts on one machine: network namespaces joined by a switch, each a node of torchrun's."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import processes
from conftest import ROOT
from detection import run_folder

pytestmark = pytest.mark.hosts

SAME = ("--bn-group", "0", "--log-every", "1", "--checkpoint-every", "1 steps")
HANG_S = 6.0


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Hosts in namespaces of their own, with the addresses 10.77.0.1, .2, ...: a context."""

    def __init__(self, count: int):
        self.switch = f"dt{os.getpid()}"
        self.names = [f"{self.switch}h{number}" for number in range(count)]
        self.made: list[str] = []

    def __enter__(self):
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

    def __exit__(self, *_):
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

    def start(self, run, *flags: str, rendezvous: str = "static") -> list[subprocess.Popen[str]]:
        """A rank on each host."""
        return [self.start_one(number, run, *flags, rendezvous=rendezvous) for number in range(len(self.names))]

    def start_one(self, number: int, run, *flags: str, rendezvous: str) -> subprocess.Popen[str]:
        launch = ["--nnodes", str(len(self.names))]
        if rendezvous == "static":
            launch += ["--node-rank", str(number), "--master-addr", self.address(0), "--master-port", "29500"]
        else:  # torch asks for the machine's own name, which is the same in each namespace
            launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.address(0)}:29500", "--rdzv-id", "run"]
            launch += ["--rdzv-conf", f"is_host={number == 0}", "--local-addr", self.address(number)]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[number]]
            + processes.command(run, *SAME, *flags, ranks=1, launch=tuple(launch)),
            env=processes.environment(GLOO_SOCKET_IFNAME="eth0"),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, run, *flags: str, rendezvous: str = "static") -> list[tuple[int, str, str]]:
        return finish(self.start(run, *flags, rendezvous=rendezvous))


def finish(hosts: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    return [processes.finish(host, timeout_s=120) for host in hosts]


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with Hosts(2) as hosts:
        yield hosts
