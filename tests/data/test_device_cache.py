import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from detection.config.settings import InputError
from detection.data import coco, device_cache, image_io
from detection.data.device_cache import DeviceCache
from detection.data.host_cache import GIB
from detection.data.image_pipeline import HostPixels, Original, Part
from detection.runtime.distributed import Ranks
from maskrcnn.config import Config as MaskRCNNConfig
from maskrcnn.data import MaskRCNNData
from ssd.config import Config
from ssd.data import SSDData
from tiny_ssd import batches_of

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def ssd_data(folder, **settings):
    return SSDData(Config(data_dir=folder, dataset="toy", num_classes=4, batch_size=5, seed=1, **settings), ALONE, 1)


def maskrcnn_data(folder, **settings):
    settings = {"batch_size": 5, "min_image_size": 128, "max_image_size": 160, **settings}
    return MaskRCNNData(MaskRCNNConfig(data_dir=folder, dataset="toy", num_classes=4, seed=1, **settings), ALONE, 1)


OPENED = {"ssd": ssd_data, "maskrcnn": maskrcnn_data}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
@pytest.mark.parametrize("benchmark", OPENED)
def test_training_is_the_same_and_the_second_epoch_reads_no_file(benchmark, decoder, num_workers, pictures):
    plain = batches_of(OPENED[benchmark](pictures, num_workers=num_workers), 3)
    data = OPENED[benchmark](
        pictures, num_workers=num_workers, jpeg_decoder=decoder, image_cache="device", image_cache_gib=1
    )
    cached = batches_of(data, 3, after_first=lambda: shutil.rmtree(pictures / "train2017"))
    assert len(plain) == len(cached) > 10
    for one, other in zip(plain, cached, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert one.images.stride() == other.images.stride()


def cache_of(split, limit_bytes, *, device_decodes=False):
    return DeviceCache(
        split.sizes_hw, limit_bytes, split.image_path, CPU, device_decodes=device_decodes, compiled=False
    )


def batch_of(cache, split, indices, size_hw=(60, 50)):
    """What the rank makes of whole images, and what the worker sent."""
    made = []
    for index in indices:
        original = cache.worker.read(index, split.image_path(index))
        height, width = original.size_hw
        made.append(cache.worker.make(Part(original, (0, 0, width, height), size_hw)))
    sent = cache.worker.lay_out(made)
    return cache.images(sent), sent


def wanted(split, indices, size_hw=(60, 50)):
    return torch.stack([image_io.resize(image_io.read(split.image_path(index)), size_hw) for index in indices])


@pytest.mark.parametrize("device_decodes", [False, True])
def test_a_batch_may_be_of_images_held_sent_and_beyond_the_limit(tiny_toy, device_decodes):
    split = coco.read(*coco.layout(tiny_toy, "train"))
    sizes = split.sizes_hw.astype(int).prod(axis=1) * 3
    cache = cache_of(split, int(sizes[:6].sum()), device_decodes=device_decodes)
    batch_of(cache, split, [1, 4, 8])
    assert np.flatnonzero(cache.worker.held).tolist() == [1, 4]
    order = [9, 4, 0, 8, 1]
    made, sent = batch_of(cache, split, order)
    assert sent.sent[:, 0].tolist() == [9, 0, 8]
    assert (sent.encoded.numel() > 0) == device_decodes
    assert (sent.decoded.numel() > 0) != device_decodes
    assert torch.equal(made, wanted(split, order))
    again, sent = batch_of(cache, split, [4, 0, 1])
    assert (len(sent.sent), sent.decoded.numel(), sent.encoded.numel()) == (0, 0, 0)
    assert torch.equal(again, wanted(split, [4, 0, 1]))


def test_an_image_of_another_size_than_annotated_is_not_kept(tiny_toy):
    split = coco.read(*coco.layout(tiny_toy, "train"))
    other = next(i for i in range(len(split)) if (split.sizes_hw[i] != split.sizes_hw[0]).any())
    cache = cache_of(split, GIB)
    cache.image_path = None
    for _ in range(2):
        original = cache.worker.read(0, split.image_path(other))
        height, width = original.size_hw
        made = cache.images(cache.worker.lay_out([Part(original, (0, 0, width, height), (60, 50))]))
        assert torch.equal(made, wanted(split, [other]))
    assert not cache.worker.held.any()


def test_what_no_device_decodes_the_worker_decodes(tiny_toy, tmp_path):
    split = coco.read(*coco.layout(tiny_toy, "train"))
    cache = cache_of(split, 0, device_decodes=True)
    with Image.open(split.image_path(0)) as image:
        image.convert("L").save(tmp_path / "grey.jpg")
        image.convert("CMYK").save(tmp_path / "cmyk.jpg")
        image.save(tmp_path / "picture.png")
    (tmp_path / "trailing.jpg").write_bytes(split.image_path(0).read_bytes() + b"more")
    ways = {
        name: cache.worker.read(0, tmp_path / name).encoded is not None
        for name in sorted(p.name for p in tmp_path.iterdir())
    }
    assert ways == {"cmyk.jpg": False, "grey.jpg": True, "picture.png": False, "trailing.jpg": False}
    for name in ways:
        original = cache.worker.read(0, tmp_path / name)
        height, width = original.size_hw
        made = cache.images(cache.worker.lay_out([Part(original, (0, 0, width, height), (60, 50))]))
        assert torch.equal(made[0], image_io.resize(image_io.read(tmp_path / name), (60, 50)))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("benchmark", OPENED)
def test_a_corrupt_image_is_named(benchmark, num_workers, pictures):
    path = sorted((pictures / "train2017").iterdir())[3]
    path.write_bytes(path.read_bytes()[:-500])
    data = OPENED[benchmark](pictures, num_workers=num_workers, jpeg_decoder="gpu")
    with pytest.raises(InputError, match=rf"{path.name}: this image cannot be decoded"):
        batches_of(data, 1)


def test_a_file_that_only_the_device_cannot_decode_is_decoded_by_the_cpu(tiny_toy, monkeypatch):
    split = coco.read(*coco.layout(tiny_toy, "train"))

    def refuse(*_):
        raise RuntimeError("unsupported")

    monkeypatch.setattr(image_io, "decode_there", refuse)
    cache = cache_of(split, GIB, device_decodes=True)
    assert torch.equal(batch_of(cache, split, [3, 1])[0], wanted(split, [3, 1]))
    broken = Original(2, (60, 50), encoded=torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(InputError, match=split.image_path(2).name):
        cache.images(cache.worker.lay_out([Part(broken, (0, 0, 50, 60), (60, 50))]))


def test_what_the_device_does_not_have_is_refused_before_the_clock():
    with pytest.raises(InputError, match="computes on the CPU"):
        device_cache.check(Config(image_cache="device"), CPU)
    with pytest.raises(InputError, match=r"--jpeg-decoder gpu: .* has no decoder"):
        device_cache.check(Config(jpeg_decoder="gpu"), CPU)
    device_cache.check(Config(image_cache="host"), CPU)
    with pytest.raises(ValueError, match="nothing to keep on the host"):
        Config(jpeg_decoder="gpu", image_cache="host")


def test_workers_make_the_images_where_nothing_else_is_asked_for(tiny_toy):
    split = coco.read(*coco.layout(tiny_toy, "train"))
    pixels, cache = device_cache.make(Config(), split, ALONE)
    assert isinstance(pixels, HostPixels)
    assert cache is None


@pytest.mark.gpu
@pytest.mark.parametrize("benchmark", OPENED)
def test_an_accelerator_makes_the_same_bytes(benchmark, pictures):
    device = torch.accelerator.current_accelerator()
    there = Ranks(0, 1, torch.device(device.type, 0))
    plain = batches_of(OPENED[benchmark](pictures, num_workers=2), 2)
    config = {"data_dir": pictures, "dataset": "toy", "num_classes": 4, "batch_size": 5, "seed": 1, "num_workers": 2}
    config |= {"image_cache": "device", "image_cache_gib": 1}
    for compiled in ("off", "on"):
        if benchmark == "ssd":
            data = SSDData(Config(**config, compile=compiled), there, 1)
        else:
            sizes = {"min_image_size": 128, "max_image_size": 160}
            data = MaskRCNNData(MaskRCNNConfig(**config, **sizes, compile=compiled), there, 1)
        for one, other in zip(plain, batches_of(data, 2), strict=True):
            assert torch.equal(one.images, other.images.cpu())


@pytest.mark.gpu
def test_the_accelerators_own_decoder_comes_close_to_the_cpus(pictures):
    device = torch.accelerator.current_accelerator()
    try:
        device_cache.check(Config(jpeg_decoder="gpu"), device)
    except InputError as error:
        pytest.skip(str(error))
    there = Ranks(0, 1, torch.device(device.type, 0))
    settings = {"data_dir": pictures, "dataset": "toy", "num_classes": 4, "batch_size": 5, "num_workers": 2}
    plain = batches_of(ssd_data(pictures, num_workers=2), 1)
    data = SSDData(Config(**settings, seed=1, jpeg_decoder="gpu"), there, 1)
    for one, other in zip(plain, batches_of(data, 1), strict=True):
        difference = (one.images.int() - other.images.cpu().int()).abs()
        assert difference.float().mean() < 2  # levels of 256; decoders may round, and smooth colours, in their own way
