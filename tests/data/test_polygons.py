from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from annotation_file import annotation, content, data_folder, read
from detection.config.settings import InputError
from detection.data import coco
from paths import shared

SQUARE = [[5, 5, 15, 5, 15, 15, 5, 15]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return data_folder(tmp_path)


def lines(split: coco.Split, box: int) -> list[list[list[float]]]:
    """The lines of a box's mask, each as its points."""
    outlines = split.outlines
    assert outlines is not None
    numbers = range(outlines.line_starts[box], outlines.line_starts[box + 1])
    starts = outlines.point_starts
    return [outlines.points_xy[starts[i] : starts[i + 1]].tolist() for i in numbers]


def test_masks_are_kept_on_request_only(folder: Path) -> None:
    assert read(folder, content()).outlines is None
    outlines = read(folder, content(), segmentations=True).outlines
    assert outlines is not None
    assert outlines.points_xy.dtype == np.float32
    assert outlines.line_starts.dtype == outlines.point_starts.dtype == np.int64


def test_polygons_of_several_parts_are_closed_and_go_with_their_box(folder: Path) -> None:
    data = content()
    data["annotations"][0]["segmentation"] = [[1, 2, 3.5, 4, 5, 6], *SQUARE]
    split = read(folder, data, segmentations=True)
    assert lines(split, 0) == [[[5, 5], [15, 5], [15, 15], [5, 5]]]
    assert lines(split, 1) == [
        [[1, 2], [3.5, 4], [5, 6], [1, 2]],
        [[5, 5], [15, 5], [15, 15], [5, 15], [5, 5]],
    ]
    assert lines(split, 2) == []


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_become_upright_borders(folder: Path, compressed: bool) -> None:
    """Of an image of 4×5 the second column from its third pixel, the third column whole, the fourth to its first."""
    data = content()
    data["images"][1].update(width=4, height=5)
    mask = {"size": [5, 4], "counts": [7, 2, 1, 6, 4]}
    if compressed:
        mask["counts"] = mask_api.frPyObjects(mask, 5, 4)["counts"].decode()
    row = annotation(4, image_id=10, bbox=[1, 0, 3, 5], segmentation=mask)
    data["annotations"].append(row)
    found = lines(read(folder, data, segmentations=True), 1)
    down = [[1, 2], [1, 4]], [[2, 0], [2, 5]], [[3, 0], [3, 1]]
    up = [[2, 4], [2, 2]], [[3, 5], [3, 0]], [[4, 1], [4, 0]]
    assert sorted(found) == sorted([list(line) for line in (*down, *up)])


@pytest.mark.parametrize("compressed", [False, True])
def test_a_mask_of_run_lengths_is_given_back(folder: Path, compressed: bool) -> None:
    data = content()
    data["images"][1].update(width=4, height=5)
    mask = {"size": [5, 4], "counts": [1, 2, 4, 9, 1, 1, 2]}
    whole = mask_api.frPyObjects(mask, 5, 4)
    if compressed:
        mask["counts"] = whole["counts"].decode()
    data["annotations"].append(annotation(4, image_id=10, bbox=[0, 0, 4, 5], segmentation=mask))
    (found,) = read(folder, data, segmentations=True).masks(1)
    assert found == {"size": [5, 4], "counts": whole["counts"].decode()}


def check_masks(annotation_file: Path, image_folder: Path) -> None:
    """Hold the masks of all boxes against those of pycocotools."""
    split = coco.read(annotation_file, image_folder, skip_missing_images=True, segmentations=True)
    official = COCO(str(annotation_file))
    seen = 0
    for index, image_id in enumerate(split.image_ids.tolist()):
        rows = [row for row in official.imgToAnns[image_id] if min(row["bbox"][2:]) > 0]
        for mask, row in zip(split.masks(index), rows, strict=True):
            assert (mask is None) == row["iscrowd"]
            if mask:
                seen += 1
                assert mask["counts"] == official.annToRLE(row)["counts"].decode()
    assert seen > 10


def test_masks_are_those_of_pycocotools(tiny_toy: Path) -> None:
    check_masks(*coco.layout(tiny_toy, "val", segmentations=True))


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_of_photos_are_those_of_pycocotools(split: Literal["train", "val"]) -> None:
    check_masks(*coco.layout(shared("data/coco-tiny"), split, segmentations=True))


def test_crowds_are_left_out_on_request_and_have_no_outline(folder: Path) -> None:
    data = content()
    spots = {"size": [200, 300], "counts": [5, 10, 59_985]}
    data["annotations"].insert(0, annotation(4, image_id=30, iscrowd=1, segmentation=spots))
    data["annotations"].append(annotation(5, image_id=30, segmentation=SQUARE))
    split = read(folder, data, segmentations=True)
    assert [split.crowd[1], split.crowd[3]] == [True, True]
    assert lines(split, 1) == lines(split, 3) == []
    left = split.without_crowds()
    assert left.image_ids.tolist() == [20, 10, 30]
    assert left.box_starts.tolist() == [0, 1, 1, 3]
    assert left.labels.tolist() == [1, 3, 1]
    assert left.boxes(2).tolist() == [[10, 20, 40.5, 60], [5, 5, 15, 15]]
    assert not left.crowd.any()
    assert [len(lines(left, box)) for box in range(3)] == [1, 1, 1]
    assert lines(left, 2) == lines(split, 4)
    assert read(folder, data).without_crowds().outlines is None


BAD_MASKS = {
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 coordinates, which is odd"),
    "two points": ([*SQUARE, [1, 2, 3, 4]], "a polygon of 2 points, where 3 are the least"),
    "none": (None, "it is missing"),
    "empty": ([], "no polygon is in it"),
    "text": ("masks/2.png", "neither polygons nor run lengths"),
    "text in it": ([[1, 2, 3, 4, 5, "6"]], "neither polygons nor run lengths"),
    "no counts": ({"size": [50, 100]}, "neither polygons nor run lengths"),
    "another size": ({"size": [100, 50], "counts": [5000]}, "run lengths of 50×100 pixels, and the image has 100×50"),
    "too few": ({"size": [50, 100], "counts": [10, 20]}, "run lengths that do not add up to 100×50 pixels"),
    "negative": ({"size": [50, 100], "counts": [6000, -1000]}, "run lengths that do not add up"),
    "too few in text": ({"size": [50, 100], "counts": "d0"}, "run lengths that do not add up"),
    "foreign text": ({"size": [50, 100], "counts": "~é"}, "run lengths in a text that is not COCO's"),
    "endless text": ({"size": [50, 100], "counts": "o" * 99}, "run lengths in a text that is not COCO's"),
    "broken text": ({"size": [50, 100], "counts": "PP"}, "run lengths in a text that breaks off"),
    "infinite": ([[1, 2, 3, 4, 5, float("inf")]], "a polygon with NaN or infinity"),
}


@pytest.mark.parametrize("mistake", BAD_MASKS)
def test_a_bad_mask_is_refused_by_its_annotation(folder: Path, mistake: str) -> None:
    segmentation, message = BAD_MASKS[mistake]
    data = content()
    data["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(InputError) as refusal:
        read(folder, data, segmentations=True)
    assert str(refusal.value).startswith(str(folder / "annotations" / "instances_train2017.json"))
    where = "segmentation is no mask: 1 of 3 (first: annotation 2, image_id 20: "
    assert where + message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(read(folder, data)) == 3  # boxes alone need none


def test_annotations_without_masks_are_refused_and_counted(folder: Path) -> None:
    data = content()
    for row in data["annotations"]:
        del row["segmentation"]
    with pytest.raises(InputError, match=r"no mask: 3 of 3 \(first: annotation 2, image_id 20: it is missing\)"):
        read(folder, data, segmentations=True)


def test_masks_are_the_same_where_the_file_is_read_by_the_slow_way(folder: Path) -> None:
    data = content()
    wanted = read(folder, data, segmentations=True)
    data["images"][0]["id"] = True  # a number to Python's reader alone
    for row in data["annotations"]:
        row["image_id"] = {20: 1}.get(row["image_id"], row["image_id"])
    got = read(folder, data, segmentations=True)
    assert [lines(got, box) for box in range(3)] == [lines(wanted, box) for box in range(3)]
