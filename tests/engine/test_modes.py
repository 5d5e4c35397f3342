"""Output and files of the modes evaluate, bench-train and bench-infer."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import annotation_file
import commands
import processes
from config_files import set_only
from detection.engine import throughput, train_loop
from detection.evaluation.coco_metric import COCO_STATS
from detection.synthetic import toy
from narrow_ssd import make_narrow
from ssd import checkpoint_names, train
from ssd.model import SSD300
from torchrun import NARROW_SSD300, launch

BENCHMARK = ("--batch-size", "2", "--eval-batch-size", "2", "--benchmark-steps", "1", "--benchmark-warmup", "0")
BENCHMARK += ("--score-threshold", "0.5")


@pytest.fixture
def environment(four_image_coco, tmp_path, monkeypatch):
    values = {"DATADIR": four_image_coco, "RUN_DIR": tmp_path / "run", "SSD_DATASET": "toy", "SSD_NUM_CLASSES": 4}
    set_only(monkeypatch, values | {"SSD_DEVICE": "cpu", "SSD_NUM_WORKERS": 0, "SSD_BACKBONE": "resnet18"})
    make_narrow(monkeypatch)


@pytest.fixture(scope="module")
def state():
    """Random weights, except that the second anchor of the 19x19 map always detects a square of its size."""
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        make_narrow(patch)
        state = SSD300(4, "resnet18").state_dict()
    per_anchor = [state[f"heads.1.{kind}"].unflatten(0, (6, 8)) for kind in ("weight", "bias")]
    for tensor in per_anchor:
        tensor[1] = 0
    per_anchor[1][1, 4 + 2] = 5
    return state


def has_no_mlperf_log(run, shown):
    assert ":::MLLOG" not in shown
    assert "RESULT" not in shown
    assert "compliance" not in shown
    return not list(run.glob("result_*"))


def test_public_checkpoint_evaluates_to_the_metrics_of_its_detections(
    environment, state, four_image_coco, tmp_path, monkeypatch, capsys
):
    data = tmp_path / "val_only"  # evaluation needs no training images
    shutil.copytree(four_image_coco, data, ignore=shutil.ignore_patterns("train2017", "instances_train2017.json"))
    monkeypatch.setenv("DATADIR", str(data))
    torch.save({"model": checkpoint_names.to_reference(state)}, tmp_path / "reference.pt")
    summary = tmp_path / "summary.json"
    flags = ("--mode", "evaluate", "--weights", str(tmp_path / "reference.pt"), "--summary-json", str(summary))
    assert commands.ssd("preflight", *flags) == 0
    assert capsys.readouterr().out.splitlines()[2] == "evaluate"
    assert train.main(list(flags)) == 0
    shown = capsys.readouterr().out
    assert has_no_mlperf_log(tmp_path / "run", shown)
    assert "checkpoint of the MLPerf reference" in shown
    metrics = json.loads(summary.read_text())["metrics"]
    assert tuple(metrics) == COCO_STATS
    for name, value in metrics.items():
        assert f" {name} " in shown or f" {name}\n" in shown
        assert "-" if value == -1 else f"{value:.3f}" in shown
    coco_gt = COCO(str(data / "annotations" / "instances_val2017.json"))
    evaluation = COCOeval(coco_gt, coco_gt.loadRes(str(tmp_path / "run" / "detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    np.testing.assert_allclose(list(metrics.values()), evaluation.stats, atol=1e-3)
    assert metrics["AR100"] > 0, "no detections to compare"


@pytest.mark.parametrize("eval_images", ["all", "with-boxes"])
def test_images_without_annotations_get_detections_and_no_metrics(
    environment, state, four_image_coco, tmp_path, capsys, eval_images
):
    content = annotation_file.contents(four_image_coco, "val")
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    torch.save(state, tmp_path / "state.pt")
    summary = tmp_path / "summary.json"
    flags = ["--mode", "evaluate", "--weights", str(tmp_path / "state.pt"), "--summary-json", str(summary)]
    flags += ["--val-images", str(four_image_coco / "val2017"), "--val-annotations", str(tmp_path / "test.json")]
    flags += ["--eval-images", eval_images]
    assert commands.ssd("preflight", *flags) == 0
    assert "no annotations: the run writes its detections, and no AP" in capsys.readouterr().err
    assert train.main(flags) == 0
    shown = capsys.readouterr().out
    assert "no metrics: the evaluation images have no annotations" in shown
    assert "AP" not in shown
    assert json.loads(summary.read_text())["metrics"] == {}
    detections = json.loads((tmp_path / "run" / "detections.json").read_text())
    assert {row["image_id"] for row in detections} == {image["id"] for image in content["images"]}


def test_checkpoint_of_a_run_evaluates_to_the_metrics_of_the_run(environment, state, tmp_path, monkeypatch):
    torch.save(state, tmp_path / "start.pt")
    flags = ("--batch-size", "4", "--epochs", "1", "--base-lr", "1e-12", "--target", "0", "--division", "open")
    start = ("--weights", str(tmp_path / "start.pt"), "--pretrained-backbone", "absent.pth")
    assert train.main([*flags, *start, "--summary-json", str(tmp_path / "trained.json")]) == 0
    run = tmp_path / "run"
    assert '"key": "checkpoint", "value": "start.pt"' in (run / "result_0.txt").read_text()
    (saved,) = (run / "checkpoints").iterdir()
    trained = torch.load(saved, weights_only=True)["model"]
    torch.testing.assert_close(trained["heads.0.weight"], state["heads.0.weight"], rtol=0, atol=1e-6)
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "again"))
    again = ("--mode", "evaluate", "--weights", str(saved), "--summary-json", str(tmp_path / "again.json"))
    assert train.main(list(again)) == 0
    metrics = [json.loads((tmp_path / name).read_text())["metrics"] for name in ("trained.json", "again.json")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("mode", "phases"),
    [("bench-train", ["data", "forward", "backward", "optimizer"]), ("bench-infer", ["data", "forward", "detection"])],
)
def test_throughput_modes_time_the_steps_of_the_training_loop(environment, tmp_path, monkeypatch, capsys, mode, phases):
    steps, real_step, summary = [], train_loop.train_step, tmp_path / "summary.json"
    monkeypatch.setattr(train_loop, "train_step", lambda *args: (steps.append(args[1]), real_step(*args))[1])
    assert train.main([*BENCHMARK, "--mode", mode, "--summary-json", str(summary)]) == 0
    shown = capsys.readouterr().out
    assert has_no_mlperf_log(tmp_path / "run", shown)
    # Per input: one timed step and one with phases. Before them, one warm-up step.
    assert len(steps) == (5 if mode == "bench-train" else 0)
    values = json.loads(summary.read_text())
    assert 0 < values["init_s"] < 60
    assert values["peak_memory_gib"] > 0.1
    assert [result["input"] for result in values["results"]] == ["real", "synthetic"]
    for result in values["results"]:
        rate, latency = result["images_per_s"], result["latency_ms"]
        assert rate["min"] <= rate["average"] <= rate["max"]
        assert rate["average"] == pytest.approx(2 / (latency["average"] / 1000))
        assert latency["median"] <= latency["p95"] <= latency["max"]
        assert list(result["time_fraction"]) == phases
        assert sum(result["time_fraction"].values()) == pytest.approx(1)
        assert result["time_fraction"]["forward"] > 0.1
        assert f"average {rate['average']:.1f}" in shown
    events = processes.metrics(tmp_path / "run")
    assert [event["event"] for event in events] == ["run_start", "summary"]
    assert events[1]["results"] == values["results"]


def test_synthetic_input_needs_no_data_set(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATADIR", str(tmp_path / "absent"))
    flags = [*BENCHMARK, "--mode", "bench-infer", "--benchmark-input", "synthetic", "--dataset", "coco2017"]
    assert commands.ssd("preflight", *flags) == 0
    assert "no data set is read" in capsys.readouterr().err
    assert train.main(flags) == 0
    assert "real input" not in capsys.readouterr().out


def test_timings_add_throughput_and_take_the_slowest_latency():
    ranks = np.array([[[8, 1.0], [8, 2.0], [8, 1.0]], [[8, 2.0], [4, 1.0], [8, 1.0]]])
    result = throughput.summarize_timings(ranks)
    assert result["images_per_s"] == pytest.approx({"average": 24 / 4 + 20 / 4, "median": 12, "min": 8, "max": 16})
    assert result["latency_ms"] == pytest.approx({"average": 5000 / 3, "median": 2000, "p95": 2000, "max": 2000})


@pytest.mark.parametrize("mode", ["bench-train", "bench-infer"])
def test_two_ranks_measure_jointly(environment, tmp_path, mode):
    summary = tmp_path / "summary.json"
    flags = (*BENCHMARK, "--mode", mode, "--summary-json", str(summary))
    done = launch(2, tmp_path / "run", *flags, program=NARROW_SSD300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("synthetic input") == 1
    assert [result["input"] for result in json.loads(summary.read_text())["results"]] == ["real", "synthetic"]


def test_weights_of_another_network_are_rejected_before_the_timer_starts(environment, state, tmp_path, capsys):
    torch.save(state, tmp_path / "four.pt")
    flags = ["--mode", "evaluate", "--weights", str(tmp_path / "four.pt"), "--network", "ssd300-r50"]
    for main in (partial(commands.ssd, "preflight"), lambda *words: train.main(list(words))):
        assert main(*flags) == 2
        shown = capsys.readouterr()
        assert shown.err.count("error:") == 1
        assert "Pass --network ssd300-r34 --backbone resnet18, or name another file" in shown.err
        assert "Traceback" not in shown.err


def test_ssd300_v1_1_trains_on_a_last_batch_of_one_image(environment, tmp_path, monkeypatch):
    toy.generate(tmp_path / "three", toy.ToySpec(train_images=3, val_images=1, seed=1))
    monkeypatch.setenv("DATADIR", str(tmp_path / "three"))
    flags = ("--network", "ssd300-r50", "--no-weight-decay-on-bias-and-norm", "--epochs", "1", "--target", "0")
    assert train.main([*flags, "--batch-size", "2", "--division", "open", "--log-every", "1"]) == 0
    assert np.isfinite(processes.losses(tmp_path / "run")).tolist() == [True, True]
    assert processes.metrics(tmp_path / "run", "epoch")[0]["images"] == 3
