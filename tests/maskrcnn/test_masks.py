"""Masks as edges, drawn in regions, and predictions laid onto images: against pycocotools and torchvision."""

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
from detection.data.polygons import Outlines
from maskrcnn import masks
from paths import shared

SIDE = 28


def write(folder, segmentations, size_hw=(SIDE, SIDE), box=(0, 0, SIDE, SIDE)):
    """One image whose annotations have these segmentations; read again."""
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 1, "iscrowd": 0, "segmentation": segmentation}
        for i, segmentation in enumerate(segmentations, start=1)
    ]
    image = {"id": 1, "file_name": "1.jpg", "height": size_hw[0], "width": size_hw[1]}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "1.jpg").touch()
    (folder / "instances.json").write_text(json.dumps(content))
    return coco.read(folder / "instances.json", folder, segmentations=True)


def polygons_as_split(boxes):
    """A split of one image in memory: boxes of polygons of points (N, 2)."""
    closed = [[np.concatenate([polygon, polygon[:1]]) for polygon in box] for box in boxes]
    lines = [polygon for box in closed for polygon in box]
    outlines = Outlines(
        line_starts=np.cumsum([0, *(len(box) for box in closed)]),
        point_starts=np.cumsum([0, *(len(line) for line in lines)]),
        points_xy=np.concatenate(lines).astype(np.float32),
    )
    count = len(boxes)
    return coco.Split(
        annotation_file=Path("none"),
        image_folder=Path("none"),
        image_ids=np.array([1]),
        file_names=np.array([b"1.jpg"]),
        sizes_hw=np.array([[SIDE, SIDE]], dtype=np.int32),
        box_starts=np.array([0, count]),
        boxes_xyxy=np.tile(np.float32([0, 0, SIDE, SIDE]), (count, 1)),
        labels=np.ones(count, dtype=np.int64),
        crowd=np.zeros(count, dtype=bool),
        categories=(coco.Category(1, "thing"),),
        dropped_boxes=0,
        clipped_boxes=0,
        missing_images=0,
        outlines=outlines,
    )


def draw(edges, roi_xyxy=(0, 0, SIDE, SIDE), size=SIDE):
    drawn = masks.rasterise(torch.from_numpy(edges)[None], torch.tensor([roi_xyxy], dtype=torch.float32), size)
    assert drawn.shape == (1, size, size)
    assert drawn.dtype == torch.float32
    return drawn[0].numpy()


def draw_polygons(*polygons, **where):
    (edges,) = masks.edges_of(polygons_as_split([[np.array(polygon, dtype=float) for polygon in polygons]]), 0)
    return draw(edges, **where)


def rectangle(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def filled(left, top, right, bottom, side=SIDE):
    mask = np.zeros((side, side))
    mask[top:bottom, left:right] = 1
    return mask


def compressed(mask):
    encoded = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def plain(mask):
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=0))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=len(pixels)).tolist()}


def random_masks():
    """Noise, blots, whole columns and rows, all and one pixel."""
    rng = np.random.default_rng(1)
    made = [rng.random((SIDE, SIDE)) < share for share in (0.03, 0.3, 0.7, 0.97)]
    made += [np.kron(rng.random((7, 7)) < 0.5, np.ones((4, 4))) for _ in range(4)]
    made += [filled(3, 0, 9, SIDE), filled(0, 0, SIDE, SIDE), filled(0, 5, SIDE, 9), filled(27, 27, 28, 28)]
    return [mask.astype(np.uint8) for mask in made]


@pytest.mark.parametrize("form", [plain, compressed])
def test_run_lengths_come_back_exactly_on_their_own_grid(tmp_path, form):
    made = random_masks()
    edges = masks.edges_of(write(tmp_path, [form(mask) for mask in made]), 0)
    assert len(edges) == len(made)
    for mask, of_mask in zip(made, edges, strict=True):
        np.testing.assert_array_equal(draw(of_mask), mask)
        half = draw(of_mask, roi_xyxy=(7, 14, 21, 28))
        np.testing.assert_array_equal(half, np.kron(mask[14:28, 7:21], np.ones((2, 2))))


def test_a_rectangle_is_drawn_exactly_in_any_region():
    np.testing.assert_array_equal(draw_polygons(rectangle(3, 5, 20, 9)), filled(3, 5, 20, 9))
    part = draw_polygons(rectangle(30, 50, 200, 90), roi_xyxy=(0, 0, 280, 280))
    np.testing.assert_array_equal(part, filled(3, 5, 20, 9))
    beyond = draw_polygons(rectangle(-50, -50, 500, 21), roi_xyxy=(7, 7, 35, 35))
    np.testing.assert_array_equal(beyond, filled(0, 0, 28, 14))


def test_a_cell_counts_where_its_middle_is_inside():
    np.testing.assert_array_equal(draw_polygons(rectangle(2.4, 2.4, 5.6, 5.4)), filled(2, 2, 6, 5))


def test_a_corner_on_the_middle_of_a_row_counts_once_or_not_at_all():
    """A diamond, whose corners are there: their rows run on to no border, and that of two of them is not empty."""
    diamond = [(14, 1.5), (27, 14.5), (14, 27.5), (1, 14.5)]
    middle = np.arange(SIDE) + 0.5
    wanted = np.abs(middle - 14) + np.abs(middle - 14.5)[:, None] < 13
    np.testing.assert_array_equal(draw_polygons(diamond), wanted)


def test_a_region_without_a_side_is_one_pixel_and_not_a_number_less():
    drawn = draw_polygons(rectangle(0, 0, 10, 10), roi_xyxy=(3, 3, 3, 3))
    np.testing.assert_array_equal(drawn, np.ones((SIDE, SIDE)))


def test_parts_that_overlap_leave_no_hole_whichever_way_they_turn():
    one, other = rectangle(2, 2, 16, 16), rectangle(8, 8, 24, 24)
    wanted = np.maximum(filled(2, 2, 16, 16), filled(8, 8, 24, 24))
    np.testing.assert_array_equal(draw_polygons(one, other), wanted)
    np.testing.assert_array_equal(draw_polygons(one, other[::-1]), wanted)


points = st.tuples(st.floats(-10, 40, width=32), st.floats(-10, 40, width=32))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(points, min_size=3, max_size=3), min_size=1, max_size=4), st.lists(st.booleans(), min_size=4))
def test_neither_the_turn_nor_the_first_point_of_a_polygon_matters(triangles, turned):
    other = [t[1:] + t[:1] if turn else t[::-1] for t, turn in zip(triangles, turned, strict=False)]
    apart = np.abs(draw_polygons(*triangles) - draw_polygons(*other)).sum()
    assert apart <= 1  # a crossing on the middle of a cell, which rounding may put on either side


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(points, min_size=3, max_size=3), min_size=1, max_size=4))
def test_parts_together_are_the_union_of_each_alone(triangles):
    alone = np.max([draw_polygons(triangle) for triangle in triangles], axis=0)
    np.testing.assert_array_equal(draw_polygons(*triangles), alone)


def test_padding_draws_nothing_and_the_pieces_of_long_outlines_add_up(monkeypatch):
    rng = np.random.default_rng(2)
    polygons = [[rng.uniform(0, SIDE, (9, 2)), rng.uniform(0, SIDE, (4, 2))], [rng.uniform(0, SIDE, (30, 2))]]
    first, second = masks.edges_of(polygons_as_split(polygons), 0)
    padded = np.zeros((2, 40, 4), dtype=np.float32)
    padded[0, : len(first)], padded[1, -len(second) :] = first, second
    rois = torch.tensor([[0.0, 0, SIDE, SIDE]] * 2)
    drawn = masks.rasterise(torch.from_numpy(padded), rois).numpy()
    np.testing.assert_array_equal(drawn, [draw(first), draw(second)])
    monkeypatch.setattr(masks, "EDGES_AT_ONCE", 7)
    np.testing.assert_array_equal(masks.rasterise(torch.from_numpy(padded), rois).numpy(), drawn)
    assert not masks.rasterise(torch.zeros(1, 5, 4), rois[:1]).any()
    assert masks.rasterise(torch.zeros(0, 5, 4), rois[:0]).shape == (0, SIDE, SIDE)


def test_edges_without_a_height_are_left_out():
    (edges,) = masks.edges_of(polygons_as_split([[np.array(rectangle(1, 2, 3, 4))]]), 0)
    assert sorted(map(tuple, edges.tolist())) == [(1, 2, 1, 4), (3, 4, 3, 2)]


@pytest.mark.data
def test_real_masks_agree_with_those_that_pycocotools_draws_in_the_same_region():
    """Seen: IoU .9896 on average over 1,503 objects, .953 at the first percentile."""
    overlaps = []
    for part in ("train", "val"):
        files = coco.layout(shared("data/coco-tiny"), part, segmentations=True)
        split = coco.read(*files, segmentations=True).without_crowds()
        by_image = {}
        for annotation in json.loads(files[0].read_text())["annotations"]:
            if not annotation["iscrowd"]:
                by_image.setdefault(annotation["image_id"], []).append(annotation["segmentation"])
        for index, image_id in enumerate(split.image_ids.tolist()):
            edges, polygons = masks.edges_of(split, index), by_image.get(image_id, [])
            assert len(edges) == len(polygons)
            for of_box, of_object, box in zip(edges, polygons, split.boxes(index), strict=True):
                got = compressed(draw(of_box, box.tolist()))
                scale = SIDE / np.maximum(box[2:] - box[:2], 1)
                in_grid = [((np.reshape(p, (-1, 2)) - box[:2]) * scale).ravel().tolist() for p in of_object]
                wanted = mask_api.merge(mask_api.frPyObjects(in_grid, SIDE, SIDE))
                overlaps.append(mask_api.iou([got], [wanted], [0])[0, 0])
    assert len(overlaps) == 1503
    assert np.mean(overlaps) > 0.985
    assert np.percentile(overlaps, 1) > 0.94


@pytest.mark.gpu
def test_drawing_never_waits_for_the_device_and_gives_what_the_cpu_gives():
    rng = np.random.default_rng(4)
    edges = torch.from_numpy(rng.uniform(0, 300, (64, 700, 4)).astype(np.float32))
    corners = torch.from_numpy(rng.uniform(0, 200, (64, 2)).astype(np.float32))
    rois = torch.cat([corners, corners + 50], dim=1)
    on_device = edges.cuda(), rois.cuda()
    masks.rasterise(*on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = masks.rasterise(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (drawn.cpu() != masks.rasterise(edges, rois)).float().mean() < 1e-3


def detections(seed, count, size_hw, smooth):
    """Masks of noise or of blots, and boxes whose middle is in the image: within, past its borders, too thin to see."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    probabilities = (
        rng.random((count, SIDE, SIDE)) if smooth else np.kron(rng.random((count, 4, 4)) < 0.5, np.ones((7, 7)))
    )
    middles = rng.uniform(0, 1, (count, 2)) * [width, height]
    extents = rng.uniform(0, 1, (count, 2)) ** 3 * [width, height]
    extents[::7] = 0.01
    extents[1::7, 0] = 2 * width
    return probabilities.astype(np.float32), np.concatenate(
        [middles - extents / 2, middles + extents / 2], axis=1
    ).astype(np.float32)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("size_hw", [(61, 97), (240, 131), (1, 40), (33, 1)])
def test_masks_are_laid_onto_their_image_as_by_torchvision_to_the_pixel(size_hw, smooth):
    probabilities, boxes = detections(3, 60, size_hw, smooth)
    wanted = paste_masks_in_image(torch.from_numpy(probabilities)[:, None], torch.from_numpy(boxes), size_hw)
    pasted = masks.paste(probabilities, boxes, size_hw)
    for number, (mask, got) in enumerate(zip((wanted[:, 0] > 0.5).numpy(), pasted, strict=True)):
        assert got == compressed(mask), f"detection {number}"
    assert any(mask_api.area(mask) for mask in pasted)


def test_a_box_outside_of_the_image_has_an_empty_mask():
    """torchvision cannot do it; the network cuts its boxes to the image, so that none comes."""
    boxes = np.float32([[-9, -9, -5, -5], [50, 2, 60, 9], [3, 70, 9, 90]])
    pasted = masks.paste(np.ones((3, SIDE, SIDE), np.float32), boxes, (30, 40))
    assert pasted == [compressed(np.zeros((30, 40)))] * 3


def test_no_detection_gives_no_mask():
    assert masks.paste(np.zeros((0, SIDE, SIDE), np.float32), np.zeros((0, 4), np.float32), (5, 5)) == []
