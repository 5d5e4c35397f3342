import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from detection.config.settings import InputError, LaunchLayout
from detection.data import coco, image_io
from detection.data.batch import split_micro_batches
from detection.data.image_pipeline import HostImagePipeline
from detection.preflight import run_checks
from detection.runtime.distributed import DistContext
from maskrcnn import masks
from maskrcnn.commands import PREFLIGHT
from maskrcnn.config import Config
from maskrcnn.data import MaskRCNNTrainDataset, MaskRCNNTrainSource, resized_hw
from maskrcnn.train_images import select_train_images
from paths import ROOT, shared

CPU = torch.device("cpu")
SINGLE_RANK = DistContext(0, 1, CPU)
SIZES = {"min_image_size": 128, "max_image_size": 160}


REFERENCE = ROOT / "tests/golden/maskrcnn/maskrcnn_reference.npz"


def make_source(folder, ranks=SINGLE_RANK, seed=5, **settings):
    known = {"dataset": "toy", "num_classes": 4, "batch_size": 4, "eval_batch_size": 3, "num_workers": 0}
    known["legacy_boxes"] = False
    return MaskRCNNTrainSource(Config(data_dir=folder, **known | SIZES | settings), ranks, seed)


def samples_by_index(data, epoch=1):
    """Return the rows of an epoch's batches by image index."""
    keys = [key for step in data.sampler for key in step]
    rows = [row for rank_batch in data.train_batches(epoch) for row in zip(*rank_batch.batch, strict=True)]
    return {index: row for (_, index), row in zip(keys, rows, strict=True)}


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((300, 1000), (400, 1333)),
        ((1000, 300), (1333, 400)),
        ((333, 555), (800, 1333)),
        ((800, 800), (800, 800)),
        ((1, 5000), (1, 1333)),
    ],
)
def test_sizes_round_as_in_the_reference(size_hw, expected):
    assert resized_hw(size_hw, 800, 1333) == expected


def test_batch_holds_resized_images_padded_with_zeros(small_toy):
    data = make_source(small_toy, flip=False)
    split = data.train_loader.dataset.split
    samples = samples_by_index(data)
    assert len(samples) == data.train_samples
    for index, (pixels, size_hw, boxes, labels, *_) in samples.items():
        original = image_io.read(split.image_path(index))
        expected_hw = resized_hw(original.shape[1:], 128, 160)
        height, width = size_hw.tolist()
        assert (height, width) == expected_hw
        assert torch.equal(pixels[:, :height, :width], image_io.resize(original, expected_hw))
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()
        assert pixels.shape[1] % 32 == pixels.shape[2] % 32 == 0
        count = len(split.boxes(index))
        scale = np.array([width / original.shape[2], height / original.shape[1]] * 2)
        np.testing.assert_allclose(boxes[:count], split.boxes(index) * scale, rtol=1e-5)
        assert labels[:count].tolist() == split.image_labels(index).tolist()
        assert not labels[count:].any()


def test_batch_has_the_size_of_its_largest_image_in_channels_last_layout(small_toy):
    for batch, *_ in make_source(small_toy).train_batches(1):
        max_hw = batch.sizes_hw.amax(dim=0)
        assert list(batch.images.shape[2:]) == [-(-side // 32) * 32 for side in max_hw.tolist()]
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_batch_splits_into_micro_batches(small_toy):
    batch = next(make_source(small_toy).train_batches(1)).batch
    halves = split_micro_batches(batch, 2)
    assert [len(half[0]) for half in halves] == [2, 2]
    for whole, parts in zip(batch, zip(*halves, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_masks_scale_with_their_image(small_toy):
    """Rasterized over the whole resized image, a mask has the annotated area and touches its box's sides."""
    data = make_source(small_toy)
    split = data.train_loader.dataset.split
    areas = {
        (a["image_id"], round(a["bbox"][0], 2)): a["area"]
        for a in json.loads(split.annotation_file.read_text())["annotations"]
    }
    for index, (_, size_hw, boxes, labels, vertices, _) in samples_by_index(data).items():
        height, width = size_hw.tolist()
        whole = torch.tensor([[0.0, 0, width, height]]).expand(len(vertices), 4)
        bitmaps = masks.rasterize_polygons(vertices, whole, size=320)
        scale = np.prod(split.sizes_hw[index]) / 320**2
        for number, box in enumerate(split.boxes(index)):
            area = areas[int(split.image_ids[index]), round(float(box[0]), 2)]
            assert float(bitmaps[number].sum()) * scale == pytest.approx(area, rel=0.02, abs=8)
            y, x = bitmaps[number].nonzero().T / 320
            x, y = x * width, y * height
            extent = [x.min(), y.min(), x.max(), y.max()]
            assert boxes[number].tolist() == pytest.approx([float(side) for side in extent], abs=1)
        assert not bitmaps[labels == 0].any()


def test_flip_applies_to_boxes_and_masks(small_toy):
    originals, samples = (samples_by_index(make_source(small_toy, flip=flip)) for flip in (False, True))
    flipped = [i for i in originals if not torch.equal(originals[i][0], samples[i][0])]
    assert 0.2 < len(flipped) / len(originals) < 0.8
    for index in flipped:
        pixels, size_hw, boxes, labels, vertices, _ = originals[index]
        height, width = size_hw.tolist()
        actual = samples[index]
        assert torch.equal(actual[0][:, :height, :width], pixels[:, :height, :width].flip(2))
        valid = labels > 0
        torch.testing.assert_close(actual[2][valid][:, [2, 0]], width - boxes[valid][:, [0, 2]])
        assert torch.equal(actual[2][:, [1, 3]], boxes[:, [1, 3]])
        assert torch.equal(actual[3], labels)
        bitmaps = masks.rasterize_polygons(vertices[valid], boxes[valid])
        differs = masks.rasterize_polygons(actual[4][valid], actual[2][valid]) != bitmaps.flip(2)
        assert differs.float().mean() < 0.01
        assert bitmaps.mean() > 0.3


def test_legacy_box_ends_with_its_last_pixel_with_and_without_flip(small_toy):
    for flip in (False, True):
        exclusive, legacy = (
            samples_by_index(make_source(small_toy, flip=flip, legacy_boxes=on)) for on in (False, True)
        )
        dataset = make_source(small_toy).train_loader.dataset
        split = dataset.split
        for index, (_, size_hw, boxes, labels, vertices, _) in exclusive.items():
            # A pixel of the original image.
            pixel = size_hw.flip(0) / torch.tensor(split.sizes_hw[index].tolist()).flip(0)
            valid = labels > 0
            actual, expected = legacy[index][2][valid], boxes[valid]
            torch.testing.assert_close(actual[:, 2:] - actual[:, :2], expected[:, 2:] - expected[:, :2] - pixel)
            # So do polygons, as in the reference.
            is_flipped = flip and dataset.sample_params(1, index)[0]
            expected_vertices = vertices - torch.tensor([is_flipped, 0, 0]) * (vertices[..., 2:] > 0)
            assert torch.equal(legacy[index][4], expected_vertices)
            shift = actual[:, 0] - expected[:, 0]
            # A flipped box loses the pixel on its left side, and the last pixel is W - 1.
            assert (shift.abs() < 1e-3).all() or torch.allclose(shift, pixel[0] - 1, atol=1e-3)


def test_flips_depend_on_epoch_and_seed(small_toy):
    def flips(seed, epoch):
        dataset = make_source(small_toy, seed=seed).train_loader.dataset
        return [dataset.sample_params(epoch, index)[0] for index in range(len(dataset.split))]

    assert flips(5, 1) == flips(5, 1)
    assert flips(5, 1) != flips(5, 2)
    assert flips(5, 1) != flips(6, 1)


def test_worker_count_does_not_change_batches(small_toy):
    loaded = [[batch for batch, *_ in make_source(small_toy, num_workers=n).train_batches(2)] for n in (0, 2)]
    assert len(loaded[0]) == len(loaded[1]) > 1
    for one, other in zip(*loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def count_samples(folder, ranks, **settings):
    """Count pixels, masks and seeds of each image, without the padding, which depends on the batch."""
    counts = Counter()
    for batch, *_ in make_source(folder, ranks, **settings).train_batches(1):
        for pixels, (height, width), _, labels, vertices, seed in zip(*batch, strict=True):
            rows = vertices[labels > 0].flatten(0, 1)
            rows = rows[rows.any(dim=1)]
            counts[pixels[:, :height, :width].numpy().tobytes(), rows.numpy().tobytes(), int(seed)] += 1
    return counts


def test_samples_do_not_depend_on_ranks_or_aspect_groups(small_toy):
    expected = count_samples(small_toy, SINGLE_RANK)
    assert set(expected.values()) == {1}
    first, second = (count_samples(small_toy, DistContext(rank, 2, CPU), batch_size=2) for rank in (0, 1))
    assert first + second == expected
    assert count_samples(small_toy, SINGLE_RANK, group_by_aspect_ratio=False) == expected
    assert count_samples(small_toy, SINGLE_RANK, seed=6) != expected


def test_batches_group_images_by_aspect_ratio(small_toy):
    def count_mixed(**settings):
        return sum(
            0 < (batch.sizes_hw[:, 1] >= batch.sizes_hw[:, 0]).sum() < len(batch.images)
            for batch, *_ in make_source(small_toy, batch_size=3, **settings).train_batches(1)
        )

    assert count_mixed(group_by_aspect_ratio=False) > 2 >= count_mixed()


def test_loss_weights_make_each_step_a_mean_over_its_images(small_toy):
    sums = Counter()
    for rank in range(3):
        for step, rank_batch in enumerate(make_source(small_toy, DistContext(rank, 3, CPU)).train_batches(1)):
            sums[step] += rank_batch.loss_weight * len(rank_batch.batch.images) / 3
    assert all(total == pytest.approx(1) for total in sums.values())


@pytest.fixture
def odd_boxes(tmp_path):
    """The split with boxes of odd sizes in the reference's vectors."""
    content = json.loads(str(np.load(REFERENCE)["dataset_json"]))
    for image in content["images"]:
        (tmp_path / image["file_name"]).touch()
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return coco.read(tmp_path / "annotations.json", tmp_path, segmentations=True)


def test_masks_stay_with_their_boxes_if_others_are_dropped(odd_boxes):
    train = select_train_images(Config(), odd_boxes)
    assert len(train.labels) < len(odd_boxes.labels) - odd_boxes.is_crowd.sum()
    for index in range(len(train)):
        for box, mask in zip(train.boxes(index), train.masks(index), strict=True):
            left, top, width, height = mask_api.toBbox(mask)
            assert [left, top, left + width, top + height] == pytest.approx(box, abs=1)


def test_batch_of_images_with_crowds_only_has_no_objects(odd_boxes):
    train = select_train_images(Config(), odd_boxes)
    index = train.image_ids.tolist().index(5)
    Image.new("RGB", (60, 60)).save(train.image_path(index))
    limits = {"min_size_px": 64, "max_size_px": 64}
    dataset = MaskRCNNTrainDataset(train, seed=0, **limits, flip=True, legacy=True, pixels=HostImagePipeline())
    batch = dataset.__getitems__([(1, index), (2, index)])
    assert batch.boxes_xyxy.shape == (2, 2, 4)
    assert not batch.labels.any()
    assert not batch.vertices.any()


def test_torchvision_variant_trains_on_narrow_boxes_and_on_no_image_with_crowds_only(odd_boxes):
    train = select_train_images(Config(legacy_boxes=False), odd_boxes)
    assert train.image_ids.tolist() == [1, 2, 3, 4]
    assert len(train.labels) == len(odd_boxes.labels) - odd_boxes.is_crowd.sum()


@pytest.mark.parametrize("legacy_boxes", [True, False])
def test_all_images_are_trained_on_if_asked(odd_boxes, legacy_boxes):
    train = select_train_images(Config(legacy_boxes=legacy_boxes, background_images="keep"), odd_boxes)
    assert train.image_ids.tolist() == odd_boxes.image_ids.tolist()
    assert not train.has_boxes.all()
    assert not train.is_crowd.any()


def write_single_box(folder, start, width):
    """Write annotations of one image with one box. Return the file."""
    Image.new("RGB", (640, 20)).save(folder / "1.jpg")
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 20, "width": 640}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [start, 3, width, 9], "area": 9 * width, "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    content["annotations"][0]["segmentation"] = [[start, 3, start + width, 3, start, 12]]
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder / "annotations.json"


@pytest.mark.parametrize("start", [5.3, 127.7, 511.61])
def test_side_of_a_pixel_is_recognized_despite_rounding(tmp_path, start):
    for width in (1.0, 1.01):
        split = coco.read(write_single_box(tmp_path, start, width), tmp_path)
        assert len(select_train_images(Config(), split)) == (width > 1)


def test_data_set_without_an_image_to_train_on_is_reported_by_preflight(tmp_path):
    file = str(write_single_box(tmp_path, 5.3, 1.0))
    data = {"train_annotations": file, "val_annotations": file}
    data |= {"train_images": str(tmp_path), "val_images": str(tmp_path), "dataset": "custom", "batch_size": 1}
    with pytest.raises(InputError, match="has 0 images to train on"):
        run_checks.check_data(Config(**data), LaunchLayout(), PREFLIGHT)
    run_checks.check_data(Config(**data, legacy_boxes=False), LaunchLayout(), PREFLIGHT)


def test_training_skips_crowds_and_images_without_boxes(small_toy):
    data = make_source(small_toy)
    split = coco.read(*coco.standard_paths(small_toy, "train"))
    assert split.is_crowd.any()
    assert not data.train_loader.dataset.split.is_crowd.any()
    assert data.train_samples == len(split.drop_crowds().drop_empty_images()) < len(split)
    indices = torch.cat([batch.image_indices for batch in data.eval_batches()])
    assert sorted(indices.tolist()) == list(range(len(data.val)))


def test_each_evaluation_image_is_on_one_rank_with_its_sizes(small_toy):
    val = coco.read(*coco.standard_paths(small_toy, "val"))
    originals, indices = val.sizes_hw.tolist(), []
    for rank in range(3):
        for batch in make_source(small_toy, DistContext(rank, 3, CPU)).eval_batches():
            indices += batch.image_indices.tolist()
            for index, size_hw, original_hw in zip(
                *(t.tolist() for t in batch[2:0:-1]), batch[3].tolist(), strict=True
            ):
                assert originals[index] == original_hw
                assert resized_hw(original_hw, 128, 160) == tuple(size_hw)
    assert sorted(indices) == list(range(len(originals)))


def test_evaluation_batches_group_images_by_size(small_toy):
    batches = list(make_source(small_toy, eval_batch_size=2).eval_batches())
    shapes = [tuple(hw) for batch in batches for hw in batch.sizes_hw.tolist()]
    assert len(set(shapes)) > 1
    assert shapes in (sorted(shapes), sorted(shapes, key=lambda hw: hw[::-1]))


def test_image_cache_yields_the_same_batches_without_files(small_toy, tmp_path):
    folder = shutil.copytree(small_toy, tmp_path / "data")
    expected = count_samples(folder, SINGLE_RANK)
    data = make_source(folder, image_cache="host")
    first = [batch for batch, *_ in data.train_batches(1)]
    shutil.rmtree(folder / "train2017")
    second = [batch for batch, *_ in data.train_batches(1)]
    assert all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert sum(len(batch.images) for batch in first) == sum(expected.values())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_image_is_named_without_a_traceback(small_toy, tmp_path, num_workers):
    data = make_source(small_toy, num_workers=num_workers)
    dataset = data.train_loader.dataset
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in dataset.split.image_dir.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:-500])
    dataset.split = replace(dataset.split, image_dir=broken)
    with pytest.raises(InputError, match=r"broken/0000\d+\.jpg: this image cannot be read") as caught:
        list(data.train_batches(1))
    assert "Traceback" not in str(caught.value)


def test_wrong_number_of_classes_is_rejected(small_toy):
    with pytest.raises(InputError, match="num_classes 4, not 7"):
        make_source(small_toy, num_classes=7)


def test_invalid_mask_is_rejected_in_either_split(small_toy, tmp_path):
    for name in ("train", "val"):
        folder = shutil.copytree(small_toy, tmp_path / name)
        file, _ = coco.standard_paths(folder, name)
        content = json.loads(file.read_text())
        content["annotations"][-1]["segmentation"] = [[1, 2, 3]]
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"instances_{name}2017.json: .*annotation \d+, image_id \d+: .*odd"):
            make_source(folder)


@pytest.mark.data
def test_real_photos_keep_their_masks():
    folder = shared("data/coco-tiny")
    data = make_source(folder, dataset="coco2017", num_classes=81, batch_size=16, num_workers=0)
    num_boxes, fill_ratios = 0, []
    for batch, *_ in data.train_batches(1):
        valid = batch.labels > 0
        num_boxes += int(valid.sum())
        fill_ratios.append(masks.rasterize_polygons(batch.vertices[valid], batch.boxes_xyxy[valid]).mean(dim=(1, 2)))
    assert num_boxes == 699
    assert 0.5 < torch.cat(fill_ratios).mean() < 0.7  # COCO's objects fill a bit more than half of their box
