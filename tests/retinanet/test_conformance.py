"""Conformance of RetinaNet to the MLPerf reference, through the command that users run on a new accelerator."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import commands
from detection.evaluation.conformance import part_name, read_network
from paths import ROOT
from recorded_vectors import RecordedVectors, failed_results
from retinanet import conformance, weights
from retinanet.conformance import SUITE, boxes, data, network, training
from retinanet.model import make_model
from tiny_retinanet import make_config

GOLDEN = ROOT / "tests/golden/retinanet/retinanet_reference.npz"

# A vector of each part that is cheap without its other cases.
VECTORS = {
    boxes.compare_anchors: "anchors_256x256_every_29th",
    boxes.compare_matching: "match0_gt_index",
    boxes.compare_losses: "loss0_logit_grad_abs_sum",
    boxes.compare_decoding: "decode0_boxes",
    data.compare_resizing: "resize0_boxes_flipped",
    data.compare_prepared_boxes: "prepare_labels",
    training.compare_warmup: "warmup",
}
TRAINING = (training.compare_adam, network.compare_net256, network.compare_pipeline)
# Keys of the parts of `compare_network`, and of all others together.
PREFIXES = ("netsmall_", "net256_", "net800_", "pipeline_", "adam_")


@pytest.fixture(scope="module")
def vectors():
    return dict(np.load(GOLDEN))


def check(*comparisons):
    """Check that parts pass; return the vectors, and which of them they read."""
    context = SUITE.load(GOLDEN, "cpu", "fp32")
    recorded = RecordedVectors(context.vectors)
    context = replace(context, vectors=recorded)
    assert [result for compare in comparisons for result in compare(context) if not result.passed] == []
    return recorded.keys(), recorded.read


def run_parts(monkeypatch, path, vectors, *comparisons):
    """Run the command with some parts on vectors without a file of tensor names; return its exit status."""
    np.savez(path, **vectors)
    monkeypatch.setattr(conformance, "SUITE", replace(SUITE, comparisons=comparisons))
    return commands.retinanet("conformance", path, "--device", "cpu")


def test_every_vector_without_a_network_is_compared_and_passes():
    keys, read = check(*VECTORS)
    assert {key for key in keys if not key.startswith(PREFIXES)} - read == {"model_seed_base"}


def test_small_network_passes_and_every_vector_is_compared():
    keys, read = check(network.compare_netsmall)
    assert {key for key in keys if key.startswith("netsmall")} <= read


@pytest.mark.slow
@pytest.mark.parametrize("compare", [*TRAINING, network.compare_net800], ids=part_name)
def test_other_networks_pass_and_every_vector_is_compared(compare):
    keys, read = check(compare)
    assert {key for key in keys if key.startswith(f"{part_name(compare)}_")} <= read


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_comparison_passes_on_the_accelerator(precision):
    context = SUITE.load(GOLDEN, "auto", precision)
    assert context.device.type != "cpu"
    assert failed_results(SUITE, context) == []


def test_builtin_network_is_that_of_the_reference():
    file = read_network(GOLDEN.with_name("retinanet_reference_state_dict.json"))
    assert network.reference_network() == file._replace(seed=None)
    assert file.seed == int(np.load(GOLDEN)["model_seed_base"])


def test_names_of_the_reference_and_back():
    state = {name: i for i, name in enumerate(make_model(make_config()).state_dict())}
    theirs = weights.to_reference(state)
    assert "head.regression_head.conv.6.bias" in theirs
    assert weights.from_reference(theirs) == {name: i for name, i in state.items() if not name.endswith("tracked")}


def test_seed_of_the_weights_is_that_of_the_names_or_the_vectors(vectors):
    context = SUITE.load(GOLDEN, "cpu", "fp32")
    tensors = context.network.tensors[:2]
    states = [
        network.reference_state(replace(context, network=context.network._replace(tensors=tensors, seed=seed)))
        for seed in (context.network.seed, None, 1)
    ]
    first, from_vectors, other = [state[tensors[0].name] for state in states]
    assert torch.equal(first, from_vectors)
    assert not torch.equal(first, other)


def test_training_a_model_leaves_the_drawn_weights_unchanged():
    context = SUITE.load(GOLDEN, "cpu", "fp32")
    state = weights.from_reference(network.reference_state(context))
    model = network.reference_model(context)
    name, parameter = next(iter(model.named_parameters()))
    with torch.no_grad():
        parameter += 1
    assert not torch.equal(parameter, state[name])
    assert torch.equal(network.reference_model(context).get_parameter(name), state[name])


@pytest.mark.parametrize("compare", VECTORS, ids=part_name)
def test_changed_vector_fails_with_exit_status_1(compare, vectors, tmp_path, monkeypatch, capsys):
    changed = vectors[VECTORS[compare]].copy()
    changed.flat[-1] += 2
    one_case = {key: np.array(1) for key in vectors if key.count("_") == 1 and key.endswith("_cases")}
    vectors = vectors | one_case | {VECTORS[compare]: changed}
    assert run_parts(monkeypatch, tmp_path / "changed.npz", vectors, compare) == 1
    shown = capsys.readouterr().out
    assert shown.count("FAIL") == 1
    assert " ok" in shown


def test_gradient_of_an_untrained_parameter_fails():
    assert network.max_each_error(torch.ones(2), np.ones(2)) == 0
    assert network.max_each_error(torch.tensor([1.0, 1e-3]), np.array([1, 2e-3])) == pytest.approx(0.5)
    assert np.isnan(network.max_each_error(torch.ones(1), np.ones(2)))


def test_absent_part_is_reported_and_the_others_are_compared(vectors, tmp_path, monkeypatch, capsys):
    others = {key: value for key, value in vectors.items() if not key.startswith("prepare")}
    parts = (data.compare_prepared_boxes, training.compare_warmup)
    assert run_parts(monkeypatch, tmp_path / "part.npz", others, *parts) == 0
    first, *rest = capsys.readouterr().out.splitlines()[1:]
    assert first.split(maxsplit=1) == ["prepared_boxes", "absent: the file has no vector 'prepare_image_wh'"]
    assert [line.split(":")[0] for line in rest[:-1]] == ["warm-up"] * 3
    assert rest[-1] == "3 of 3 comparisons passed, 1 parts absent"


def test_vectors_of_another_network_are_rejected(tmp_path, monkeypatch, capsys):
    parts = SUITE.comparisons
    assert run_parts(monkeypatch, tmp_path / "other.npz", {"anything": np.zeros(1)}, *parts) == 2
    assert "holds no vectors of RetinaNet" in capsys.readouterr().err


def test_corners_are_float32_sums(vectors, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    xywh = rng.uniform(1, 90, (200, 4))
    corners = xywh[:, :2].astype(np.float32) + xywh[:, 2:].astype(np.float32)
    assert not np.array_equal(corners, (xywh[:, :2] + xywh[:, 2:]).astype(np.float32))
    other = {
        "prepare_image_wh": np.array([200, 180]),
        "prepare_annotations": np.concatenate([xywh, np.zeros((200, 2))], axis=1),
        "prepare_boxes": np.concatenate([xywh[:, :2].astype(np.float32), corners.clip(max=[200, 180])], axis=1),
        "prepare_labels": np.zeros(200, np.int32),
    }
    assert run_parts(monkeypatch, tmp_path / "other.npz", other, data.compare_prepared_boxes) == 0


def test_other_cases_and_sizes(vectors, tmp_path, monkeypatch, capsys):
    other = {key.replace("match5", "match0"): value for key, value in vectors.items() if key.startswith("match5")}
    other |= {key.replace("match9", "match1"): value for key, value in vectors.items() if key.startswith("match9")}
    other |= {"match_cases": np.array(2), "cell_anchors": vectors["cell_anchors"]}
    other |= {"anchor_sizes": np.array([[333, 501]])} | {k: vectors[k] for k in vectors if k.startswith("anchors_333")}
    parts = (boxes.compare_anchors, boxes.compare_matching)
    assert run_parts(monkeypatch, tmp_path / "other.npz", other, *parts) == 0
    shown = capsys.readouterr().out
    assert "matching 1: targets" in shown
    assert "matching 2:" not in shown
    assert "800" not in shown
