import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from mlperf.check import check, main
from mlperf.rules import BENCHMARKS, DIVISIONS, mlperf_name
from paths import shared
from recipes_and_checkers import RULESETS_BY_BENCHMARK
from synthetic_log import write_run

SSD_RULESETS = list(BENCHMARKS["ssd"].names)


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize(("benchmark", "ruleset"), RULESETS_BY_BENCHMARK)
def test_official_checker_accepts_complete_run(tmp_path: Path, benchmark: str, ruleset: str, division: str) -> None:
    verdict = check(write_run(tmp_path / "log.txt", division, benchmark=benchmark, ruleset=ruleset), ruleset)
    assert (verdict.passed, verdict.ruleset, verdict.messages) == (True, ruleset, [])


@pytest.mark.parametrize(("benchmark", "ruleset"), RULESETS_BY_BENCHMARK)
def test_official_checker_rejects_run_below_target_or_of_another_ruleset(tmp_path, benchmark, ruleset) -> None:
    run = {"benchmark": benchmark, "ruleset": ruleset}
    low = {"BBOX": 0.3769, "SEGM": 0.35} if benchmark == "maskrcnn" else 0.2299
    assert not check(write_run(tmp_path / "a", **run, accuracy=low), ruleset).passed
    other_name = "retinanet" if ruleset < "5" else "ssd"
    log = write_run(tmp_path / "b", **run)
    log.write_text(log.read_text().replace(f'"value": "{mlperf_name(benchmark, ruleset)}"', f'"value": "{other_name}"'))
    assert any("CHECK for 'submission_benchmark' failed" in message for message in check(log, ruleset).messages)


@pytest.mark.parametrize(
    ("benchmark", "rulesets"), [("maskrcnn", {"1.1.0", "2.0.0", "2.1.0"}), ("retinanet", {"2.0.0", "2.1.0"})]
)
def test_initialized_tensors_are_required_in_some_rulesets(tmp_path, benchmark, rulesets) -> None:
    failing = set()
    for ruleset in BENCHMARKS[benchmark].names:
        log = write_run(tmp_path / ruleset, benchmark=benchmark, ruleset=ruleset, without="weights_initialization")
        failing |= set() if check(log, ruleset).passed else {ruleset}
    assert failing == rulesets


def test_availability_is_not_required_from_4_1_and_the_submitter_not_in_5_0(tmp_path) -> None:
    rulesets = ("4.0.0", "4.1.0", "5.0.0", "5.1.0")
    for key, expected in (
        ("submission_status", [False, True, True, True]),
        ("submission_org", [False, False, True, False]),
    ):
        logs = [write_run(tmp_path / f"{key}{r}", benchmark="retinanet", ruleset=r, without=key) for r in rulesets]
        assert [check(log, ruleset).passed for log, ruleset in zip(logs, rulesets, strict=True)] == expected


@pytest.mark.parametrize("ruleset", SSD_RULESETS)
@pytest.mark.parametrize(
    "key", ["submission_org", "cache_clear", "init_stop", "run_start", "run_stop", "eval_accuracy", "max_samples"]
)
def test_missing_key_is_named(tmp_path: Path, ruleset: str, key: str) -> None:
    verdict = check(write_run(tmp_path / "log.txt", without=key), ruleset)
    assert not verdict.passed
    assert any(f"'{key}'" in message for message in verdict.messages)


def test_gradient_accumulation_is_required_from_1_0_and_tensors_from_1_1(tmp_path: Path) -> None:
    log = write_run(tmp_path / "a", without="gradient_accumulation_steps")
    assert [check(log, ruleset).passed for ruleset in SSD_RULESETS] == [True, False, False]
    log = write_run(tmp_path / "b", without="weights_initialization")
    assert [check(log, ruleset).passed for ruleset in SSD_RULESETS] == [True, True, False]


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
def test_closed_run_with_invalid_value_is_rejected(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert not check(write_run(tmp_path / "log.txt", **changes), "1.1.0").passed


@pytest.mark.parametrize("accuracy", [{"BBOX": 0.3769, "SEGM": 0.34}, {"BBOX": 0.38, "SEGM": 0.3389}], ids=str)
def test_maskrcnn_must_reach_both_targets(tmp_path: Path, accuracy: dict[str, float]) -> None:
    log = write_run(tmp_path / "log.txt", benchmark="maskrcnn", accuracy=accuracy)
    assert not any(check(log, ruleset).passed for ruleset in BENCHMARKS["maskrcnn"].names)


def test_open_run_below_target_fails_only_in_0_7(tmp_path: Path) -> None:
    log = write_run(tmp_path / "log.txt", "open", accuracy=0.1, status="aborted")
    assert [check(log, ruleset).passed for ruleset in SSD_RULESETS] == [False, True, True]


def test_checker_crash_is_reported_in_one_line(tmp_path: Path) -> None:
    verdict = check(write_run(tmp_path / "log.txt", accuracy="high"), "1.1.0")
    assert not verdict.passed
    assert verdict.messages[-1].startswith("the official checker crashed on this log: TypeError")


def test_truncated_line_is_rejected(tmp_path: Path) -> None:
    log = write_run(tmp_path / "log.txt")
    log.write_text(log.read_text()[:-20])
    verdict = check(log, "1.1.0")
    assert not verdict.passed
    assert any("Log lines had parsing errors" in message for message in verdict.messages)


def test_text_without_log_lines_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello\n")
    assert "No log lines detected" in check(tmp_path / "notes.txt", "0.7.0").messages


def test_checks_are_independent_and_leave_no_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_run(tmp_path / "good.txt")
    bad = write_run(tmp_path / "bad.txt", without="run_stop")
    working_dir = tmp_path / "empty"
    working_dir.mkdir()
    monkeypatch.chdir(working_dir)
    verdicts = [check(log, "1.1.0").passed for log in (good, bad, good, bad, good)]
    assert verdicts == [True, False, True, False, True]
    assert list(working_dir.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_unknown_ruleset_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown ruleset '6\.0\.0': choose one of 0\.7\.0"):
        check(write_run(tmp_path / "log.txt"), "6.0.0")


def command(*arguments: object) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def test_command_prints_verdict_and_reasons_of_each_log(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good.txt")
    bad = write_run(tmp_path / "bad.txt", without="run_stop")
    status, out, err = command(good, bad)
    assert status == 1
    assert out.splitlines()[:2] == [f"PASS {good} (ruleset 1.1.0)", f"FAIL {bad} (ruleset 1.1.0)"]
    assert "Required EXACTLY_ONE occurrence of 'run_stop'" in out
    assert err == ""
    assert command(good, "--ruleset", "0.7.0") == (0, f"PASS {good} (ruleset 0.7.0)\n", "")


def test_older_ruleset_is_suggested_for_log_that_names_none(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old.txt", without="gradient_accumulation_steps")
    status, out, _ = command(old)
    assert status == 1
    assert "names no ruleset and was checked with 1.1.0: it passes --ruleset 0.7.0" in out
    assert "names no ruleset" not in command(old, "--ruleset", "1.1.0")[1]
    unnamed = command(write_run(tmp_path / "unnamed.txt", without="weights_initialization"))[1]
    assert "sorted(s['initialized_tensors']) == sorted([…])" in unnamed  # not the names of 119 tensors
    bad = write_run(tmp_path / "bad.txt", without="run_stop")
    assert "checked with 1.1.0: it does not pass another one either" in command(bad)[1]


def test_log_is_checked_with_the_newest_ruleset_of_its_benchmark(tmp_path: Path) -> None:
    for benchmark, ruleset, newest in [
        ("ssd", "1.0.0", "1.1.0"),
        ("maskrcnn", "2.0.0", "3.1.0"),
        ("retinanet", "3.0.0", "4.1.0"),  # the newest that calls it ssd
        ("retinanet", "5.0.0", "5.1.0"),
    ]:
        log = write_run(tmp_path / f"{benchmark}{ruleset}", benchmark=benchmark, ruleset=ruleset)
        assert command(log) == (0, f"PASS {log} (ruleset {newest})\n", "")


def test_log_that_names_an_unknown_ruleset_is_rejected(tmp_path: Path) -> None:
    log = write_run(tmp_path / "log.txt", config={"ruleset": "6.0.0"})
    status, _, err = command(log)
    assert status == 2
    assert err.startswith(f"error: {log}: names ruleset 6.0.0. Choose one of 0.7.0")
    assert command(log, "--ruleset", "1.1.0")[0] == 0


def test_missing_file_exits_with_2_and_other_logs_are_checked(tmp_path: Path) -> None:
    bad = write_run(tmp_path / "bad.txt", without="run_stop")
    status, out, err = command(tmp_path / "none.txt", tmp_path, bad)
    assert status == 2
    assert out.startswith(f"FAIL {bad}")
    assert err.splitlines()[0].startswith(f"error: {tmp_path / 'none.txt'}: No such file")
    assert len(err.splitlines()) == 2


def test_command_rejects_unknown_ruleset(tmp_path: Path) -> None:
    status, _, err = command("log.txt", "--ruleset", "9")
    assert status == 2
    assert "invalid choice: '9'" in err


def test_published_logs_pass_only_their_own_ruleset() -> None:
    logs = sorted(shared("logs").glob("*_pytorch/ssd/result_*.txt"))
    assert len(logs) == 10
    assert all(check(log, "0.7.0").passed for log in logs)
    assert not check(logs[0], "1.0.0").passed


@pytest.mark.parametrize(
    ("folder", "ruleset", "minutes", "status"),
    [
        ("v3.0_dgxh100/maskrcnn", "3.0.0", 19.18, 1),  # one of the five runs missed the target
        ("v3.0_dgxh100/ssd", "3.0.0", 37.01, 0),
        ("v4.0_h200/ssd", "4.0.0", 34.26, 0),
        ("v5.1_gb200x8/retinanet", "5.1.0", 22.33, 0),
    ],
)
def test_published_logs_of_later_rounds_have_their_scores(folder, ruleset, minutes, status, capsys) -> None:
    exit_status, out, _ = command(shared(f"logs/{folder}"), "--ruleset", ruleset)
    assert exit_status == status
    assert f"score {minutes} minutes" in out
    assert "seeds: PASS" in out
    assert "convergence: PASS" in out
    assert len([line for line in out.splitlines() if f" {minutes:.2f} " in line and "training_results_v" in line]) == 1
    assert capsys.readouterr() == ("", "")
