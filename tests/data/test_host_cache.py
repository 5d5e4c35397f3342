import shutil

import pytest
import torch

from detection.config.settings import InputError
from detection.data import coco, image_io
from detection.data.host_cache import HostImageCache, available_host_memory
from detection.data.image_file import ImageFile
from detection.runtime.distributed import DistContext
from ssd.config import Config
from ssd.data import SSDTrainSource
from tiny_ssd import batches_equal, load_batches

SINGLE_RANK = DistContext(0, 1, torch.device("cpu"))


def load_epochs(folder, count, num_workers, after_first=lambda: None, **settings):
    """Return the training batches of `count` epochs. `after_first` is called after the first epoch."""
    config = Config(
        data_dir=folder, dataset="toy", num_classes=4, batch_size=5, num_workers=num_workers, seed=1, **settings
    )
    return load_batches(SSDTrainSource(config, SINGLE_RANK, 1), count, after_first)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_batches_are_identical_and_the_second_epoch_reads_no_file(toy_copy, num_workers):
    uncached = load_epochs(toy_copy, 3, num_workers)
    cached = load_epochs(
        toy_copy, 3, num_workers, after_first=lambda: shutil.rmtree(toy_copy / "train2017"), image_cache="host"
    )
    assert len(uncached) == len(cached) > 10
    for expected, actual in zip(uncached, cached, strict=True):
        assert batches_equal(expected, actual)


def test_images_beyond_the_limit_are_decoded_every_time(toy_copy):
    split = coco.read(*coco.standard_paths(toy_copy, "train"))
    sizes = split.sizes_hw.astype(int).prod(axis=1) * 3
    cache = HostImageCache(split.sizes_hw, int(sizes[:3].sum()), SINGLE_RANK)
    assert (cache.num_slots, cache.size_bytes) == (3, sizes[:3].sum())
    for index in range(4):
        cache.read(index, split.image_file(index))
    absent = ImageFile(toy_copy / "absent.jpg")
    for index in range(3):
        cached = cache.read(index, absent)
        decoded = image_io.read(split.image_path(index))
        assert torch.equal(cached, decoded)
        assert cached.stride() == decoded.stride()
    with pytest.raises(InputError, match=r"absent\.jpg"):
        cache.read(3, absent)


def test_available_host_memory_is_plausible():
    assert 0 < available_host_memory() < 2**45
