"""Categories of a checkpoint: matched with those of the data by name, in every workload."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import maskrcnn.weights
import retinanet.weights
import ssd.weights
from detection.checkpoint.weights import Weights
from detection.config.settings import InputError
from detection.data.coco import Category
from maskrcnn.config import Config as MaskRCNNConfig
from retinanet.config import Config as RetinaNetConfig
from ssd.anchors import ANCHORS_PER_CELL
from ssd.config import Config as SSDConfig

FILE = Path("file.pt")
OLD, NEW = ("disc", "square", "triangle"), ("triangle", "disc", "square")
OLD_LABELS = [0, 3, 1, 2]  # of the new labels


def random_state(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def ssd_heads(state: dict[str, Tensor], level: int) -> tuple[Tensor, Tensor]:
    """Return the weights of the box deltas (A, 4, ...) and of the class logits (A, K, ...)."""
    deltas, logits = state[f"heads.{level}.weight"].unflatten(0, (ANCHORS_PER_CELL[level], 8)).split(4, dim=1)
    return deltas, logits


@pytest.fixture
def make_config(tmp_path):
    """Return a function that writes annotations with the names of categories, and returns settings with them."""

    def make(config_class, names):
        row = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0}
        content = {
            "images": [{"id": 1, "file_name": "1.jpg", "width": 9, "height": 9}],
            "annotations": [row],
            "categories": [{"id": 7 * number, "name": name} for number, name in enumerate(names, start=1)],
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        paths = {
            f"{split}_{kind}": str(tmp_path / "a.json")
            for split in ("train", "val")
            for kind in ("annotations", "images")
        }
        return config_class(**paths, dataset="mine", num_classes=1 + len(names))

    return make


def make_weights(state, names=OLD):
    return Weights(state, "this program", categories=tuple(Category(i, name) for i, name in enumerate(names, start=1)))


def test_ssd_outputs_follow_the_names(make_config):
    shapes = {f"heads.{i}.weight": (8 * a, 5, 3, 3) for i, a in enumerate(ANCHORS_PER_CELL)}
    old = random_state(shapes | {f"heads.{i}.bias": (8 * a,) for i, a in enumerate(ANCHORS_PER_CELL)})
    new = ssd.weights.order_classes(make_weights(old), make_config(SSDConfig, NEW), FILE).state
    for level in range(len(ANCHORS_PER_CELL)):
        (old_deltas, old_logits), (new_deltas, new_logits) = ssd_heads(old, level), ssd_heads(new, level)
        assert torch.equal(new_deltas, old_deltas)
        assert torch.equal(new_logits, old_logits[:, OLD_LABELS])


def test_retinanet_outputs_follow_the_names(make_config):
    layer = retinanet.weights.CLASS_LAYER
    anchors = retinanet.weights.ANCHORS_PER_CELL
    old = random_state({f"{layer}.weight": (3 * anchors, 5, 3, 3), f"{layer}.bias": (3 * anchors,)})
    new = retinanet.weights.order_classes(make_weights(old), make_config(RetinaNetConfig, NEW), FILE).state
    for name in old:
        assert torch.equal(new[name].unflatten(0, (anchors, 3)), old[name].unflatten(0, (anchors, 3))[:, [2, 0, 1]])


def test_mask_rcnn_outputs_follow_the_names(make_config):
    sizes = dict(zip(maskrcnn.weights.CLASS_HEADS, (1, 4, 1), strict=True))
    shapes = {f"{head}.weight": (4 * size, 5) for head, size in sizes.items()}
    old = random_state(shapes | {f"{head}.bias": (4 * size,) for head, size in sizes.items()})
    new = maskrcnn.weights.order_classes(make_weights(old), make_config(MaskRCNNConfig, NEW), FILE).state
    for head, size in sizes.items():
        for name in (f"{head}.weight", f"{head}.bias"):
            assert torch.equal(new[name].unflatten(0, (4, size)), old[name].unflatten(0, (4, size))[OLD_LABELS])


@pytest.mark.parametrize("names", [OLD, ()], ids=["same names", "file without names"])
def test_outputs_stay_in_the_same_order(make_config, names):
    old = random_state(
        {f"heads.{i}.{kind}": (8 * a,) for i, a in enumerate(ANCHORS_PER_CELL) for kind in ("weight", "bias")}
    )
    new = ssd.weights.order_classes(make_weights(old, names), make_config(SSDConfig, OLD), FILE).state
    assert all(torch.equal(new[name], old[name]) for name in old)


@pytest.mark.parametrize("names", [("disc", "square", "hexagon"), ("disc", "disc", "square")])
def test_other_names_are_an_error_that_lists_both(make_config, names):
    with pytest.raises(InputError, match=f"categories disc, square, triangle, but .* have {', '.join(names)}"):
        ssd.weights.order_classes(make_weights({}), make_config(SSDConfig, names), FILE)


def test_run_without_data_takes_any_names(make_config):
    config = replace(make_config(SSDConfig, NEW), mode="bench-infer", benchmark_input="synthetic")
    heads = {f"heads.{i}.{kind}": (8 * a,) for i, a in enumerate(ANCHORS_PER_CELL) for kind in ("weight", "bias")}
    old = random_state(heads)
    new = ssd.weights.order_classes(make_weights(old), config, FILE).state
    assert all(torch.equal(new[name], old[name]) for name in old)
