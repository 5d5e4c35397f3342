"""Page of augmented training images, their targets, and statistics of the data set."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import commands
from detection.data import coco
from detection.data.statistics import count_by_range, histograms, summarize
from detection.report import data_page
from detection.runtime.distributed import DistContext
from maskrcnn import samples as maskrcnn_samples
from maskrcnn.config import load as load_maskrcnn
from retinanet import samples as retinanet_samples
from retinanet.config import load as load_retinanet
from samples import make_split
from ssd import samples as ssd_samples
from ssd.anchors import IMAGE_SIZE_PX, make_anchors
from ssd.augment import normalize, to_float
from ssd.config import load as load_ssd
from ssd.data import SSDTrainSource
from ssd.train import prepare_batch

FLAGS = ("--dataset", "toy", "--division", "open", "--batch-size", "2", "--num-workers", "0", "--num-classes", "4")
SMALL = {
    "ssd": (),
    "maskrcnn": ("--min-image-size", "96", "--max-image-size", "128", "--anchor-sizes", "16,32,64,128,256"),
    "retinanet": ("--image-size", "128", "--anchor-sizes", "16,32,64,128,256"),
}
OPEN = {
    "ssd": (load_ssd, ssd_samples.open_samples),
    "maskrcnn": (load_maskrcnn, maskrcnn_samples.open_samples),
    "retinanet": (load_retinanet, retinanet_samples.open_samples),
}
RANKS = DistContext(0, 1, torch.device("cpu"))


def open_samples(workload, folder):
    load, open_of = OPEN[workload]
    config = load([*FLAGS, *SMALL[workload], "--data-dir", str(folder)], {}).config
    return config, *open_of(config, RANKS, 5)


@pytest.mark.parametrize("workload", OPEN)
def test_command_writes_images_targets_and_statistics(workload, small_toy, tmp_path, capsys):
    out = tmp_path / "data.html"
    words = ("data", "--show", "3", "--out", out, *FLAGS, *SMALL[workload], "--data-dir", small_toy)
    assert getattr(commands, workload)(*words) == 0
    assert capsys.readouterr().out == f"data: {out}\n"
    page = out.read_text()
    assert page.count("<figure") == 3
    assert re.search(r"[1-9]\d* objects, [1-9]\d* matched anchors", page)
    split = coco.read(*coco.standard_paths(small_toy, "train"))
    assert f"<dt>objects</dt><dd>{int((~split.is_crowd).sum())}</dd>" in page
    assert "Objects by class" in page


@pytest.mark.parametrize("workload", OPEN)
def test_samples_match_objects_and_anchors_overlap_them(workload, small_toy):
    _, split, samples = open_samples(workload, small_toy)
    sample = next(samples)
    height, width, channels = sample.image.shape
    assert (channels, sample.image.dtype) == (3, np.uint8)
    assert split.annotation_file.name == "instances_train2017.json"
    assert len(sample.anchors_xyxy) == len(sample.matched) > 0
    assert sample.matched.max() < len(sample.labels)
    assert (sample.boxes_xyxy >= -1).all()
    assert (sample.boxes_xyxy[:, [0, 2]] <= width + 1).all()
    assert (sample.boxes_xyxy[:, [1, 3]] <= height + 1).all()
    boxes = sample.boxes_xyxy[sample.matched]
    overlap = np.minimum(boxes[:, 2:], sample.anchors_xyxy[:, 2:]) - np.maximum(
        boxes[:, :2], sample.anchors_xyxy[:, :2]
    )
    assert (overlap > 0).all()


def test_ssd_samples_are_the_input_and_the_targets_of_the_network(small_toy):
    config, _, samples = open_samples("ssd", small_toy)
    batch, _, _ = next(SSDTrainSource(config, RANKS, 5).train_batches(1))
    images, _, labels = prepare_batch(batch, make_anchors())
    for image, anchor_labels in zip(images, labels, strict=True):
        sample = next(samples)
        shown = normalize(to_float(torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None]))[0]
        assert (shown - image).abs().max() < 0.01  # of a range of 4: rounded to bytes
        (positive,) = anchor_labels.nonzero(as_tuple=True)
        anchors = make_anchors().boxes_xyxy[positive] * IMAGE_SIZE_PX
        assert np.array_equal(sample.anchors_xyxy, anchors.numpy())
        assert np.array_equal(sample.labels[sample.matched], anchor_labels[positive].numpy())


def test_object_without_an_anchor_is_marked(small_toy):
    _, _, samples = open_samples("ssd", small_toy)
    sample = next(samples)._replace(matched=np.zeros(1, dtype=np.int64))
    sample = sample._replace(anchors_xyxy=sample.anchors_xyxy[:1])
    described = data_page.describe_sample(sample, ["?", "disc", "square", "triangle"])
    states = [shape["state"] for shape in described["objects"]]
    assert states == ["found", *["missed"] * (len(states) - 1)]
    assert described["group"] == "without anchors"
    assert described["caption"].endswith(f"1 matched anchors, {len(states) - 1} objects without")
    content = base64.b64decode(described["uri"].partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (IMAGE_SIZE_PX, IMAGE_SIZE_PX)


def test_statistics_count_classes_boxes_and_crowds():
    split = make_split([([0.0, 0, 40, 20], 2, False), ([0.0, 0, 5, 5], 2, False), ([0.0, 0, 100, 100], 1, True)], [])
    assert dict(summarize(split)) == {
        "images": "2",
        "images without boxes": "1",
        "objects": "2",
        "crowds": "1",
        "classes": "2",
        "classes without objects": "1",
        "boxes dropped: no width or height": "0",
        "boxes clipped to their image": "0",
        "images without a file": "0",
    }
    by_title = {histogram.title: dict(histogram.rows) for histogram in histograms(split)}
    assert by_title["Objects by class"] == {"square": 2, "disc": 0}
    sizes = by_title["Box size, square root of the area in pixels"]
    assert {name: count for name, count in sizes.items() if count} == {"0 to 8": 1, "16 to 32": 1}
    assert by_title["Box width over height"]["2 to 4"] == by_title["Box width over height"]["1 to 1.5"] == 1
    assert by_title["Boxes per image"]["0 to 1"] == by_title["Boxes per image"]["3 to 5"] == 1
    assert by_title["Longer side of the image in pixels"]["0 to 150"] == 2


def test_values_beyond_the_last_edge_are_counted():
    assert count_by_range("t", np.array([0.0, 2, 9]), (0, 1, 2)).rows == [
        ("0 to 1", 1),
        ("1 to 2", 0),
        ("2 and more", 2),
    ]
