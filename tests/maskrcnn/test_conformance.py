"""Conformance of Mask R-CNN to the MLPerf reference, through the command that users run on a new accelerator."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision import ops

import commands
from detection.evaluation.conformance import Vectors, part_name, read_network
from maskrcnn import conformance
from maskrcnn.conformance import SUITE, data, heads, network, rpn, training
from paths import ROOT
from recorded_vectors import RecordedVectors, failed_results

GOLDEN = ROOT / "tests/golden/maskrcnn/maskrcnn_reference.npz"

# A vector of each part except the network, which takes longest.
VECTORS = {
    rpn.compare_anchors: "anchors_xyxy",
    rpn.compare_rpn_targets: "rpn_target0_labels",
    rpn.compare_rpn_losses: "rpn_loss0_values",
    rpn.compare_proposals: "proposals0_image0_xyxy",
    heads.compare_box_targets: "box_target0_image0_drawn_labels",
    heads.compare_box_losses: "box_loss0_values",
    heads.compare_sampling: "sampling_counts",
    heads.compare_roi_align: "roi_align0_out",
    heads.compare_mask_targets: "mask_target_bits",
    heads.compare_mask_losses: "mask_loss_value",
    heads.compare_detections: "detections0_image0_xyxy",
    heads.compare_pasting: "paste0_areas",
    data.compare_resizing: "resize_out_hw",
    data.compare_transforms: "transform0_pixels",
    data.compare_aspect_groups: "aspect_group",
    data.compare_dataset: "dataset_ids",
    training.compare_learning_rates: "schedule0_first_hundred",
    training.compare_optimizer: "optimizer_groups",
    training.compare_initialization: "initial_std_max",
}


@pytest.fixture(scope="module")
def vectors():
    return dict(np.load(GOLDEN))


def run_parts(monkeypatch, path, vectors, *comparisons):
    """Run the command with some parts on vectors without a file of tensor names; return its exit status."""
    np.savez(path, **vectors)
    monkeypatch.setattr(conformance, "SUITE", replace(SUITE, comparisons=comparisons))
    return commands.maskrcnn("conformance", path, "--device", "cpu")


def rename_case(vectors, old, new):
    """Return the vectors whose keys start with `old`, under the name `new`."""
    return {new + key.removeprefix(old): value for key, value in vectors.items() if key.startswith(old)}


def test_every_vector_is_compared_and_passes():
    context = SUITE.load(GOLDEN, "cpu", "fp32")
    recorded = RecordedVectors(context.vectors)
    context = replace(context, vectors=recorded)
    assert failed_results(SUITE, context) == []
    assert recorded.keys() - recorded.read == set()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_comparison_passes_on_the_accelerator(precision):
    context = SUITE.load(GOLDEN, "auto", precision)
    assert context.device.type != "cpu"
    assert failed_results(SUITE, context) == []


def test_builtin_network_is_that_of_the_reference():
    assert network.reference_network() == read_network(GOLDEN.with_name("maskrcnn_reference_state_dict.json"))


@pytest.mark.parametrize("compare", VECTORS, ids=part_name)
def test_changed_vector_fails_with_exit_status_1(compare, vectors, tmp_path, monkeypatch, capsys):
    changed = vectors[VECTORS[compare]].copy()
    changed.flat[-1] += 2
    one_case = {key: np.array(1) for key in vectors if key.endswith("_cases")}
    vectors = vectors | one_case | {VECTORS[compare]: changed}
    assert run_parts(monkeypatch, tmp_path / "changed.npz", vectors, compare) == 1
    shown = capsys.readouterr().out
    assert "FAIL" in shown
    assert " ok" in shown or shown.count("FAIL") == 1


def test_changed_vector_of_the_network_fails(vectors):
    context = SUITE.load(GOLDEN, "cpu", "fp32")
    changed = context.vectors["network_p2"].copy()
    changed.flat[-1] += 1e-3 * np.abs(changed).max()
    context = replace(context, vectors=Vectors(context.vectors | {"network_p2": changed}))
    features = next(network.compare_network(context))
    assert features.name == "network: P2"
    assert features.error == pytest.approx(1e-3, rel=0.02)
    assert not features.passed


def test_absent_part_is_reported_and_the_others_are_compared(vectors, tmp_path, monkeypatch, capsys):
    others = {key: value for key, value in vectors.items() if not key.startswith("box_target")}
    parts = (heads.compare_box_targets, heads.compare_sampling)
    assert run_parts(monkeypatch, tmp_path / "part.npz", others, *parts) == 0
    first, *rest = capsys.readouterr().out.splitlines()[1:]
    assert first.split(maxsplit=1) == ["box_targets", "absent: the file has no vector 'box_target_cases'"]
    assert [line.split(":")[0] for line in rest[:2]] == ["sampling", "sampling"]
    assert rest[-1] == "2 of 2 comparisons passed, 1 parts absent"


def test_vectors_of_another_network_are_rejected(tmp_path, monkeypatch, capsys):
    assert run_parts(monkeypatch, tmp_path / "other.npz", {"anything": np.zeros(1)}, *VECTORS) == 2
    assert "holds no vectors of Mask R-CNN" in capsys.readouterr().err


def test_number_and_order_of_cases_come_from_the_file(vectors, tmp_path, monkeypatch, capsys):
    other = {key: vectors[key] for key in ("anchors_padded_hw", "anchors_sizes_hw")}
    for kind, order in (("rpn_target", (5, 0)), ("rpn_loss", (2,)), ("box_target", (1, 0)), ("box_loss", (1, 0))):
        for new, old in enumerate(order):
            other |= rename_case(vectors, f"{kind}{old}_", f"{kind}{new}_")
        other[f"{kind}_cases"] = np.array(len(order))
    # A third image, equal to the first.
    other["box_target0_priority_seeds"] = other["box_target0_priority_seeds"][[0, 1, 0]]
    other |= rename_case(other, "box_target0_image0_", "box_target0_image2_")
    parts = (rpn.compare_rpn_targets, rpn.compare_rpn_losses, heads.compare_box_targets)
    assert run_parts(monkeypatch, tmp_path / "other.npz", other, *parts) == 0
    shown = capsys.readouterr().out
    assert "RPN targets 1: deltas" in shown
    assert "box targets 0, image 2: deltas" in shown
    assert "RPN targets 2:" not in shown


def test_other_numbers_of_candidates(tmp_path, monkeypatch):
    rng = np.random.default_rng(7)
    rows = []
    for sampler, count, fraction in ((0, 256, 0.5), (1, 512, 0.25)):
        for positives, negatives in rng.integers(0, 900, (20, 2)).tolist():
            drawn = min(positives, int(count * fraction))
            rows.append([sampler, positives, negatives, drawn, min(negatives, count - drawn)])
    vectors = {"sampling_counts": np.array(rows)}
    assert run_parts(monkeypatch, tmp_path / "other.npz", vectors, heads.compare_sampling) == 0


def test_other_sizes_of_images(vectors, tmp_path, monkeypatch):
    height, width = 96, 160
    sizes_hw = np.array([[96, 129], [77, 160], [64, 64]])
    cells = [(height // stride, width // stride) for stride in (4, 8, 16, 32, 64)]
    cells[-1] = (2, 3)  # every second cell of P5, rounded up
    anchors = []
    for level, (rows, columns) in enumerate(cells):
        y, x = np.mgrid[:rows, :columns].reshape(2, -1, 1, 1) * 4 * 2**level
        corners = np.concatenate([x, y, x, y], axis=2)
        anchors.append((corners + vectors["anchors_of_cell"][3 * level : 3 * level + 3]).reshape(-1, 4))
    anchors = np.concatenate(anchors).astype(np.float32)
    inside = [(anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < w) & (anchors[:, 3] < h) for h, w in sizes_hw]
    assert 0 < inside[2].sum() < inside[0].sum() < len(anchors)
    changed = {key: value for key, value in vectors.items() if key.startswith("anchors")} | {
        "anchors_padded_hw": np.array([height, width]),
        "anchors_sizes_hw": sizes_hw,
        "anchors_level_counts": np.array([3 * rows * columns for rows, columns in cells]),
        "anchors_xyxy": anchors,
        **{f"anchors_inside{image}": np.packbits(row) for image, row in enumerate(inside)},
    }
    assert run_parts(monkeypatch, tmp_path / "other.npz", changed, rpn.compare_anchors) == 0


def test_roi_align_of_other_features_matches_torchvision(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    features = [
        rng.standard_normal((3, 12, 64 // stride, 128 // stride)).astype(np.float32) for stride in (4, 8, 16, 32)
    ]
    corners = rng.uniform(0, 60, (30, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + rng.uniform(1, 60, (30, 2)).astype(np.float32)], axis=1)
    images = rng.integers(0, 3, 30)
    table = torch.from_numpy(np.concatenate([images[:, None], boxes], axis=1).astype(np.float32))
    finest = torch.from_numpy(features[0]).requires_grad_()
    out = ops.roi_align(finest, table, (7, 7), spatial_scale=1 / 4, sampling_ratio=2, aligned=False)
    grad = np.random.default_rng(4).standard_normal(out.shape).astype(np.float32)
    (out * torch.from_numpy(grad)).sum().backward()
    other = {
        "anchors_padded_hw": np.array([64, 128]),
        "anchors_sizes_hw": np.array([[64, 128]] * 3),
        "roi_align_cases": np.array(1),
        "roi_align0_features_seed": np.array(3),
        "roi_align0_channels": np.array(12),
        "roi_align0_cells": np.array(7),
        "roi_align0_xyxy": boxes,
        "roi_align0_image": images,
        "roi_align0_level": np.zeros(29, np.int8),  # below 112 pixels, all are on P2
        "roi_align0_out": out.detach().numpy()[:, ::2],
        "roi_align0_grad_seed": np.array(4),
        "roi_align0_grad_p2": finest.grad.numpy()[:, ::4, ::2, ::2],
        **{f"roi_align0_grad_p{level}": np.zeros_like(features[level - 2][:, ::4]) for level in (3, 4, 5)},
    }
    assert run_parts(monkeypatch, tmp_path / "other.npz", other, heads.compare_roi_align) == 0
