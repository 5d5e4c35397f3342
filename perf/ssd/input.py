"""From JPEG bytes to what the network sees: each part alone, all of it on one core and by workers, a worker's memory.

B images, G boxes of one image.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from math import ceil
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, default_collate

from detection.data import device_cache, image_io
from detection.data.image_pipeline import CropSpec, DeviceBatchInput, SourceImage
from detection.data.prefetch import prefetch, to_device
from detection.runtime.device import supports_jpeg_decode
from perf.harness import BenchContext, Result
from perf.photos import Photos
from perf.roofline import Work, bytes_moved
from perf.ssd import baseline
from perf.timing import Variant, limit_threads, quartiles
from ssd import augment
from ssd.anchors import make_anchors
from ssd.box_coder import encode
from ssd.data import SIZE_HW, Batch, SSDTrainDataset, SSDTrainSource, crop_to_px
from ssd.train import prepare_batch

# Photos that are held decoded, at .8 MB each.
DECODED_PHOTOS = 64
# Images that are made ready at once on a core, and by the plain way for a batch.
SMALL_BATCH = 8
# Batches that each worker makes in a sample at least, so that its first does not count for much.
BATCHES_PER_WORKER = 4
# Readings of a worker's memory, one a batch: it holds more or fewer batches at each.
READINGS = 10
MEMORY_BATCH = 32
# The plain way takes about so much longer, and is given fewer images.
BASELINE_SLOWDOWN = 4


def time_decode(bench: BenchContext) -> Iterator[Result]:
    """Decode JPEG files, on one core; then by the accelerator, where it has a decoder."""
    name = "Pillow" if image_io.decode is image_io.decode_with_pillow else "torchcodec"
    for photos in bench.sources:
        encoded = photos.encoded()
        ours = Variant(f"{name}, {photos.name}", each(image_io.decode, encoded), len(encoded))
        plain = Variant(f"Pillow, {photos.name}", each(baseline.decode_jpeg, encoded), len(encoded))
        with limit_threads(1):
            yield from bench.compare("decode", ours, *bench.baselines([plain]))
        if supports_jpeg_decode(bench.device):
            files = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in encoded]
            there = Variant(
                f"the accelerator, {photos.name}",
                partial(image_io.decode_jpeg_on_device, files, bench.device),
                len(files),
            )
            yield from bench.compare("decode", there)


def each(decode: Callable[[bytes], object], encoded: list[bytes]) -> Callable[[], object]:
    """Decode all of the files, one after another."""

    def run() -> None:
        for one in encoded:
            decode(one)

    return run


def time_resize(bench: BenchContext) -> Iterator[Result]:
    """Draw the IoU crop, cut it out and resize it, on one core."""
    for photos in bench.sources:
        with limit_threads(1):
            yield from resize_of(bench, photos)


def resize_of(bench: BenchContext, photos: Photos) -> Iterator[Result]:
    """Crop and resize of some photos, decoded before."""
    dataset = train_images(bench.open_data(photos, len(photos.photos), num_workers=0))
    encoded = photos.encoded()[:DECODED_PHOTOS]
    tensors, pictures = [image_io.decode(one) for one in encoded], [baseline.decode_jpeg(one) for one in encoded]
    samples = baseline.Samples(dataset.split)
    epochs = count(1)

    def ours() -> None:
        epoch = next(epochs)
        for index, image in enumerate(tensors):
            size_hw = image.shape[1], image.shape[2]
            draw, _, _ = dataset.sample_params(epoch, index, *size_hw)
            dataset.pixels.transform(
                CropSpec(SourceImage(index, size_hw, image), crop_to_px(draw.crop_xyxy, size_hw), SIZE_HW)
            )

    def plain() -> None:
        for index, picture in enumerate(pictures):
            baseline.resize(samples.crop(index, picture)[0])

    yield from bench.compare(
        "resize",
        Variant(f"tries at once, torch, {photos.name}", ours, len(encoded)),
        *bench.baselines([Variant(f"try by try, Pillow, {photos.name}", plain, len(encoded))]),
    )
    if bench.device.type != "cpu":
        yield from bench.compare("resize", device_resize_variant(bench, dataset), unit="img/s")


def device_resize_variant(bench: BenchContext, dataset: SSDTrainDataset) -> Variant:
    """Batches cut and resized on the device, of images that it holds."""
    size = bench.size.batch_size
    config = bench.config(compile="auto", image_cache="device", image_cache_gib=1)
    worker, cache = device_cache.build(config, dataset.split, bench.ranks)
    assert cache
    held = SSDTrainDataset(
        dataset.split, seed=bench.seed, crop=True, jitter=True, flip="horizontal", max_samples=1, pixels=worker
    )

    def batch(epoch: int) -> DeviceBatchInput:
        made = held.__getitems__([(epoch, index % len(dataset.split)) for index in range(size)])
        assert isinstance(made, Batch)
        originals: DeviceBatchInput = made.images
        return originals

    cache.assemble_batch(batch(1))
    host = batch(2)
    assert not len(host.uploaded)
    ready = to_device(host, bench.device)._replace(
        uploaded=host.uploaded
    )  # which the rank reads without waiting for the device
    return Variant(f"batch of {size} on the device, of images held there", lambda: cache.assemble_batch(ready), size)


def time_jitter(bench: BenchContext) -> Iterator[Result]:
    """Colour jitter and normalisation of 300×300 pixels: of a batch on the device, or on one core of a CPU."""
    batch = to_device(first_batch(bench, bench.size.batch_size), bench.device)
    pictures = [Image.fromarray(pixels) for pixels in batch.images.cpu().permute(0, 2, 3, 1).contiguous().numpy()]

    def ours() -> Tensor:
        jittered = augment.color_jitter(augment.to_float(batch.images), batch.jitter, batch.jitter_order)
        return augment.normalize(jittered)

    def plain() -> None:
        for picture in pictures:
            baseline.color_jitter(picture)

    with limit_threads(1):
        yield from bench.compare(
            "jitter",
            Variant(f"batch of {len(pictures)}", ours, len(pictures)),
            *bench.baselines([Variant("torchvision on Pillow, one core", plain, len(pictures))]),
            work=Work(bytes=bytes_moved(batch.images, ours()) / len(pictures)),
            limits=bench.roofline(num_threads=1),
        )


def time_encode(bench: BenchContext) -> Iterator[Result]:
    """Ground truth to targets: of a batch on the device, or on one core of a CPU."""
    batch = first_batch(bench, bench.size.batch_size)
    _, boxes, labels, *_ = to_device(batch, bench.device)
    anchors, anchors_cpu = make_anchors(bench.device), make_anchors("cpu")
    alone = [
        (b[is_box], k[is_box]) for b, k, is_box in zip(batch.boxes_xyxy, batch.labels, batch.labels > 0, strict=True)
    ]

    def ours() -> tuple[Tensor, Tensor]:
        return encode(boxes, labels, anchors)

    def plain() -> None:
        for boxes_of_one, labels_of_one in alone:
            baseline.encode(boxes_of_one, labels_of_one, anchors_cpu)

    with limit_threads(1):
        yield from bench.compare(
            "encode",
            Variant(f"batch of {len(alone)}", ours, len(alone)),
            *bench.baselines([Variant("image by image, one core", plain, len(alone))]),
            work=Work(bytes=bytes_moved(boxes, labels, *ours()) / len(alone)),
            limits=bench.roofline(num_threads=1),
        )


def time_input(bench: BenchContext) -> Iterator[Result]:
    """From files to what the network sees and is to say: on one core, then by the number of workers."""
    for photos in bench.sources:
        with limit_threads(1):
            yield from per_core_throughput(bench, photos)
        for num_workers in bench.size.workers:
            yield from worker_throughput(bench, photos, num_workers)


def per_core_throughput(bench: BenchContext, photos: Photos) -> Iterator[Result]:
    """All that is done to an image, in this process: a worker's part and the device's; then a worker's alone."""
    dataset = train_images(bench.open_data(photos, len(photos.photos), num_workers=0))
    samples, v2_samples = baseline.Samples(dataset.split), baseline.V2Samples(dataset.split)
    anchors = make_anchors("cpu")
    starts = range(0, len(samples), SMALL_BATCH)
    chunks = [range(start, min(start + SMALL_BATCH, len(samples))) for start in starts]
    epochs = count(1)

    def ours() -> None:
        for batch in batches():
            prepare_batch(batch, anchors)

    def batches() -> Iterator[Batch]:
        epoch = next(epochs)
        for chunk in chunks:
            batch = dataset.__getitems__([(epoch, index) for index in chunk])
            assert isinstance(batch, Batch)
            yield batch

    def worker() -> None:
        for _ in batches():
            pass

    def plain(dataset: baseline.Samples | baseline.V2Samples) -> None:
        for chunk in chunks:
            default_collate([dataset[index] for index in chunk])

    where = f"one core, {photos.name}"
    pillow = Variant(f"Pillow and torchvision, {where}", lambda: plain(samples), len(samples))
    v2 = Variant(f"torchvision v2 without targets, {where}", lambda: plain(v2_samples), len(samples))
    yield from bench.compare(
        "input",
        Variant(where, ours, len(samples)),
        *bench.baselines([pillow, v2]),
        unit="img/s",
        requirement="input per core",
    )
    for kept in ("", ", decoded images kept"):
        alone = Variant(f"a worker's part alone{kept}, {where}", worker, len(samples))
        yield from bench.compare("input", alone, *bench.baselines([pillow]), unit="img/s")
        host = bench.config(image_cache="host", image_cache_gib=1)
        dataset.pixels, _ = device_cache.build(host, dataset.split, bench.ranks)


def worker_throughput(bench: BenchContext, photos: Photos, num_workers: int) -> Iterator[Result]:
    """Epochs of the run's own loader, made ready for the network on the device."""
    size = bench.size.batch_size
    data = bench.open_data(photos, sample_images(bench, size, num_workers), num_workers=num_workers)
    anchors = make_anchors(bench.device)
    epochs = count(1)

    def ours() -> None:
        for share in prefetch(data.train_batches(next(epochs)), bench.device):
            prepare_batch(share.batch, anchors)

    def plain() -> None:
        for _ in prefetch(loader, bench.device):
            pass

    small = min(size, SMALL_BATCH)
    num_plain = small * ceil(data.train_samples / BASELINE_SLOWDOWN / small)
    samples = Subset(baseline.Samples(train_images(data).split), range(num_plain))
    loader = baseline.make_loader(samples, small, num_workers, bench.device)
    where = f"{num_workers} workers, {photos.name}"
    yield from bench.compare(
        "input",
        Variant(where, ours, data.train_samples),
        *bench.baselines([Variant(f"Pillow and torchvision, {where}", plain, num_plain)]),
        unit="img/s",
    )


def sample_images(bench: BenchContext, batch_size: int, num_workers: int) -> int:
    """Images of a sample of the input: whole batches, so many for each worker."""
    wanted = bench.size.input_images * max(1, num_workers)
    return batch_size * max(ceil(wanted / batch_size), BATCHES_PER_WORKER * num_workers)


def time_memory(bench: BenchContext) -> Iterator[Result]:
    """Memory of a worker after few and after many images: its own, and its part of what it shares (PSS)."""
    before = set(active_children())
    data = bench.open_data(bench.photos, bench.size.read_images[1], num_workers=1, batch_size=MEMORY_BATCH)
    worker: BaseProcess | None = None
    read, readings = 0, []
    for share in data.train_batches(1):
        (worker,) = [worker] if worker else set(active_children()) - before
        read += share.global_batch_size
        assert worker.pid
        readings.append((read, proportional_set_mib(worker.pid)))
    few, many = bench.size.read_images
    early = [mib for images, mib in readings if images >= few][:READINGS]
    late = [mib for _, mib in readings][-READINGS:]
    yield Result("memory", f"worker after {few} images", "MiB", quartiles(early))
    yield Result("memory", f"worker after {many} images", "MiB", quartiles(late))
    growth = quartiles([after / median(early) for after in late])
    yield Result("memory", "growth between", "×", growth, requirement="memory of a worker")


def proportional_set_mib(pid: int) -> float:
    """Memory of a process, MiB; of what it shares with others its part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


def first_batch(bench: BenchContext, batch_size: int) -> Batch:
    """A batch of photos as a worker makes it."""
    data = bench.open_data(bench.photos, batch_size, batch_size=batch_size, num_workers=0)
    batch: Batch = next(data.train_batches(1)).batch
    return batch


def train_images(data: SSDTrainSource) -> SSDTrainDataset:
    """The data set that the workers of a run read."""
    dataset = data.train_loader.dataset
    assert isinstance(dataset, SSDTrainDataset)
    return dataset
