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
from perf.page import update_marker
from ssd.config import Config
from ssd.data import SSDTrainSource

NAMES = [axis.name for axis in curves.axes()]


@pytest.fixture
def in_one_process(monkeypatch):
    """Points in this process, since each new one imports torch."""
    monkeypatch.setattr(footprint, "in_a_process", lambda function, *arguments: function(*arguments))


def points(works, least_s):
    return [{"work": work, "min": least} for work, least in zip(works, least_s, strict=True)]


def test_the_exponent_is_that_of_the_upper_end():
    works = [0, 1, 10, 100, 1000]
    assert growth.exponent(points(works, [5, 5, 10**2, 100**2, 1000**2])) == pytest.approx(2, abs=0.01)
    assert growth.exponent(points([0, 7], [1, 2])) is None


def test_what_is_reported_is_the_median_over_rounds_with_the_spread():
    values = {("a", 1): [{"time": 3.0}, {"time": 1.0}, {"time": 8.0}], ("b", 1): [{"rate": 2.0}] * 3}
    a, b = growth.series(values)
    (point,) = a["points"]
    assert [point[key] for key in ("work", "n", "median", "min", "max")] == [1, 3, 3.0, 1.0, 8.0]
    assert (a["measure"], a["unit"], b["measure"], b["unit"]) == ("time", "ms", "rate", "img/s")
    assert b["exponent"] is None


def allocate(mib):
    return footprint.cost(lambda: np.ones(mib * 2**20, dtype=np.uint8))


def test_the_peak_of_memory_is_that_of_the_call_and_not_of_what_came_before():
    bytearray(512 * 2**20)
    assert footprint.run_in_subprocess(allocate, 64)["memory"] == pytest.approx(64, abs=8)


@pytest.mark.parametrize("candidates", [1, 100, 10_000, 100_000])
def test_the_made_up_logits_have_as_many_candidates(candidates):
    scores = curves.synthetic_logits(candidates).softmax(dim=-1)[..., 1:]
    assert (scores > 0.05).sum(dim=(1, 2)).tolist() == [candidates] * curves.BATCH_SIZE


@pytest.mark.slow
def test_a_whole_run_writes_what_it_measured(tmp_path, in_one_process, capsys):
    page = tmp_path / "page.md"
    page.write_text("".join(f"# {name}\n<!-- {name} -->\nold\n<!-- end -->\n" for name in NAMES) + "the end\n")
    assert growth.main(["--quick", "--rounds", "1", "--out", str(tmp_path), "--page", str(page)]) == 0
    records = json.loads((tmp_path / "growth.json").read_text())
    assert list(records) == NAMES
    shown = capsys.readouterr().out
    for axis in curves.axes():
        assert (tmp_path / f"{axis.name}.png").stat().st_size > 10_000
        record = records[axis.name]
        assert {"hardware", "commit"} <= record["machine"].keys()
        measured = {(s["curve"], point["work"]) for s in record["series"] for point in s["points"]}
        assert measured == {(curve.name, work) for curve in axis.curves for work in curve.quick}
        assert all(point["min"] > 0 for s in record["series"] for point in s["points"])
        assert growth.table(record) in shown
        assert growth.table(record) in page.read_text()
    assert "old" not in page.read_text()
    assert page.read_text().endswith("the end\n")


def test_a_run_of_one_axis_keeps_what_is_known_of_the_others(tmp_path, in_one_process):
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
        (["pictures"], "pictures: not measured here. What is: images, boxes"),
        (["--rounds", "0"], "--rounds 0"),
        (["--page", "nowhere.md", "batch"], "nowhere.md: No such file"),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_measured(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "measure", lambda *_, **__: pytest.fail("it measured"))
    assert growth.main([*flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("<!-- boxes -->\n<!-- end -->\n")
    with pytest.raises(InputError, match="no place for a table: <!-- images -->"):
        update_marker(tmp_path / "page.md", "images")


def test_workers_have_no_copy_of_the_annotations(small_toy):
    ranks = DistContext(0, 1, torch.device("cpu"))
    private = []
    for extra_mib in (0, 200):
        data = SSDTrainSource(Config(data_dir=small_toy, num_classes=4, batch_size=4, num_workers=1), ranks, seed=0)
        images = data.train_loader.dataset
        more = np.ones((extra_mib * 2**16, 4), dtype=np.float32)
        images.split = replace(images.split, boxes_xyxy=np.concatenate([images.split.boxes_xyxy, more]))
        shares = data.train_batches(1)
        next(shares)
        (worker,) = multiprocessing.active_children()
        private.append(footprint.memory_mib("smaps_rollup", "Private_Clean", "Private_Dirty", process=worker.pid))
        del shares, data, images
    assert private[1] - private[0] < 50


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "PERFORMANCE.md").read_text()
    records = json.loads((growth.OUT / "growth.json").read_text())
    assert set(records) <= set(NAMES)
    for name in records:
        assert growth.table(records[name]) in page
        assert f"performance/{name}.png" in page
        assert (growth.OUT / f"{name}.png").is_file()
