import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from mlperf.check import check, main
from mlperf.rules import BENCHMARKS, DIVISIONS, RULESETS
from paths import SHARED
from synthetic_log import write_run

SHARED_LOGS = SHARED / "logs"


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("ruleset", RULESETS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_official_checker_accepts_a_whole_run(tmp_path: Path, benchmark: str, ruleset: str, division: str) -> None:
    verdict = check(write_run(tmp_path / "log.txt", division, benchmark=benchmark), ruleset)
    assert (verdict.passed, verdict.ruleset, verdict.messages) == (True, ruleset, [])


@pytest.mark.parametrize("ruleset", RULESETS)
@pytest.mark.parametrize(
    "key",
    ["submission_org", "cache_clear", "init_stop", "run_start", "run_stop", "eval_accuracy", "max_samples"],
)
def test_a_run_without_one_key_is_refused_by_the_name_of_the_key(tmp_path: Path, ruleset: str, key: str) -> None:
    verdict = check(write_run(tmp_path / "log.txt", without=key), ruleset)
    assert not verdict.passed
    assert any(f"'{key}'" in message for message in verdict.messages)


def test_gradient_accumulation_is_missed_from_1_0_and_the_tensors_from_1_1(tmp_path: Path) -> None:
    log = write_run(tmp_path / "a", without="gradient_accumulation_steps")
    assert [check(log, ruleset).passed for ruleset in RULESETS] == [True, False, False]
    log = write_run(tmp_path / "b", without="weights_initialization")
    assert [check(log, ruleset).passed for ruleset in RULESETS] == [True, True, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"opt_learning_rate_decay_boundary_epochs": (40, 51)},
        {"epoch_count": 0},
        {"accuracy": 0.2299},
        {"opt_learning_rate_warmup_steps": 0},
        {"max_samples": 2},
    ],
    ids=str,
)
def test_a_closed_run_with_a_value_out_of_the_rules_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert not check(write_run(tmp_path / "log.txt", **changes), "1.1.0").passed


@pytest.mark.parametrize("accuracy", [{"BBOX": 0.3769, "SEGM": 0.34}, {"BBOX": 0.38, "SEGM": 0.3389}], ids=str)
def test_mask_rcnn_has_to_reach_both_targets(tmp_path: Path, accuracy: dict[str, float]) -> None:
    log = write_run(tmp_path / "log.txt", benchmark="maskrcnn", accuracy=accuracy)
    assert not any(check(log, ruleset).passed for ruleset in RULESETS)


def test_below_the_target_the_open_division_fails_only_in_0_7(tmp_path: Path) -> None:
    log = write_run(tmp_path / "log.txt", "open", accuracy=0.1, status="aborted")
    assert [check(log, ruleset).passed for ruleset in RULESETS] == [False, True, True]


def test_a_value_that_breaks_the_checker_itself_is_told_in_one_line(tmp_path: Path) -> None:
    verdict = check(write_run(tmp_path / "log.txt", accuracy="high"), "1.1.0")
    assert not verdict.passed
    assert verdict.messages[-1].startswith("the official checker broke off on this log: TypeError")


def test_a_truncated_line_is_refused(tmp_path: Path) -> None:
    log = write_run(tmp_path / "log.txt")
    log.write_text(log.read_text()[:-20])
    verdict = check(log, "1.1.0")
    assert not verdict.passed
    assert any("Log lines had parsing errors" in message for message in verdict.messages)


def test_a_text_without_a_line_of_a_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello\n")
    assert "No log lines detected" in check(tmp_path / "notes.txt", "0.7.0").messages


def test_checks_do_not_influence_each_other_and_leave_nothing_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_run(tmp_path / "good.txt")
    bad = write_run(tmp_path / "bad.txt", without="run_stop")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    verdicts = [check(log, "1.1.0").passed for log in (good, bad, good, bad, good)]
    assert verdicts == [True, False, True, False, True]
    assert list(here.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_an_unknown_ruleset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown ruleset '3\.0\.0': choose one of 0\.7\.0"):
        check(write_run(tmp_path / "log.txt"), "3.0.0")


def command(*arguments: object) -> tuple[int, str, str]:
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def test_the_command_prints_a_verdict_for_each_log_and_its_reasons(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good.txt")
    bad = write_run(tmp_path / "bad.txt", without="run_stop")
    status, out, err = command(good, bad)
    assert status == 1
    assert out.splitlines()[:2] == [f"PASS {good} (ruleset 1.1.0)", f"FAIL {bad} (ruleset 1.1.0)"]
    assert "Required EXACTLY_ONE occurrence of 'run_stop'" in out
    assert err == ""
    assert command(good, "--ruleset", "0.7.0") == (0, f"PASS {good} (ruleset 0.7.0)\n", "")


def test_a_log_that_names_no_ruleset_and_fails_the_newest_is_told_which_one_it_passes(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old.txt", without="gradient_accumulation_steps")
    status, out, _ = command(old)
    assert status == 1
    assert "names no ruleset, so that it was held to 1.1.0: it passes --ruleset 0.7.0" in out
    assert "names no ruleset" not in command(old, "--ruleset", "1.1.0")[1]
    untold = command(write_run(tmp_path / "untold.txt", without="weights_initialization"))[1]
    assert "sorted(s['initialized_tensors']) == sorted([…])" in untold  # not the names of 119 tensors
    bad = write_run(tmp_path / "bad.txt", without="run_stop")
    assert "held to 1.1.0: nor does it pass an older one" in command(bad)[1]


def test_the_command_exits_2_for_a_file_that_is_not_there_and_still_checks_the_rest(tmp_path: Path) -> None:
    bad = write_run(tmp_path / "bad.txt", without="run_stop")
    status, out, err = command(tmp_path / "none.txt", tmp_path, bad)
    assert status == 2
    assert out.startswith(f"FAIL {bad}")
    assert err.splitlines()[0].startswith(f"error: {tmp_path / 'none.txt'}: No such file")
    assert len(err.splitlines()) == 2


def test_the_command_refuses_an_unknown_ruleset(tmp_path: Path) -> None:
    status, _, err = command("log.txt", "--ruleset", "9")
    assert status == 2
    assert "invalid choice: '9'" in err


@pytest.mark.skipif(not SHARED_LOGS.exists(), reason="needs the folder of published logs beside the repository")
def test_published_logs_pass_under_their_own_ruleset_only() -> None:
    logs = sorted(SHARED_LOGS.glob("*/ssd/result_*.txt"))
    assert len(logs) == 10
    assert all(check(log, "0.7.0").passed for log in logs)
    assert not check(logs[0], "1.0.0").passed
