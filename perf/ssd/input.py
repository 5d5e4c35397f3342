"""SSD300's input pipeline: its stages on one core, all stages by number of workers, and the memory of a worker.

B images, G boxes of one image.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from math import ceil
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, default_collate

from detection.data import device_cache, image_io
from detection.data.image_pipeline import CropSpec, DeviceBatchInput, SourceImage
from detection.data.prefetch import prefetch, to_device
from detection.runtime.device import supports_jpeg_decode
from detection.runtime.threads import limit_threads
from perf.harness import BenchContext, Result
from perf.machine import process_mib
from perf.photos import PhotoSet
from perf.roofline import Work, bytes_moved
from perf.ssd import baseline
from perf.timing import Variant, quartiles
from ssd import augment
from ssd.anchors import make_anchors
from ssd.box_coder import encode
from ssd.data import SIZE_HW, Batch, SSDTrainDataset, SSDTrainSource, crop_to_px
from ssd.train import prepare_batch

# Photos that are held decoded, at 0.8 MB each.
DECODED_PHOTOS = 64
# Images per batch on one core, and in the baseline.
SMALL_BATCH = 8
# Minimum batches per worker in a sample, so that its first batch has little weight.
BATCHES_PER_WORKER = 4
# Readings of a worker's memory, one per batch, since the number of batches that it holds varies.
READINGS = 10
MEMORY_BATCH = 32
# Approximate ratio by which the baseline is slower, and gets fewer images.
BASELINE_SLOWDOWN = 4


def time_decode(context: BenchContext) -> Iterator[Result]:
    """Time JPEG decoding on one core, then on the accelerator if it has a decoder."""
    library = "Pillow" if image_io.decode is image_io.decode_with_pillow else "torchcodec"
    for photos in context.photo_sets:
        encoded = photos.encoded()
        decode_all = partial(for_each, image_io.decode, encoded)
        optimized = Variant(f"{library}, {photos.name}", decode_all, len(encoded))
        pillow_all = partial(for_each, baseline.decode_jpeg, encoded)
        pillow = Variant(f"Pillow, {photos.name}", pillow_all, len(encoded))
        with limit_threads(1):
            yield from context.compare("decode", optimized, pillow)
        if supports_jpeg_decode(context.device):
            files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded]
            decode_on_device = partial(image_io.decode_jpeg_on_device, files, context.device)
            accelerator = Variant(f"accelerator, {photos.name}", decode_on_device, len(files))
            yield from context.compare("decode", accelerator)


def for_each(run: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Call `run` with each item."""
    for item in items:
        run(item)


def time_resize(context: BenchContext) -> Iterator[Result]:
    """Time sampling the IoU crop, cropping and resizing, on one core."""
    for photos in context.photo_sets:
        with limit_threads(1):
            yield from time_resize_photos(context, photos)


def time_resize_photos(context: BenchContext, photos: PhotoSet) -> Iterator[Result]:
    """Time crop and resize of decoded photos."""
    dataset = train_dataset(context.make_train_source(photos, len(photos.photos), num_workers=0))
    encoded = photos.encoded()[:DECODED_PHOTOS]
    tensors = [image_io.decode(data) for data in encoded]
    pillow_images = [baseline.decode_jpeg(data) for data in encoded]
    samples = baseline.Samples(dataset.split)
    epochs = count(1)

    def run_optimized() -> None:
        epoch = next(epochs)
        for index, image in enumerate(tensors):
            size_hw = image.shape[1], image.shape[2]
            crop_px = crop_to_px(dataset.sample_params(epoch, index, *size_hw)[0], size_hw)
            dataset.pixels.transform(CropSpec(SourceImage(index, size_hw, image), crop_px, SIZE_HW))

    def run_baseline() -> None:
        for index, image in enumerate(pillow_images):
            baseline.resize(samples.crop(index, image)[0])

    yield from context.compare(
        "resize",
        Variant(f"tries at once, torch, {photos.name}", run_optimized, len(encoded)),
        Variant(f"try by try, Pillow, {photos.name}", run_baseline, len(encoded)),
    )
    if context.device.type != "cpu":
        yield from context.compare("resize", device_resize_variant(context, dataset), unit="img/s")


def device_resize_variant(context: BenchContext, dataset: SSDTrainDataset) -> Variant:
    """Return cropping and resizing on the device, of batches of images in its cache."""
    batch_size = context.size.batch_size
    config = context.config(compile="auto", image_cache="device", image_cache_gib=1)
    pipeline, cache = device_cache.build(config, dataset.split, context.ranks)
    assert cache
    cached_dataset = SSDTrainDataset(dataset.split, config, seed=context.seed, pixels=pipeline)

    def make_input(epoch: int) -> DeviceBatchInput:
        batch = cached_dataset.__getitems__([(epoch, index % len(dataset.split)) for index in range(batch_size)])
        assert isinstance(batch, Batch)
        images: DeviceBatchInput = batch.images
        return images

    cache.assemble_batch(make_input(1))
    host_input = make_input(2)
    assert not len(host_input.uploaded)
    # The rank reads `uploaded` on the host, without waiting for the device.
    device_input = to_device(host_input, context.device)._replace(uploaded=host_input.uploaded)
    return Variant(
        f"batch of {batch_size} from the device cache", lambda: cache.assemble_batch(device_input), batch_size
    )


def time_jitter(context: BenchContext) -> Iterator[Result]:
    """Time color jitter and normalization of 300×300 pixels: a batch on the device, or on one core of a CPU."""
    batch = to_device(make_batch(context, context.size.batch_size), context.device)
    images = [Image.fromarray(pixels) for pixels in batch.images.cpu().permute(0, 2, 3, 1).contiguous().numpy()]

    def run_optimized() -> Tensor:
        _, jitter, order = batch.augmentation
        return augment.normalize(augment.color_jitter(augment.to_float(batch.images), jitter, order))

    with limit_threads(1):
        yield from context.compare(
            "jitter",
            Variant(f"batch of {len(images)}", run_optimized, len(images)),
            Variant("torchvision on Pillow, one core", partial(for_each, baseline.color_jitter, images), len(images)),
            work=Work(bytes=bytes_moved(batch.images, run_optimized()) / len(images)),
            roofline=context.roofline(num_threads=1),
        )


def time_encode(context: BenchContext) -> Iterator[Result]:
    """Time encoding ground truth to targets: a batch on the device, or on one core of a CPU."""
    batch = make_batch(context, context.size.batch_size)
    _, boxes, labels, *_ = to_device(batch, context.device)
    anchors, cpu_anchors = make_anchors(context.device), make_anchors("cpu")
    gt = [(b[is_box], k[is_box]) for b, k, is_box in zip(batch.boxes_xyxy, batch.labels, batch.labels > 0, strict=True)]

    optimized = partial(encode, boxes, labels, anchors)

    def run_baseline() -> None:
        for image_boxes, image_labels in gt:
            baseline.encode(image_boxes, image_labels, cpu_anchors)

    with limit_threads(1):
        yield from context.compare(
            "encode",
            Variant(f"batch of {len(gt)}", optimized, len(gt)),
            Variant("image by image, one core", run_baseline, len(gt)),
            work=Work(bytes=bytes_moved(boxes, labels, *optimized()) / len(gt)),
            roofline=context.roofline(num_threads=1),
        )


def time_input(context: BenchContext) -> Iterator[Result]:
    """Time the pipeline from files to network inputs and targets: on one core, then by number of workers."""
    for photos in context.photo_sets:
        with limit_threads(1):
            yield from per_core_throughput(context, photos)
        for num_workers in context.size.workers:
            yield from worker_throughput(context, photos, num_workers)


def per_core_throughput(context: BenchContext, photos: PhotoSet) -> Iterator[Result]:
    """Time all stages in this process: those of a worker and of the device, then those of a worker alone."""
    dataset = train_dataset(context.make_train_source(photos, len(photos.photos), num_workers=0))
    samples = baseline.Samples(dataset.split)
    anchors = make_anchors("cpu")
    offsets = range(0, len(samples), SMALL_BATCH)
    chunks = [range(start, min(start + SMALL_BATCH, len(samples))) for start in offsets]
    epochs = count(1)

    def batches() -> Iterator[Batch]:
        epoch = next(epochs)
        for chunk in chunks:
            batch = dataset.__getitems__([(epoch, index) for index in chunk])
            assert isinstance(batch, Batch)
            yield batch

    def run_all() -> None:
        for batch in batches():
            prepare_batch(batch, anchors)

    def run_baseline() -> None:
        for chunk in chunks:
            default_collate([samples[index] for index in chunk])

    encoded = photos.encoded()
    decoding = Variant("decoding alone", partial(for_each, image_io.decode, encoded), len(encoded))
    title = f"one core, {photos.name}"
    pillow = Variant(f"Pillow and torchvision, {title}", run_baseline, len(samples))
    all_stages = Variant(title, run_all, len(samples))
    yield from context.compare("input", all_stages, pillow, unit="img/s")
    for cache, baselines in (("", (decoding, pillow)), (", image cache on host", (pillow,))):
        worker = Variant(f"worker stages alone{cache}, {title}", lambda: deque(batches(), maxlen=0), len(samples))
        requirement = "" if cache else "input of decoding"
        yield from context.compare("input", worker, *baselines, unit="img/s", requirement=requirement)
        config = context.config(image_cache="host", image_cache_gib=1)
        dataset.pixels, _ = device_cache.build(config, dataset.split, context.ranks)


def worker_throughput(context: BenchContext, photos: PhotoSet, num_workers: int) -> Iterator[Result]:
    """Time epochs of the run's own loader, prepared for the network on the device."""
    batch_size = context.size.batch_size
    min_images = context.size.input_images * max(1, num_workers)
    num_images = batch_size * max(ceil(min_images / batch_size), BATCHES_PER_WORKER * num_workers)
    data = context.make_train_source(photos, num_images, num_workers=num_workers)
    anchors = make_anchors(context.device)
    epochs = count(1)

    def run_optimized() -> None:
        for rank_batch in prefetch(data.train_batches(next(epochs)), context.device):
            prepare_batch(rank_batch.batch, anchors)

    baseline_batch = min(batch_size, SMALL_BATCH)
    baseline_images = baseline_batch * ceil(data.train_samples / BASELINE_SLOWDOWN / baseline_batch)
    samples = Subset(baseline.Samples(train_dataset(data).split), range(baseline_images))
    loader = baseline.make_loader(samples, baseline_batch, num_workers, context.device)
    title = f"{num_workers} workers, {photos.name}"
    pillow_name = f"Pillow and torchvision, {title}"
    pillow = Variant(pillow_name, lambda: deque(prefetch(loader, context.device), maxlen=0), baseline_images)
    yield from context.compare("input", Variant(title, run_optimized, data.train_samples), pillow, unit="img/s")


def time_memory(context: BenchContext) -> Iterator[Result]:
    """Measure the memory of a worker after few and many images: private, and its part of shared memory (PSS)."""
    children = set(active_children())
    min_images, max_images = context.size.memory_images
    data = context.make_train_source(context.photos, max_images, num_workers=1, batch_size=MEMORY_BATCH)
    worker: BaseProcess | None = None
    num_images, readings = 0, []
    for rank_batch in data.train_batches(1):
        (worker,) = [worker] if worker else set(active_children()) - children
        num_images += rank_batch.global_batch_size
        assert worker.pid
        readings.append((num_images, process_mib(worker.pid, "smaps_rollup", "Pss")))
    early = [mib for images, mib in readings if images >= min_images][:READINGS]
    late = [mib for _, mib in readings][-READINGS:]
    yield Result("memory", f"worker after {min_images} images", "MiB", quartiles(early))
    yield Result("memory", f"worker after {max_images} images", "MiB", quartiles(late))
    growth = quartiles([after / median(early) for after in late])
    yield Result("memory", "growth", "×", growth, requirement="worker memory growth")


def make_batch(context: BenchContext, batch_size: int) -> Batch:
    """Return a batch of photos as a worker makes it."""
    data = context.make_train_source(context.photos, batch_size, batch_size=batch_size, num_workers=0)
    batch: Batch = next(data.train_batches(1)).batch
    return batch


def train_dataset(data: SSDTrainSource) -> SSDTrainDataset:
    """Return the data set that the workers of a run read."""
    dataset = data.train_loader.dataset
    assert isinstance(dataset, SSDTrainDataset)
    return dataset
