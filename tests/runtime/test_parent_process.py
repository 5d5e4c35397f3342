"""Processes whose parent is killed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from paths import ROOT

CHILD = """
import os, signal, sys, time
from detection.runtime import parent_process
parent_process.POLL_INTERVAL_S = 0.05
{prepare}
def on_signal(*_):
    print("ended by SIGTERM", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, on_signal)
parent_process.end_with_parent({parent_pid})
print("ready", flush=True)
time.sleep(30)
print("never ended", flush=True)
"""
WITHOUT_KERNEL = "parent_process.set_death_signal = lambda: False"


def start(prepare, parent_pid="0"):
    """Start a child under a parent that waits, and return the parent. Both write to its output."""
    child = CHILD.format(prepare=prepare, parent_pid=parent_pid)
    parent = "import subprocess, sys; subprocess.call([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", parent, child]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("prepare", ["", WITHOUT_KERNEL])
def test_process_ends_when_its_parent_is_killed(prepare):
    parent = start(prepare)
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.2)
    parent.send_signal(signal.SIGKILL)
    assert parent.stdout.read() == "ended by SIGTERM\n"
    parent.wait()


@pytest.mark.parametrize("prepare", ["", WITHOUT_KERNEL])
def test_process_ends_if_its_parent_died_before(prepare):
    parent = start(prepare, parent_pid=str(os.getpid()))  # not its parent
    assert "ended by SIGTERM\n" in parent.communicate(timeout=20)[0]


def test_death_signal_survives_exec():
    program = (
        "import subprocess, sys; from detection.runtime import parent_process; subprocess.call(['sh', '-c', "
        "'trap \"echo ended; exit\" TERM; echo ready; for i in 1 2 3 4 5 6 7 8 9; do sleep 1; done'], "
        "preexec_fn=parent_process.set_death_signal)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGKILL)
    assert parent.stdout.read() == "ended\n"
    parent.wait()
