import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mlperf.log import Event, MlperfLog, find_clock_error, read
from paths import SHARED

SHARED_LOGS = SHARED / "logs"


def test_written_events_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "result_0.txt"
    with MlperfLog(path) as log:
        log.start("block", first_epoch_num=1, epoch_count=40)
        log.event("eval_accuracy", 0.23, epoch_num=40)
        log.end("run", status="success")
    start, accuracy, end = read(path)
    assert (start.key, start.event_type, start.value) == ("block_start", "INTERVAL_START", None)
    assert start.metadata["first_epoch_num"] == 1
    assert start.metadata["epoch_count"] == 40
    assert (accuracy.key, accuracy.event_type, accuracy.value) == ("eval_accuracy", "POINT_IN_TIME", 0.23)
    assert (end.key, end.event_type, end.metadata["status"]) == ("run_stop", "INTERVAL_END", "success")
    assert [event.line for event in (start, accuracy, end)] == [1, 2, 3]
    assert 1.7e12 < start.time_ms <= end.time_ms


@pytest.mark.parametrize("method", ["start", "end", "event"])
def test_line_names_position_of_its_caller_relative_to_repository(tmp_path: Path, method: str) -> None:
    path = tmp_path / "log.txt"
    with MlperfLog(path) as log:
        expected_line = sys._getframe().f_lineno + 1
        getattr(log, method)("init")
    (event,) = read(path)
    assert (event.metadata["file"], event.metadata["lineno"]) == ("tests/mlperf/test_log.py", expected_line)


def test_each_line_is_flushed_to_file_and_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.txt"
    log = MlperfLog(path, echo=print)
    log.event("seed", 1)
    assert path.read_text() == capsys.readouterr().out
    assert [event.key for event in read(path)] == ["seed"]
    log.event("seed", 2)
    assert [event.value for event in read(path)] == [1, 2]
    log.close()


def test_times_do_not_follow_a_clock_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MlperfLog(tmp_path / "log.txt") as log:
        log.start("run")
        monkeypatch.setattr(time, "time", lambda: 0.0)
        log.end("run")
    start, stop = read(tmp_path / "log.txt")
    assert 0 <= stop.time_ms - start.time_ms < 60_000


@pytest.mark.parametrize(
    ("keys", "times_ms", "error"),
    [
        (["run_start", "eval_start", "run_stop"], [0, 500, 9000], ""),
        (["run_start", "eval_start", "run_stop"], [1000, 955, 9000], ""),  # as in published logs
        (["init_start", "run_start", "run_stop"], [9000, 9000, 4000], "set back by 5 s before line 3 (run_stop)"),
        (["init_start", "run_start", "eval_start"], [9000, 7000, 8000], "set back by 2 s before line 2 (run_start)"),
        (["run_start", "epoch_start", "eval_start", "run_stop"], [4000, 3400, 2800, 9000], "set back by 1 s"),
        (["run_start", "run_stop"], [500, 400], "line 2: run_stop is before run_start"),
        (["run_stop"], [0], ""),
        ([], [], ""),
    ],
)
def test_clock_that_was_set_back_is_found(keys: list[str], times_ms: list[int], error: str) -> None:
    events = [
        Event(ms, "POINT_IN_TIME", key, None, {}, line)
        for line, (key, ms) in enumerate(zip(keys, times_ms, strict=True), start=1)
    ]
    assert error in find_clock_error(events) if error else find_clock_error(events) == ""


def test_silent_log_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with MlperfLog(None) as log:
        log.start("init")
        log.event("seed", 1)
        log.end("init")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_no_output_without_echo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MlperfLog(tmp_path / "log.txt") as log:
        log.event("seed", 1)
    assert capsys.readouterr() == ("", "")


def test_two_logs_in_one_process_are_independent(tmp_path: Path) -> None:
    first, second = MlperfLog(tmp_path / "a"), MlperfLog(tmp_path / "b")
    first.event("seed", 1)
    second.event("seed", 2)
    first.event("seed", 3)
    assert [event.value for event in read(tmp_path / "a")] == [1, 3]
    assert [event.value for event in read(tmp_path / "b")] == [2]


def test_existing_log_is_rejected_unless_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with MlperfLog(path) as log:
        log.event("seed", 1)
    with pytest.raises(ValueError, match="already exists"):
        MlperfLog(path)
    with MlperfLog(path, append=True) as log:
        log.event("seed", 2)
    assert [event.value for event in read(path)] == [1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("nan"))])
def test_non_finite_number_is_rejected_and_leaves_no_line(tmp_path: Path, bad: object) -> None:
    path = tmp_path / "log.txt"
    with MlperfLog(path) as log:
        with pytest.raises(ValueError, match="eval_accuracy is"):
            log.event("eval_accuracy", bad, epoch_num=5)
        with pytest.raises(ValueError, match="finite"):
            log.event("eval_accuracy", 0.1, epoch_num=bad)
    assert path.read_text() == ""


def test_numpy_and_torch_values_become_json(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with MlperfLog(path) as log:
        log.event("a", np.float64(0.25), epoch_num=np.int64(3))
        log.event("b", torch.tensor([1, 2]))
        log.event("c", (44, 55))
        with pytest.raises(TypeError, match="cannot be stored in an MLPerf log"):
            log.event("d", object())
    events = read(path)
    assert [event.value for event in events] == [0.25, [1, 2], [44, 55]]
    assert events[0].metadata["epoch_num"] == 3


def test_lines_are_written_even_if_logging_is_disabled(tmp_path: Path) -> None:
    logging.disable(logging.CRITICAL)
    try:
        with MlperfLog(tmp_path / "log.txt") as log:
            log.event("seed", 1)
    finally:
        logging.disable(logging.NOTSET)
    assert len(read(tmp_path / "log.txt")) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_reported_once_and_run_continues(capsys: pytest.CaptureFixture[str]) -> None:
    with MlperfLog(Path("/dev/full"), append=True) as log:
        assert log.write_error is None
        log.event("seed", 1)
        log.event("seed", 2)
    assert "No space left" in str(log.write_error)
    assert capsys.readouterr().err == "warning: /dev/full is incomplete from here: No space left on device\n"


def test_import_prints_nothing() -> None:
    process = subprocess.run([sys.executable, "-c", "import mlperf.log"], capture_output=True, check=True)
    assert (process.stdout, process.stderr) == (b"", b"")


def test_events_are_read_among_other_output_and_after_prefix(tmp_path: Path) -> None:
    fields = {"time_ms": 7, "event_type": "POINT_IN_TIME", "key": "seed", "value": 1, "metadata": {}}
    path = tmp_path / "log.txt"
    path.write_bytes(b"Epoch 1 \xff\r\n12%|## | 0: :::MLLOG " + json.dumps(fields).encode() + b"\nbye\n")
    assert read(path) == [Event(7, "POINT_IN_TIME", "seed", 1, {}, line=2)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"time_ms": "x"}', '{"time_ms": Infinity}'])
def test_invalid_line_is_named_with_its_number(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.txt"
    path.write_text(f"start\n:::MLLOG {text}\n")
    with pytest.raises(ValueError, match=r"log\.txt, line 2: not an MLPerf log line"):
        read(path)


@pytest.mark.skipif(not SHARED_LOGS.exists(), reason="needs ../shared/logs")
def test_published_logs_are_parsed_with_times_and_accuracies() -> None:
    paths = sorted(SHARED_LOGS.glob("*_pytorch/ssd/result_*.txt"))
    assert len(paths) == 10
    for path in paths:
        events = read(path)
        assert len(events) == 141
        times = {event.key: event.time_ms for event in events}
        assert 500 < (times["run_stop"] - times["run_start"]) / 1000 < 1500
        assert max(event.value for event in events if event.key == "eval_accuracy") >= 0.23
        assert sum(event.key == "init_start" for event in events) == 8
