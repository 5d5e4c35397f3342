"""Fingerprint of training: equal for equal code, and different if a weight or a log line differs."""

import json

import pytest

from perf import fingerprint


@pytest.fixture
def one_workload(monkeypatch):
    monkeypatch.setattr(fingerprint, "WORKLOADS", {"ssd300-r34": fingerprint.WORKLOADS["ssd300-r34"]})


@pytest.mark.slow
def test_two_trainings_have_the_same_fingerprint(one_workload, tmp_path, capsys):
    out = tmp_path / "fingerprint.json"
    assert fingerprint.main(["--steps", "2", "--out", str(out)]) == 0
    assert fingerprint.main(["--steps", "2", "--compare", str(out)]) == 0
    assert capsys.readouterr().out.endswith("the same\n")
    (content,) = json.loads(out.read_text()).values()
    assert {"run_start", "run_stop"} <= {key for key, *_ in content["log"]}
    assert len(content["weights"]) == 64


@pytest.mark.parametrize("part", ["weights", "log"])
def test_a_difference_is_named_and_gives_status_1(part, one_workload, tmp_path, monkeypatch, capsys):
    same = {"weights": "a" * 64, "log": [["run_start", None, {}]]}
    monkeypatch.setattr(fingerprint, "train", lambda *_: None)
    monkeypatch.setattr(fingerprint, "hash_weights", lambda _: same["weights"])
    monkeypatch.setattr(fingerprint, "log_lines", lambda _: same["log"])
    (tmp_path / "old.json").write_text(json.dumps({"ssd300-r34": same | {part: "other"}}))
    assert fingerprint.main(["--compare", str(tmp_path / "old.json")]) == 1
    assert f"differs: ssd300-r34: {part}\n" in capsys.readouterr().out
