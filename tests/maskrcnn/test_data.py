import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from detection.config.settings import InputError
from detection.data import coco, image_io
from detection.engine import train_loop
from detection.runtime.distributed import Ranks
from maskrcnn import masks
from maskrcnn.config import Config
from maskrcnn.data import MaskRCNNData, resized_hw
from paths import shared

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
SIZES = {"min_image_size": 128, "max_image_size": 160}


def open_data(folder, ranks=ALONE, seed=5, **settings):
    known = {"dataset": "toy", "num_classes": 4, "batch_size": 4, "eval_batch_size": 3, "num_workers": 0}
    known["legacy_boxes"] = False
    return MaskRCNNData(Config(data_dir=folder, **known | SIZES | settings), ranks, seed)


def samples(data, epoch=1):
    """Each image that is trained on in an epoch, by its index: what the batches hold of it."""
    keys = [key for step in data.sampler for key in step]
    rows = [row for share in data.shares(epoch) for row in zip(*share.batch, strict=True)]
    return {index: row for (_, index), row in zip(keys, rows, strict=True)}


@pytest.mark.parametrize(
    ("size_hw", "wanted"),
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
def test_sizes_are_rounded_as_by_the_reference(size_hw, wanted):
    assert resized_hw(size_hw, 800, 1333) == wanted


def test_a_batch_holds_each_image_resized_in_its_corner_and_zeros_around_it(tiny_toy):
    data = open_data(tiny_toy, flip=False)
    split = data.train_loader.dataset.split
    seen = samples(data)
    assert len(seen) == data.train_samples
    for index, (pixels, size_hw, boxes, labels, *_) in seen.items():
        original = image_io.read(split.image_path(index))
        wanted_hw = resized_hw(original.shape[1:], 128, 160)
        height, width = size_hw.tolist()
        assert (height, width) == wanted_hw
        assert torch.equal(pixels[:, :height, :width], image_io.resize(original, wanted_hw))
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()
        assert pixels.shape[1] % 32 == pixels.shape[2] % 32 == 0
        count = len(split.boxes(index))
        scale = np.array([width / original.shape[2], height / original.shape[1]] * 2)
        np.testing.assert_allclose(boxes[:count], split.boxes(index) * scale, rtol=1e-5)
        assert labels[:count].tolist() == split.image_labels(index).tolist()
        assert not labels[count:].any()


def test_images_are_no_larger_than_the_largest_of_their_batch_needs_and_lie_channels_last(tiny_toy):
    for share in open_data(tiny_toy).shares(1):
        most = share.batch.sizes_hw.amax(dim=0)
        assert list(share.batch.images.shape[2:]) == [-(-side // 32) * 32 for side in most.tolist()]
        assert share.batch.images.dtype == torch.uint8
        assert share.batch.images.is_contiguous(memory_format=torch.channels_last)


def test_the_loop_can_cut_a_batch_along_its_images(tiny_toy):
    batch = next(open_data(tiny_toy).shares(1)).batch
    halves = train_loop.split(batch, 2)
    assert [len(half[0]) for half in halves] == [2, 2]
    for whole, parts in zip(batch, zip(*halves, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_masks_follow_their_image_in_size_and_place(tiny_toy):
    """Drawn over the whole of the resized image, a mask is as large as annotated, and touches its box's sides."""
    data = open_data(tiny_toy)
    split = data.train_loader.dataset.split
    areas = {
        (a["image_id"], round(a["bbox"][0], 2)): a["area"]
        for a in json.loads(split.annotation_file.read_text())["annotations"]
    }
    for index, (_, size_hw, boxes, labels, edges, _) in samples(data).items():
        height, width = size_hw.tolist()
        whole = torch.tensor([[0.0, 0, width, height]]).expand(len(edges), 4)
        drawn = masks.rasterise(edges, whole, size=320)
        scale = np.prod(split.sizes_hw[index]) / 320**2
        for place, box in enumerate(split.boxes(index)):
            area = areas[int(split.image_ids[index]), round(float(box[0]), 2)]
            assert float(drawn[place].sum()) * scale == pytest.approx(area, rel=0.02, abs=8)
            y, x = drawn[place].nonzero().T / 320
            x, y = x * width, y * height
            around = [x.min(), y.min(), x.max(), y.max()]
            assert boxes[place].tolist() == pytest.approx([float(side) for side in around], abs=1)
        assert not drawn[labels == 0].any()


def test_a_mirrored_image_has_its_boxes_and_masks_mirrored(tiny_toy):
    plain, chance = samples(open_data(tiny_toy, flip=False)), samples(open_data(tiny_toy, flip=True))
    mirrored = [i for i in plain if not torch.equal(plain[i][0], chance[i][0])]
    assert 0.2 < len(mirrored) / len(plain) < 0.8
    for index in mirrored:
        pixels, size_hw, boxes, labels, edges, _ = plain[index]
        height, width = size_hw.tolist()
        got = chance[index]
        assert torch.equal(got[0][:, :height, :width], pixels[:, :height, :width].flip(2))
        there = labels > 0
        torch.testing.assert_close(got[2][there][:, [2, 0]], width - boxes[there][:, [0, 2]])
        assert torch.equal(got[2][:, [1, 3]], boxes[:, [1, 3]])
        assert torch.equal(got[3], labels)
        drawn = masks.rasterise(edges[there], boxes[there])
        apart = masks.rasterise(got[4][there], got[2][there]) != drawn.flip(2)
        assert apart.float().mean() < 0.01
        assert drawn.mean() > 0.3


def test_a_legacy_box_ends_with_its_last_pixel_before_and_after_it_is_mirrored(tiny_toy):
    for flip in (False, True):
        plain, legacy = (samples(open_data(tiny_toy, flip=flip, legacy_boxes=on)) for on in (False, True))
        split = open_data(tiny_toy).train_loader.dataset.split
        for index, (_, size_hw, boxes, labels, edges, _) in plain.items():
            pixel = size_hw.flip(0) / torch.tensor(split.sizes_hw[index].tolist()).flip(0)  # one of the original
            there = labels > 0
            got, wanted = legacy[index][2][there], boxes[there]
            torch.testing.assert_close(got[:, 2:] - got[:, :2], wanted[:, 2:] - wanted[:, :2] - pixel)
            whole = torch.equal(legacy[index][4], edges)
            assert whole
            moved = got[:, 0] - wanted[:, 0]
            # Mirrored, it ends where it began: the pixel is lost on its other side, and the last pixel is W - 1.
            assert (moved.abs() < 1e-3).all() or torch.allclose(moved, pixel[0] - 1, atol=1e-3)


def test_which_images_are_mirrored_is_drawn_anew_for_each_epoch_and_seed(tiny_toy):
    def mirrored(seed, epoch):
        dataset = open_data(tiny_toy, seed=seed).train_loader.dataset
        return [dataset.draw(epoch, index)[0] for index in range(len(dataset.split))]

    assert mirrored(5, 1) == mirrored(5, 1)
    assert mirrored(5, 1) != mirrored(5, 2)
    assert mirrored(5, 1) != mirrored(6, 1)


def test_workers_do_not_change_what_is_trained(tiny_toy):
    loaded = [[share.batch for share in open_data(tiny_toy, num_workers=n).shares(2)] for n in (0, 2)]
    assert len(loaded[0]) == len(loaded[1]) > 1
    for one, other in zip(*loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def trained(folder, ranks, **settings):
    """Pixels and masks of each image, without the padding, that depends on its batch."""
    seen = Counter()
    for share in open_data(folder, ranks, **settings).shares(1):
        for pixels, (height, width), _, labels, edges, seed in zip(*share.batch, strict=True):
            rows = edges[labels > 0].flatten(0, 1)
            rows = rows[rows.any(dim=1)]
            seen[pixels[:, :height, :width].numpy().tobytes(), rows.numpy().tobytes(), int(seed)] += 1
    return seen


def test_neither_ranks_nor_groups_change_which_images_are_trained_nor_how(tiny_toy):
    whole = trained(tiny_toy, ALONE)
    assert set(whole.values()) == {1}
    assert (
        trained(tiny_toy, Ranks(0, 2, CPU), batch_size=2) + trained(tiny_toy, Ranks(1, 2, CPU), batch_size=2) == whole
    )
    assert trained(tiny_toy, ALONE, group_by_aspect_ratio=False) == whole
    assert trained(tiny_toy, ALONE, seed=6) != whole


def test_batches_are_of_wide_or_of_high_images(tiny_toy):
    def mixed(**settings):
        return sum(
            0 < (share.batch.sizes_hw[:, 1] >= share.batch.sizes_hw[:, 0]).sum() < len(share.batch.images)
            for share in open_data(tiny_toy, batch_size=3, **settings).shares(1)
        )

    assert mixed(group_by_aspect_ratio=False) > 2 >= mixed()


def test_the_weights_of_an_epoch_make_each_step_a_mean_over_its_images(tiny_toy):
    sums = Counter()
    for rank in range(3):
        for step, share in enumerate(open_data(tiny_toy, Ranks(rank, 3, CPU)).shares(1)):
            sums[step] += share.weight * len(share.batch.images) / 3
    assert all(total == pytest.approx(1) for total in sums.values())


def test_crowds_are_not_trained_on_and_images_without_boxes_only_evaluated(tiny_toy):
    data = open_data(tiny_toy)
    whole = coco.read(*coco.layout(tiny_toy, "train"))
    assert whole.crowd.any()
    assert not data.train_loader.dataset.split.crowd.any()
    assert data.train_samples == len(whole.without_crowds().with_boxes()) < len(whole)
    ids = torch.cat([batch.image_ids for batch in data.eval_batches()])
    assert sorted(ids.tolist()) == sorted(coco.read(*coco.layout(tiny_toy, "val")).image_ids.tolist())


def test_each_evaluation_image_is_on_one_rank_with_its_own_sizes(tiny_toy):
    val = coco.read(*coco.layout(tiny_toy, "val"))
    originals = dict(zip(val.image_ids.tolist(), val.sizes_hw.tolist(), strict=True))
    ids = []
    for rank in range(3):
        for batch in open_data(tiny_toy, Ranks(rank, 3, CPU)).eval_batches():
            ids += batch.image_ids.tolist()
            for image_id, size_hw, original_hw in zip(
                *(t.tolist() for t in batch[2:0:-1]), batch[3].tolist(), strict=True
            ):
                assert originals[image_id] == original_hw
                assert resized_hw(original_hw, 128, 160) == tuple(size_hw)
    assert sorted(ids) == sorted(originals)


def test_evaluation_images_of_like_shape_come_together(tiny_toy):
    batches = list(open_data(tiny_toy, eval_batch_size=2).eval_batches())
    shapes = [tuple(hw) for batch in batches for hw in batch.sizes_hw.tolist()]
    assert len(set(shapes)) > 1
    assert shapes in (sorted(shapes), sorted(shapes, key=lambda hw: hw[::-1]))


def test_decoded_images_that_are_kept_train_the_same_without_their_files(tiny_toy, tmp_path):
    folder = shutil.copytree(tiny_toy, tmp_path / "data")
    wanted = trained(folder, ALONE)
    data = open_data(folder, image_cache="host")
    first = [share.batch for share in data.shares(1)]
    shutil.rmtree(folder / "train2017")
    again = [share.batch for share in data.shares(1)]
    assert all(
        torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert sum(len(batch.images) for batch in first) == sum(wanted.values())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_named_and_wrapped_in_no_traceback(tiny_toy, tmp_path, num_workers):
    data = open_data(tiny_toy, num_workers=num_workers)
    dataset = data.train_loader.dataset
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in dataset.split.image_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:-500])
    dataset.split = replace(dataset.split, image_folder=broken)
    with pytest.raises(InputError, match=r"broken/0000\d+\.jpg: this image cannot be decoded") as caught:
        list(data.shares(1))
    assert "Traceback" not in str(caught.value)


def test_a_number_of_classes_that_the_annotations_do_not_have_is_refused(tiny_toy):
    with pytest.raises(InputError, match="num_classes is 4, not 7"):
        open_data(tiny_toy, num_classes=7)


def test_a_bad_mask_is_refused_in_either_split(tiny_toy, tmp_path):
    for name in ("train", "val"):
        folder = shutil.copytree(tiny_toy, tmp_path / name)
        file, _ = coco.layout(folder, name)
        content = json.loads(file.read_text())
        content["annotations"][-1]["segmentation"] = [[1, 2, 3]]
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"instances_{name}2017.json: .*annotation \d+, image_id \d+: .*odd"):
            open_data(folder)


@pytest.mark.data
def test_every_real_photo_is_resized_and_keeps_its_masks():
    folder = shared("data/coco-tiny")
    data = open_data(folder, dataset="coco2017", num_classes=81, batch_size=16, num_workers=0)
    boxes, filled = 0, []
    for share in data.shares(1):
        there = share.batch.labels > 0
        boxes += int(there.sum())
        filled.append(masks.rasterise(share.batch.edges[there], share.batch.boxes_xyxy[there]).mean(dim=(1, 2)))
    assert boxes == 699
    assert 0.5 < torch.cat(filled).mean() < 0.7  # of its box an object of COCO fills a bit more than a half
