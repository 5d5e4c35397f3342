"""The commit of the program: from its repository, or named where it has none; in a run's log and in its record."""

import pytest

from detection import git_state
from detection.config.settings import InputError
from detection.git_state import Source
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


def test_a_repository_names_its_commit_and_says_when_files_differ_or_are_new(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert git_state.read(root=repository) == Source(head, False)
    assert git_state.read(COMMIT, root=repository) == Source(head, False)
    (repository / "config_mine.sh").write_text("new\n")
    assert git_state.read(root=repository) == Source(head, True)
    (repository / "config_mine.sh").unlink()
    (repository / "a.py").write_text("2\n")
    assert git_state.read(root=repository) == Source(head, True)


def test_without_a_repository_the_commit_is_the_named_one_or_unknown(tmp_path):
    assert git_state.read(root=tmp_path) == Source("unknown", None)
    assert git_state.read(COMMIT, root=tmp_path) == Source(COMMIT, False)
    assert git_state.read(f"{COMMIT}-dirty", root=tmp_path) == Source(COMMIT, True)


def test_a_repository_that_the_program_merely_lies_in_is_not_its_own(repository):
    inside = repository / "inside"
    inside.mkdir()
    assert git_state.read(root=inside) == Source("unknown", None)


def test_a_machine_without_git_has_an_unknown_commit(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    assert git_state.read(root=repository) == Source("unknown", None)


def test_a_run_logs_the_commit_named_in_the_environment_where_there_is_no_repository(tmp_path, monkeypatch):
    from detection.engine import entrypoint

    monkeypatch.setattr(git_state.read, "__defaults__", ("", tmp_path))
    config = load([], {"DETECTION_SOURCE_COMMIT": f"{COMMIT}-dirty"}).config
    with MlperfLog(tmp_path / "log.txt", echo=False) as log:
        entrypoint.log_submission(log, config, num_nodes=1)
    (point,) = (event for event in read(tmp_path / "log.txt") if event.key == "commit")
    assert (point.value, point.metadata["dirty"]) == (COMMIT, True)


def test_a_commit_that_is_none_is_refused():
    with pytest.raises(InputError, match="DETECTION_SOURCE_COMMIT=main"):
        load([], {"DETECTION_SOURCE_COMMIT": "main"})


def test_a_record_has_the_commit_of_the_run_and_not_of_the_day_it_is_recorded(tmp_path):
    from perf.record import outcome

    logged = write_run(tmp_path / "a.txt", commit={"value": COMMIT, "dirty": True})
    assert outcome(logged)["commit"] == f"{COMMIT}-dirty"
    assert "commit" not in outcome(write_run(tmp_path / "b.txt"))
