"""metrics.jsonl, the summary and TensorBoard: what docs/METRICS_JSONL.md says is what a run writes."""

import json
import math
import re

import pytest

import processes
from config_files import set_only
from mlperf.log import read
from narrow_ssd import make_narrow
from paths import ROOT
from ssd import train

FLAGS = ("--batch-size", "2", "--num-workers", "0", "--log-every", "1", "--warmup-steps", "1")
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)


def documented() -> dict[str, list[str]]:
    """Fields of each event, as the page lists them."""
    _, *parts = SECTION.split((ROOT / "docs" / "METRICS_JSONL.md").read_text())
    return {
        name: ["event", "time_s", *re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)]
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.fixture
def environment(four_image_coco, tmp_path, monkeypatch):
    values = {"DATADIR": four_image_coco, "RUN_DIR": tmp_path / "run", "SSD_DATASET": "toy", "SSD_NUM_CLASSES": 4}
    set_only(monkeypatch, values | {"SSD_DIVISION": "open", "SSD_DEVICE": "cpu"})
    make_narrow(monkeypatch)


def test_run_writes_the_documented_events_and_their_numbers_agree(small_run):
    found = processes.metrics(small_run.folder)
    for event in found:
        assert list(event) == documented()[event["event"]], event["event"]
    names = [event["event"] for event in found]
    steps = [event for event in found if event["event"] == "step"]
    assert names == ["run_start", "evaluation", *["step"] * len(steps), "epoch", "evaluation", "summary"]
    by_name = {event["event"]: event for event in found}  # the last of each
    epoch, summary = by_name["epoch"], by_name["summary"]
    assert [event["time_s"] for event in found] == sorted(event["time_s"] for event in found)
    assert epoch["loss"] == pytest.approx(sum(step["loss"] for step in steps) / len(steps))
    samples = next(event.value for event in read(small_run.folder / "result_0.txt") if event.key == "train_samples")
    assert epoch["images"] == summary["images"] == samples
    assert epoch["images_per_s"] == pytest.approx(samples / epoch["seconds"], rel=1e-2)
    assert summary["metrics"] == by_name["evaluation"]["metrics"]
    assert (summary["converged"], summary["epoch"], by_name["run_start"]["resumed_from"]) == (True, 1, None)
    assert [event["epoch"] for event in found if event["event"] == "evaluation"] == [0, 1]
    assert summary["init_s"] + summary["run_s"] == pytest.approx(summary["e2e_s"], abs=0.01)
    assert summary["run_s"] >= summary["train_s"] + summary["eval_s"] > 0
    written = json.loads((small_run.clone / "summary.json").read_text())
    assert written == {name: value for name, value in summary.items() if name not in ("event", "time_s")}


def test_aborted_run_has_a_summary(tmp_path):
    status, _, err = processes.run(tmp_path, "--batch-size", "8", "--log-every", "1", FAULT="nan 0 1")
    assert status == 1, err
    *_, step, summary = processes.metrics(tmp_path)
    assert math.isnan(step["loss"])
    assert (summary["event"], summary["converged"], summary["stopped_by"]) == ("summary", False, "NonFiniteLossError")
    assert (summary["epoch"], summary["images_per_s"]) == (None, None)
    assert "non-finite loss" in summary["stop_reason"]


def test_unwritable_summary_is_rejected_before_the_timer_starts(environment, tmp_path, capsys):
    assert train.main([*FLAGS, "--summary-json", str(tmp_path / "absent" / "summary.json")]) == 2
    assert "summary.json: cannot be written (No such file or directory)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result_0.txt").exists()
