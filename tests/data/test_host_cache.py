import shutil

import pytest
import torch

from detection.config.settings import InputError
from detection.data import coco, image_io
from detection.data.host_cache import GIB, DecodedCache, free_memory_bytes
from detection.runtime.distributed import Ranks
from ssd.config import Config
from ssd.data import SSDData
from tiny_ssd import batches_of

ALONE = Ranks(0, 1, torch.device("cpu"))


def epochs(folder, count, num_workers, after_first=lambda: None, **settings):
    """The training batches of some epochs; `after_first` is called after the first."""
    config = Config(
        data_dir=folder, dataset="toy", num_classes=4, batch_size=5, num_workers=num_workers, seed=1, **settings
    )
    return batches_of(SSDData(config, ALONE, 1), count, after_first)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_is_the_same_and_the_second_epoch_reads_no_file(pictures, num_workers):
    plain = epochs(pictures, 3, num_workers)
    cached = epochs(
        pictures, 3, num_workers, after_first=lambda: shutil.rmtree(pictures / "train2017"), image_cache="host"
    )
    assert len(plain) == len(cached) > 10
    for one, other in zip(plain, cached, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_the_limit_leaves_out_is_decoded_each_time(pictures):
    split = coco.read(*coco.layout(pictures, "train"))
    sizes = split.sizes_hw.astype(int).prod(axis=1) * 3
    cache = DecodedCache(split.sizes_hw, int(sizes[:3].sum()), ALONE)
    assert (cache.num_places, cache.size_bytes) == (3, sizes[:3].sum())
    for index in range(4):
        cache.read(index, split.image_path(index))
    for index in range(3):
        kept = cache.read(index, pictures / "nothing.jpg")
        decoded = image_io.read(split.image_path(index))
        assert torch.equal(kept, decoded)
        assert kept.stride() == decoded.stride()
    with pytest.raises(InputError, match=r"nothing\.jpg"):
        cache.read(3, pictures / "nothing.jpg")


def test_an_image_of_another_size_than_annotated_is_not_kept(pictures):
    split = coco.read(*coco.layout(pictures, "train"))
    cache = DecodedCache(split.sizes_hw, GIB, ALONE)
    other = next(i for i in range(len(split)) if (split.sizes_hw[i] != split.sizes_hw[0]).any())
    assert torch.equal(cache.read(0, split.image_path(other)), image_io.read(split.image_path(other)))
    assert torch.equal(cache.read(0, split.image_path(0)), image_io.read(split.image_path(0)))


def test_the_memory_that_is_free_is_between_none_and_all_of_the_machines():
    assert 0 < free_memory_bytes() < 2**45
