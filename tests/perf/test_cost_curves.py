import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch

from detection.config.settings import InputError
from detection.data import coco_arrays
from detection.data.open_images import ANNOTATION_FILE
from detection.runtime.distributed import DistContext
from paths import ROOT
from perf import cost_curves, open_images
from perf.cost_curves import AXES, Axis
from perf.machine import process_mib
from perf.page import split_at_marker
from ssd.config import Config
from ssd.data import SSDTrainSource


@pytest.fixture
def in_one_process(monkeypatch):
    """Measure points in this process, since each new process imports torch."""
    monkeypatch.setattr(cost_curves, "run_in_subprocess", lambda function, *arguments: function(*arguments))


@pytest.fixture
def clean_idle_machine(monkeypatch):
    machine = {"hardware": "cpu", "processor": "x", "versions": {"torch": "2.9"}, "commit": "abc1234"}
    monkeypatch.setattr(cost_curves, "machine", lambda: machine)
    monkeypatch.setattr(cost_curves.LoadMeter, "read", lambda _: {"load_1min": 0.1, "is_idle": True})


def test_exponent_is_fitted_to_the_upper_end():
    column = {
        str(amount): {"min": time} for amount, time in {0: 5, 1: 5, 10: 10**2, 100: 100**2, 1000: 1000**2}.items()
    }
    assert cost_curves.format_exponent(column) == "2.00"
    assert cost_curves.format_exponent({"0": {"min": 1}, "7": {"min": 2}}) == ""


def allocate(mib):
    return cost_curves.cost(lambda: np.ones(mib * 2**20, dtype=np.uint8))


def test_peak_memory_excludes_earlier_allocations():
    bytearray(512 * 2**20)
    assert cost_curves.run_in_subprocess(allocate, 64)["memory, MiB"] == pytest.approx(64, abs=8)


@pytest.mark.slow
def test_command_measures_every_axis_and_updates_the_page(tmp_path, in_one_process, monkeypatch, capsys):
    page, out = tmp_path / "page.md", tmp_path / "curves.json"
    page.write_text("".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in AXES) + "the end\n")
    for name, amounts in {"images": (40,), "workers": (0, 1), "open_images": (9,), "batch": (1,)}.items():
        monkeypatch.setitem(AXES, name, AXES[name]._replace(amounts=amounts))
    monkeypatch.setitem(AXES["workers"].curves, "1,000 images", AXES["workers"].curves.pop("118,287 images"))
    assert cost_curves.main(["--rounds", "1", "--out", str(out), "--page", str(page)]) == 0
    records = json.loads(out.read_text())
    assert list(records) == list(AXES)
    output = capsys.readouterr().out
    for name, record in records.items():
        assert {"hardware", "commit"} <= record["machine"].keys()
        assert {int(amount) for column in record["columns"].values() for amount in column} == set(AXES[name].amounts)
        assert cost_curves.format_record(record) in output
        assert cost_curves.format_record(record) in page.read_text()
    assert "old" not in page.read_text()
    assert page.read_text().endswith("the end\n")


def test_measuring_one_axis_keeps_the_records_of_others(tmp_path, in_one_process, clean_idle_machine, monkeypatch):
    out = tmp_path / "curves.json"
    out.write_text('{"images": 1, "batch": 2}')
    times = iter([3.0, 1.0, 8.0])
    monkeypatch.setitem(AXES, "batch", Axis("images", (1,), {"step": lambda *_: {"time, ms": next(times)}}))
    assert cost_curves.main(["batch", "--rounds", "3", "--out", str(out)]) == 0
    records = json.loads(out.read_text())
    assert records["images"] == 1
    assert records["batch"]["columns"]["step: time, ms"]["1"] == {
        "n": 3,
        "median": 3.0,
        "min": 1.0,
        "q1": 2.0,
        "q3": 5.5,
        "max": 8.0,
    }
    assert "3.00 (1.00 to 8.00)" in cost_curves.format_record(records["batch"])


def test_table_omits_times_of_a_loaded_machine(tmp_path, in_one_process, clean_idle_machine, monkeypatch):
    out = tmp_path / "curves.json"
    values = {"time, ms": 1.0, "rate, img/s": 2.0, "memory, MiB": 3.0}
    monkeypatch.setitem(AXES, "batch", Axis("images", (1,), {"step": lambda *_: values}))
    monkeypatch.setattr(cost_curves.LoadMeter, "read", lambda _: {"load_1min": 7.5, "is_idle": False})
    assert cost_curves.main(["batch", "--out", str(out)]) == 0
    table = cost_curves.format_record(json.loads(out.read_text())["batch"])
    assert "memory, MiB" in table
    assert "time, ms" not in table
    assert "rate, img/s" not in table
    assert "load 7.5, other processes busy" in table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sizes"], "sizes: no such axis. Choose from images, workers, open_images, batch"),
        (["--rounds", "0"], "--rounds 0"),
        (["--page", "nowhere.md", "batch"], "nowhere.md: No such file"),
    ],
)
def test_invalid_input_gives_one_message_before_measuring(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost_curves, "measure", lambda *_: pytest.fail("measured"))
    assert cost_curves.main([*flags, "--out", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_page_without_marker_is_rejected(tmp_path):
    (tmp_path / "page.md").write_text("<!-- boxes -->\n<!-- end -->\n")
    with pytest.raises(InputError, match="no marker for table images"):
        split_at_marker(tmp_path / "page.md", "images")


def test_workers_do_not_copy_the_annotations(small_toy):
    ranks = DistContext(0, 1, torch.device("cpu"))
    private = []
    for extra_mib in (0, 200):
        data = SSDTrainSource(Config(data_dir=small_toy, num_classes=4, batch_size=4, num_workers=1), ranks, seed=0)
        images = data.train_loader.dataset
        extra = np.ones((extra_mib * 2**16, 4), dtype=np.float32)
        images.split = replace(images.split, boxes_xyxy=np.concatenate([images.split.boxes_xyxy, extra]))
        rank_batches = data.train_batches(1)
        next(rank_batches)
        (worker,) = multiprocessing.active_children()
        private.append(process_mib(worker.pid, "smaps_rollup", "Private_Clean", "Private_Dirty"))
        del rank_batches, data, images
    assert private[1] - private[0] < 50


def test_page_shows_the_records():
    page = (ROOT / "docs" / "PERFORMANCE.md").read_text()
    records = json.loads(cost_curves.RECORDS.read_text())
    assert set(records) <= set(AXES)
    for record in records.values():
        assert not record["machine"]["commit"].endswith("-dirty")
        assert cost_curves.format_record(record) in page


def test_open_images_are_generated_as_the_download_reads_them(tmp_path, capsys):
    open_images.generate(tmp_path / "split", 7)
    open_images.convert(tmp_path / "split")
    assert "7 images, 84 boxes" in capsys.readouterr().out
    arrays = coco_arrays.arrays_path(tmp_path / "split" / ANNOTATION_FILE)
    content = arrays.read_bytes()
    open_images.read_json(tmp_path / "split")
    open_images.read_arrays(tmp_path / "split")
    assert arrays.read_bytes() == content
