"""N experiments in one run folder, with a stub run_and_time.sh whose runs write an MLPerf log."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detection.engine import experiments
from mlperf.errors import InputError
from paths import ROOT
from synthetic_log import write_run

# STATUSES: exit status of each run. WAIT: number of the run that waits for a signal.
STUB = """#!/usr/bin/env bash
echo "$NEXP $RUN_INDEX ${RUN_DIR#"$PWD/"}${PAGE_CACHE_DROPPED+ [$PAGE_CACHE_DROPPED]} $*" >>calls
log=$RUN_DIR/result_$RUN_INDEX.txt
mkdir -p "$RUN_DIR"
event() {
  printf ':::MLLOG {"time_ms": %s, "event_type": "", "key": "%s", "value": 1, "metadata": {%s}}\\n' "$@" >>"$log"
}
event 1000 run_start ''
echo "output of the run"
if [[ $RUN_INDEX == "${WAIT:-}" && ! -e waits ]]; then
  trap 'ends INT 130' INT
  for name in TERM HUP USR1; do trap "ends $name 143" "$name"; done
  ends() {
    [[ -z ${STUBBORN:-} ]] || { STUBBORN='' && echo "first $1" && return; }
    event 3000 run_stop '"status": "aborted"' && echo "ended by $1" && exit "$2"
  }
  touch waits
  for ((i = 0; i < 600; i++)); do sleep 0.1; done
fi
statuses=(${STATUSES:-})
status=${statuses[RUN_INDEX]:-0}
case $status in
  0) event 2000 epoch_stop '' && event 94000 run_stop '"status": "success", "epoch_num": 1' ;;
  3) event 2000 epoch_stop '' && event 3000 epoch_stop '' &&
    event 9000 run_stop '"status": "aborted", "epoch_num": 2' ;;
  *) event 2500 run_stop '"status": "aborted"' ;;
esac
exit "$status"
"""
COMMAND = [sys.executable, "-m", "detection.engine.experiments"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Folder with the stub, which is the working directory."""
    (tmp_path / "run_and_time.sh").write_text(STUB)
    (tmp_path / "run_and_time.sh").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("NEXP", "RUN_DIR", "RUN_INDEX", "PAGE_CACHE_DROPPED"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run(project, capfd):
    """Run experiments and return status, stdout, stderr and the calls of the stub."""
    handlers = [signal.getsignal(number) for number in experiments.SIGNALS]

    def run(*words, flags=(), folder="a run"):
        (project / "calls").write_text("")
        where = ("--folder", folder) if folder else ("--parent", "logs", "--hint", "RUN_DIR")
        status = experiments.main([*where, *words, "--", "./run_and_time.sh", *flags])
        for number, handler in zip(experiments.SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        out, err = capfd.readouterr()
        return status, out, err, (project / "calls").read_text().splitlines()

    return run


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    """Start experiments that wait for a signal in the third run."""
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *COMMAND, "--nexp", "5", *words, "--", "./run_and_time.sh"],
        env=os.environ | {"WAIT": "2"} | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 30
    while not Path("waits").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return process


def test_experiments_share_a_folder_with_a_folder_and_a_linked_log_each(run, project):
    status, out, err, calls = run("--nexp", "3", flags=["--note", "a b"])
    assert (status, err) == (0, "")
    assert calls == [f"1 {i} a run/experiment_{i} --note a b" for i in range(3)]
    assert (
        "experiment 2 of 3, in a run/experiment_1\noutput of the run\nexperiment 2 of 3 finished with status 0\n" in out
    )
    for i in range(3):
        assert os.readlink(project / f"a run/result_{i}.txt") == f"experiment_{i}/result_{i}.txt"
        assert "run_stop" in (project / f"a run/result_{i}.txt").read_text()


def test_new_folder_is_named_after_the_time_and_never_shared(run, project, monkeypatch):
    run("--nexp", "2", folder=None)
    (folder,) = (project / "logs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    times = iter([folder.name, "2030-01-01_00-00-00"])
    monkeypatch.setattr(experiments.time, "strftime", lambda _: next(times))
    assert experiments.new_folder(project / "logs").name == "2030-01-01_00-00-00"


@pytest.mark.parametrize(
    ("variable", "flags", "seeds"),
    [
        ("", ["--seed", "7", "--log-every", "1"], ["7", "8", "9"]),
        ("5", ["--seed=7"], ["7", "8", "9"]),
        ("11", [], ["11", "12", "13"]),
        ("", [], []),
        ("", ["--seed", "x"], []),
    ],
)
def test_seed_increases_by_one_per_experiment(run, variable, flags, seeds):
    _, out, _, calls = run("--nexp", "3", "--seed", variable, flags=flags)
    assert re.findall(r"--seed (\d+)$", "\n".join(calls), re.MULTILINE) == seeds
    assert ("Seeds: " in out) == bool(seeds)
    if seeds:
        assert f"Seeds: {seeds[0]} to {seeds[-1]}, one per experiment\n" in out


def test_each_experiment_writes_its_own_summary_file(run):
    *_, calls = run("--nexp", "2", flags=["--summary-json", "my speed.json"])
    assert [call.split("--summary-json ")[-1] for call in calls] == ["my speed_0.json", "my speed_1.json"]


def test_one_experiment_keeps_flags_of_a_single_run(run):
    *_, calls = run("--nexp", "1", flags=["--summary-json", "a.json", "--resume", "some.pt"])
    assert calls == ["1 0 a run/experiment_0 --summary-json a.json --resume some.pt"]


def test_others_run_after_a_failed_one_and_the_summary_lists_all(run, monkeypatch):
    monkeypatch.setenv("STATUSES", "0 3 1 137 0")
    status, out, _, calls = run("--nexp", "5", "--hint", "RUN_DIR")
    assert (status, len(calls)) == (3, 5)
    summary = [" ".join(line.split()) for line in out.splitlines()[-6:]]
    assert summary == [
        "experiment status seconds epochs log",
        "1 of 5 0 93 1 a run/result_0.txt",
        "2 of 5 3 8 2 a run/result_1.txt",
        "3 of 5 1 2 0 a run/result_2.txt",
        "4 of 5 137 2 0 a run/result_3.txt",
        "5 of 5 0 93 1 a run/result_4.txt",
    ]


@pytest.mark.parametrize(("minutes", "seconds"), [(20, "1200"), (-30, "-")])
def test_time_of_a_log_whose_clock_was_set_back_is_not_shown(tmp_path, minutes, seconds):
    assert experiments.duration_s(write_run(tmp_path / "log.txt", benchmark="retinanet", minutes=minutes)) == seconds


@pytest.mark.parametrize("status", [2, 125, 143])
def test_bad_configuration_and_a_stopped_run_end_the_series(run, monkeypatch, status):
    monkeypatch.setenv("STATUSES", str(status))
    result, out, _, calls = run("--nexp", "3", "--hint", "DATESTAMP=my run")
    assert (result, len(calls)) == (status, 1)
    assert "\n2 of 3            -        -      -  -\n" in out
    assert out.endswith("To continue: DATESTAMP='my run' NEXP=3 and the same command\n")


def test_finished_experiments_are_skipped_and_crashed_ones_resumed(run, monkeypatch):
    monkeypatch.setenv("STATUSES", "3 1 0")
    run("--nexp", "3")
    monkeypatch.setenv("STATUSES", "")
    status, out, _, calls = run("--nexp", "3", "--seed", "7")
    assert (status, calls) == (3, ["1 1 a run/experiment_1 --seed 8 --resume auto"])
    assert "experiment 1 of 3 is already finished, with status 3" in out
    assert run("--nexp", "3")[3] == []


def test_resume_auto_continues_the_last_unfinished_folder(run, project, monkeypatch):
    (project / "logs/2020-01-01_00-00-00/experiment_0").mkdir(parents=True)
    monkeypatch.setenv("STATUSES", "0 143")
    assert "To continue: RUN_DIR=logs/20" in run("--nexp", "3", folder=None)[1]
    monkeypatch.setenv("STATUSES", "")
    status, _, _, calls = run("--nexp", "3", folder=None, flags=["--resume", "auto"])
    assert (status, [call.split()[1] for call in calls]) == (0, ["1", "2"])
    assert len(list((project / "logs").iterdir())) == 2
    assert len(list((project / "logs").glob("*/result_2.txt"))) == 1


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (["--nexp", "many"], [], "NEXP=many is not a valid number"),
        (["--nexp", "0"], [], "NEXP=0 is not a valid number"),
        (["--nexp", "2"], ["--run-dir", "x"], "--run-dir x: each experiment has its own folder"),
        (["--nexp", "2"], ["--run-index=3"], "--run-index 3: each experiment has its own folder"),
        (["--nexp", "2"], ["--resume", "some.pt"], "--resume some.pt: names one experiment, but NEXP=2"),
        (["--nexp", "2"], ["--seed", "4294967295"], "seed 4294967295: NEXP=2 experiments use consecutive seeds"),
    ],
)
def test_mistakes_give_one_message_and_start_nothing(run, words, flags, message):
    status, out, err, calls = run(*words, flags=flags)
    assert (status, out, calls) == (2, "", [])
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_single_run_is_not_overwritten_and_nodes_need_a_common_folder(run, project):
    (project / "a run").mkdir()
    (project / "a run/result_3.txt").write_text("precious")
    status, _, err, calls = run("--nexp", "5")
    assert (status, calls) == (2, [])
    assert "a run contains the log of a single run, result_3.txt" in err
    status, _, err, calls = run("--nexp", "5", "--nodes", "2", folder=None)
    assert (status, calls) == (2, [])
    assert err.startswith("error: NEXP=5 on DGXNNODES=2 nodes: set the same RUN_DIR on all of them")


def test_dry_run_prints_folder_and_seeds(project):
    words = ["--nexp", "5", "--folder", "x", "--dry-run", "--", "./run_and_time.sh", "--seed", "7"]
    out = subprocess.run([*COMMAND, *words], check=True, capture_output=True, text=True).stdout
    assert out.startswith("Seeds: 7 to 11, one per experiment\nrun folder of the NEXP=5 experiments: x\n")
    assert (project / "calls").read_text() == "1 0 x/experiment_0 --seed 7 --seed 7 --dry-run\n"


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "USR1"])
def test_signal_stops_the_run_and_the_same_command_resumes_there(run, project, name):
    process = start("--folder", "a run", "--hint", "RUN_DIR")
    process.send_signal(signal.Signals[f"SIG{name}"])
    out, _ = process.communicate(timeout=30)
    assert process.returncode == (130 if name == "INT" else 143)
    assert f"SIG{name}: stopping the run, no other experiment starts\n" in out
    assert f"ended by {name}\n" in out
    assert "To continue: RUN_DIR='a run' NEXP=5 and the same command" in out
    assert "4 of 5            -        -      -  -" in out
    status, _, _, calls = run("--nexp", "5")
    assert (status, [call.split()[1] for call in calls]) == (0, ["2", "3", "4"])
    assert "--resume auto" in calls[0]


def test_only_a_repeated_signal_is_forwarded_again(project):
    process = start("--folder", "a run", STUBBORN="1")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # a duplicate
    time.sleep(experiments.DUPLICATE_S)
    process.send_signal(signal.SIGUSR1)  # another one of the scheduler
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert (out.count("first TERM"), out.count("ended by TERM"), out.count("stopping the run")) == (1, 1, 1)


def test_output_goes_to_a_log_per_experiment(run, project):
    Path("old_1.log").write_text("earlier\n")
    _, out, _, calls = run("--nexp", "2", "--log", "old", "--page-cache", "keep", "--folder-in-job", "/inside")
    assert Path("old_1.log").read_text() == "earlier\noutput of the run\n"
    assert "output of the run" not in out
    assert calls[0].strip() == "1 0 /inside/experiment_0 [0]"


def test_full_disk_and_a_reader_that_is_gone_end_no_experiment(project):
    Path("old_1.log").symlink_to("/dev/full")
    words = ["--nexp", "2", "--folder", "a run", "--log", "old", "--tee", "--", "./run_and_time.sh"]
    shell = ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash", *COMMAND, *words]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len((project / "calls").read_text().splitlines()) == 2
    assert Path("old_2.log").read_text() == "output of the run\n"


def test_log_that_cannot_be_written_is_named(run):
    Path("old_1.log").symlink_to("/dev/full")
    status, out, _, _ = run("--nexp", "1", "--log", "old")
    assert status == 0
    assert "warning: old_1.log: No space left on device. Output is missing from it\n" in out


def test_run_ends_when_the_series_is_killed(project):
    process = start("--folder", "a run")
    process.kill()
    process.communicate()
    end = time.monotonic() + 20
    while "aborted" not in Path("a run/experiment_2/result_2.txt").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_second_series_in_a_folder_is_refused_and_writes_nothing(project):
    process = start("--folder", "a run")
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    words = ["--nexp", "5", "--folder", "a run", "--log", "old", "--fresh-logs", "--", "./run_and_time.sh"]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: run folder a run: in use by process {process.pid} on host ")
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before
    process.terminate()
    process.communicate()


def test_page_cache_is_dropped_on_each_node_before_each_experiment(run, project, capfd):
    for result in ("true", "false"):
        Path("node").write_text(f'#!/bin/sh\necho "$*" >>nodes\n{result}\n')
        Path("node").chmod(0o755)
        _, out, _, calls = run("--nexp", "2", "--page-cache", "drop", "--per-node", "./node 'a b'", folder=result)
        assert [re.findall(r"\[.\]", call) for call in calls] == [["[1]" if result == "true" else "[0]"]] * 2
        assert ("could not drop the page cache" in out) == (result == "false")
    assert Path("nodes").read_text().count("a b bash -c sync && ") == 4


@pytest.mark.parametrize(
    ("walltime", "minutes"), [("00:20:30", 63), ("2-01:00:00", 3 * 49 * 60), ("100:00:00", 18000), ("00:10:00", 30)]
)
def test_walltime_of_three_experiments(walltime, minutes):
    assert experiments.total_minutes(walltime, 3) == minutes


@pytest.mark.parametrize("walltime", ["soon", "", "10:00", "1-2", "00:1:00"])
def test_invalid_walltime_is_rejected(walltime):
    with pytest.raises(InputError, match=f"^WALLTIME={walltime}: "):
        experiments.total_minutes(walltime, 3)


def test_log_of_a_resumed_run_is_recognized(tmp_path):
    log = tmp_path / "result_0.txt"
    event = ':::MLLOG {"time_ms": 1, "event_type": "POINT_IN_TIME", "key": "KEY", "value": null, "metadata": {}}\n'
    assert experiments.main(["--is-resumed", str(log)]) == 1
    log.write_text(event.replace("KEY", "seed") + ":::MLLOG {broken\n")
    assert experiments.main(["--is-resumed", str(log)]) == 1
    log.write_text(log.read_text() + event.replace("KEY", "resumed"))
    assert experiments.main(["--is-resumed", str(log)]) == 0


@pytest.mark.parametrize(
    "path",
    [
        "detection/engine/experiments.py",
        "detection/run_lock.py",
        "detection/runtime/parent_process.py",
        "mlperf/errors.py",
        "mlperf/log.py",
        "mlperf/stdio.py",
    ],
)
def test_module_needs_no_new_python(path):
    ast.parse((ROOT / path).read_text(), feature_version=(3, 8))


def test_module_needs_no_packages_and_starts_at_once(project):
    words = [sys.executable, "-I", "-S", "-X", "importtime", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"]
    words[-1] += "import detection.engine.experiments; print(len(sys.modules))"
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150, "about 110: packages such as torch add hundreds"
