"""Tests of mask rasterization and pasting against pycocotools and torchvision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detection.data import coco
from detection.data.polygons import PolygonArrays
from maskrcnn import masks
from paths import shared

SIDE = 28


def write(folder, segmentations, size_hw=(SIDE, SIDE), box=(0, 0, SIDE, SIDE)):
    """Write one image whose annotations have these segmentations; return the split."""
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 1, "iscrowd": 0, "segmentation": segmentation}
        for i, segmentation in enumerate(segmentations, start=1)
    ]
    image = {"id": 1, "file_name": "1.jpg", "height": size_hw[0], "width": size_hw[1]}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "1.jpg").touch()
    (folder / "instances.json").write_text(json.dumps(content))
    return coco.read(folder / "instances.json", folder, segmentations=True)


def make_split(boxes):
    """Return an in-memory split of one image: boxes of polygons of points (N, 2)."""
    closed = [[np.concatenate([polygon, polygon[:1]]) for polygon in box] for box in boxes]
    rings = [polygon for box in closed for polygon in box]
    polygons = PolygonArrays(
        ring_offsets=np.cumsum([0, *(len(box) for box in closed)]),
        point_offsets=np.cumsum([0, *(len(ring) for ring in rings)]),
        points_xy=np.concatenate(rings).astype(np.float32),
    )
    count = len(boxes)
    return coco.Split(
        annotation_file=Path("none"),
        image_dir=Path("none"),
        image_ids=np.array([1]),
        file_names=np.array([b"1.jpg"]),
        sizes_hw=np.array([[SIDE, SIDE]], dtype=np.int32),
        box_offsets=np.array([0, count]),
        boxes_xyxy=np.tile(np.float32([0, 0, SIDE, SIDE]), (count, 1)),
        labels=np.ones(count, dtype=np.int64),
        is_crowd=np.zeros(count, dtype=bool),
        categories=(coco.Category(1, "thing"),),
        num_dropped_boxes=0,
        num_clipped_boxes=0,
        num_missing_images=0,
        polygons=polygons,
    )


def rasterize(edges, roi_xyxy=(0, 0, SIDE, SIDE), size=SIDE):
    raster = masks.rasterize_edges(torch.from_numpy(edges)[None], torch.tensor([roi_xyxy], dtype=torch.float32), size)
    assert raster.shape == (1, size, size)
    assert raster.dtype == torch.float32
    return raster[0].numpy()


def rasterize_polygons(*polygons, **options):
    (edges,) = masks.mask_edges(make_split([[np.array(polygon, dtype=float) for polygon in polygons]]), 0)
    return rasterize(edges, **options)


def rectangle(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def filled(left, top, right, bottom, side=SIDE):
    mask = np.zeros((side, side))
    mask[top:bottom, left:right] = 1
    return mask


def compressed(mask):
    encoded = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def uncompressed(mask):
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=0))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=len(pixels)).tolist()}


def random_masks():
    """Return masks of noise, blobs, whole columns and rows, all pixels and one pixel."""
    rng = np.random.default_rng(1)
    bitmaps = [rng.random((SIDE, SIDE)) < fraction for fraction in (0.03, 0.3, 0.7, 0.97)]
    bitmaps += [np.kron(rng.random((7, 7)) < 0.5, np.ones((4, 4))) for _ in range(4)]
    bitmaps += [filled(3, 0, 9, SIDE), filled(0, 0, SIDE, SIDE), filled(0, 5, SIDE, 9), filled(27, 27, 28, 28)]
    return [mask.astype(np.uint8) for mask in bitmaps]


@pytest.mark.parametrize("encoding", [uncompressed, compressed])
def test_rle_masks_rasterize_exactly(tmp_path, encoding):
    bitmaps = random_masks()
    edges = masks.mask_edges(write(tmp_path, [encoding(mask) for mask in bitmaps]), 0)
    assert len(edges) == len(bitmaps)
    for mask, mask_edges in zip(bitmaps, edges, strict=True):
        np.testing.assert_array_equal(rasterize(mask_edges), mask)
        half = rasterize(mask_edges, roi_xyxy=(7, 14, 21, 28))
        np.testing.assert_array_equal(half, np.kron(mask[14:28, 7:21], np.ones((2, 2))))


def test_rectangle_rasterizes_exactly_in_any_roi():
    np.testing.assert_array_equal(rasterize_polygons(rectangle(3, 5, 20, 9)), filled(3, 5, 20, 9))
    part = rasterize_polygons(rectangle(30, 50, 200, 90), roi_xyxy=(0, 0, 280, 280))
    np.testing.assert_array_equal(part, filled(3, 5, 20, 9))
    beyond = rasterize_polygons(rectangle(-50, -50, 500, 21), roi_xyxy=(7, 7, 35, 35))
    np.testing.assert_array_equal(beyond, filled(0, 0, 28, 14))


def test_cell_is_set_if_its_center_is_inside():
    np.testing.assert_array_equal(rasterize_polygons(rectangle(2.4, 2.4, 5.6, 5.4)), filled(2, 2, 6, 5))


def test_corner_on_a_row_center_does_not_leak():
    """The corners of the diamond lie on row centers: their rows must not be filled up to the border."""
    diamond = [(14, 1.5), (27, 14.5), (14, 27.5), (1, 14.5)]
    center = np.arange(SIDE) + 0.5
    expected = np.abs(center - 14) + np.abs(center - 14.5)[:, None] < 13
    np.testing.assert_array_equal(rasterize_polygons(diamond), expected)


def test_empty_roi_counts_as_one_pixel():
    raster = rasterize_polygons(rectangle(0, 0, 10, 10), roi_xyxy=(3, 3, 3, 3))
    np.testing.assert_array_equal(raster, np.ones((SIDE, SIDE)))


def test_overlapping_polygons_leave_no_hole_in_either_orientation():
    one, other = rectangle(2, 2, 16, 16), rectangle(8, 8, 24, 24)
    expected = np.maximum(filled(2, 2, 16, 16), filled(8, 8, 24, 24))
    np.testing.assert_array_equal(rasterize_polygons(one, other), expected)
    np.testing.assert_array_equal(rasterize_polygons(one, other[::-1]), expected)


points = st.tuples(st.floats(-10, 40, width=32), st.floats(-10, 40, width=32))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(points, min_size=3, max_size=3), min_size=1, max_size=4), st.lists(st.booleans(), min_size=4))
def test_orientation_and_first_point_of_a_polygon_do_not_matter(triangles, reversals):
    other = [t[1:] + t[:1] if keep else t[::-1] for t, keep in zip(triangles, reversals, strict=False)]
    num_different = np.abs(rasterize_polygons(*triangles) - rasterize_polygons(*other)).sum()
    assert num_different <= 1  # rounding may put a crossing at a cell's center on either side


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(points, min_size=3, max_size=3), min_size=1, max_size=4))
def test_several_polygons_give_their_union(triangles):
    separate = np.max([rasterize_polygons(triangle) for triangle in triangles], axis=0)
    np.testing.assert_array_equal(rasterize_polygons(*triangles), separate)


def test_padding_sets_nothing_and_chunks_add_up(monkeypatch):
    rng = np.random.default_rng(2)
    polygons = [[rng.uniform(0, SIDE, (9, 2)), rng.uniform(0, SIDE, (4, 2))], [rng.uniform(0, SIDE, (30, 2))]]
    first, second = masks.mask_edges(make_split(polygons), 0)
    padded = np.zeros((2, 40, 4), dtype=np.float32)
    padded[0, : len(first)], padded[1, -len(second) :] = first, second
    rois = torch.tensor([[0.0, 0, SIDE, SIDE]] * 2)
    raster = masks.rasterize_edges(torch.from_numpy(padded), rois).numpy()
    np.testing.assert_array_equal(raster, [rasterize(first), rasterize(second)])
    monkeypatch.setattr(masks, "MAX_EDGES_PER_CHUNK", 7)
    np.testing.assert_array_equal(masks.rasterize_edges(torch.from_numpy(padded), rois).numpy(), raster)
    assert not masks.rasterize_edges(torch.zeros(1, 5, 4), rois[:1]).any()
    assert masks.rasterize_edges(torch.zeros(0, 5, 4), rois[:0]).shape == (0, SIDE, SIDE)


def test_horizontal_edges_are_dropped():
    (edges,) = masks.mask_edges(make_split([[np.array(rectangle(1, 2, 3, 4))]]), 0)
    assert sorted(map(tuple, edges.tolist())) == [(1, 2, 1, 4), (3, 4, 3, 2)]


@pytest.mark.data
def test_real_masks_agree_with_pycocotools():
    """Measured: mean IoU 0.9896 over 1,503 objects, 0.953 at the first percentile."""
    ious = []
    for name in ("train", "val"):
        files = coco.standard_paths(shared("data/coco-tiny"), name, segmentations=True)
        split = coco.read(*files, segmentations=True).drop_crowds()
        by_image = {}
        for annotation in json.loads(files[0].read_text())["annotations"]:
            if not annotation["iscrowd"]:
                by_image.setdefault(annotation["image_id"], []).append(annotation["segmentation"])
        for index, image_id in enumerate(split.image_ids.tolist()):
            edges, polygons = masks.mask_edges(split, index), by_image.get(image_id, [])
            assert len(edges) == len(polygons)
            for box_edges, box_polygons, box in zip(edges, polygons, split.boxes(index), strict=True):
                actual = compressed(rasterize(box_edges, box.tolist()))
                scale = SIDE / np.maximum(box[2:] - box[:2], 1)
                in_grid = [((np.reshape(p, (-1, 2)) - box[:2]) * scale).ravel().tolist() for p in box_polygons]
                expected = mask_api.merge(mask_api.frPyObjects(in_grid, SIDE, SIDE))
                ious.append(mask_api.iou([actual], [expected], [0])[0, 0])
    assert len(ious) == 1503
    assert np.mean(ious) > 0.985
    assert np.percentile(ious, 1) > 0.94


@pytest.mark.gpu
def test_device_rasterizes_without_sync_and_matches_the_cpu():
    rng = np.random.default_rng(4)
    edges = torch.from_numpy(rng.uniform(0, 300, (64, 700, 4)).astype(np.float32))
    corners = torch.from_numpy(rng.uniform(0, 200, (64, 2)).astype(np.float32))
    rois = torch.cat([corners, corners + 50], dim=1)
    on_device = edges.cuda(), rois.cuda()
    masks.rasterize_edges(*on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        raster = masks.rasterize_edges(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (raster.cpu() != masks.rasterize_edges(edges, rois)).float().mean() < 1e-3


def random_detections(seed, count, size_hw, smooth):
    """Return masks of noise or blobs, and boxes centered in the image: inside, across its border, or very thin."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    probabilities = (
        rng.random((count, SIDE, SIDE)) if smooth else np.kron(rng.random((count, 4, 4)) < 0.5, np.ones((7, 7)))
    )
    centers = rng.uniform(0, 1, (count, 2)) * [width, height]
    extents = rng.uniform(0, 1, (count, 2)) ** 3 * [width, height]
    extents[::7] = 0.01
    extents[1::7, 0] = 2 * width
    boxes = np.concatenate([centers - extents / 2, centers + extents / 2], axis=1)
    return probabilities.astype(np.float32), boxes.astype(np.float32)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("size_hw", [(61, 97), (240, 131), (1, 40), (33, 1)])
def test_pasted_masks_match_torchvision_exactly(size_hw, smooth):
    probabilities, boxes = random_detections(3, 60, size_hw, smooth)
    expected = paste_masks_in_image(torch.from_numpy(probabilities)[:, None], torch.from_numpy(boxes), size_hw)
    pasted = masks.paste_masks(probabilities, boxes, size_hw)
    for number, (mask, actual) in enumerate(zip((expected[:, 0] > 0.5).numpy(), pasted, strict=True)):
        assert actual == compressed(mask), f"detection {number}"
    assert any(mask_api.area(mask) for mask in pasted)


def test_box_outside_of_the_image_has_an_empty_mask():
    """torchvision fails on such boxes; the network never produces them, since it clips boxes to the image."""
    boxes = np.float32([[-9, -9, -5, -5], [50, 2, 60, 9], [3, 70, 9, 90]])
    pasted = masks.paste_masks(np.ones((3, SIDE, SIDE), np.float32), boxes, (30, 40))
    assert pasted == [compressed(np.zeros((30, 40)))] * 3


def test_no_detections_give_no_masks():
    assert masks.paste_masks(np.zeros((0, SIDE, SIDE), np.float32), np.zeros((0, 4), np.float32), (5, 5)) == []
