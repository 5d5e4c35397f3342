"""The live view: files that grow, are cut and end; a terminal, a pipe, and narrow ones."""

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
from detection.report.watch import Follower, Watched
from paths import ROOT

TOY = ROOT / "perf" / "results" / "2026-11-21_toy_2core_cpu"
LINES = (TOY / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run of the repository's before its first event."""
    folder = tmp_path / "results" / "toy" / "ssd" / "start"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text((TOY / "config.json").read_text())
    return folder


def append(folder: Path, *texts: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(texts)


def shown(run: Watched, width: int = 80, **options) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, **options)
    run.read()
    console.print(watch.view(run, ascii_only=console.options.ascii_only))
    text = console.file.getvalue()
    assert max(map(cell_len, text.splitlines())) <= width
    return " ".join(text.split())


def test_a_line_that_is_not_whole_waits_for_its_end(folder):
    follower = Follower(folder / "metrics.jsonl")
    assert follower.new() == []
    append(folder, LINES[0], LINES[1][:40])
    assert [event["event"] for event in follower.new()] == ["run_start"]
    assert follower.new() == []
    append(folder, LINES[1][40:])
    assert [event["step"] for event in follower.new()] == [9]
    assert not follower.over
    append(folder, "no JSON\n", "[1]\n", LINES[-1])
    assert [event["event"] for event in follower.new()] == ["summary"]
    assert follower.over


def test_a_file_that_is_cut_for_a_resumed_run_is_read_anew(folder):
    follower = Follower(folder / "metrics.jsonl")
    append(folder, *LINES[:9])
    follower.new()
    (folder / "metrics.jsonl").write_text("".join(LINES[:2]))
    append(folder, LINES[0])
    follower.new()
    assert [event["event"] for event in follower.events] == ["run_start", "step", "run_start"]


def test_the_view_tells_how_far_the_run_is(folder):
    run = Watched(folder)
    assert "it has not begun yet" in shown(run)
    append(folder, *LINES[:5])
    (folder / "result_0.txt").write_text((TOY / "result_0.txt").read_text())
    text = shown(run)
    for words in (
        "ssd300-r34 on toy, 1 × cpu, 2 threads, bf16",
        "epoch 1/12, step 40/1140",
        "loss 11.23",
        "lr 0.0039",
        "img/s 4.4",
        "AP not evaluated yet, target 0.23",
        "training 100 %",
    ):
        assert words in text, words
    # 1100 steps of 4 images at 4.2 a second, and the evaluations, of which none has been seen
    assert run.left_s() == pytest.approx(1100 * 4 / 4.205, rel=0.01)
    append(folder, *LINES[5:13])
    text = shown(run)
    assert "AP 0.2351 after epoch 1, target 0.23" in text
    assert "training 94 %, evaluation 6 %, other 0 %" in text
    assert run.left_s() == pytest.approx(1045 * 4 / 4.392 + 11 * 5.188, rel=0.01)
    append(folder, LINES[13])
    assert "0:01:33 on the clock; the target is reached" in shown(run)


def test_the_view_fits_narrow_terminals_and_those_without_blocks(folder):
    append(folder, *LINES[:-1])
    for width in (40, 80, 200):
        shown(Watched(folder), width)
    command = [sys.executable, "-m", "detection.report.watch", str(folder)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "TTY_COMPATIBLE": "1", "COLUMNS": "80"}
    append(folder, LINES[-1])
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "+- start ---" in done.stdout
    assert "4.586  @" in done.stdout


def test_the_curve_rises_with_its_values():
    assert watch.curve([0, 1, 2, 3, 4, 5, 6, 7], watch.BLOCKS) == watch.BLOCKS
    assert watch.curve([0.1, float("nan"), 0.2], watch.BLOCKS, least=0, most=0.4) == "▃ ▅"
    assert watch.curve([5.0] * 1000, watch.BLOCKS) == "▁" * 20
    assert watch.curve([], watch.BLOCKS) == ""


def test_trouble_is_shown(folder):
    append(folder, *LINES[:3])
    run = Watched(folder)
    assert "!" not in shown(run)
    run.mark_s -= 600
    assert "! nothing new for 0:10:00" in shown(run)
    bad = json.loads(LINES[3]) | {"loss": float("nan")}
    append(folder, json.dumps(bad) + "\n")
    text = shown(run)
    assert "the loss is nan at step 29" in text
    assert "nothing new" not in text
    assert "loss nan █▁" in text


def test_a_run_that_was_stopped_in_an_epoch_says_so(folder):
    stopped = json.loads(LINES[-1]) | {"converged": False, "stopped_by": "Stopped", "run_s": 40.0, "time_s": 40.0}
    append(folder, *LINES[:5], json.dumps(stopped) + "\n")
    text = shown(Watched(folder))
    assert "0:00:40 on the clock; it was stopped before its end" in text
    assert "! it was stopped before its end: by a signal or --max-steps" in text
    assert "training 95 %" in text


def test_it_renews_itself_and_ends_with_the_run(folder):
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    ahead = list(LINES)

    def wait() -> None:
        append(folder, ahead.pop(0))

    watch.watch(Watched(folder), console, wait)
    assert ahead == []
    text = console.file.getvalue()
    assert text.count("\x1b[1A") > 50  # back up, over what was there
    assert "the target is reached" in text


def test_a_pipe_gets_a_line_for_each_event_as_it_comes(folder):
    append(folder, *LINES[:2])
    command = [sys.executable, "-m", "detection.report.watch", "--under", str(folder.parents[2]), "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "ssd300-r34 on 1 × cpu, 2 threads\n"
        assert process.stdout.readline().startswith("epoch 1/12  step 10  loss 23.68  lr 0.0009  4.0 img/s")
        append(folder, *LINES[2:])
        lines = process.stdout.read().splitlines()
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""
    assert len(lines) == 9 + 2
    assert lines[-2] == "evaluation after epoch 1: AP 0.2351 (target AP 0.23)"
    assert lines[-1] == "0:01:33 on the clock; the target is reached"
    assert not any("\x1b" in line for line in lines)


def test_ctrl_c_ends_it_quietly(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    append(folder, LINES[0])
    monkeypatch.setattr(time, "sleep", interrupt)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert watch.main([str(folder)]) == 0


def test_the_newest_run_is_watched_and_where_there_is_none_it_says_so(folder, tmp_path, capsys):
    append(folder, LINES[0])
    newer = folder.with_name("later")
    newer.mkdir()
    append(newer, LINES[0])
    assert watch.newest(tmp_path / "results") in (folder, newer)
    os.utime(folder / "metrics.jsonl", (1, 1))
    assert watch.newest(tmp_path / "results") == newer
    append(newer, *LINES[1:])
    assert watch.main([str(tmp_path / "results")]) == 0  # of several runs that are below, the newest
    assert "the target is reached" in capsys.readouterr().out
    assert watch.main(["--under", str(tmp_path / "empty")]) == 2
    assert "no run is below" in capsys.readouterr().err
    assert watch.main([str(tmp_path / "absent")]) == 2
    assert "is no folder" in capsys.readouterr().err
