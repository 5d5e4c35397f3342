"""Commit of the program: from its repository or a fallback, in the log of a run and in its record."""

import pytest

from detection import git_state
from detection.config.settings import InputError
from detection.git_state import GitState
from git_repository import git
from mlperf.log import MlperfLog, read
from ssd.config import load
from synthetic_log import write_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "program"
    root.mkdir()
    (root / "a.py").write_text("1\n")
    git(root, "init", "-q")
    git(root, "add", "a.py")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "One file")
    return root


def test_a_repository_reports_its_commit_and_dirty_files(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert git_state.read(root=repository) == GitState(head, False)
    assert git_state.read(COMMIT, root=repository) == GitState(head, False)
    (repository / "config_mine.sh").write_text("new\n")
    assert git_state.read(root=repository) == GitState(head, True)
    (repository / "config_mine.sh").unlink()
    (repository / "a.py").write_text("2\n")
    assert git_state.read(root=repository) == GitState(head, True)


def test_without_a_repository_the_commit_is_the_fallback_or_unknown(tmp_path):
    assert git_state.read(root=tmp_path) == GitState("unknown", None)
    assert git_state.read(COMMIT, root=tmp_path) == GitState(COMMIT, False)
    assert git_state.read(f"{COMMIT}-dirty", root=tmp_path) == GitState(COMMIT, True)


def test_an_enclosing_repository_is_ignored(repository):
    inside = repository / "inside"
    inside.mkdir()
    assert git_state.read(root=inside) == GitState("unknown", None)


def test_without_git_the_commit_is_unknown(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    assert git_state.read(root=repository) == GitState("unknown", None)


def test_a_run_without_a_repository_logs_the_commit_of_the_environment(tmp_path, monkeypatch):
    from detection.engine import entrypoint

    monkeypatch.setattr(git_state.read, "__defaults__", ("", tmp_path))
    config = load([], {"DETECTION_SOURCE_COMMIT": f"{COMMIT}-dirty"}).config
    with MlperfLog(tmp_path / "log.txt") as log:
        entrypoint.log_submission(log, config, num_nodes=1)
    (commit_event,) = (event for event in read(tmp_path / "log.txt") if event.key == "commit")
    assert (commit_event.value, commit_event.metadata["dirty"]) == (COMMIT, True)


def test_an_invalid_commit_is_rejected():
    with pytest.raises(InputError, match="DETECTION_SOURCE_COMMIT=main"):
        load([], {"DETECTION_SOURCE_COMMIT": "main"})


def test_a_record_contains_the_commit_of_its_run(tmp_path):
    from perf.record import summarize

    logged = write_run(tmp_path / "a.txt", commit={"value": COMMIT, "dirty": True})
    assert summarize(logged)["commit"] == f"{COMMIT}-dirty"
    with pytest.raises(InputError, match="names no commit"):
        summarize(write_run(tmp_path / "b.txt"))
    with pytest.raises(InputError, match="the clock was set back"):
        summarize(write_run(tmp_path / "c.txt", commit={"value": COMMIT, "dirty": False}, minutes=-30))
