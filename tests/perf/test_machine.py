"""Commit and load of the machine, and the folders that results may go to."""

import json
import subprocess
import sys
import time

import pytest

from detection.config.settings import InputError
from git_repository import git
from perf import machine, record
from perf.machine import LoadMeter, select_out, source_commit


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    for folder in ("docs", "perf/results", "ssd"):
        (root / folder).mkdir(parents=True)
        (root / folder / "file").write_text("1")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "-c", "user.name=n", "-c", "user.email=e@localhost", "commit", "-qm", "subject")
    return root


@pytest.mark.parametrize(
    ("path", "is_dirty"), [("ssd/file", True), ("ssd/new", True), ("docs/file", False), ("perf/results/new", False)]
)
def test_commit_is_dirty_if_code_differs(repository, path, is_dirty):
    head = git(repository, "rev-parse", "--short", "HEAD")
    assert source_commit(repository) == head
    (repository / path).write_text("2")
    assert source_commit(repository) == (f"{head}-dirty" if is_dirty else head)


def test_commit_is_unknown_outside_a_repository(tmp_path):
    assert source_commit(tmp_path) == "unknown"


@pytest.mark.parametrize("commit", ["abc1234-dirty", "unknown"])
def test_results_of_uncommitted_code_stay_out_of_the_repository(repository, commit, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", repository)
    results = repository / "perf" / "results"
    assert select_out(None, results, "abc1234") == results
    for out in (None, results / "x.json", repository / "other"):
        with pytest.raises(InputError, match=r"not reproducible\. Commit all files"):
            select_out(out, results, commit)
    assert select_out(repository.parent, results, commit) == repository.parent
    assert not select_out(None, results, commit, allow_dirty=True).is_relative_to(repository)
    assert select_out(repository / "other", results, commit, allow_dirty=True) == repository / "other"
    with pytest.raises(InputError):
        select_out(results / "x.json", results, commit, allow_dirty=True)


def test_load_is_that_of_processes_which_are_not_measured():
    meter = LoadMeter()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinner:
        time.sleep(1)
        load = meter.read()
        spinner.kill()
    assert load["other_cpu_percent"] > 20
    assert not load["is_idle"]
    assert load["load_1min"] >= 0
    # Once a child has ended, its CPU time is that of the measured program.
    assert meter.read()["other_cpu_percent"] < load["other_cpu_percent"]


def write_run(folder, dirty):
    keys = ("init_start", "init_stop", "run_start", "epoch_start", "epoch_stop", "eval_accuracy", "run_stop")
    values = {"eval_accuracy": 0.23}
    metadata = {"eval_accuracy": {"epoch_num": 1}, "run_stop": {"status": "success"}}
    events = [("commit", "abc1234", {"dirty": dirty}), ("train_samples", 40, {})]
    events += [(key, values.get(key), metadata.get(key, {})) for key in keys]
    lines = [
        {"namespace": "", "time_ms": 1000 * i, "event_type": "POINT_IN_TIME", "key": k, "value": v, "metadata": m}
        for i, (k, v, m) in enumerate(events)
    ]
    folder.mkdir()
    (folder / "result_0.txt").write_text("".join(f":::MLLOG {json.dumps(line)}\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"data_dir": "/secret/toy"}))
    (folder / "metrics.jsonl").write_text('{"data_dir": "/secret/toy"}\n')


def test_record_contains_files_and_summary_without_paths(tmp_path, capsys):
    write_run(tmp_path / "run", dirty=False)
    assert record.main([str(tmp_path / "run"), "toy", "--note", "n"], tmp_path / "results") == 0
    (folder,) = (tmp_path / "results").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["commit"], summary["status"], summary["ap_by_epoch"]) == ("abc1234", "success", {"1": 0.23})
    assert summary["epoch_s"] == {"n": 1, "min": 1.0, "median": 1.0, "max": 1.0}
    assert summary["images_per_s_median"] == 40
    assert not any("/secret" in path.read_text() for path in folder.iterdir())


def test_run_of_uncommitted_code_is_not_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    write_run(tmp_path / "run", dirty=True)
    assert record.main([str(tmp_path / "run"), "toy"], tmp_path / "results") == 2
    assert "abc1234-dirty are not reproducible" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
