"""Faults made on purpose: each ends in time, in a message that names rank and cause, and leaves no process behind."""

import os
import re
import signal
import subprocess
import time

import pytest

import processes
from detection import run_dir
from detection.engine.run_logger import slowest

TWO = ("--batch-size", "3", "--log-every", "2", "--checkpoint-every", "1 steps")


def faulty(run, fault, *flags, ranks=2, timeout_s=60, **extra):
    """Status and stderr of a run in which the fault happens; nothing of it is left."""
    process = processes.start(run, *TWO, *flags, ranks=ranks, FAULT=fault, **extra)
    status, _, err = processes.finish(process, timeout_s)
    end = time.monotonic() + 10
    while processes.alive(process.pid):
        assert time.monotonic() < end, "processes are left"
        time.sleep(0.1)
    return status, err


@pytest.mark.parametrize(
    ("kind", "status", "said"), [("kill", 137, "rank 1 ended with SIGKILL"), ("exit", 7, "rank 1 ended with status 7")]
)
def test_a_rank_that_dies_is_named_and_takes_the_others_along(tmp_path, kind, status, said):
    got, err = faulty(tmp_path, f"{kind} 1 6")
    assert got == status
    assert said in err
    assert "Traceback" not in err
    assert run_dir.checkpoints(tmp_path)[-1].step == 6


def test_a_rank_that_hangs_is_ended_with_the_stack_of_every_rank(tmp_path):
    status, err = faulty(tmp_path, "hang 1 6", "--step-timeout-s", "8")
    assert status == 1
    for rank in (0, 1):
        assert f"rank {rank} has made no step for 8 s" in err
    assert re.search(r"dummy_workload.py\", line \d+ in happen", err), "where rank 1 sleeps"
    assert "all_reduce" in err or "backward" in err, "where rank 0 waits"


def test_a_rank_that_sees_nan_is_named(tmp_path):
    status, err = faulty(tmp_path, "nan 1 5")
    assert status == 1
    assert re.search(r"error: The loss is nan at step \d of epoch 2 \(.*\), on rank (0, )?1\.", err)
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """The folder of a run to its end, one of whose two ranks is slow, and what it said."""
    folder = tmp_path_factory.mktemp("slow") / "run"
    status, out, err = processes.run(folder, *TWO, ranks=2, FAULT="slow 1 0")
    assert status == 3, err
    return folder, out


def test_a_slow_rank_is_named_and_the_run_goes_on(slow):
    assert "warning: rank 1 is slow: it works 0.2" in slow[1]


def test_ranks_that_are_about_as_fast_are_not_slow():
    assert slowest([1.0], 1.0) is None
    assert slowest([1.0, 1.2, 1.1, 1.0], 2.0) is None
    assert slowest([0.01, 0.03], 1.0) is None, "three times as long, of a step that takes much longer"
    assert slowest([1.0, 1.0, 1.9, 1.0], 2.0) == 2


def test_a_killed_data_worker_is_told(tmp_path):
    status, err = faulty(tmp_path, "worker", "--num-workers", "1", ranks=0)
    assert status == 1
    assert re.search(r"error: rank 0: DataLoader worker \(pid\(?s?\)? \d+\) .*(killed by signal: Killed|exited)", err)
    assert "--num-workers" in err
    assert "Traceback" not in err


def test_the_launcher_starts_the_ranks_again_and_they_go_on(slow, tmp_path):
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
    assert processes.equal(processes.weights(run), processes.weights(slow[0]))


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_saving_and_not_the_training(small_disk):
    run = small_disk / "run"
    status, out, err = processes.run(run, *TWO, "--num-images", "60", FAULT="")
    assert status == 3, err
    assert "No space left on device" in out + err
    assert re.search(r"warning: no checkpoint was saved after step \d+: ", out)
    assert "ended after epoch 3" in out
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_run_without_shared_memory_says_what_to_do(tmp_path):
    """A container's /dev/shm of 64 KiB, as a mount namespace of its own."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace cannot be made here")
    large = ("--num-images", "3000", "--batch-size", "3000", "--num-workers", "1")
    run = " ".join(processes.command(tmp_path / "run", *large))
    inside = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {run}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside],
        env=processes.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "error: /dev/shm has 0.1 MiB free, and 1 data workers may need 4 MiB" in done.stderr
    assert "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    process = processes.start(tmp_path, "--batch-size", "5", "--step-s", "4")
    processes.wait_for(tmp_path / "result_0.txt", "epoch_start")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    status, _, err = processes.finish(process, timeout_s=3)
    assert status == 130
    assert "Traceback" not in err


def test_bn_groups_divide_the_ranks(tmp_path):
    status, _, err = processes.run(tmp_path, "--bn-group", "3", ranks=2)
    assert status == 2
    assert "error: bn_group 3 does not divide the 2 ranks" in err
