"""Complete runs: logs, exit status, and equality across numbers of ranks."""

import io
import json
import re
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import processes
from detection.data import coco
from detection.engine import finalize
from detection.evaluation import sample_predictions
from detection.runtime import device
from detection.synthetic import toy
from mlperf import check
from mlperf.log import read
from narrow_ssd import make_narrow
from perf import record
from ssd import train
from ssd.evaluator import SSDEvaluator
from ssd.model import SSD300
from torchrun import FULL_SSD300, NARROW_SSD300, launch, run_ranks

FEW_STEPS = ("--epochs", "1", "--batch-size", "2", "--num-workers", "0", "--log-every", "1", "--warmup-steps", "1")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Toy data set of 4 training and 4 evaluation images."""
    folder = tmp_path_factory.mktemp("toy_data") / "data"
    toy.generate(folder, toy.ToySpec(train_images=4, val_images=4, seed=1))
    return folder


def variables(toy_data, run):
    """Return the variables that config_toy.sh and ./run_and_time.sh export."""
    own = {"SSD_DATASET": "toy", "SSD_DIVISION": "open", "SSD_DEVICE": "cpu"}
    return own | {"DATADIR": str(toy_data), "RUN_DIR": str(run)}


@pytest.fixture
def environment(request, toy_data, tmp_path, monkeypatch):
    """Environment of a run in tmp_path, of a narrow network unless the parameter is "full"."""
    for name, value in variables(toy_data, tmp_path / "run").items():
        monkeypatch.setenv(name, value)
    if getattr(request, "param", "narrow") == "narrow":
        make_narrow(monkeypatch)


@pytest.fixture(scope="module")
def full_run(toy_data, tmp_path_factory):
    """Folder and output of a run of the real network that reaches its target."""
    folder, output = tmp_path_factory.mktemp("full") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        for name, value in variables(toy_data, folder).items():
            patch.setenv(name, value)
        assert train.main([*FEW_STEPS, "--epochs", "2", "--eval-epochs", "1,2", "--target", "0"]) == 0
    return folder, output.getvalue()


def events(folder: Path):
    return read(folder / "result_0.txt")


def keys(folder: Path):
    return [event.key for event in events(folder)]


def test_run_that_reaches_its_target_logs_all_events_in_order(full_run):
    run, shown = full_run
    order = [
        key
        for key in keys(run)
        if key.endswith(("_start", "_stop")) or key in ("eval_accuracy", "seed", "train_samples")
    ]
    assert order == [
        "init_start", "seed", "init_stop", "run_start", "train_samples", "block_start", "epoch_start", "epoch_stop",
        "block_stop", "eval_start", "eval_accuracy", "eval_stop", "run_stop",
    ]  # fmt: skip
    assert events(run)[-1].metadata["status"] == "success"
    by_key = {event.key: event for event in events(run)}
    assert by_key["dataset"].value == "toy"
    assert by_key["dataset"].metadata["is_coco2017"] is False
    assert by_key["epoch_start"].metadata["epoch_num"] == 1
    for ruleset in ("1.0.0", "1.1.0"):
        assert check.check(run / "result_0.txt", ruleset).passed, ruleset
    assert "MLPerf compliance (1.1.0): PASS" in shown
    assert "above the target 0.0" in shown
    assert "after epoch 1, target 0.0: target reached" in shown
    assert "pycocotools confirms the final metrics" in shown
    assert str(run) in shown
    assert ":::MLLOG" not in shown
    assert re.search(r"^epoch 1/2: loss \d+\.\d{3}, \d+\.\d img/s, AP 0\.\d{4}, 0:\d\d:\d\d$", shown, re.MULTILINE)


def test_echo_log_prints_every_line_of_the_log(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ECHO_LOG", "1")
    train.main([*FEW_STEPS, "--max-steps", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(":::MLLOG")]
    assert lines == (tmp_path / "run" / "result_0.txt").read_text().splitlines()


def test_run_folder_has_config_metrics_checkpoint_and_detections(full_run):
    run, _ = full_run
    assert json.loads((run / "config.json").read_text())["batch_size"] == 2
    steps = processes.metrics(run, "step")
    assert [step["step"] for step in steps] == [0, 1]
    assert all(np.isfinite(step["loss"]) and step["images_per_s"] > 0 for step in steps)
    assert [evaluation["epoch"] for evaluation in processes.metrics(run, "evaluation")] == [1]
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = torch.load(checkpoint, weights_only=True)
    SSD300(4).load_state_dict(state["model"])
    assert [category["name"] for category in state["categories"]] == ["disc", "square", "triangle"]
    assert json.loads(state["config"])["num_classes"] == 4
    assert (state["epoch"], state["step"]) == (1, 2)
    assert isinstance(json.loads((run / "detections.json").read_text()), list)
    classes = json.loads((run / "classes.json").read_text())
    assert [row["name"] for row in classes] == ["disc", "square", "triangle"]
    assert sum(row["objects"] for row in classes) > 0
    summary = record.summarize(run / "result_0.txt")
    assert (summary["status"], summary["epoch_s"]["n"], list(summary["ap_by_epoch"])) == ("success", 1, [1])
    assert sample_predictions.write_samples(run) > 0


def test_custom_data_set_needs_only_four_paths(toy_data, tmp_path, monkeypatch, capsys):
    make_narrow(monkeypatch)
    annotations = {}
    for split in ("train", "val"):  # unordered ids with gaps, and two classes
        content = json.loads((toy_data / f"annotations/instances_{split}2017.json").read_text())
        content["categories"] = [{"id": 70, "name": "round"}, {"id": 9, "name": "with corners"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 70 if annotation["category_id"] == 1 else 9
        if split == "val":
            empty = content["images"][0]["id"]
            content["annotations"] = [row for row in content["annotations"] if row["image_id"] != empty]
        annotations[split] = tmp_path / f"{split}.json"
        annotations[split].write_text(json.dumps(content))
    monkeypatch.setenv("SSD_DEVICE", "cpu")
    monkeypatch.setenv("DATADIR", str(tmp_path / "absent"))
    flags = ["--run-dir", str(tmp_path / "run"), "--target", "0", "--eval-images", "with-boxes"]
    for split, file in annotations.items():
        flags += [f"--{split}-images", str(toy_data / f"{split}2017"), f"--{split}-annotations", str(file)]
    assert train.main([*FEW_STEPS, *flags]) == 0
    (path,) = (tmp_path / "run/checkpoints").iterdir()
    state = torch.load(path, weights_only=True)
    assert state["categories"] == [{"id": 9, "name": "with corners"}, {"id": 70, "name": "round"}]
    SSD300(3).load_state_dict(state["model"])
    assert {event.value for event in events(tmp_path / "run") if event.key == "dataset"} == {"custom"}
    detections = json.loads((tmp_path / "run/detections.json").read_text())
    assert {detection["category_id"] for detection in detections} <= {9, 70}
    assert empty not in {detection["image_id"] for detection in detections}
    assert [event.value for event in events(tmp_path / "run") if event.key == "eval_samples"] == [3]
    summary = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert summary["other_eval_images"]["images"] == 4
    assert set(summary["other_eval_images"]["metrics"]) == set(summary["metrics"])
    assert "with --eval-images all (4 images): AP 0." in capsys.readouterr().out


def test_wrong_number_of_classes_is_rejected_without_preflight(environment, capsys):
    assert train.main([*FEW_STEPS, "--num-classes", "7"]) == 2
    assert "make num_classes 4, not 7" in capsys.readouterr().err


@pytest.mark.parametrize("ruleset", ["0.7.0", "1.0.0", "1.1.0"])
def test_official_checker_rejects_a_short_closed_run_only_for_its_accuracy(environment, tmp_path, ruleset):
    decay = ("--lr-decay-epochs", "44,55", "--ruleset", ruleset, "--division", "closed")
    assert train.main([*FEW_STEPS, *decay, "--target", "0"]) == 0
    verdict = check.check(tmp_path / "run" / "result_0.txt", ruleset)
    assert not verdict.passed
    assert len(verdict.messages) == 1
    assert "eval_accuracy" in verdict.messages[0]


def test_run_below_its_target_exits_with_3_and_is_logged_as_aborted(environment, tmp_path):
    assert train.main([*FEW_STEPS, "--target", "0.99"]) == 3
    assert events(tmp_path / "run")[-1].metadata["status"] == "aborted"


@pytest.mark.skipif(not device.CAN_COMPILE, reason="--compile needs torch 2.6")
def test_compilation_failure_is_rejected_or_falls_back_to_eager(environment, tmp_path, capsys, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, *_, **__: compiled(function, backend=broken))
    assert train.main([*FEW_STEPS, "--compile", "on"]) == 2
    shown = capsys.readouterr().err
    assert "error: --compile on: not possible on this machine (" in shown
    assert "no compiler here" in shown
    monkeypatch.setattr(device, "should_compile", lambda choice, device: True)
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "auto"))
    try:
        assert train.main([*FEW_STEPS, "--target", "0"]) == 0
    finally:
        torch.compiler.set_stance("default")
    assert "not compiled: not possible on this machine" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not device.CAN_COMPILE, reason="--compile needs torch 2.6")
def test_compiled_training_matches_eager_training(environment, tmp_path, monkeypatch, capsys):
    for choice in ("off", "on"):
        monkeypatch.setenv("RUN_DIR", str(tmp_path / choice))
        same = ("--seed", "3", "--precision", "fp32", "--batch-size", "3", "--epochs", "2", "--eval-epochs", "2")
        assert train.main([*FEW_STEPS, *same, "--target", "0", "--compile", choice]) == 0
    assert "s, compiled" in capsys.readouterr().out
    on, off = processes.losses(tmp_path / "on"), processes.losses(tmp_path / "off")
    np.testing.assert_allclose(on[:3], off[:3], rtol=1e-3)
    np.testing.assert_allclose(on, off, rtol=0.05)  # rounding changes the choice of hard negatives


def test_metrics_that_pycocotools_does_not_confirm_fail_the_run(environment, capsys, monkeypatch):
    monkeypatch.setattr(SSDEvaluator, "verify_official", lambda self: {"AP": 0.123})
    assert train.main([*FEW_STEPS, "--target", "0"]) == 1
    assert "pycocotools computes AP 0.123" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(0.0, 0), (3e-10, 0), (2e-9, 1)])
def test_metrics_are_confirmed_up_to_rounding(capsys, error, status):
    metrics = {"AP": 0.25, "AP50": 0.5}
    official = metrics | {"AP50": 0.5 + error}
    run = SimpleNamespace(logger=SimpleNamespace(metadata={"targets": {"AP": 0.2}}))
    assert finalize.is_confirmed(metrics, official, run) == (status == 0)
    shown = capsys.readouterr()
    assert (f"{error:.1e}" in shown.out + shown.err) == bool(error)


def test_non_finite_loss_aborts_the_run(environment, tmp_path, capsys):
    state = train.SSD300(4).backbone.state_dict()
    state["conv1.weight"] = torch.full_like(state["conv1.weight"], float("nan"))
    np.savez(tmp_path / "poison.npz", **{name: t.numpy() for name, t in state.items()})
    assert train.main([*FEW_STEPS, "--pretrained-backbone", str(tmp_path / "poison.npz")]) == 1
    last = events(tmp_path / "run")[-1]
    assert (last.key, last.metadata["status"]) == ("run_stop", "aborted")
    assert "eval_start" not in keys(tmp_path / "run")
    shown = capsys.readouterr()
    assert "non-finite loss: nan at step 0 of epoch 1" in shown.err
    assert "Traceback" not in shown.err


def test_existing_log_is_not_overwritten(environment, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result_0.txt").write_text("precious\n")
    assert train.main([*FEW_STEPS]) == 2
    assert (tmp_path / "run" / "result_0.txt").read_text() == "precious\n"
    assert "already exists" in capsys.readouterr().err


def test_seeds_are_random_unless_set(environment, tmp_path, monkeypatch):
    seeds = []
    for name, flags in (("a", ()), ("b", ()), ("c", ("--seed", "5")), ("d", ("--seed", "5"))):
        monkeypatch.setenv("RUN_DIR", str(tmp_path / name))
        train.main([*FEW_STEPS, "--batch-size", "1", "--max-steps", "1", *flags])
        seeds.append(next(event.value for event in events(tmp_path / name) if event.key == "seed"))
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [5, 5]
    b, c, d = (weights(tmp_path / name) for name in ("b", "c", "d"))
    assert all(torch.equal(c[name], d[name]) for name in c)
    assert not torch.equal(b["extras.0.conv1.weight"], c["extras.0.conv1.weight"])


def weights(run: Path):
    (path,) = (run / "checkpoints").iterdir()
    return torch.load(path, weights_only=True)["model"]


def scores(run: Path):
    """Return the number of detections and their mean score for each image with detections."""
    by_image = defaultdict(list)
    for detection in json.loads((run / "detections.json").read_text()):
        by_image[detection["image_id"]].append(detection["score"])
    return np.array([[len(values), np.mean(values)] for _, values in sorted(by_image.items())])


@pytest.mark.parametrize(
    ("environment", "program", "batch_size"),
    [("narrow", NARROW_SSD300, 2), pytest.param("full", FULL_SSD300, 8, marks=pytest.mark.slow)],
    indirect=["environment"],
)
def test_two_ranks_match_one_rank_and_gradient_accumulation(environment, tmp_path, monkeypatch, program, batch_size):
    data = tmp_path / "data"
    toy.generate(data, toy.ToySpec(train_images=2 * batch_size, val_images=2, seed=2))
    monkeypatch.setenv("DATADIR", str(data))
    same = ("--seed", "3", "--precision", "fp32", "--freeze-batch-norm", "--base-lr", "1e-4", "--epochs", "1")
    same += ("--num-workers", "1", "--log-every", "1", "--warmup-steps", "0", "--target", "0")
    whole, half = ("--batch-size", str(batch_size)), ("--batch-size", str(batch_size // 2))
    runs = {"one": whole, "parts": (*whole, "--grad-accum-steps", "2")}
    for name, flags in runs.items():
        monkeypatch.setenv("RUN_DIR", str(tmp_path / name))
        assert train.main([*same, *flags]) == 0
    done = launch(2, tmp_path / "two", *same, *half, "--image-cache", "host", program=program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1: ") == 1, "only the first rank prints"
    assert len(processes.losses(tmp_path / "one")) >= 2
    for name in ("two", "parts"):
        np.testing.assert_allclose(processes.losses(tmp_path / name), processes.losses(tmp_path / "one"), rtol=1e-5)
        for key, tensor in weights(tmp_path / "one").items():
            torch.testing.assert_close(
                weights(tmp_path / name)[key], tensor, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}"
            )
    results = {name: scores(tmp_path / name) for name in ("one", "two", "parts")}
    assert len(results["one"]) == 2, "every evaluation image counts once"
    for name in ("two", "parts"):
        np.testing.assert_allclose(results[name], results["one"], atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not device.CAN_COMPILE, reason="--compile needs torch 2.6")
def test_two_compiled_ranks_train_as_two_eager_ones(environment, tmp_path):
    same = (*FEW_STEPS, "--batch-size", "1", "--seed", "3", "--precision", "fp32", "--base-lr", "1e-4", "--target", "0")
    for choice in ("on", "off"):
        variables = {"RUN_DIR": str(tmp_path / choice), "COMPILE_BACKEND": "aot_eager"}
        done = run_ranks(2, *NARROW_SSD300, *same, "--compile", choice, **variables)
        assert done.returncode == 0, done.stderr
        assert (", compiled" in done.stdout) == (choice == "on")
    assert len(processes.losses(tmp_path / "on")) >= 2
    np.testing.assert_allclose(processes.losses(tmp_path / "on"), processes.losses(tmp_path / "off"), rtol=1e-4)
    for key, tensor in weights(tmp_path / "off").items():
        torch.testing.assert_close(weights(tmp_path / "on")[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_batch_norm_statistics_are_averaged_over_ranks(environment, tmp_path, monkeypatch):
    data = tmp_path / "data"
    toy.generate(data, toy.ToySpec(train_images=2, val_images=1, seed=1))
    monkeypatch.setenv("DATADIR", str(data))
    same = ("--seed", "3", "--precision", "fp32", "--base-lr", "1e-4", "--epochs", "1", "--num-workers", "0")
    done = launch(2, tmp_path / "2", *same, "--target", "0", "--batch-size", "1", program=NARROW_SSD300)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "1"))
    assert train.main([*same, "--target", "0", "--batch-size", "2"]) == 0
    name = "backbone.bn1.running_mean"
    # The first layer's mean is linear in the images, so the mean over ranks is the mean over the whole batch.
    torch.testing.assert_close(weights(tmp_path / "2")[name], weights(tmp_path / "1")[name], rtol=1e-3, atol=1e-5)


def test_corrupt_image_is_named_and_stops_every_rank(environment, tmp_path, monkeypatch):
    data = tmp_path / "data"
    toy.generate(data, toy.ToySpec(train_images=4, val_images=1, seed=1))
    broken = coco.read(*coco.standard_paths(data, "train")).drop_empty_images().image_path(0)
    broken.write_bytes(broken.read_bytes()[:700])
    monkeypatch.setenv("DATADIR", str(data))
    done = launch(2, tmp_path / "run", *FEW_STEPS, "--num-workers", "1", program=NARROW_SSD300)
    assert done.returncode == 2
    assert f"error: {broken}: this image cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert "RESULT" not in done.stdout
    assert events(tmp_path / "run")[-1].metadata["status"] == "aborted"


@pytest.mark.gpu
def test_accelerator_trains_in_every_precision(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("SSD_DEVICE", "auto")
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        monkeypatch.setenv("RUN_DIR", str(tmp_path / precision))
        assert train.main([*FEW_STEPS, "--precision", precision, "--target", "0"]) == 0
        assert all(np.isfinite(processes.losses(tmp_path / precision)))
