"""Signals to a rank, in a process of its own."""

import signal
import subprocess
import sys
import time

import pytest

from paths import ROOT

PROGRAM = """
import ctypes, time
from detection.runtime.signals import SignalHandler
lock = ctypes.create_string_buffer(64)
with SignalHandler() as signals, signals.deferred():
    {prepare}
    print("ready", flush=True)
    {wait}
"""
WAIT_IN_LIBRARY = "[ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"


@pytest.fixture
def start():
    """Function that starts a program and waits until it is ready."""
    processes = []

    def start(prepare, wait):
        program = PROGRAM.format(prepare=prepare, wait=wait)
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("prepare", "wait"),
    [
        ("pass", "time.sleep(60)"),
        ("pass", WAIT_IN_LIBRARY),  # as for another rank
        ("signals.finish()", "time.sleep(60)"),  # as in the verification of the final metrics
    ],
)
def test_second_signal_ends_the_process_in_every_phase(start, prepare, wait):
    process = start(prepare, wait)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None, "the first one is deferred"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) in (128 + signal.SIGTERM, 1)


def test_duplicate_of_a_signal_is_no_second_one(start):
    process = start("pass", "time.sleep(3); raise SystemExit(signals.pending)")
    process.terminate()
    process.terminate()
    assert process.wait(timeout=20) == signal.SIGTERM


def test_first_signal_after_finish_keeps_the_exit_status(start):
    process = start("signals.finish()", "time.sleep(1); raise SystemExit(3)")
    process.terminate()
    assert process.wait(timeout=20) == 3
