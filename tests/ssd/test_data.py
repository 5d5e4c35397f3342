from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detection.config.settings import InputError
from detection.data import coco, image_io
from detection.data.loader import EpochSampler
from detection.runtime.distributed import Ranks
from paths import shared
from ssd.config import Config
from ssd.data import SSDData

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def samplers(num_images, batch_size, world_size, epoch=1, last_batch="partial", groups=None):
    made = [
        EpochSampler(
            num_images, batch_size, seed=7, ranks=Ranks(r, world_size, CPU), last_batch=last_batch, groups=groups
        )
        for r in range(world_size)
    ]
    for sampler in made:
        sampler.epoch = epoch
    return made


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 9))
def test_every_image_is_trained_on_once_an_epoch_over_all_ranks(num_images, batch_size, world_size):
    seen = Counter()
    for sampler in samplers(num_images, batch_size, world_size):
        steps = list(sampler)
        assert len(steps) == len(sampler)
        for keys, (start, stop, _) in zip(steps, sampler.stretches(), strict=True):
            assert 1 <= len(keys) <= batch_size
            if stop > start:
                seen.update(index for _, index in keys)
    assert seen == Counter(range(num_images))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_the_number_of_ranks_does_not_change_a_global_batch(num_images, batch_size, world_size):
    (alone,) = samplers(num_images, batch_size * world_size, 1)
    shares = zip(*samplers(num_images, batch_size, world_size), strict=True)
    for whole, parts, (_, _, size) in zip(alone, shares, alone.stretches(), strict=True):
        together = [key for part in parts for key in part]
        assert together[: len(whole)] == whole or set(whole) <= set(together)
        assert size == len(whole)


@settings(max_examples=60, deadline=None)
@given(st.integers(12, 60), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["pad", "carry-over"]))
def test_a_filled_last_batch_leaves_every_batch_whole_and_no_image_out(num_images, batch_size, world_size, last_batch):
    seen, epochs = Counter(), 4
    for epoch in range(1, epochs + 1):
        for sampler in samplers(num_images, batch_size, world_size, epoch, last_batch):
            for keys, (_, _, size) in zip(sampler, sampler.stretches(), strict=True):
                assert len(keys) == batch_size
                assert size == batch_size * world_size
                seen.update(keys)
    for epoch in range(1, epochs + 1):
        assert {index for e, index in seen if e == epoch} == set(range(num_images))
    twice = [key for key, times in seen.items() if times > 1]
    if last_batch == "carry-over":
        assert not twice
        assert sum(e == epochs + 1 for e, _ in seen) == -num_images * epochs % (batch_size * world_size)
    else:
        assert len(twice) == epochs * (-num_images % (batch_size * world_size))
        assert all(times <= 2 for times in seen.values())


@pytest.mark.parametrize("last_batch", ["partial", "pad", "carry-over"])
def test_an_epoch_goes_on_after_the_images_that_are_trained(last_batch):
    (whole,) = samplers(22, 5, 1, 3, last_batch)
    (rest,) = samplers(22, 5, 1, 3, last_batch)
    rest.samples = 10
    assert list(rest) == list(whole)[2:]


grouped = st.lists(st.integers(0, 2), min_size=1, max_size=60).map(np.array)


def indices(step):
    return [index for _, index in step]


@settings(max_examples=60, deadline=None)
@given(grouped, st.integers(1, 7), st.integers(1, 5))
def test_global_batches_are_of_one_group_but_for_what_remains_at_the_end(groups, batch_size, epoch):
    (sampler,) = samplers(len(groups), batch_size, 1, epoch, groups=groups)
    steps = [indices(step) for step in sampler]
    assert sorted(index for step in steps for index in step) == list(range(len(groups)))
    whole = sum(np.bincount(groups) // batch_size)
    assert all(len(set(groups[step])) == 1 and len(step) == batch_size for step in steps[:whole])
    assert sum(len(step) for step in steps[whole:]) == sum(np.bincount(groups) % batch_size)


@settings(max_examples=60, deadline=None)
@given(grouped, st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_the_number_of_ranks_does_not_change_a_global_batch_of_a_group(groups, batch_size, world_size):
    (alone,) = samplers(len(groups), batch_size * world_size, 1, groups=groups)
    shares = zip(*samplers(len(groups), batch_size, world_size, groups=groups), strict=True)
    for whole, parts in zip(alone, shares, strict=True):
        assert {key for part in parts for key in part} - set(whole) <= {next(iter(alone))[0]}
        assert {key for part in parts for key in part} >= set(whole)


@settings(max_examples=60, deadline=None)
@given(st.integers(12, 60), st.integers(1, 9), st.integers(0, 3))
def test_groups_are_whole_too_where_an_epoch_begins_within_a_batch(num_images, batch_size, seed):
    groups = np.random.default_rng(seed).integers(0, 2, num_images)
    seen = Counter()
    for epoch in (1, 2, 3):
        (sampler,) = samplers(num_images, batch_size, 1, epoch, "carry-over", groups)
        steps = list(sampler)
        whole = [step for step in steps if len(set(groups[indices(step)])) == 1]
        assert len(whole) >= (num_images - sampler.begun(epoch)) // batch_size - 2
        assert all(len(step) == batch_size for step in steps)
        seen.update(key for step in steps for key in step)
    assert max(seen.values()) == 1
    assert {(e, i) for e in (1, 2, 3) for i in range(num_images)} <= set(seen)


def test_groups_come_in_turn_as_chance_has_it():
    groups = np.arange(400) % 2
    (sampler,) = samplers(400, 10, 1, groups=groups)
    kinds = [int(groups[indices(step)[0]]) for step in sampler]
    assert 10 < np.abs(np.diff(kinds)).sum() < 40
    (other,) = samplers(400, 10, 1, epoch=2, groups=groups)
    assert list(other) != list(sampler)


@pytest.mark.parametrize("last_batch", ["partial", "pad", "carry-over"])
def test_an_epoch_of_groups_goes_on_after_the_images_that_are_trained(last_batch):
    groups = np.arange(22) % 3 // 2
    whole, rest = (samplers(22, 5, 1, 3, last_batch, groups)[0] for _ in range(2))
    rest.samples = 10
    assert list(rest) == list(whole)[2:]


def test_epochs_have_orders_of_their_own():
    first, second = (list(samplers(20, 5, 1, epoch)[0]) for epoch in (1, 2))
    assert [[i for _, i in keys] for keys in first] != [[i for _, i in keys] for keys in second]


def open_toy(folder, ranks=ALONE, seed=5, **settings):
    config = Config(data_dir=folder, dataset="toy", num_classes=4, batch_size=8, eval_batch_size=3, **settings)
    return SSDData(config, ranks, seed)


def test_workers_do_not_change_what_is_trained(tiny_toy):
    loaded = [[share.batch for share in open_toy(tiny_toy, num_workers=n).shares(2)] for n in (0, 2)]
    assert len(loaded[0]) == len(loaded[1]) > 1
    for one, other in zip(*loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_ranks_do_not_change_what_is_trained(tiny_toy):
    whole = {}
    for share in open_toy(tiny_toy, num_workers=0).shares(1):
        for row in range(len(share.batch.images)):
            whole[share.batch.images[row].numpy().tobytes()] = share.batch.jitter[row].tolist()
    for rank in range(3):
        for share in open_toy(tiny_toy, Ranks(rank, 3, CPU), num_workers=0).shares(1):
            for row in range(len(share.batch.images)):
                assert whole[share.batch.images[row].numpy().tobytes()] == share.batch.jitter[row].tolist()


def test_the_weights_of_an_epoch_make_each_step_a_mean_over_its_images(tiny_toy):
    for world_size in (1, 2, 5):
        sums = Counter()
        for rank in range(world_size):
            for step, share in enumerate(open_toy(tiny_toy, Ranks(rank, world_size, CPU), num_workers=0).shares(1)):
                sums[step] += share.weight * len(share.batch.images) / world_size
        assert all(total == pytest.approx(1) for total in sums.values())


def test_seeds_and_epochs_change_the_augmentation(tiny_toy):
    def pixels(seed, epoch):
        data = open_toy(tiny_toy, seed=seed, num_workers=0)
        return next(data.shares(epoch)).batch.images

    assert torch.equal(pixels(5, 1), pixels(5, 1))
    assert not torch.equal(pixels(5, 1), pixels(6, 1))
    assert not torch.equal(pixels(5, 1), pixels(5, 2))


def test_images_without_boxes_are_evaluated_but_not_trained_on(tiny_toy):
    data = open_toy(tiny_toy, num_workers=0)
    train = coco.read(*coco.layout(tiny_toy, "train"))
    assert data.train_samples == len(train.with_boxes()) < len(train)
    ids = torch.cat([batch.image_ids for batch in data.eval_batches()])
    assert sorted(ids.tolist()) == sorted(data.val.image_ids.tolist())


def test_each_evaluation_image_is_on_one_rank(tiny_toy):
    ids = []
    for rank in range(3):
        for batch in open_toy(tiny_toy, Ranks(rank, 3, CPU), num_workers=0).eval_batches():
            ids += batch.image_ids.tolist()
    assert sorted(ids) == sorted(coco.read(*coco.layout(tiny_toy, "val")).image_ids.tolist())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_named_and_wrapped_in_no_traceback(tiny_toy, tmp_path, num_workers):
    data = open_toy(tiny_toy, num_workers=num_workers)
    dataset = data.train_loader.dataset
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in dataset.split.image_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:-500])
    dataset.split = replace(dataset.split, image_folder=broken)
    with pytest.raises(InputError, match=r"broken/0000\d+\.jpg: this image cannot be decoded") as caught:
        list(data.shares(1))
    assert "Traceback" not in str(caught.value)


def test_both_decoders_give_the_same_pixels(tiny_toy):
    for path in sorted((tiny_toy / "val2017").iterdir()):
        encoded = path.read_bytes()
        assert torch.equal(image_io.decode(encoded), image_io.decode_with_pillow(encoded))


@pytest.mark.parametrize("name", ["a.bmp", "a.tiff", "a.png", "a.gif", "a.webp"])
@pytest.mark.parametrize("decode", [image_io.decode, image_io.decode_with_pillow])
def test_training_images_may_be_of_other_formats_and_depths(tmp_path, name, decode):
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))
    deep = name in ("a.tiff", "a.png")
    Image.fromarray(grey.astype(np.uint16) * 257 if deep else grey).save(tmp_path / name, lossless=True)
    pixels = decode((tmp_path / name).read_bytes())
    assert pixels.shape == (3, 48, 64)
    assert np.abs(pixels.numpy().astype(int) - grey).max() <= 1


@pytest.mark.parametrize("size_hw", [300, (300, 300), (131, 222), (700, 523)])
def test_resizing_agrees_with_pillow(tiny_toy, size_hw):
    path = min((tiny_toy / "val2017").iterdir())
    size_wh = (300, 300) if size_hw == 300 else size_hw[::-1]
    wanted = np.asarray(Image.open(path).convert("RGB").resize(size_wh, Image.Resampling.BILINEAR), dtype=int)
    got = image_io.resize(image_io.read(path), size_hw).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - wanted).max() <= 1


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco-tiny", "bccd"])
def test_every_real_photo_is_read_cropped_and_resized(name):
    folder = shared(f"data/{name}")
    classes = coco.read(*coco.layout(folder, "train")).num_classes
    config = Config(data_dir=folder, num_classes=classes, batch_size=16, num_workers=0)
    data = SSDData(config, ALONE, seed=0)
    images_seen = sum(len(share.batch.images) for share in data.shares(1))
    assert images_seen == data.train_samples
    assert sum(len(batch.images) for batch in data.eval_batches()) == data.eval_samples
