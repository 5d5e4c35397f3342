"""Watchdog of a rank, in a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from paths import ROOT

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from detection.runtime import watchdog
from mlperf import stdio
stdio.STUCK_S = 0.2
stdio.ignore_write_errors()
watchdog.STACK_DUMP_GRACE_S = 0.5
def hang():
    {hang}
with watchdog.Watchdog(3, 0.6) as guard:
    guard.folder = Path(sys.argv[1]) if sys.argv[1:] else None
    time.sleep(0.5)
    guard.heartbeat()
    with guard.extended():
        time.sleep(0.8)
    time.sleep(0.2)  # until the timer has the limit of a step again
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


@pytest.mark.parametrize(
    ("hang", "redirection"),
    [
        ("time.sleep(60)", "2>/dev/full"),
        ("time.sleep(60)", "2>&-"),
        ("time.sleep(60)", "2>&1 | sleep 60 & wait $!"),
        ("ctypes.PyDLL(None).sleep(60)", "2>&1 | sleep 60 & wait $!"),
    ],
)
def test_hang_is_ended_if_standard_error_cannot_be_written(tmp_path, hang, redirection):
    program = PROGRAM.format(hang=hang).replace("def hang", "print('x' * 2**20, file=sys.stderr)\ndef hang")
    command = f'{{ "$@"; echo $? >"{tmp_path}/status"; }} {redirection}'
    start_s = time.monotonic()
    shell = subprocess.Popen(
        ["bash", "-c", command, "bash", sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, start_new_session=True
    )
    try:
        while not (tmp_path / "status").exists() or not (tmp_path / "status").read_text():
            assert time.monotonic() - start_s < 30
            time.sleep(0.05)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    assert (tmp_path / "status").read_text() == "1\n"
    if hang.startswith("time"):  # otherwise no other thread can run
        report = (tmp_path / "hang_rank_3.txt").read_text()
        assert report.startswith("error: rank 3 completed no step within 0.6 s")
        assert "in hang" in report
