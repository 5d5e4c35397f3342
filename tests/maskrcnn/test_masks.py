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

from annotation_file import read_one_image
from detection.data import coco, rle
from detection.data.polygons import PolygonArrays
from maskrcnn import masks
from maskrcnn.data import pad_vertices
from paths import shared

SIDE = 28


def write(folder, segmentations):
    """Write one image whose annotations have these segmentations; return the split."""
    return read_one_image(folder, segmentations, [(0, 0, SIDE, SIDE)] * len(segmentations), (SIDE, SIDE))


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


def rasterize(vertices, roi_xyxy=(0, 0, SIDE, SIDE), size=SIDE):
    roi = torch.tensor([roi_xyxy], dtype=torch.float32)
    raster = masks.rasterize_polygons(torch.from_numpy(vertices)[None], roi, size)
    assert raster.shape == (1, size, size)
    assert raster.dtype == torch.float32
    return raster[0].numpy()


def rasterize_polygons(*polygons, **options):
    (vertices,) = masks.mask_vertices(make_split([[np.array(polygon, dtype=float) for polygon in polygons]]), 0)
    return rasterize(vertices, **options)


def rasterize_like_reference(polygons, roi_xyxy, size=SIDE):
    """Return the mask targets of maskrcnn-benchmark: its float32 operations, then pycocotools."""
    left, top, right, bottom = torch.tensor(np.asarray(roi_xyxy, dtype=np.float32))
    ratios = [float(size) / float(max(side, 1)) for side in (right - left, bottom - top)]
    on_grid = []
    for polygon in polygons:
        points = torch.tensor(np.asarray(polygon), dtype=torch.float32).reshape(-1, 2).clone()
        for axis, corner in enumerate((left, top)):
            points[:, axis] = (points[:, axis] - corner) * ratios[axis]
        on_grid.append(points.flatten().numpy())
    return mask_api.decode(mask_api.merge(mask_api.frPyObjects(on_grid, size, size)))


def rasterize_batch(objects, rois_xyxy):
    """Return the mask targets (R, 28, 28) of objects, each a list of polygons, within one ROI each."""
    vertices = pad_vertices([masks.mask_vertices(make_split(objects), 0)])[0, : len(objects)]
    return masks.rasterize_polygons(vertices, torch.from_numpy(rois_xyxy)).numpy()


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
    vertices = masks.mask_vertices(write(tmp_path, [encoding(mask) for mask in bitmaps]), 0)
    assert len(vertices) == len(bitmaps)
    for mask, mask_vertices in zip(bitmaps, vertices, strict=True):
        np.testing.assert_array_equal(rasterize(mask_vertices), mask)
        half = rasterize(mask_vertices, roi_xyxy=(7, 14, 21, 28))
        np.testing.assert_array_equal(half, np.kron(mask[14:28, 7:21], np.ones((2, 2))))


def test_rle_targets_sample_the_bitmap_at_cell_centers():
    """Sides of pixels are rounded to fifths of a cell, like vertices, so a pixel covers whole fifths of a cell."""
    rng = np.random.default_rng(5)
    mask = np.kron(rng.random((12, 10)) < 0.5, np.ones((5, 7)))
    vertices = rle.runs_to_polygon(np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=0)).reshape(-1, 2), 60)
    numbered = np.column_stack([vertices, np.ones(len(vertices), np.float32)])
    for left, top, right, bottom in ((0, 0, 70, 60), (3, 8, 45, 57), (10.3, 0.4, 69.1, 31.9), (60, 50, 75, 61)):
        actual = rasterize(numbered, (left, top, right, bottom))
        x, y = (np.floor(np.arange(n + 1) * 1.0) for n in (70, 60))
        column = np.searchsorted(np.floor((x - left) * (28 / (right - left)) * 5 + 0.5), np.arange(28) * 5 + 2, "right")
        row = np.searchsorted(np.floor((y - top) * (28 / (bottom - top)) * 5 + 0.5), np.arange(28) * 5 + 2, "right")
        np.testing.assert_array_equal(actual, np.pad(mask, 1)[row][:, column])


def test_empty_rle_mask_has_no_vertices(tmp_path):
    (vertices,) = masks.mask_vertices(write(tmp_path, [uncompressed(np.zeros((SIDE, SIDE)))]), 0)
    assert vertices.shape == (0, 3)


def test_rectangle_rasterizes_exactly_in_any_roi():
    np.testing.assert_array_equal(rasterize_polygons(rectangle(3, 5, 20, 9)), filled(3, 5, 20, 9))
    part = rasterize_polygons(rectangle(30, 50, 200, 90), roi_xyxy=(0, 0, 280, 280))
    np.testing.assert_array_equal(part, filled(3, 5, 20, 9))
    beyond = rasterize_polygons(rectangle(-50, -50, 500, 21), roi_xyxy=(7, 7, 35, 35))
    np.testing.assert_array_equal(beyond, filled(0, 0, 28, 14))


def test_empty_roi_counts_as_one_pixel():
    raster = rasterize_polygons(rectangle(0, 0, 10, 10), roi_xyxy=(3, 3, 3, 3))
    np.testing.assert_array_equal(raster, np.ones((SIDE, SIDE)))


def test_overlapping_polygons_leave_no_hole_but_a_polygon_on_itself_does():
    one, other = rectangle(2, 2, 16, 16), rectangle(8, 8, 24, 24)
    expected = np.maximum(filled(2, 2, 16, 16), filled(8, 8, 24, 24))
    np.testing.assert_array_equal(rasterize_polygons(one, other), expected)
    np.testing.assert_array_equal(rasterize_polygons(one, other[::-1]), expected)
    hole = filled(2, 2, 16, 16) + filled(8, 8, 24, 24) == 1
    np.testing.assert_array_equal(rasterize_polygons([*one, one[0], *other, other[0]]), hole)


points = st.tuples(st.floats(-10, 40, width=32), st.floats(-10, 40, width=32))
several_polygons = st.lists(st.lists(points, min_size=3, max_size=7), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(several_polygons, st.lists(st.booleans(), min_size=4))
def test_orientation_and_first_point_of_a_polygon_do_not_matter(polygons, reversals):
    other = [p[1:] + p[:1] if keep else p[::-1] for p, keep in zip(polygons, reversals, strict=False)]
    np.testing.assert_array_equal(rasterize_polygons(*polygons), rasterize_polygons(*other))


@settings(max_examples=30, deadline=None)
@given(several_polygons)
def test_several_polygons_give_their_union(polygons):
    separate = np.max([rasterize_polygons(polygon) for polygon in polygons], axis=0)
    np.testing.assert_array_equal(rasterize_polygons(*polygons), separate)


fifths = st.integers(-60, 200).map(lambda number: number / 5)
any_points = st.tuples(st.one_of(fifths, st.floats(-200, 200, width=32)), st.one_of(fifths, st.floats(-99, 99)))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(any_points, min_size=3, max_size=9), min_size=1, max_size=3),
    st.tuples(st.floats(-20, 20, width=32), fifths, st.floats(0, 100, width=32), st.sampled_from([0, 1, 14, 28, 280])),
)
def test_drawn_polygons_have_the_bits_of_the_reference(polygons, roi):
    left, top, width, height = roi
    roi_xyxy = np.float32([left, top, left + width, top + height])
    np.testing.assert_array_equal(
        rasterize_polygons(*polygons, roi_xyxy=roi_xyxy.tolist()), rasterize_like_reference(polygons, roi_xyxy)
    )


def random_polygon(rng):
    """Return a random closed line, which crosses itself: tiny to large, few to many points, on borders or repeated."""
    num_points = int(rng.integers(100, 300) if rng.random() < 0.03 else rng.integers(3, 30))
    extent = rng.choice([1, 5, 28, 60, 200, 1000])
    polygon = rng.uniform(-0.3 * extent, extent, (num_points, 2))
    match rng.integers(5):
        case 0:
            return np.round(polygon * 5) / 5
        case 1:
            return np.round(polygon)
        case 2:
            return np.repeat(polygon, rng.integers(1, 3, num_points), axis=0)
        case 3:  # ties: half a fifth, and slopes of small whole numbers
            return np.round(polygon * 10) / 10
    return polygon


def random_regions(seed, count):
    """Return objects, each a list of polygons, and one ROI each: (R, 4) float32."""
    rng = np.random.default_rng(seed)
    objects = [[random_polygon(rng) for _ in range(rng.integers(1, 4))] for _ in range(count)]
    corners = rng.uniform(-5, 30, (count, 2))
    corners[::3] = corners[::3].round()
    sides = rng.uniform(0, 60, (count, 2))
    sides[1::4], sides[2::4], sides[3::4] = 28, rng.uniform(0, 3, (len(sides[2::4]), 2)), 1400 / rng.integers(1, 60)
    return objects, np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


@pytest.mark.parametrize(("count", "dense"), [(300, False), (60, True)])
def test_random_polygons_have_the_bits_of_the_reference(monkeypatch, count, dense):
    if dense:  # as on an accelerator
        monkeypatch.setattr(masks, "_crossed_columns", masks._all_columns)
    objects, rois_xyxy = random_regions(dense, count)
    expected = np.stack([rasterize_like_reference(*region) for region in zip(objects, rois_xyxy, strict=True)])
    assert 0.1 < expected.mean() < 0.9
    np.testing.assert_array_equal(rasterize_batch(objects, rois_xyxy), expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 35))
def test_thousands_of_random_polygons_have_the_bits_of_the_reference(seed):
    objects, rois_xyxy = random_regions(seed, 400)
    expected = np.stack([rasterize_like_reference(*region) for region in zip(objects, rois_xyxy, strict=True)])
    np.testing.assert_array_equal(rasterize_batch(objects, rois_xyxy), expected)


def test_padding_sets_nothing_and_chunks_add_up(monkeypatch):
    rng = np.random.default_rng(2)
    polygons = [[rng.uniform(0, SIDE, (9, 2)), rng.uniform(0, SIDE, (4, 2))], [rng.uniform(0, SIDE, (30, 2))]]
    first, second = masks.mask_vertices(make_split(polygons), 0)
    padded = np.zeros((2, 40, 3), dtype=np.float32)
    padded[0, : len(first)], padded[1, -len(second) :] = first, second
    rois = torch.tensor([[0.0, 0, SIDE, SIDE]] * 2)
    raster = masks.rasterize_polygons(torch.from_numpy(padded), rois).numpy()
    np.testing.assert_array_equal(raster, [rasterize(first), rasterize(second)])
    monkeypatch.setattr(masks, "MAX_CROSSINGS_PER_CHUNK", 7)
    np.testing.assert_array_equal(masks.rasterize_polygons(torch.from_numpy(padded), rois).numpy(), raster)
    assert not masks.rasterize_polygons(torch.zeros(1, 5, 3), rois[:1]).any()
    assert masks.rasterize_polygons(torch.zeros(0, 5, 3), rois[:0]).shape == (0, SIDE, SIDE)


def test_vertices_carry_the_number_of_their_polygon_within_the_mask():
    one, other, third = np.float32([[1, 2], [3, 4], [5, 1]]), np.float32([[6, 7], [8, 9], [7, 7]]), np.ones((3, 2))
    first, second = masks.mask_vertices(make_split([[one, other], [third]]), 0)
    assert first.dtype == np.float32
    assert first[:, :2].tolist() == [*one.tolist(), [1, 2], *other.tolist(), [6, 7]]
    assert first[:, 2].tolist() == [1] * 4 + [2] * 4
    assert second.tolist() == [[1, 1, 1]] * 4


@pytest.mark.data
def test_real_masks_have_the_bits_of_the_reference():
    num_masks = 0
    for name in ("train", "val"):
        files = coco.standard_paths(shared("data/coco-tiny"), name, segmentations=True)
        split = coco.read(*files, segmentations=True).drop_crowds()
        by_image = {}
        for annotation in json.loads(files[0].read_text())["annotations"]:
            if not annotation["iscrowd"]:
                by_image.setdefault(annotation["image_id"], []).append(annotation["segmentation"])
        for index, image_id in enumerate(split.image_ids.tolist()):
            vertices, polygons = masks.mask_vertices(split, index), by_image.get(image_id, [])
            assert len(vertices) == len(polygons)
            for mask, box_polygons, box in zip(vertices, polygons, split.boxes(index), strict=True):
                np.testing.assert_array_equal(
                    rasterize(mask, box.tolist()), rasterize_like_reference(box_polygons, box)
                )
                num_masks += 1
    assert num_masks == 1503


@pytest.mark.gpu
def test_device_rasterizes_without_sync_and_matches_the_cpu():
    objects, rois_xyxy = random_regions(3, 64)
    vertices = pad_vertices([masks.mask_vertices(make_split(objects), 0)])[0]
    rois = torch.from_numpy(rois_xyxy)
    on_device = vertices.cuda(), rois.cuda()
    masks.rasterize_polygons(*on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        raster = masks.rasterize_polygons(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(raster.cpu(), masks.rasterize_polygons(vertices, rois))


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
