"""Outputs of the classes of a weights file: matched with the data by name, or initialized, in every workload."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import maskrcnn.model
import maskrcnn.weights
import retinanet.model
import retinanet.weights
import ssd.model
import ssd.weights
from detection.checkpoint import class_outputs
from detection.checkpoint import weights as files
from detection.checkpoint.weights import Weights
from detection.config.settings import InputError
from detection.data.coco import Category
from maskrcnn.config import Config as MaskRCNNConfig
from retinanet.config import Config as RetinaNetConfig
from ssd.config import Config as SSDConfig

FILE = Path("file.pt")
OLD, NEW = ("disc", "square", "triangle"), ("triangle", "disc", "square")
OLD_LABELS = [0, 3, 1, 2]  # of the new labels


WORKLOADS = [
    pytest.param(ssd.weights, SSDConfig, id="ssd"),
    pytest.param(maskrcnn.weights, MaskRCNNConfig, id="maskrcnn"),
    pytest.param(retinanet.weights, RetinaNetConfig, id="retinanet"),
]


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


def make_head(layers, num_classes, seed=0):
    """Return the tensors of the class layers, with channels of one value each, and of another layer."""
    generator = torch.Generator().manual_seed(seed)
    state = {"other": torch.randn(2, generator=generator)}
    for layer in layers:
        width = 4 if "bbox_pred" in layer.name else 1
        channels = layer.num_groups * (layer.num_shared + (num_classes - layer.first_label) * width)
        state[f"{layer.name}.bias"] = torch.randn(channels, generator=generator)
        state[f"{layer.name}.weight"] = state[f"{layer.name}.bias"][:, None].expand(channels, 5).clone()
    return state


def class_rows(state, layer, num_classes):
    """Return the outputs of a layer by group: those of no class, and those of the labels (groups, labels, values)."""
    for kind in ("weight", "bias"):
        groups = state[f"{layer.name}.{kind}"].unflatten(0, (layer.num_groups, -1))
        width = (groups.shape[1] - layer.num_shared) // (num_classes - layer.first_label)
        yield groups[:, : layer.num_shared], groups[:, layer.num_shared :].unflatten(1, (-1, width))


def fit(module, config, old, initial=None):
    """Return the state with the class outputs of the settings' data, and the report."""
    match = class_outputs.match(make_weights(old), module.CLASS_LAYERS, config, FILE, initialize=initial is not None)
    return class_outputs.select(old, module.CLASS_LAYERS, match.labels, initial), match.report


@pytest.mark.parametrize(("module", "config_class"), WORKLOADS)
def test_outputs_follow_the_names(make_config, module, config_class):
    layers = module.CLASS_LAYERS
    old = make_head(layers, 4)
    new, report = fit(module, make_config(config_class, NEW), old)
    assert report == f"{len(old)} tensors loaded"
    assert torch.equal(new["other"], old["other"])
    for layer in layers:
        rows = zip(class_rows(old, layer, 4), class_rows(new, layer, 4), strict=True)
        for (old_shared, old_rows), (new_shared, new_rows) in rows:
            expected = [label - layer.first_label for label in OLD_LABELS[layer.first_label :]]
            assert torch.equal(new_shared, old_shared)
            assert torch.equal(new_rows, old_rows[:, expected])


@pytest.mark.parametrize(("module", "config_class"), WORKLOADS)
@pytest.mark.parametrize(
    ("names", "sources"),
    [
        (("square", "hexagon"), [0, 2, None]),
        (("square", "disc"), [0, 2, 1]),
        (("hexagon", "ring", "cross", "star"), [None] * 5),
        (("disc", "disc", "square"), [0, None, None, 2]),
    ],
    ids=["one of two known", "subset", "all new", "ambiguous"],
)
def test_outputs_of_new_categories_are_initialized(make_config, module, config_class, names, sources):
    layers, count = module.CLASS_LAYERS, len(sources)
    old, initial = make_head(layers, 4), make_head(layers, count, seed=1)
    new, report = fit(module, make_config(config_class, names), old, initial)
    unknown = [name for name, source in zip(names, sources[1:], strict=True) if source is None]
    expected_report = ", ".join(unknown) if any(sources) else f"all {count} classes"
    assert (
        f"tensors loaded, but the outputs of {expected_report} initialized ({layers[0].name}" in report or not unknown
    )
    assert torch.equal(new["other"], old["other"])
    for layer in layers:
        rows = (class_rows(old, layer, 4), class_rows(initial, layer, count), class_rows(new, layer, count))
        for (old_shared, old_rows), (_, initial_rows), (new_shared, new_rows) in zip(*rows, strict=True):
            assert torch.equal(new_shared, old_shared)
            for label, source in list(enumerate(sources))[layer.first_label :]:
                row = label - layer.first_label
                expected = initial_rows[:, row] if source is None else old_rows[:, source - layer.first_label]
                assert torch.equal(new_rows[:, row], expected), label


def test_file_without_names_matches_by_number(make_config):
    layers = ssd.weights.CLASS_LAYERS
    unnamed = make_weights(make_head(layers, 4), names=())
    same = class_outputs.match(unnamed, layers, make_config(SSDConfig, NEW), FILE, initialize=False)
    assert list(same.labels) == [0, 1, 2, 3]
    config = make_config(SSDConfig, ("disc", "square"))
    assert list(class_outputs.match(unnamed, layers, config, FILE, initialize=True).labels) == [None] * 3
    with pytest.raises(InputError, match=r"holds 4 classes, with the background, but the annotations have 3\. Use"):
        class_outputs.match(unnamed, layers, config, FILE, initialize=False)


@pytest.mark.parametrize("names", [("disc", "square", "hexagon"), ("disc", "disc", "square"), ("disc", "square")])
def test_evaluation_with_other_names_is_an_error_that_lists_both(make_config, names):
    with pytest.raises(InputError, match=f"categories disc, square, triangle, but .* have {', '.join(names)}"):
        fit(ssd.weights, make_config(SSDConfig, names), make_head(ssd.weights.CLASS_LAYERS, 4))


def test_run_without_data_takes_any_names_of_the_same_number(make_config):
    layers = ssd.weights.CLASS_LAYERS
    config = replace(make_config(SSDConfig, NEW), mode="bench-infer", benchmark_input="synthetic")
    old = make_head(layers, 4)
    assert list(class_outputs.match(make_weights(old), layers, config, FILE, initialize=False).labels) == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"the settings ask for 9\. Pass --num-classes 4\."):
        class_outputs.match(make_weights(old), layers, replace(config, num_classes=9), FILE, initialize=False)


def maskrcnn_torchvision_names(state):
    renames = (("box_head.features.", "roi_heads.box_head."), ("box_head.predictor.", "roi_heads.box_predictor."))
    renames += (("mask_head.features.", "roi_heads.mask_head."), ("mask_head.predictor.", "roi_heads.mask_predictor."))
    return {
        next((new + name.removeprefix(old) for old, new in renames if name.startswith(old)), name): tensor
        for name, tensor in state.items()
    }


def maskrcnn_reference_names(state):
    anchors = {"rpn.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}  # a buffer of the reference
    return maskrcnn.checkpoint_names.to_reference(state) | anchors


SMALL_MASK_RCNN = ("--division", "open", "--backbone", "resnet18", "--dataset", "mine")
SMALL_RETINANET = ("--division", "open", "--backbone", "resnet18", "--dataset", "mine")
LAYOUTS = {
    "ssd own": (ssd, ("--backbone", "resnet18"), dict),
    "ssd reference": (ssd, ("--backbone", "resnet18"), ssd.checkpoint_names.to_reference),
    "maskrcnn own": (maskrcnn, SMALL_MASK_RCNN, dict),
    "maskrcnn torchvision": (maskrcnn, (*SMALL_MASK_RCNN, "--variant", "torchvision"), maskrcnn_torchvision_names),
    "maskrcnn reference": (maskrcnn, SMALL_MASK_RCNN, maskrcnn_reference_names),
    "retinanet own": (retinanet, SMALL_RETINANET, dict),
    "retinanet reference": (retinanet, SMALL_RETINANET, retinanet.weights.to_reference),
}


def fill(shapes, layers):
    """Return tensors of these shapes: random class outputs, and one random value per other tensor, which is fast."""
    outputs = tuple(layer.name for layer in layers)
    return {
        name: torch.randn(tensor.shape if name.startswith(outputs) else ()).to(tensor.dtype).expand(tensor.shape)
        for name, tensor in shapes.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_initializes_only_the_class_outputs_of_a_file_for_other_classes(tmp_path, layout):
    package, flags, to_layout = LAYOUTS[layout]
    layers = package.weights.CLASS_LAYERS
    old_config, new_config = (package.config.load([*flags, "--num-classes", n], {}).config for n in ("3", "6"))
    old = fill(files.expected_state(package.model.make_model, old_config), layers)
    with torch.device("meta"):
        model = package.model.make_model(new_config)
    model.to_empty(device="cpu").load_state_dict(fill(model.state_dict(), layers))
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"model": to_layout(old)}, tmp_path / "old.pth")
    taken = package.weights.load(model, new_config, tmp_path / "old.pth")
    assert "but the outputs of all 6 classes initialized" in taken.report
    new = model.state_dict()
    outputs = {f"{layer.name}.{kind}" for layer in layers for kind in ("weight", "bias")}
    for name in new.keys() - outputs:  # the Mask R-CNN reference counts no batches
        assert torch.equal(new[name], old[name]) or name.endswith("num_batches_tracked"), name
    for layer in layers:
        rows = (class_rows(old, layer, 3), class_rows(initial, layer, 6), class_rows(new, layer, 6))
        for (old_shared, _), (_, initial_rows), (new_shared, new_rows) in zip(*rows, strict=True):
            assert torch.equal(new_shared, old_shared)
            assert torch.equal(new_rows, initial_rows)
