from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from annotation_file import annotation, content, data_folder, read
from detection.config.settings import InputError
from detection.data import coco, rle
from paths import shared

SQUARE = [[5, 5, 15, 5, 15, 15, 5, 15]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return data_folder(tmp_path)


def box_rings(split: coco.Split, box: int) -> list[list[list[float]]]:
    """Return the rings of a box's mask, each as a list of points."""
    polygons = split.polygons
    assert polygons is not None
    rings = range(polygons.ring_offsets[box], polygons.ring_offsets[box + 1])
    offsets = polygons.point_offsets
    return [polygons.points_xy[offsets[i] : offsets[i + 1]].tolist() for i in rings]


def test_masks_are_read_only_on_request(folder: Path) -> None:
    assert read(folder, content()).polygons is None
    polygons = read(folder, content(), segmentations=True).polygons
    assert polygons is not None
    assert polygons.points_xy.dtype == np.float32
    assert polygons.ring_offsets.dtype == polygons.point_offsets.dtype == np.int64


def test_multi_part_polygons_are_closed_and_belong_to_their_box(folder: Path) -> None:
    data = content()
    data["annotations"][0]["segmentation"] = [[1, 2, 3.5, 4, 5, 6], *SQUARE]
    split = read(folder, data, segmentations=True)
    assert box_rings(split, 0) == [[[5, 5], [15, 5], [15, 15], [5, 5]]]
    assert box_rings(split, 1) == [[[1, 2], [3.5, 4], [5, 6], [1, 2]], [[5, 5], [15, 5], [15, 15], [5, 15], [5, 5]]]
    assert box_rings(split, 2) == []


@pytest.mark.parametrize("compressed", [False, True])
def test_rle_becomes_one_closed_polygon(folder: Path, compressed: bool) -> None:
    """The mask of a 4×5 image covers column 1 from row 2 to 3, all of column 2, and row 0 of column 3."""
    data = content()
    data["images"][1].update(width=4, height=5)
    mask = {"size": [5, 4], "counts": [7, 2, 1, 6, 4]}
    if compressed:
        mask["counts"] = mask_api.frPyObjects(mask, 5, 4)["counts"].decode()
    row = annotation(4, image_id=10, bbox=[1, 0, 3, 5], segmentation=mask)
    data["annotations"].append(row)
    (ring,) = box_rings(read(folder, data, segmentations=True), 1)
    tops = [1, 2], [2, 2], [2, 0], [4, 0]
    bottoms = [4, 1], [3, 1], [3, 5], [2, 5], [2, 4], [1, 4]
    assert ring == [*map(list, tops), *map(list, bottoms), [1, 2]]


def test_rle_with_holes_and_empty_columns_becomes_the_same_mask() -> None:
    rng = np.random.default_rng(0)
    for side in (1, 2, 5, 40):
        for fraction in (0.03, 0.3, 0.7, 0.97):
            mask = np.asfortranarray(rng.random((side, 3 * side // 2)) < fraction)
            changes = np.flatnonzero(np.diff(mask.ravel("F"), prepend=False, append=False))
            polygon = rle.runs_to_polygon(changes.reshape(-1, 2), side)
            if not mask.any():
                assert polygon.shape == (0, 2)
                continue
            assert polygon[0].tolist() == polygon[-1].tolist()
            assert ((polygon[1:] != polygon[:-1]).sum(axis=1) == 1).all()  # each side is horizontal or vertical
            actual = rle.decode_mask(rle.fill_polygons([polygon.astype(np.float64)], mask.shape))
            np.testing.assert_array_equal(actual, mask)


@pytest.mark.parametrize("compressed", [False, True])
def test_rle_mask_round_trips(folder: Path, compressed: bool) -> None:
    data = content()
    data["images"][1].update(width=4, height=5)
    mask = {"size": [5, 4], "counts": [1, 2, 4, 9, 1, 1, 2]}
    expected = mask_api.frPyObjects(mask, 5, 4)
    if compressed:
        mask["counts"] = expected["counts"].decode()
    data["annotations"].append(annotation(4, image_id=10, bbox=[0, 0, 4, 5], segmentation=mask))
    (actual,) = read(folder, data, segmentations=True).masks(1)
    assert actual == {"size": [5, 4], "counts": expected["counts"].decode()}


def check_masks(annotation_file: Path, image_dir: Path) -> None:
    """Compare the masks of all boxes with those of pycocotools."""
    split = coco.read(annotation_file, image_dir, skip_missing_images=True, segmentations=True)
    official = COCO(str(annotation_file))
    num_masks = 0
    for index, image_id in enumerate(split.image_ids.tolist()):
        rows = [row for row in official.imgToAnns[image_id] if min(row["bbox"][2:]) > 0]
        for mask, row in zip(split.masks(index), rows, strict=True):
            assert (mask is None) == row["iscrowd"]
            if mask:
                num_masks += 1
                assert mask["counts"] == official.annToRLE(row)["counts"].decode()
    assert num_masks > 10


def test_masks_match_pycocotools(small_toy: Path) -> None:
    check_masks(*coco.standard_paths(small_toy, "val", segmentations=True))


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_of_photos_match_pycocotools(split: Literal["train", "val"]) -> None:
    check_masks(*coco.standard_paths(shared("data/coco-tiny"), split, segmentations=True))


def test_drop_crowds_removes_crowds_which_have_no_rings(folder: Path) -> None:
    data = content()
    crowd_rle = {"size": [200, 300], "counts": [5, 10, 59_985]}
    data["annotations"].insert(0, annotation(4, image_id=30, iscrowd=1, segmentation=crowd_rle))
    data["annotations"].append(annotation(5, image_id=30, segmentation=SQUARE))
    split = read(folder, data, segmentations=True)
    assert [split.is_crowd[1], split.is_crowd[3]] == [True, True]
    assert box_rings(split, 1) == box_rings(split, 3) == []
    without_crowds = split.drop_crowds()
    assert without_crowds.image_ids.tolist() == [20, 10, 30]
    assert without_crowds.box_offsets.tolist() == [0, 1, 1, 3]
    assert without_crowds.labels.tolist() == [1, 3, 1]
    assert without_crowds.boxes(2).tolist() == [[10, 20, 40.5, 60], [5, 5, 15, 15]]
    assert not without_crowds.is_crowd.any()
    assert [len(box_rings(without_crowds, box)) for box in range(3)] == [1, 1, 1]
    assert box_rings(without_crowds, 2) == box_rings(split, 4)
    assert read(folder, data).drop_crowds().polygons is None


def test_masks_of_dropped_boxes_are_dropped(folder: Path) -> None:
    data = content()
    data["annotations"].insert(0, annotation(4, image_id=30, segmentation=[*SQUARE, *SQUARE]))
    split = read(folder, data, segmentations=True)
    expected = [box_rings(split, box) for box in range(len(split.labels))]
    for dropped in range(len(expected)):
        kept = split.keep_boxes(np.arange(len(expected)) != dropped)
        rings = [box_rings(kept, box) for box in range(len(kept.labels))]
        assert rings == expected[:dropped] + expected[dropped + 1 :]


INVALID_MASKS = {
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 coordinates, an odd number"),
    "two points": ([*SQUARE, [1, 2, 3, 4]], "a polygon of 2 points, fewer than 3"),
    "missing": (None, "it is missing"),
    "empty": ([], "it has no polygon"),
    "text": ("masks/2.png", "neither polygons nor RLE"),
    "text in it": ([[1, 2, 3, 4, 5, "6"]], "neither polygons nor RLE"),
    "no counts": ({"size": [50, 100]}, "neither polygons nor RLE"),
    "another size": ({"size": [100, 50], "counts": [5000]}, "RLE of 50×100 pixels, but the image has 100×50"),
    "too few": ({"size": [50, 100], "counts": [10, 20]}, "RLE that does not add up to 100×50 pixels"),
    "negative": ({"size": [50, 100], "counts": [6000, -1000]}, "RLE that does not add up"),
    "too few in text": ({"size": [50, 100], "counts": "d0"}, "RLE that does not add up"),
    "invalid text": ({"size": [50, 100], "counts": "~é"}, "RLE text that is not in COCO's format"),
    "endless text": ({"size": [50, 100], "counts": "o" * 99}, "RLE text that is not in COCO's format"),
    "truncated text": ({"size": [50, 100], "counts": "PP"}, "RLE text that is truncated"),
    "infinite": ([[1, 2, 3, 4, 5, float("inf")]], "a polygon with NaN or infinity"),
}


@pytest.mark.parametrize("error", INVALID_MASKS)
def test_invalid_mask_is_reported_with_its_annotation(folder: Path, error: str) -> None:
    segmentation, message = INVALID_MASKS[error]
    data = content()
    data["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(InputError) as raised:
        read(folder, data, segmentations=True)
    assert str(raised.value).startswith(str(folder / "annotations" / "instances_train2017.json"))
    prefix = "annotations with an invalid segmentation: 1 of 3 (first: annotation 2, image_id 20: "
    assert prefix + message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(read(folder, data)) == 3  # boxes alone need no mask


def test_annotations_without_masks_are_counted_as_errors(folder: Path) -> None:
    data = content()
    for row in data["annotations"]:
        del row["segmentation"]
    with pytest.raises(
        InputError, match=r"invalid segmentation: 3 of 3 \(first: annotation 2, image_id 20: it is missing\)"
    ):
        read(folder, data, segmentations=True)


def test_masks_of_the_slow_reader_match_the_fast_one(folder: Path) -> None:
    data = content()
    expected = read(folder, data, segmentations=True)
    data["images"][0]["id"] = True  # only Python's JSON reader accepts it as a number
    for row in data["annotations"]:
        row["image_id"] = {20: 1}.get(row["image_id"], row["image_id"])
    actual = read(folder, data, segmentations=True)
    assert [box_rings(actual, box) for box in range(3)] == [box_rings(expected, box) for box in range(3)]
