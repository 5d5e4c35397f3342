"""Training images of RetinaNet as the network sees them, with their targets."""

from collections.abc import Iterator

import torch

from detection.data.coco import Split
from detection.data.train_sample import TrainSample
from detection.runtime.distributed import DistContext
from retinanet.anchors import make_anchors
from retinanet.config import Config
from retinanet.data import RetinaNetTrainSource
from retinanet.loss import match
from retinanet.resize import PIXEL_MEAN, PIXEL_STD, normalize_and_resize, resize_boxes


def open_samples(config: Config, ranks: DistContext, seed: int) -> tuple[Split, Iterator[TrainSample]]:
    """Return the training split, and the images of its first epoch in the order of training, on the CPU."""
    source = RetinaNetTrainSource(config, ranks, seed)
    return source.train, iter_samples(source, config)


def iter_samples(source: RetinaNetTrainSource, config: Config) -> Iterator[TrainSample]:
    """Yield the images of the first epoch, augmented, and the anchors that match their boxes."""
    size = config.image_size
    anchors = torch.cat(make_anchors(size, size, torch.device("cpu"), config.anchor_sizes))
    for batch, _, _ in source.train_batches(1):
        images = normalize_and_resize(batch.images, batch.sizes_hw, batch.flips, size).permute(0, 2, 3, 1)
        pixels = (images * torch.tensor(PIXEL_STD) + torch.tensor(PIXEL_MEAN)).mul(255).round().byte().numpy()
        boxes_xyxy = resize_boxes(batch.boxes_xyxy, batch.sizes_hw, batch.flips, size)
        for image, boxes, labels in zip(pixels, boxes_xyxy, batch.labels, strict=True):
            valid = labels > 0
            matched = match(boxes, valid, anchors)
            positive = matched >= 0
            yield TrainSample.from_tensors(image, boxes[valid], labels[valid], anchors[positive], matched[positive])
