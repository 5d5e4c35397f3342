"""Watchdog of a rank, in a process of its own."""

import subprocess
import sys

import pytest

from paths import ROOT

PROGRAM = """
import ctypes, time
from detection.runtime import watchdog
watchdog.STACK_DUMP_GRACE_S = 0.5
def hang():
    {hang}
with watchdog.Watchdog(3, 0.6) as guard:
    time.sleep(0.5)
    guard.heartbeat()
    with guard.extended():
        time.sleep(0.8)
    hang()
"""


@pytest.mark.parametrize(
    ("hang", "message"),
    [
        ("time.sleep(60)", "error: rank 3 completed no step within 0.6 s (--step-timeout-s)."),
        ("ctypes.PyDLL(None).sleep(60)", "Timeout (0:00:0"),  # holds the interpreter lock: no other thread can run
    ],
)
def test_hung_process_exits_with_its_stack(hang, message):
    program = PROGRAM.format(hang=hang)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=40
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "in hang" in done.stderr


def test_finished_process_is_left_alone():
    program = PROGRAM.format(hang="pass") + "time.sleep(2)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=40
    )
    assert (done.returncode, done.stderr) == (0, "")
