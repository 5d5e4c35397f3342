"""Signals to a rank, in a process of its own."""

import signal
import time
from pathlib import Path

import pytest

import processes
from forked import Forked

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
def start(tmp_path):
    """Function that starts a program and waits until it is ready."""
    started = []

    def start(prepare, wait):
        (tmp_path / "program.py").write_text(PROGRAM.format(prepare=prepare, wait=wait))
        started.append(Forked([str(tmp_path / "program.py")], processes.environment()))
        processes.wait_for(Path(started[0].files[0].name), "ready")
        return started[0]

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


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
