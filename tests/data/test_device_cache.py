import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from detection.config.settings import InputError
from detection.data import coco, device_cache, image_io
from detection.data.device_cache import DeviceImageCache
from detection.data.host_cache import GIB
from detection.data.image_file import ImageFile
from detection.data.image_pipeline import CropSpec, HostImagePipeline, SourceImage
from detection.runtime.distributed import DistContext
from maskrcnn.config import Config as MaskRCNNConfig
from maskrcnn.data import MaskRCNNTrainSource
from ssd.config import Config
from ssd.data import SSDTrainSource
from tiny_ssd import batches_equal, load_batches

CPU = torch.device("cpu")
SINGLE_RANK = DistContext(0, 1, CPU)


def ssd_data(folder, **settings):
    return SSDTrainSource(
        Config(data_dir=folder, dataset="toy", num_classes=4, batch_size=5, seed=1, **settings), SINGLE_RANK, 1
    )


def maskrcnn_data(folder, **settings):
    settings = {"batch_size": 5, "min_image_size": 128, "max_image_size": 160, **settings}
    return MaskRCNNTrainSource(
        MaskRCNNConfig(data_dir=folder, dataset="toy", num_classes=4, seed=1, **settings), SINGLE_RANK, 1
    )


needs_torchcodec = pytest.mark.skipif(
    image_io.decode is image_io.decode_with_pillow, reason="torchcodec does not load with this torch"
)

SOURCES = {"ssd": ssd_data, "maskrcnn": maskrcnn_data}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("decoder", ["cpu", pytest.param("gpu", marks=needs_torchcodec)])
@pytest.mark.parametrize("benchmark", SOURCES)
def test_cached_batches_are_identical_and_the_second_epoch_reads_no_file(benchmark, decoder, num_workers, toy_copy):
    expected = load_batches(SOURCES[benchmark](toy_copy, num_workers=num_workers), 3)
    data = SOURCES[benchmark](
        toy_copy, num_workers=num_workers, jpeg_decoder=decoder, image_cache="device", image_cache_gib=1
    )
    cached = load_batches(data, 3, after_first=lambda: shutil.rmtree(toy_copy / "train2017"))
    assert len(expected) == len(cached) > 10
    for host_batch, device_batch in zip(expected, cached, strict=True):
        assert batches_equal(host_batch, device_batch)
        assert host_batch.images.stride() == device_batch.images.stride()


def make_cache(split, limit_bytes, *, device_decodes=False):
    return DeviceImageCache(
        split.sizes_hw, limit_bytes, split.image_path, CPU, device_decodes=device_decodes, compiled=False
    )


def load_batch(cache, split, indices, size_hw=(60, 50)):
    """Return the batch of resized images, and the input that the worker sent."""
    crops = []
    for index in indices:
        source = cache.pipeline.read(index, split.image_file(index))
        height, width = source.size_hw
        crops.append(cache.pipeline.transform(CropSpec(source, (0, 0, width, height), size_hw)))
    inputs = cache.pipeline.collate(crops)
    return cache.assemble_batch(inputs), inputs


def expected_batch(split, indices, size_hw=(60, 50)):
    return torch.stack([image_io.resize(image_io.read(split.image_path(index)), size_hw) for index in indices])


@pytest.mark.parametrize("device_decodes", [False, pytest.param(True, marks=needs_torchcodec)])
def test_batch_may_mix_cached_and_uploaded_images(small_toy, device_decodes):
    split = coco.read(*coco.standard_paths(small_toy, "train"))
    sizes = split.sizes_hw.astype(int).prod(axis=1) * 3
    cache = make_cache(split, int(sizes[:6].sum()), device_decodes=device_decodes)
    load_batch(cache, split, [1, 4, 8])
    assert np.flatnonzero(cache.pipeline.is_cached).tolist() == [1, 4]
    order = [9, 4, 0, 8, 1]
    batch, inputs = load_batch(cache, split, order)
    assert inputs.uploaded[:, 0].tolist() == [9, 0, 8]
    assert (inputs.encoded.numel() > 0) == device_decodes
    assert (inputs.decoded.numel() > 0) != device_decodes
    assert torch.equal(batch, expected_batch(split, order))
    batch, inputs = load_batch(cache, split, [4, 0, 1])
    assert (len(inputs.uploaded), inputs.decoded.numel(), inputs.encoded.numel()) == (0, 0, 0)
    assert torch.equal(batch, expected_batch(split, [4, 0, 1]))


@needs_torchcodec
def test_worker_decodes_files_that_the_device_does_not_support(small_toy, tmp_path):
    split = coco.read(*coco.standard_paths(small_toy, "train"))
    cache = make_cache(split, 0, device_decodes=True)
    with Image.open(split.image_path(0)) as image:
        image.convert("L").save(tmp_path / "gray.jpg")
        image.convert("CMYK").save(tmp_path / "cmyk.jpg")
        image.save(tmp_path / "image.png")
    (tmp_path / "trailing.jpg").write_bytes(split.image_path(0).read_bytes() + b"more")
    is_encoded = {
        name: cache.pipeline.read(0, ImageFile(tmp_path / name)).encoded is not None
        for name in sorted(p.name for p in tmp_path.iterdir())
    }
    assert is_encoded == {"cmyk.jpg": False, "gray.jpg": True, "image.png": False, "trailing.jpg": False}
    for name in is_encoded:
        source = cache.pipeline.read(0, ImageFile(tmp_path / name))
        height, width = source.size_hw
        batch = cache.assemble_batch(cache.pipeline.collate([CropSpec(source, (0, 0, width, height), (60, 50))]))
        assert torch.equal(batch[0], image_io.resize(image_io.read(tmp_path / name), (60, 50)))


@needs_torchcodec
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("benchmark", SOURCES)
def test_error_names_a_corrupt_image(benchmark, num_workers, toy_copy):
    path = sorted((toy_copy / "train2017").iterdir())[3]
    path.write_bytes(path.read_bytes()[:-500])
    data = SOURCES[benchmark](toy_copy, num_workers=num_workers, jpeg_decoder="gpu")
    with pytest.raises(InputError, match=rf"{path.name}: this image cannot be read"):
        load_batches(data, 1)


def test_cpu_decodes_a_file_that_the_device_decoder_rejects(small_toy, monkeypatch):
    split = coco.read(*coco.standard_paths(small_toy, "train"))

    def fail(*_):
        raise RuntimeError("unsupported")

    monkeypatch.setattr(image_io, "decode_jpeg_on_device", fail)
    cache = make_cache(split, GIB, device_decodes=True)
    assert torch.equal(load_batch(cache, split, [3, 1])[0], expected_batch(split, [3, 1]))
    corrupt = SourceImage(2, (60, 50), encoded=torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(InputError, match=split.image_path(2).name):
        cache.assemble_batch(cache.pipeline.collate([CropSpec(corrupt, (0, 0, 50, 60), (60, 50))]))


def test_unsupported_settings_are_rejected():
    with pytest.raises(InputError, match="needs an accelerator"):
        device_cache.validate(Config(image_cache="device"), CPU)
    with pytest.raises(InputError, match=r"--jpeg-decoder gpu: .* has no decoder for"):
        device_cache.validate(Config(jpeg_decoder="gpu"), CPU)
    device_cache.validate(Config(image_cache="host"), CPU)
    with pytest.raises(ValueError, match="excludes --image-cache host"):
        Config(jpeg_decoder="gpu", image_cache="host")


def test_workers_preprocess_images_by_default(small_toy):
    split = coco.read(*coco.standard_paths(small_toy, "train"))
    pipeline, cache = device_cache.build(Config(), split, SINGLE_RANK)
    assert isinstance(pipeline, HostImagePipeline)
    assert cache is None


@pytest.mark.gpu
@pytest.mark.parametrize("benchmark", SOURCES)
def test_accelerator_produces_the_same_bytes(benchmark, toy_copy):
    device = torch.accelerator.current_accelerator()
    ranks = DistContext(0, 1, torch.device(device.type, 0))
    expected = load_batches(SOURCES[benchmark](toy_copy, num_workers=2), 2)
    config = {"data_dir": toy_copy, "dataset": "toy", "num_classes": 4, "batch_size": 5, "seed": 1, "num_workers": 2}
    config |= {"image_cache": "device", "image_cache_gib": 1}
    for compiled in ("off", "on"):
        if benchmark == "ssd":
            data = SSDTrainSource(Config(**config, compile=compiled), ranks, 1)
        else:
            sizes = {"min_image_size": 128, "max_image_size": 160}
            data = MaskRCNNTrainSource(MaskRCNNConfig(**config, **sizes, compile=compiled), ranks, 1)
        for host_batch, device_batch in zip(expected, load_batches(data, 2), strict=True):
            assert torch.equal(host_batch.images, device_batch.images.cpu())


@pytest.mark.gpu
def test_accelerator_decoder_is_close_to_the_cpu_decoder(toy_copy):
    device = torch.accelerator.current_accelerator()
    try:
        device_cache.validate(Config(jpeg_decoder="gpu"), device)
    except InputError as error:
        pytest.skip(str(error))
    ranks = DistContext(0, 1, torch.device(device.type, 0))
    settings = {"data_dir": toy_copy, "dataset": "toy", "num_classes": 4, "batch_size": 5, "num_workers": 2}
    expected = load_batches(ssd_data(toy_copy, num_workers=2), 1)
    data = SSDTrainSource(Config(**settings, seed=1, jpeg_decoder="gpu"), ranks, 1)
    for host_batch, device_batch in zip(expected, load_batches(data, 1), strict=True):
        difference = (host_batch.images.int() - device_batch.images.cpu().int()).abs()
        assert difference.float().mean() < 2  # of 256 levels: decoders differ in rounding and chroma upsampling
