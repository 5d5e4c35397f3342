"""Lock of a run folder between processes."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from detection import run_lock
from mlperf.errors import InputError
from paths import ROOT

# Holds the lock, and leaves a child that outlives it, like a data worker.
HOLDER = """
import os, sys, time
from pathlib import Path
from detection import run_lock
with run_lock.hold(Path(sys.argv[1])):
    if os.fork():
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Process that holds the lock of tmp_path / "run"."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_second_process_is_refused_with_the_holder_and_writes_nothing(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_S", 0.1)
    before = {path: (path.stat().st_mtime_ns, path.read_text()) for path in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError) as caught, run_lock.hold(tmp_path / "run"):
        raise AssertionError("two holders")
    assert f"in use by process {holder.pid} on host {socket.gethostname()}." in str(caught.value)
    assert {path: (path.stat().st_mtime_ns, path.read_text()) for path in (tmp_path / "run").iterdir()} == before


def test_lock_disappears_with_its_holder_and_not_with_its_children(tmp_path, holder):
    holder.kill()
    holder.wait()
    with run_lock.hold(tmp_path / "run"):
        assert (tmp_path / "run" / run_lock.LOCK).read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    with run_lock.hold(tmp_path):
        pass
    assert f"warning: {tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"file/run: cannot be written \(Not a directory\)"),
        run_lock.hold(tmp_path / "file" / "run"),
    ):
        pass
