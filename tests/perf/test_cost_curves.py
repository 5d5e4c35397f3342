import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch

from detection.config.settings import InputError
from detection.runtime.distributed import DistContext
from paths import ROOT
from perf import curves, footprint, growth
from perf.page import split_at_marker
from ssd.config import Config
from ssd.data import SSDTrainSource

NAMES = [axis.name for axis in curves.axes()]


@pytest.fixture
def in_one_process(monkeypatch):
    """Measure points in this process, since each new process imports torch."""
    monkeypatch.setattr(footprint, "run_in_subprocess", lambda function, *arguments: function(*arguments))


def points(works, times):
    return [{"work": work, "min": time} for work, time in zip(works, times, strict=True)]


def test_exponent_is_fitted_to_the_upper_end():
    works = [0, 1, 10, 100, 1000]
    assert growth.exponent(points(works, [5, 5, 10**2, 100**2, 1000**2])) == pytest.approx(2, abs=0.01)
    assert growth.exponent(points([0, 7], [1, 2])) is None


def test_points_have_median_and_range_over_rounds():
    values = {("a", 1): [{"time": 3.0}, {"time": 1.0}, {"time": 8.0}], ("b", 1): [{"rate": 2.0}] * 3}
    a, b = growth.series(values)
    (point,) = a["points"]
    assert [point[key] for key in ("work", "n", "median", "min", "max")] == [1, 3, 3.0, 1.0, 8.0]
    assert (a["measure"], a["unit"], b["measure"], b["unit"]) == ("time", "ms", "rate", "img/s")
    assert b["exponent"] is None


def allocate(mib):
    return footprint.cost(lambda: np.ones(mib * 2**20, dtype=np.uint8))


def test_peak_memory_excludes_earlier_allocations():
    bytearray(512 * 2**20)
    assert footprint.run_in_subprocess(allocate, 64)["memory"] == pytest.approx(64, abs=8)


@pytest.mark.parametrize("candidates", [1, 100, 10_000, 100_000])
def test_synthetic_logits_have_the_number_of_candidates(candidates):
    scores = curves.synthetic_logits(candidates).softmax(dim=-1)[..., 1:]
    assert (scores > 0.05).sum(dim=(1, 2)).tolist() == [candidates] * curves.BATCH_SIZE


@pytest.mark.slow
def test_command_writes_tables_plots_and_records(tmp_path, in_one_process, capsys):
    page = tmp_path / "page.md"
    page.write_text("".join(f"# {name}\n<!-- {name} -->\nold\n<!-- end -->\n" for name in NAMES) + "the end\n")
    assert growth.main(["--quick", "--rounds", "1", "--out", str(tmp_path), "--page", str(page)]) == 0
    records = json.loads((tmp_path / "growth.json").read_text())
    assert list(records) == NAMES
    output = capsys.readouterr().out
    for axis in curves.axes():
        assert (tmp_path / f"{axis.name}.png").stat().st_size > 10_000
        record = records[axis.name]
        assert {"hardware", "commit"} <= record["machine"].keys()
        measured = {(s["curve"], point["work"]) for s in record["series"] for point in s["points"]}
        assert measured == {(curve.name, work) for curve in axis.curves for work in curve.quick}
        assert all(point["min"] > 0 for s in record["series"] for point in s["points"])
        assert growth.table(record) in output
        assert growth.table(record) in page.read_text()
    assert "old" not in page.read_text()
    assert page.read_text().endswith("the end\n")


def test_measuring_one_axis_keeps_the_records_of_others(tmp_path, in_one_process):
    (tmp_path / "growth.json").write_text('{"images": 1, "batch": 2}')
    axis = curves.Axis("batch", "images", (curves.Curve("nothing", (), (1,), lambda work, folder: {"time": 1.0}),))
    growth.measure_all([axis], tmp_path, None, rounds=2, quick=True)
    records = json.loads((tmp_path / "growth.json").read_text())
    assert records["images"] == 1
    (series,) = records["batch"]["series"]
    assert [(point["work"], point["n"], point["median"]) for point in series["points"]] == [(1, 2, 1.0)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sizes"], "sizes: no such axis. Choose from images, boxes"),
        (["--rounds", "0"], "--rounds 0"),
        (["--page", "nowhere.md", "batch"], "nowhere.md: No such file"),
    ],
)
def test_invalid_input_gives_one_message_before_measuring(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "measure", lambda *_, **__: pytest.fail("measured"))
    assert growth.main([*flags, "--out", str(tmp_path)]) == 2
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
        private.append(footprint.memory_mib("smaps_rollup", "Private_Clean", "Private_Dirty", process=worker.pid))
        del rank_batches, data, images
    assert private[1] - private[0] < 50


def test_page_shows_the_records():
    page = (ROOT / "docs" / "PERFORMANCE.md").read_text()
    records = json.loads((growth.OUT / "growth.json").read_text())
    assert set(records) <= set(NAMES)
    for name in records:
        assert growth.table(records[name]) in page
        assert f"performance/{name}.png" in page
        assert (growth.OUT / f"{name}.png").is_file()
