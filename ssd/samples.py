"""Training images of SSD300 as the network sees them, with their targets."""

from collections.abc import Iterator

from detection.data.coco import Split
from detection.data.train_sample import TrainSample
from detection.runtime.distributed import DistContext
from ssd import augment, box_coder
from ssd.anchors import IMAGE_SIZE_PX, make_anchors
from ssd.config import Config
from ssd.data import SSDTrainSource


def open_samples(config: Config, ranks: DistContext, seed: int) -> tuple[Split, Iterator[TrainSample]]:
    """Return the training split, and the images of its first epoch in the order of training, on the CPU."""
    source = SSDTrainSource(config, ranks, seed)
    return source.train, iter_samples(source)


def iter_samples(source: SSDTrainSource) -> Iterator[TrainSample]:
    """Yield the images of the first epoch, augmented, and the anchors that match their boxes."""
    anchors = make_anchors()
    anchors_px = anchors.boxes_xyxy * IMAGE_SIZE_PX
    for batch, _, _ in source.train_batches(1):
        images, boxes_xyxy = augment.augment_batch(batch.images, batch.boxes_xyxy, batch.augmentation)
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        matches = box_coder.match(boxes_xyxy, batch.labels, anchors)
        for image, boxes, labels, matched in zip(pixels, boxes_xyxy, batch.labels, matches, strict=True):
            valid, positive = labels > 0, matched >= 0
            boxes_px = boxes[valid] * IMAGE_SIZE_PX
            yield TrainSample.from_tensors(image, boxes_px, labels[valid], anchors_px[positive], matched[positive])
