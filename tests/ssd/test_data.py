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
from detection.data.loader import EpochBatchSampler
from detection.runtime.distributed import DistContext
from paths import shared
from ssd.anchors import make_anchors
from ssd.config import Config
from ssd.data import SSDTrainSource
from ssd.train import prepare_batch
from tiny_ssd import batches_equal

CPU = torch.device("cpu")
SINGLE_RANK = DistContext(0, 1, CPU)


def make_samplers(num_images, batch_size, world_size, epoch=1, last_batch="partial", groups=None):
    samplers = [
        EpochBatchSampler(
            num_images, batch_size, seed=7, ranks=DistContext(r, world_size, CPU), last_batch=last_batch, groups=groups
        )
        for r in range(world_size)
    ]
    for sampler in samplers:
        sampler.epoch = epoch
    return samplers


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 9))
def test_each_image_is_trained_once_per_epoch_over_all_ranks(num_images, batch_size, world_size):
    counts = Counter()
    for sampler in make_samplers(num_images, batch_size, world_size):
        steps = list(sampler)
        assert len(steps) == len(sampler)
        for keys, (start, stop, _) in zip(steps, sampler.rank_slices(), strict=True):
            assert 1 <= len(keys) <= batch_size
            if stop > start:
                counts.update(index for _, index in keys)
    assert counts == Counter(range(num_images))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_the_number_of_ranks_does_not_change_a_global_batch(num_images, batch_size, world_size):
    (single_rank,) = make_samplers(num_images, batch_size * world_size, 1)
    rank_batches = zip(*make_samplers(num_images, batch_size, world_size), strict=True)
    for full, parts, (_, _, size) in zip(single_rank, rank_batches, single_rank.rank_slices(), strict=True):
        gathered = [key for part in parts for key in part]
        assert gathered[: len(full)] == full or set(full) <= set(gathered)
        assert size == len(full)


@settings(max_examples=60, deadline=None)
@given(st.integers(12, 60), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["pad", "carry-over"]))
def test_pad_and_carry_over_fill_every_batch_and_skip_no_image(num_images, batch_size, world_size, last_batch):
    counts, epochs = Counter(), 4
    for epoch in range(1, epochs + 1):
        for sampler in make_samplers(num_images, batch_size, world_size, epoch, last_batch):
            for keys, (_, _, size) in zip(sampler, sampler.rank_slices(), strict=True):
                assert len(keys) == batch_size
                assert size == batch_size * world_size
                counts.update(keys)
    for epoch in range(1, epochs + 1):
        assert {index for e, index in counts if e == epoch} == set(range(num_images))
    repeated = [key for key, times in counts.items() if times > 1]
    if last_batch == "carry-over":
        assert not repeated
        assert sum(e == epochs + 1 for e, _ in counts) == -num_images * epochs % (batch_size * world_size)
    else:
        assert len(repeated) == epochs * (-num_images % (batch_size * world_size))
        assert all(times <= 2 for times in counts.values())


@pytest.mark.parametrize("last_batch", ["partial", "pad", "carry-over"])
def test_sampler_resumes_an_epoch_after_its_trained_images(last_batch):
    (full,) = make_samplers(22, 5, 1, 3, last_batch)
    (resumed,) = make_samplers(22, 5, 1, 3, last_batch)
    resumed.skip_images = 10
    assert list(resumed) == list(full)[2:]


random_groups = st.lists(st.integers(0, 2), min_size=1, max_size=60).map(np.array)


def indices(step):
    return [index for _, index in step]


@settings(max_examples=60, deadline=None)
@given(random_groups, st.integers(1, 7), st.integers(1, 5))
def test_global_batches_have_one_group_except_the_rest_at_the_end(groups, batch_size, epoch):
    (sampler,) = make_samplers(len(groups), batch_size, 1, epoch, groups=groups)
    steps = [indices(step) for step in sampler]
    assert sorted(index for step in steps for index in step) == list(range(len(groups)))
    full = sum(np.bincount(groups) // batch_size)
    assert all(len(set(groups[step])) == 1 and len(step) == batch_size for step in steps[:full])
    assert sum(len(step) for step in steps[full:]) == sum(np.bincount(groups) % batch_size)


@settings(max_examples=60, deadline=None)
@given(random_groups, st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_the_number_of_ranks_does_not_change_a_grouped_global_batch(groups, batch_size, world_size):
    (single_rank,) = make_samplers(len(groups), batch_size * world_size, 1, groups=groups)
    rank_batches = zip(*make_samplers(len(groups), batch_size, world_size, groups=groups), strict=True)
    for full, parts in zip(single_rank, rank_batches, strict=True):
        assert {key for part in parts for key in part} - set(full) <= {next(iter(single_rank))[0]}
        assert {key for part in parts for key in part} >= set(full)


@settings(max_examples=60, deadline=None)
@given(st.integers(12, 60), st.integers(1, 9), st.integers(0, 3))
def test_groups_fill_batches_in_epochs_that_begin_within_a_batch(num_images, batch_size, seed):
    groups = np.random.default_rng(seed).integers(0, 2, num_images)
    counts = Counter()
    for epoch in (1, 2, 3):
        (sampler,) = make_samplers(num_images, batch_size, 1, epoch, "carry-over", groups)
        steps = list(sampler)
        full = [step for step in steps if len(set(groups[indices(step)])) == 1]
        assert len(full) >= (num_images - sampler.images_carried_over(epoch)) // batch_size - 2
        assert all(len(step) == batch_size for step in steps)
        counts.update(key for step in steps for key in step)
    assert max(counts.values()) == 1
    assert {(e, i) for e in (1, 2, 3) for i in range(num_images)} <= set(counts)


def test_batches_of_different_groups_come_in_random_order():
    groups = np.arange(400) % 2
    (sampler,) = make_samplers(400, 10, 1, groups=groups)
    kinds = [int(groups[indices(step)[0]]) for step in sampler]
    assert 10 < np.abs(np.diff(kinds)).sum() < 40
    (other,) = make_samplers(400, 10, 1, epoch=2, groups=groups)
    assert list(other) != list(sampler)


@pytest.mark.parametrize("last_batch", ["partial", "pad", "carry-over"])
def test_grouped_sampler_resumes_an_epoch_after_its_trained_images(last_batch):
    groups = np.arange(22) % 3 // 2
    full, resumed = (make_samplers(22, 5, 1, 3, last_batch, groups)[0] for _ in range(2))
    resumed.skip_images = 10
    assert list(resumed) == list(full)[2:]


def test_each_epoch_has_a_different_order():
    first, second = (list(make_samplers(20, 5, 1, epoch)[0]) for epoch in (1, 2))
    assert [[i for _, i in keys] for keys in first] != [[i for _, i in keys] for keys in second]


def make_toy_source(folder, ranks=SINGLE_RANK, seed=5, **settings):
    config = Config(data_dir=folder, dataset="toy", num_classes=4, batch_size=8, eval_batch_size=3, **settings)
    return SSDTrainSource(config, ranks, seed)


def test_the_number_of_workers_does_not_change_the_batches(small_toy):
    batches = [
        [rank_batch.batch for rank_batch in make_toy_source(small_toy, num_workers=n).train_batches(2)] for n in (0, 2)
    ]
    assert len(batches[0]) == len(batches[1]) > 1
    for first, second in zip(*batches, strict=True):
        assert batches_equal(first, second)


def test_the_number_of_ranks_does_not_change_the_samples(small_toy):
    full = {}
    for rank_batch in make_toy_source(small_toy, num_workers=0).train_batches(1):
        for row in range(len(rank_batch.batch.images)):
            full[rank_batch.batch.images[row].numpy().tobytes()] = rank_batch.batch.augmentation.jitter[row].tolist()
    for rank in range(3):
        for rank_batch in make_toy_source(small_toy, DistContext(rank, 3, CPU), num_workers=0).train_batches(1):
            for row in range(len(rank_batch.batch.images)):
                jitter = rank_batch.batch.augmentation.jitter[row].tolist()
                assert full[rank_batch.batch.images[row].numpy().tobytes()] == jitter


def test_loss_weights_make_each_step_the_mean_over_its_images(small_toy):
    for world_size in (1, 2, 5):
        sums = Counter()
        for rank in range(world_size):
            data = make_toy_source(small_toy, DistContext(rank, world_size, CPU), num_workers=0)
            for step, rank_batch in enumerate(data.train_batches(1)):
                sums[step] += rank_batch.loss_weight * len(rank_batch.batch.images) / world_size
        assert all(total == pytest.approx(1) for total in sums.values())


def test_seeds_and_epochs_change_the_augmentation(small_toy):
    def pixels(seed, epoch):
        data = make_toy_source(small_toy, seed=seed, num_workers=0)
        return next(data.train_batches(epoch)).batch.images

    assert torch.equal(pixels(5, 1), pixels(5, 1))
    assert not torch.equal(pixels(5, 1), pixels(6, 1))
    assert not torch.equal(pixels(5, 1), pixels(5, 2))


def test_images_without_boxes_are_evaluated_but_not_trained_on(small_toy):
    data = make_toy_source(small_toy, num_workers=0)
    train = coco.read(*coco.standard_paths(small_toy, "train"))
    assert data.train_samples == len(train.drop_empty_images()) < len(train)
    indices = torch.cat([batch.image_indices for batch in data.eval_batches()])
    assert sorted(indices.tolist()) == list(range(len(data.val)))


def test_images_without_boxes_are_trained_on_if_asked(small_toy):
    data = make_toy_source(small_toy, num_workers=0, background_images="keep")
    train = coco.read(*coco.standard_paths(small_toy, "train"))
    assert data.train_samples == len(train)
    batches = [rank_batch.batch for rank_batch in data.train_batches(1)]
    assert sum(int((batch.labels == 0).all(dim=1).sum()) for batch in batches) == (~train.has_boxes).sum() > 0
    for batch in batches:
        _, deltas, labels = prepare_batch(batch, make_anchors(CPU))
        assert torch.isfinite(deltas).all()
        assert torch.equal((labels > 0).any(dim=1), (batch.labels > 0).any(dim=1))


def test_each_evaluation_image_is_on_one_rank(small_toy):
    indices = []
    for rank in range(3):
        for batch in make_toy_source(small_toy, DistContext(rank, 3, CPU), num_workers=0).eval_batches():
            indices += batch.image_indices.tolist()
    assert sorted(indices) == list(range(len(coco.read(*coco.standard_paths(small_toy, "val")))))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_image_is_named_without_traceback(small_toy, tmp_path, num_workers):
    data = make_toy_source(small_toy, num_workers=num_workers)
    dataset = data.train_loader.dataset
    corrupt = tmp_path / "broken"
    corrupt.mkdir()
    for path in dataset.split.image_dir.iterdir():
        (corrupt / path.name).write_bytes(path.read_bytes()[:-500])
    dataset.split = replace(dataset.split, image_dir=corrupt)
    with pytest.raises(InputError, match=r"broken/0000\d+\.jpg: this image cannot be read") as caught:
        list(data.train_batches(1))
    assert "Traceback" not in str(caught.value)


def test_both_decoders_give_identical_pixels(small_toy):
    for path in sorted((small_toy / "val2017").iterdir()):
        encoded = path.read_bytes()
        assert torch.equal(image_io.decode(encoded), image_io.decode_with_pillow(encoded))


@pytest.mark.parametrize("name", ["a.bmp", "a.tiff", "a.png", "a.gif", "a.webp"])
@pytest.mark.parametrize("decode", [image_io.decode, image_io.decode_with_pillow])
def test_other_image_formats_and_bit_depths_are_decoded(tmp_path, name, decode):
    gray = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))
    is_16_bit = name in ("a.tiff", "a.png")
    Image.fromarray(gray.astype(np.uint16) * 257 if is_16_bit else gray).save(tmp_path / name, lossless=True)
    pixels = decode((tmp_path / name).read_bytes())
    assert pixels.shape == (3, 48, 64)
    assert np.abs(pixels.numpy().astype(int) - gray).max() <= 1


@pytest.mark.parametrize("size_hw", [300, (300, 300), (131, 222), (700, 523)])
def test_resize_matches_pillow(small_toy, size_hw):
    path = min((small_toy / "val2017").iterdir())
    size_wh = (300, 300) if size_hw == 300 else size_hw[::-1]
    expected = np.asarray(Image.open(path).convert("RGB").resize(size_wh, Image.Resampling.BILINEAR), dtype=int)
    actual = image_io.resize(image_io.read(path), size_hw).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(actual - expected).max() <= 1


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco-tiny", "bccd"])
def test_all_photos_of_real_data_sets_are_loaded(name):
    folder = shared(f"data/{name}")
    classes = coco.read(*coco.standard_paths(folder, "train")).num_classes
    config = Config(data_dir=folder, num_classes=classes, batch_size=16, num_workers=0)
    data = SSDTrainSource(config, SINGLE_RANK, seed=0)
    num_images = sum(len(rank_batch.batch.images) for rank_batch in data.train_batches(1))
    assert num_images == data.train_samples
    assert sum(len(batch.images) for batch in data.eval_batches()) == data.eval_samples
