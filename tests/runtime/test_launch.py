import os
import signal
import time
from pathlib import Path

import pytest

from detection.runtime import launch
from forked import Forked
from paths import ROOT

# Rank that writes its process ID, then exits with the argument of its number or waits for termination.
RANK = """
import os, sys, time
rank = int(os.environ["RANK"])
open(f"pid_{rank}", "w").write(f"{os.getpid()} {os.environ['WORLD_SIZE']} {sys.argv[1:]}")
open("starts", "a").write("x")
end = sys.argv[1:][rank]
if end.startswith("-"):
    os.kill(os.getpid(), int(end[1:]))
if end == "wait":
    time.sleep(300)
sys.exit(int(end))
"""


def start(folder: Path, *ends: str, ranks: int | None = None, restarts: int = 0, **extra: str) -> Forked:
    (folder / "rank.py").write_text(RANK)
    flags = ["--nnodes", "1", "--nproc-per-node", str(ranks or len(ends)), "--max-restarts", str(restarts)]
    words = ["-m", "detection.runtime.launch", *flags, "-m", "rank", *ends]
    return Forked(words, environment(folder) | extra, folder)


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", "NEW_INTERPRETERS": "1"}


def result(folder: Path, *ends: str, **extra: str) -> tuple[int, str]:
    process = start(folder, *ends, **extra)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_successful_run_exits_with_0_and_prints_nothing(tmp_path):
    assert result(tmp_path, "0", "0") == (0, "")
    assert (tmp_path / "pid_1").read_text().endswith("2 ['0', '0']")


def test_a_run_exits_with_the_status_of_the_failed_rank(tmp_path):
    assert result(tmp_path, "wait", "7") == (7, "error: rank 1 exited with status 7\n")


def test_status_3_prints_no_error(tmp_path):
    assert result(tmp_path, "3") == (3, "")


@pytest.mark.parametrize(("end", "starts"), [("3", 1), ("2", 1), ("7", 2)])
def test_only_a_crashed_rank_restarts(tmp_path, end, starts):
    process = start(tmp_path, end, restarts=1)
    process.communicate(timeout=60)
    assert process.returncode == int(end)
    assert len((tmp_path / "starts").read_text()) == starts


def test_a_killed_rank_is_reported_with_its_signal(tmp_path):
    status, stderr = result(tmp_path, "wait", "-9")
    assert status == 128 + signal.SIGKILL
    assert stderr == "error: rank 1 was killed by SIGKILL (out of memory?)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_ranks(tmp_path, number):
    process = start(tmp_path, "wait", "wait")
    files = [tmp_path / "pid_0", tmp_path / "pid_1"]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"error: stopped by {number.name}" in stderr
    assert not any(alive(int(file.read_text().split()[0])) for file in files)


def test_variables_of_a_scheduler_do_not_reach_torchrun(tmp_path):
    variables = {"PET_RDZV_ENDPOINT": "nowhere:1", "PET_MAX_RESTARTS": "many", "PET_NPROC_PER_NODE": "3"}
    variables |= {"TORCHELASTIC_RESTART_COUNT": "many", "LOGLEVEL": "chatty", "RANK": "7", "WORLD_SIZE": "9"}
    assert result(tmp_path, "0", "0", **variables) == (0, "")
    assert (tmp_path / "pid_1").read_text().endswith("2 ['0', '0']")


# A script that starts the launcher, as run_and_time.sh does.
SCRIPT = """
import os, runpy, sys, time
if os.fork():
    time.sleep(300)
os.environ["LAUNCHER_PID"] = str(os.getppid())
sys.argv = sys.argv[1:]
runpy.run_module("detection.runtime.launch", run_name="__main__", alter_sys=True)
"""


def test_launcher_and_ranks_end_when_the_script_is_killed(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["script.py", "launch", "--nproc-per-node", "1", "-m", "rank", "wait"]
    script = Forked(words, environment(tmp_path), tmp_path)
    pid = tmp_path / "pid_0"
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(signal.SIGKILL)
    while alive(int(pid.read_text().split()[0])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.communicate(timeout=60)


def test_an_invalid_number_of_ranks_is_rejected(capsys, monkeypatch):
    monkeypatch.setattr(launch.logging, "disable", lambda level: None)  # other tests use this process, too
    assert launch.main(["--nnodes", "1", "--nproc-per-node", "many", "-m", "rank"]) == 2
    assert "many" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("exitcodes", "cause"),
    [
        ({0: 1, 1: -9}, 1),  # the peer of rank 0 disconnected
        ({0: 1, 1: 2}, 1),
        ({0: -15, 1: 1}, 1),  # the launcher terminated rank 0
        ({0: 143, 1: 1}, 1),
        ({0: 3, 1: 3}, 0),
    ],
)
def test_the_root_cause_is_distinguished_from_its_consequences(exitcodes, cause):
    failures = {rank: launch.ProcessFailure(rank, 1, code, "") for rank, code in exitcodes.items()}
    for failure in failures.values():
        failure.timestamp = 0
    assert launch._root_cause(failures)[0] == cause


def test_the_earliest_failure_is_the_root_cause():
    failures = {rank: launch.ProcessFailure(rank, 1, 5, "") for rank in (0, 1)}
    failures[0].timestamp, failures[1].timestamp = 2, 1
    assert launch._root_cause(failures)[0] == 1
