"""Commands of docs/RECOVERY.md, run with the real script and a dummy workload, and the tests that it names."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import processes
from detection import run_dir
from paths import ROOT

PAGE = (ROOT / "docs/RECOVERY.md").read_text()
COMMANDS = re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)
# Python of the environment: skips preflight, and runs the dummy workload in place of `ssd train`.
PYTHON = """#!/usr/bin/env bash
if [[ $3 == preflight ]]; then printf '%s\\n' "Some Lab" "$RUN_DIR" train 2 && exit; fi
for word in "$@"; do
  [[ $word == train ]] && words[-2]={dummy_workload} && unset "words[-1]" || words+=("$word")
done
exec {python} "${{words[@]}}"
"""


@pytest.fixture
def project(tmp_path):
    """Folder with the scripts, and an environment whose python runs the dummy workload."""
    for script in ("run_and_time.sh", "scripts/lib/resolve_config.sh"):
        (tmp_path / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, tmp_path / script)
    (tmp_path / "config_toy.sh").write_text("export DGXNNODES=1 DGXNGPU=1\n")
    for name, text in (
        ("setup.sh", "#!/bin/sh\n"),
        ("venv/bin/python", PYTHON.format(dummy_workload=processes.DUMMY_WORKLOAD, python=sys.executable)),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def page(word: str) -> str:
    """Return the command with a word, adapted to a run of nine steps."""
    (command,) = (command for command in COMMANDS if word in command)
    return command.replace("500 steps", "1 steps").replace("--step-timeout-s 120", "--step-timeout-s 5")


def start(project: Path, command: str, **extra: str) -> subprocess.Popen[str]:
    settings = {"BATCH_SIZE": "8", "NUM_WORKERS": "0", "PRECISION": "fp32", "SEED": "5"}
    unset = ("DGXNGPU", "DGXSYSTEM", "NEXP", "RUN_INDEX", "MAX_RESTARTS", "RUN_DIR", "LOGDIR")
    environment = processes.environment(
        VENV="venv",
        CLEAR_CACHES="0",
        PYTHONPATH=str(ROOT),
        **{f"DUMMY_{name}": value for name, value in settings.items()},
        **extra,
    )
    return subprocess.Popen(
        ["bash", "-c", f"exec env {command}"],
        cwd=project,
        env={name: value for name, value in environment.items() if name not in unset},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_every_command_on_the_page_is_tested():
    assert len(COMMANDS) == 6
    words = ("=results/mine ./run_and_time.sh --checkpoint-every", "kill -TERM", "--resume auto", "NAME.pt")
    for word in (*words[:2], "results/mine ./run_and_time.sh --resume", words[3], "MAX_RESTARTS", "--step-timeout-s"):
        assert page(word)


@pytest.mark.parametrize("name", re.findall(r"`(test_\w+\.py::test_\w+)`", PAGE))
def test_tests_named_on_the_page_exist(name):
    file, function = name.split("::")
    (path,) = (ROOT / "tests").rglob(file)
    assert f"\ndef {function}(" in path.read_text()


@pytest.mark.slow
def test_terminated_run_resumes_by_the_commands_on_the_page(project):
    mine = project / "results/mine"
    process = start(project, page("results/mine ./run_and_time.sh --checkpoint-every"), DUMMY_STEP_S="0.3")
    processes.wait_for(mine / "result_0.txt", "run_start")
    subprocess.run(["bash", "-c", page("kill").replace("PID", str(process.pid))], check=True)
    status, out, err = processes.finish(process)
    assert status == 143, err
    assert "SIGTERM: stopping the run" in err
    assert "RESULT" not in out
    first = run_dir.list_checkpoints(mine)[-1]
    assert 0 < first.step < 9
    assert {"result_0.txt", "metrics.jsonl", "config.json", "checkpoints"} <= {path.name for path in mine.iterdir()}

    copy = project / "kept.pt"
    shutil.copy(first.path, copy)
    status, out, _ = processes.finish(start(project, page("results/mine ./run_and_time.sh --resume")))
    assert status == 3, "the dummy workload never reaches its target"
    assert f"resuming from results/mine/checkpoints/{first.path.name}" in out
    assert run_dir.list_checkpoints(mine)[-1].step == 9

    os.replace(copy, mine / "checkpoints" / first.path.name)
    elsewhere = page("NAME.pt").replace("NAME.pt", first.path.name)
    status, _, err = processes.finish(start(project, elsewhere))
    assert status == 3, err
    assert '"key": "resumed"' in (project / "results/other/result_0.txt").read_text()


@pytest.mark.slow
def test_dead_ranks_restart_by_the_command_on_the_page(project):
    mark = project / "mark"
    process = start(project, page("MAX_RESTARTS"), FAULT="exit 0 4", FAULT_MARK=str(mark))
    status, out, err = processes.finish(process)
    assert status == 3, err
    assert mark.exists(), "the rank died"
    assert "resuming from results/restarts/checkpoints/" in out
    assert run_dir.list_checkpoints(project / "results/restarts")[-1].step == 9


@pytest.mark.slow
def test_hang_ends_by_the_command_on_the_page(project):
    status, _, err = processes.finish(start(project, page("--step-timeout-s"), FAULT="hang 0 4"))
    assert status == 1
    assert "rank 0 completed no step within 5 s" in err


@pytest.mark.slow
def test_series_terminated_in_its_second_run_resumes_there(project):
    series = project / "results/two"
    command = "RUN_DIR=results/two NEXP=2 ./run_and_time.sh --seed 7"
    process = start(project, command, DUMMY_STEP_S="0.3")
    processes.wait_for(series / "experiment_1/metrics.jsonl", "run_start")
    first = (series / "result_0.txt").read_text()
    process.terminate()
    status, out, err = processes.finish(process)
    assert status == 3, "status of the first run, which failed first"
    assert "SIGTERM: stopping the run" in err
    assert "To continue: RUN_DIR=results/two NEXP=2" in out

    status, out, _ = processes.finish(start(project, command))
    assert status == 3
    assert "experiment 1 of 2 is already finished, with status 3" in out
    assert "resuming from results/two/experiment_1/checkpoints/" in out
    assert (series / "result_0.txt").read_text() == first
    for number in (0, 1):
        assert f'"key": "seed", "value": {7 + number},' in (series / f"result_{number}.txt").read_text()
        assert run_dir.list_checkpoints(series / f"experiment_{number}")[-1].step == 9
