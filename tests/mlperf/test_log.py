import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mlperf.log import Event, MlperfLog, read
from paths import SHARED

SHARED_LOGS = SHARED / "logs"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "result_0.txt"
    with MlperfLog(path, echo=False) as log:
        log.start("block", first_epoch_num=1, epoch_count=40)
        log.point("eval_accuracy", 0.23, epoch_num=40)
        log.end("run", status="success")
    start, point, end = read(path)
    assert (start.key, start.event_type, start.value) == ("block_start", "INTERVAL_START", None)
    assert start.metadata["first_epoch_num"] == 1
    assert start.metadata["epoch_count"] == 40
    assert (point.key, point.event_type, point.value) == ("eval_accuracy", "POINT_IN_TIME", 0.23)
    assert (end.key, end.event_type, end.metadata["status"]) == ("run_stop", "INTERVAL_END", "success")
    assert [event.line for event in (start, point, end)] == [1, 2, 3]
    assert 1.7e12 < start.time_ms <= end.time_ms


@pytest.mark.parametrize("method", ["start", "end", "point"])
def test_a_line_names_the_place_of_its_caller_relative_to_the_repository(tmp_path: Path, method: str) -> None:
    path = tmp_path / "log.txt"
    with MlperfLog(path, echo=False) as log:
        here = sys._getframe().f_lineno + 1
        getattr(log, method)("init")
    (event,) = read(path)
    assert (event.metadata["file"], event.metadata["lineno"]) == ("tests/mlperf/test_log.py", here)


def test_each_line_is_in_the_file_and_on_stdout_before_the_next_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.txt"
    log = MlperfLog(path)
    log.point("seed", 1)
    assert path.read_text() == capsys.readouterr().out
    assert [event.key for event in read(path)] == ["seed"]
    log.point("seed", 2)
    assert [event.value for event in read(path)] == [1, 2]
    log.close()


def test_a_silent_rank_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with MlperfLog(None) as log:
        log.start("init")
        log.point("seed", 1)
        log.end("init")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_without_echo_stdout_stays_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MlperfLog(tmp_path / "log.txt", echo=False) as log:
        log.point("seed", 1)
    assert capsys.readouterr() == ("", "")


def test_two_logs_in_one_process_do_not_share_lines(tmp_path: Path) -> None:
    first, second = MlperfLog(tmp_path / "a", echo=False), MlperfLog(tmp_path / "b", echo=False)
    first.point("seed", 1)
    second.point("seed", 2)
    first.point("seed", 3)
    assert [event.value for event in read(tmp_path / "a")] == [1, 3]
    assert [event.value for event in read(tmp_path / "b")] == [2]


def test_an_existing_log_is_refused_unless_a_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with MlperfLog(path, echo=False) as log:
        log.point("seed", 1)
    with pytest.raises(ValueError, match="exists already"):
        MlperfLog(path, echo=False)
    with MlperfLog(path, echo=False, append=True) as log:
        log.point("seed", 2)
    assert [event.value for event in read(path)] == [1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("nan"))])
def test_a_number_that_json_lacks_is_refused_and_leaves_no_line(tmp_path: Path, bad: object) -> None:
    path = tmp_path / "log.txt"
    with MlperfLog(path, echo=False) as log:
        with pytest.raises(ValueError, match="eval_accuracy is"):
            log.point("eval_accuracy", bad, epoch_num=5)
        with pytest.raises(ValueError, match="finite"):
            log.point("eval_accuracy", 0.1, epoch_num=bad)
    assert path.read_text() == ""


def test_numpy_and_torch_values_become_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with MlperfLog(path, echo=False) as log:
        log.point("a", np.float64(0.25), epoch_num=np.int64(3))
        log.point("b", torch.tensor([1, 2]))
        log.point("c", (44, 55))
        with pytest.raises(TypeError, match="not a value that a log can hold"):
            log.point("d", object())
    events = read(path)
    assert [event.value for event in events] == [0.25, [1, 2], [44, 55]]
    assert events[0].metadata["epoch_num"] == 3


def test_lines_are_written_even_where_logging_is_switched_off(tmp_path: Path) -> None:
    logging.disable(logging.CRITICAL)
    try:
        with MlperfLog(tmp_path / "log.txt", echo=False) as log:
            log.point("seed", 1)
    finally:
        logging.disable(logging.NOTSET)
    assert len(read(tmp_path / "log.txt")) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_once_and_remembered_and_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with MlperfLog(Path("/dev/full"), echo=False, append=True) as log:
        assert log.broken is None
        log.point("seed", 1)
        log.point("seed", 2)
    assert "No space left" in str(log.broken)
    assert capsys.readouterr().err == "warning: /dev/full has a gap from here on: No space left on device\n"


def test_the_progress_bar_is_cleared_before_each_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MlperfLog(tmp_path / "log.txt", before_echo=lambda: print("cleared")) as log:
        log.point("seed", 1)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "cleared"
    assert second.startswith(":::MLLOG ")


def test_on_a_terminal_the_line_that_a_bar_left_is_wiped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with MlperfLog(tmp_path / "log.txt") as log:
        log.point("seed", 1)
    assert capsys.readouterr().out.startswith("\r\033[K:::MLLOG ")
    assert (tmp_path / "log.txt").read_text().startswith(":::MLLOG ")


def test_importing_the_log_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", "import mlperf.log"], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_events_are_found_among_other_output_and_after_a_prefix(tmp_path: Path) -> None:
    fields = {"time_ms": 7, "event_type": "POINT_IN_TIME", "key": "seed", "value": 1, "metadata": {}}
    path = tmp_path / "log.txt"
    path.write_bytes(b"Epoch 1 \xff\r\n12%|## | 0: :::MLLOG " + json.dumps(fields).encode() + b"\nbye\n")
    assert read(path) == [Event(7, "POINT_IN_TIME", "seed", 1, {}, line=2)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"time_ms": "x"}', '{"time_ms": Infinity}'])
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.txt"
    path.write_text(f"start\n:::MLLOG {text}\n")
    with pytest.raises(ValueError, match=r"log\.txt, line 2: not an MLPerf log line"):
        read(path)


@pytest.mark.skipif(not SHARED_LOGS.exists(), reason="needs the folder of published logs beside the repository")
def test_published_logs_are_parsed_with_their_times_and_curves() -> None:
    paths = sorted(SHARED_LOGS.glob("*/ssd/result_*.txt"))
    assert len(paths) == 10
    for path in paths:
        events = read(path)
        assert len(events) == 141
        times = {event.key: event.time_ms for event in events}
        assert 500 < (times["run_stop"] - times["run_start"]) / 1000 < 1500
        assert max(event.value for event in events if event.key == "eval_accuracy") >= 0.23
        assert sum(event.key == "init_start" for event in events) == 8


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_terminal_is_spared_the_names_of_the_weights_that_the_file_holds(tmp_path, monkeypatch, capsys, on_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    with MlperfLog(tmp_path / "log.txt") as log:
        log.point("weights_initialization", tensor="a")
        log.point("seed", 1)
    assert ("weights_initialization" in capsys.readouterr().out) is not on_terminal
    assert [event.key for event in read(tmp_path / "log.txt")] == ["weights_initialization", "seed"]
