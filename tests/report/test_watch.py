"""Live view of growing, truncated and finished files, in terminals and pipes."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from detection.report import watch
from detection.report.watch import JsonlTail, WatchedRun
from paths import ROOT

TOY = ROOT / "perf" / "results" / "2026-11-21_toy_2core_cpu"
LINES = (TOY / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Folder of a recorded run before its first event."""
    folder = tmp_path / "results" / "toy" / "ssd" / "start"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text((TOY / "config.json").read_text())
    return folder


def append(folder: Path, *texts: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(texts)


def render_text(run: WatchedRun, width: int = 80, **options) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, **options)
    run.poll()
    console.print(watch.render(run, ascii_only=console.options.ascii_only))
    text = console.file.getvalue()
    assert max(map(cell_len, text.splitlines())) <= width
    return " ".join(text.split())


def test_incomplete_line_waits_for_its_end(folder):
    tail = JsonlTail(folder / "metrics.jsonl")
    assert tail.poll() == []
    append(folder, LINES[0], LINES[1][:40])
    assert [event["event"] for event in tail.poll()] == ["run_start"]
    assert tail.poll() == []
    append(folder, LINES[1][40:])
    assert [event["step"] for event in tail.poll()] == [9]
    assert not tail.finished
    append(folder, "not JSON\n", "[1]\n", LINES[-1])
    assert [event["event"] for event in tail.poll()] == ["summary"]
    assert tail.finished


def test_file_truncated_by_resume_is_read_again(folder):
    tail = JsonlTail(folder / "metrics.jsonl")
    append(folder, *LINES[:9])
    tail.poll()
    (folder / "metrics.jsonl").write_text("".join(LINES[:2]))
    append(folder, LINES[0])
    tail.poll()
    assert [event["event"] for event in tail.events] == ["run_start", "step", "run_start"]


def test_view_shows_progress(folder):
    run = WatchedRun(folder)
    assert "not started yet" in render_text(run)
    append(folder, *LINES[:5])
    (folder / "result_0.txt").write_text((TOY / "result_0.txt").read_text())
    text = render_text(run)
    for words in (
        "ssd300-r34 on toy, 1 × cpu, 2 threads, bf16",
        "epoch 1/12, step 40/1140",
        "loss 11.23",
        "lr 0.0039",
        "img/s 4.4",
        "AP not evaluated yet, target 0.23",
        "training 100%",
    ):
        assert words in text, words
    # 1100 steps of 4 images at 4.2 images/s. The evaluations have no time yet.
    assert run.remaining_s() == pytest.approx(1100 * 4 / 4.205, rel=0.01)
    append(folder, *LINES[5:13])
    text = render_text(run)
    assert "AP 0.2351 after epoch 1, target 0.23" in text
    assert "training 94%, evaluation 6%, other 0%" in text
    assert run.remaining_s() == pytest.approx(1045 * 4 / 4.392 + 11 * 5.188, rel=0.01)
    append(folder, LINES[13])
    assert "0:01:33 elapsed, target reached" in render_text(run)


def test_view_fits_narrow_and_ascii_terminals(folder):
    append(folder, *LINES[:-1])
    for width in (40, 80, 200):
        render_text(WatchedRun(folder), width)
    command = [sys.executable, "-m", "detection.report", "watch", str(folder)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "TTY_COMPATIBLE": "1", "COLUMNS": "80"}
    append(folder, LINES[-1])
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "+- start ---" in process.stdout
    assert "4.586  @" in process.stdout


def test_sparkline_follows_its_values():
    assert watch.sparkline([0, 1, 2, 3, 4, 5, 6, 7], watch.BLOCKS) == watch.BLOCKS
    assert watch.sparkline([0.1, float("nan"), 0.2], watch.BLOCKS, minimum=0, maximum=0.4) == "▃ ▅"
    assert watch.sparkline([5.0] * 1000, watch.BLOCKS) == "▁" * 20
    assert watch.sparkline([], watch.BLOCKS) == ""


def test_stalls_and_non_finite_losses_are_shown(folder):
    append(folder, *LINES[:3])
    run = WatchedRun(folder)
    assert "!" not in render_text(run)
    run.last_event_s -= 600
    assert "! no event for 0:10:00" in render_text(run)
    bad = json.loads(LINES[3]) | {"loss": float("nan")}
    append(folder, json.dumps(bad) + "\n")
    text = render_text(run)
    assert "the loss is nan at step 29" in text
    assert "no event" not in text
    assert "loss nan █▁" in text


def test_run_stopped_within_an_epoch_is_shown(folder):
    stopped = json.loads(LINES[-1]) | {
        "converged": False,
        "stopped_by": "TrainingStopped",
        "run_s": 40.0,
        "time_s": 40.0,
    }
    append(folder, *LINES[:5], json.dumps(stopped) + "\n")
    text = render_text(WatchedRun(folder))
    assert "0:00:40 elapsed, stopped early" in text
    assert "! the run stopped early: by a signal or --max-steps" in text
    assert "training 95%" in text


def test_view_updates_in_place_and_ends_with_the_run(folder):
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    pending = list(LINES)

    def wait() -> None:
        append(folder, pending.pop(0))

    watch.watch(WatchedRun(folder), console, wait)
    assert pending == []
    text = console.file.getvalue()
    assert text.count("\x1b[1A") > 50  # moves up over the previous view
    assert "target reached" in text


def test_pipe_gets_one_line_per_event(folder):
    append(folder, *LINES[:2])
    command = [sys.executable, "-m", "detection.report", "watch", "--under", str(folder.parents[2]), "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "ssd300-r34 on 1 × cpu, 2 threads\n"
        assert process.stdout.readline().startswith("epoch 1/12  step 10  loss 23.68  lr 0.0009  4.0 img/s")
        append(folder, *LINES[2:])
        lines = process.stdout.read().splitlines()
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""
    assert len(lines) == 9 + 2
    assert lines[-2] == "evaluation after epoch 1: AP 0.2351 (target AP 0.23)"
    assert lines[-1] == "0:01:33 elapsed, target reached"
    assert not any("\x1b" in line for line in lines)


def test_ctrl_c_exits_quietly(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    append(folder, LINES[0])
    monkeypatch.setattr(time, "sleep", interrupt)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert watch.main([str(folder)]) == 0


def test_latest_run_is_watched_and_a_missing_run_is_reported(folder, tmp_path, capsys):
    append(folder, LINES[0])
    newer = folder.with_name("later")
    newer.mkdir()
    append(newer, LINES[0])
    assert watch.latest_run(tmp_path / "results") in (folder, newer)
    os.utime(folder / "metrics.jsonl", (1, 1))
    assert watch.latest_run(tmp_path / "results") == newer
    append(newer, *LINES[1:])
    assert watch.main([str(tmp_path / "results")]) == 0  # the latest of several runs
    assert "target reached" in capsys.readouterr().out
    assert watch.main(["--under", str(tmp_path / "empty")]) == 2
    assert "no run below" in capsys.readouterr().err
    assert watch.main([str(tmp_path / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err
