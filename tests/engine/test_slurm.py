"""run.sub on a real Slurm cluster of two nodes on this machine, with a dummy workload."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import processes
from detection import run_dir
from paths import ROOT, shared

pytestmark = pytest.mark.slurm

CONFIG = """
export DGXNNODES=2
export DGXNGPU=1
export WALLTIME=00:10:00
"""
# Python of the environment: skips preflight, and runs the dummy workload in place of `ssd train`.
PYTHON = """#!/usr/bin/env bash
if [[ $3 == preflight ]]; then printf '%s\\n' "Some Lab" "$RUN_DIR" train 2 && exit; fi
for word in "$@"; do
  [[ $word == train ]] && words[-2]={dummy_workload} && unset "words[-1]" || words+=("$word")
done
exec {python} "${{words[@]}}"
"""
RUN = ("--seed", "5", "--precision", "fp32", "--num-workers", "1", "--batch-size", "4", "--log-every", "1")
REACHED = ("--target", "0.1")  # at the first evaluation, after three steps


class Slurm:
    """Slurm cluster, used from `folder`, which has the scripts."""

    def __init__(self, conf: str, folder: Path):
        self.folder = folder
        self.environment = processes.environment(
            SLURM_CONF=conf,
            DGXSYSTEM="pair",
            VENV="venv",
            LOGDIR=str(folder / "logs"),
            NEXP="2",
            CLEAR_CACHES="0",  # this machine also does other work
            PYTHONPATH=str(ROOT),
        )

    def call(self, *words: str, **extra: str) -> str:
        done = subprocess.run(
            words, env=self.environment | extra, cwd=self.folder, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    def submit(self, *flags: str, **extra: str) -> str:
        """Submit a short run with `./run.sub` and return the job ID."""
        return self.call("./run.sub", *RUN, *flags, **extra).split()[-1]

    def job_field(self, job: str, name: str) -> str:
        match = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "--oneliner", "show", "job", job))
        assert match
        return match[1]

    def wait(self, job: str, *states: str) -> None:
        end = time.monotonic() + 600
        while self.job_field(job, "JobState") not in states:
            assert time.monotonic() < end, self.job_field(job, "JobState")
            time.sleep(0.2)

    def restart(self, job: str) -> None:
        """Start a requeued job after 3 s instead of two minutes."""
        self.wait(job, "PENDING")
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")
        self.wait(job, "RUNNING", "COMPLETED", "FAILED")

    def output(self, job: str) -> str:
        return (self.folder / f"slurm-{job}.out").read_text()

    def run(self, job: str, number: int) -> Path:
        return self.folder / f"logs/pair/ssd/job_{job}/experiment_{number - 1}"

    def log(self, job: str, number: int) -> Path:
        return self.folder / f"logs/job_{job}_{number}.log"


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    """Configuration file of a running Slurm cluster."""
    if os.geteuid() or not (shutil.which("slurmctld") and shutil.which("munged")):
        pytest.skip("Slurm needs root, and Debian's slurm-wlm and munge")
    up, down = shared("tools/slurm_up.sh"), shared("tools/slurm_down.sh")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([up, folder], check=True, stdout=subprocess.DEVNULL)
        yield str(folder / "slurm.conf")
    finally:
        daemons = [int(pid) for file in folder.glob("*.pid") for pid in file.read_text().split()]
        subprocess.run([down, folder], check=True)
        while any(map(is_alive, daemons)):  # the next cluster would mistake them for its own
            time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.fixture
def slurm(conf, tmp_path):
    for script in ("run.sub", "run_and_time.sh", "scripts/lib/resolve_config.sh", "scripts/lib/container_mounts.sh"):
        (tmp_path / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, tmp_path / script)
    (tmp_path / "config_pair.sh").write_text(CONFIG)
    for name, text in (
        ("setup.sh", "#!/bin/sh\n"),
        ("venv/bin/python", PYTHON.format(dummy_workload=processes.DUMMY_WORKLOAD, python=sys.executable)),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    slurm = Slurm(conf, tmp_path)
    yield slurm
    slurm.call("scancel", "--user=root")
    while slurm.call("squeue", "--noheader"):
        time.sleep(0.2)


def results(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("RESULT")]


def test_two_experiments_on_two_nodes_write_two_logs_with_one_result_each(slurm):
    job = slurm.submit(*REACHED)
    slurm.wait(job, "COMPLETED", "FAILED")
    assert slurm.job_field(job, "ExitCode") == "0:0", slurm.output(job)
    assert slurm.job_field(job, "NumNodes") == "2"
    assert slurm.job_field(job, "TimeLimit") == "00:20:00"
    for number in (1, 2):
        log = slurm.log(job, number)
        assert [line.split(",")[4] for line in results(log)] == ["Some Lab"], log.read_text()
        assert log.read_text().count("STARTING TIMING RUN") == 2, "one per node"
        run = slurm.run(job, number)
        assert (run / f"result_{number - 1}.txt").is_file()
        assert len(processes.load_tensors(run)["batch norm"]) == 2, "two ranks"
        assert len(processes.steps(run)) == 3, "of eight images on both ranks"

    # A requeued job has nothing left to do.
    before = slurm.log(job, 1).read_text()
    slurm.call("scontrol", "requeue", job)
    slurm.restart(job)
    slurm.wait(job, "COMPLETED", "FAILED")
    assert slurm.job_field(job, "Restarts") == "1"
    assert "experiment 2 of 2 is already finished, with status 0" in slurm.output(job)
    assert slurm.log(job, 1).read_text() == before


@pytest.mark.parametrize("batch", [["--batch"], []])
def test_signaled_job_saves_and_resumes_to_the_same_weights_after_requeue(slurm, batch):
    job = slurm.submit(*REACHED, "--step-s", "2", REQUEUE="1")
    processes.wait_for(slurm.run(job, 1) / "metrics.jsonl", '"step"', timeout_s=120)
    slurm.call("scancel", "--signal=TERM", *batch, job)
    slurm.wait(job, "PENDING", "COMPLETED", "FAILED")
    assert slurm.job_field(job, "JobState") == "PENDING", slurm.output(job)
    saved = run_dir.list_checkpoints(slurm.run(job, 1))
    assert [checkpoint.step for checkpoint in saved] in ([1], [2])
    assert "stopped by SIGTERM after step" in slurm.log(job, 1).read_text()
    assert "experiment 1 of 2 finished with status 143" in slurm.output(job)
    assert not slurm.log(job, 2).exists()

    slurm.restart(job)
    slurm.wait(job, "COMPLETED", "FAILED")
    assert slurm.job_field(job, "ExitCode") == "0:0", slurm.output(job)
    assert f"resuming from {saved[-1].path}" in slurm.log(job, 1).read_text()
    assert [len(results(slurm.log(job, number))) for number in (1, 2)] == [0, 1], "a resumed run has no RESULT line"
    assert processes.steps(slurm.run(job, 1)) == [0, 1, 2]
    uninterrupted = slurm.folder / "uninterrupted"
    assert processes.run(uninterrupted, *RUN, *REACHED, ranks=2, timeout_s=300)[0] == 0
    assert processes.bit_identical(processes.load_tensors(slurm.run(job, 1)), processes.load_tensors(uninterrupted))


def test_cancelled_job_saves_and_is_not_requeued(slurm):
    job = slurm.submit(*REACHED, "--step-s", "2", REQUEUE="1")
    processes.wait_for(slurm.run(job, 1) / "metrics.jsonl", '"step"', timeout_s=120)
    slurm.call("scancel", job)
    slurm.wait(job, "CANCELLED", "COMPLETING", "PENDING")
    end = time.monotonic() + 40
    while slurm.call("squeue", "--noheader"):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert slurm.job_field(job, "JobState") == "CANCELLED", slurm.output(job)
    assert run_dir.list_checkpoints(slurm.run(job, 1))


def test_next_experiment_runs_after_a_failed_one(slurm):
    job = slurm.submit(*REACHED, FAULT="exit 1 2", FAULT_MARK=str(slurm.folder / "mark"))
    slurm.wait(job, "COMPLETED", "FAILED")
    assert slurm.job_field(job, "ExitCode") == "7:0", slurm.output(job)
    assert [len(results(slurm.log(job, number))) for number in (1, 2)] == [0, 1]
    assert "rank 1 exited with status 7" in slurm.log(job, 1).read_text()


def test_job_with_the_wrong_number_of_nodes_is_rejected(slurm):
    job = slurm.call("sbatch", "--nodes=1", "--parsable", "run.sub").strip()
    slurm.wait(job, "COMPLETED", "FAILED")
    assert slurm.job_field(job, "ExitCode") == "2:0"
    assert re.search(r"error: .* DGXNNODES=2, .* SLURM_JOB_NUM_NODES=1\b", slurm.output(job))
    assert not (slurm.folder / "logs").exists()
