"""Injected faults: each ends in time, names rank and cause, and leaves no process behind."""

import os
import re
import signal
import socket
import subprocess
import time

import pytest

import processes
from detection import run_dir
from detection.engine.run_logger import find_straggler
from forked import Forked

TWO = ("--batch-size", "3", "--log-every", "2", "--checkpoint-every", "1 steps")


def run_with_fault(run, fault, *flags, ranks=2, timeout_s=180, **extra):
    """Return status and stderr of a run with a fault, once all its processes have exited."""
    process = processes.start(run, *TWO, *flags, ranks=ranks, FAULT=fault, **extra)
    status, _, err = processes.finish(process, timeout_s)
    end = time.monotonic() + 60
    while processes.alive(process.pid):
        assert time.monotonic() < end, "processes are left"
        time.sleep(0.1)
    return status, err


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [("kill", 137, "rank 1 was killed by SIGKILL"), ("exit", 7, "rank 1 exited with status 7")],
)
def test_dead_rank_is_named_and_ends_the_run(tmp_path, kind, status, message):
    actual, err = run_with_fault(tmp_path, f"{kind} 1 6")
    assert actual == status
    assert message in err
    assert "Traceback" not in err
    assert run_dir.list_checkpoints(tmp_path)[-1].step == 6


def test_hung_rank_ends_the_run_with_all_stack_traces(tmp_path):
    status, err = run_with_fault(tmp_path, "hang 1 6", "--step-timeout-s", "8")
    assert status == 1
    for rank in (0, 1):
        assert f"rank {rank} completed no step within 8 s" in err
    assert re.search(r"dummy_workload.py\", line \d+ in inject", err), "where rank 1 sleeps"
    assert "all_reduce" in err or "backward" in err, "where rank 0 waits"


def test_non_finite_loss_names_the_rank(tmp_path):
    status, err = run_with_fault(tmp_path, "nan 1 5")
    assert status == 1
    assert re.search(r"error: non-finite loss: nan at step \d of epoch 2 \(.*\), on rank (0, )?1\.", err)
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def straggler_run(tmp_path_factory):
    """Folder and stdout of a complete run with one straggler of two ranks."""
    folder = tmp_path_factory.mktemp("slow") / "run"
    status, out, err = processes.run(folder, *TWO, ranks=2, FAULT="slow 1 0")
    assert status == 3, err
    return folder, out


def test_straggler_is_named_and_the_run_continues(straggler_run):
    assert "warning: rank 1 is a straggler: 0.2" in straggler_run[1]


def test_similar_ranks_are_not_stragglers():
    assert find_straggler([1.0], 1.0) is None
    assert find_straggler([1.0, 1.2, 1.1, 1.0], 2.0) is None
    assert find_straggler([0.01, 0.03], 1.0) is None, "three times as long, but a small part of the step"
    assert find_straggler([1.0, 1.0, 1.9, 1.0], 2.0) == 2


def test_killed_data_worker_is_reported(tmp_path):
    status, err = run_with_fault(tmp_path, "worker", "--num-workers", "1", ranks=0)
    assert status == 1
    assert re.search(r"error: rank 0: DataLoader worker \(pid\(?s?\)? \d+\) .*(killed by signal: Killed|exited)", err)
    assert "--num-workers" in err
    assert "Traceback" not in err


def test_launcher_restarts_the_ranks_and_they_resume(straggler_run, tmp_path):
    run = tmp_path / "run"
    process = processes.start(
        run,
        *TWO,
        "--resume",
        "auto",
        ranks=2,
        launch=("--max-restarts", "1"),
        FAULT="kill 1 6",
        FAULT_MARK=str(tmp_path / "mark"),
    )
    status, out, _ = processes.finish(process)
    assert "resuming from" in out
    assert "ended after epoch 3" in out
    assert status in (2, 3)
    assert processes.bit_identical(processes.load_tensors(run), processes.load_tensors(straggler_run[0]))


@pytest.fixture
def small_disk(tmp_path):
    """Folder on a file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_skips_checkpoints_and_training_continues(small_disk):
    run = small_disk / "run"
    status, out, err = processes.run(run, *TWO, "--num-images", "60", FAULT="")
    assert status == 3, err
    assert "No space left on device" in out + err
    assert re.search(r"warning: checkpoint after step \d+ not saved: ", out)
    assert "ended after epoch 3" in out
    assert not list((run / "checkpoints").glob("*.partial"))


def test_run_with_a_full_disk_for_its_output_and_a_long_tmpdir_is_complete(tmp_path):
    """A worker passes batches through a socket in TMPDIR, whose path has at most 107 bytes."""
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    command = processes.command(tmp_path / "run", *TWO, "--num-workers", "1")
    process = Forked(command[1:], processes.environment(TMPDIR=str(folder)), out="/dev/full", err="/dev/full")
    assert processes.finish(process)[0] == 3
    assert len(processes.steps(tmp_path / "run")) == 12
    assert run_dir.list_checkpoints(tmp_path / "run")


def test_ranks_save_and_end_when_their_launcher_is_killed(tmp_path):
    process = processes.start(tmp_path, *TWO, "--step-s", "0.1", "--epochs", "900", ranks=2)
    processes.wait_for(tmp_path / "metrics.jsonl", '"step"')
    process.send_signal(signal.SIGKILL)
    processes.wait_for(tmp_path / "result_0.txt", '"run_stop"')
    assert run_dir.list_checkpoints(tmp_path)


def test_second_run_in_a_folder_is_refused_and_writes_nothing(tmp_path):
    first = processes.start(tmp_path, *TWO, "--step-s", "0.1", "--epochs", "900")
    processes.wait_for(tmp_path / "metrics.jsonl", '"step"')
    config = (tmp_path / "config.json").read_bytes()
    status, out, err = processes.run(tmp_path, *TWO, "--resume", "auto", "--epochs", "9")
    assert (status, out) == (2, "")
    assert err.startswith(
        f"error: run folder {tmp_path}: in use by process {first.pid} on host {socket.gethostname()}."
    )
    assert (tmp_path / "config.json").read_bytes() == config
    first.terminate()
    processes.finish(first)


def test_missing_shared_memory_is_reported_with_a_fix(tmp_path):
    """Run in a mount namespace with a /dev/shm of 64 KiB, as in a container."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot create a mount namespace")
    large = ("--num-images", "3000", "--batch-size", "3000", "--num-workers", "1")
    run = " ".join(processes.command(tmp_path / "run", *large))
    inside = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {run}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside],
        env=processes.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2
    assert "error: /dev/shm: 0.1 MiB free, but 1 data workers may need 4 MiB" in done.stderr
    assert "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr


def test_second_signal_ends_the_run_immediately(tmp_path):
    process = processes.start(tmp_path, "--batch-size", "5", "--step-s", "4")
    processes.wait_for(tmp_path / "result_0.txt", "epoch_start")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    status, _, err = processes.finish(process, timeout_s=3)
    assert status == 130
    assert "Traceback" not in err


def test_bn_group_must_divide_the_ranks(tmp_path):
    status, _, err = processes.run(tmp_path, "--bn-group", "3", ranks=2)
    assert status == 2
    assert "error: --bn-group 3: does not divide the 2 ranks" in err
