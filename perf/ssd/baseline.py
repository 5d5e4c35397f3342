"""Baseline of SSD300: a straightforward implementation that users would choose instead of this project.

Images: Pillow and torchvision, one at a time. Network: float32, channels first. Hard negatives: a sort, and a sort of
the sort. Detections: a loop over images and classes. The results equal those of ssd/, which
tests/perf/test_ssd_baseline.py verifies, and nothing is slower than this style requires. Shared with ssd/ is only what
does not affect speed: anchors, box formats, the distribution of crops, the backbone.

B images, G boxes of one image, A anchors, K classes with background 0.
"""

import io
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from detection.boxes import pairwise_iou, xyxy_to_cxcywh
from detection.data.coco import Split
from detection.nn.detections import Detections
from ssd.anchors import ANCHORS_PER_CELL, IMAGE_SIZE_PX, Anchors, make_anchors
from ssd.augment import (
    CROP_OPTIONS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_RANGES,
    MAX_CROP_ASPECT,
    MIN_CROP_SIDE,
    WHOLE_IMAGE,
    FloatArray,
    centers_inside,
    crop_box_iou,
    crop_boxes,
)
from ssd.box_coder import POSITIVE_IOU, decode, to_deltas
from ssd.loss import NEGATIVES_PER_POSITIVE
from ssd.model import Backbone, feature_map_channels, make_extras

resize = transforms.Resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX))
color_jitter = transforms.Compose(
    [transforms.ColorJitter(*JITTER_RANGES), transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
)
"""Jitter an image of Pillow and convert it to (3, 300, 300) float32, normalized."""


class Sample(NamedTuple):
    """Network input and targets of one training image. A batch has B as first dimension.

    image: (3, 300, 300) float32, normalized. deltas: (A, 4) and labels: (A,), 0 at negative anchors.
    """

    image: Tensor
    deltas: Tensor
    labels: Tensor


def decode_jpeg(encoded: bytes) -> Image.Image:
    """Decode an image from the bytes of its file."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def sample_crop(boxes_xyxy: FloatArray, max_samples: int = 1) -> FloatArray:
    """Sample the random IoU crop (4,) for boxes (G, 4), all normalized: one try after another until one is accepted."""
    while True:
        minimum = random.choice(CROP_OPTIONS)
        if minimum is None:
            return WHOLE_IMAGE
        for _ in range(max_samples):
            width, height = random.uniform(MIN_CROP_SIDE, 1), random.uniform(MIN_CROP_SIDE, 1)
            if not 1 / MAX_CROP_ASPECT <= width / height <= MAX_CROP_ASPECT:
                continue
            left, top = random.uniform(0, 1 - width), random.uniform(0, 1 - height)
            crop = np.array([left, top, left + width, top + height], dtype=np.float32)
            # "Any" overlap includes an overlap of 0.
            if minimum and not (crop_box_iou(crop, boxes_xyxy) > minimum).all():
                continue
            if centers_inside(crop, boxes_xyxy).any():
                return crop


def flip(image: Image.Image, boxes_xyxy: FloatArray) -> tuple[Image.Image, FloatArray]:
    """Flip half of the images horizontally, with their boxes (G, 4), normalized."""
    if random.random() < 0.5:
        return image, boxes_xyxy
    flipped = boxes_xyxy.copy()
    flipped[:, 0], flipped[:, 2] = 1 - boxes_xyxy[:, 2], 1 - boxes_xyxy[:, 0]
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flipped


def encode(boxes_xyxy: Tensor, labels: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """Return the target deltas (A, 4) and labels (A,) for the boxes (G, 4) and labels (G,) of one image."""
    iou = pairwise_iou(boxes_xyxy, anchors.boxes_xyxy)  # (G, A)
    best_iou, best_box = iou.max(dim=0)
    for box, anchor in enumerate(iou.argmax(dim=1).tolist()):  # each box keeps its best anchor
        best_iou[anchor], best_box[anchor] = 2, box
    positive = best_iou > POSITIVE_IOU
    anchor_labels = torch.where(positive, labels[best_box], 0)
    boxes_cxcywh = anchors.boxes_cxcywh.clone()
    boxes_cxcywh[positive] = xyxy_to_cxcywh(boxes_xyxy)[best_box[positive]]
    return to_deltas(boxes_cxcywh, anchors), anchor_labels


class Samples(Dataset[Sample]):
    """Training samples of a split, each prepared for the network in the worker that reads it."""

    def __init__(self, split: Split):
        self.split, self.anchors = split, make_anchors("cpu")

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        """Read, decode, crop, flip, resize, jitter, normalize and encode image `index`."""
        image = decode_jpeg(self.split.image_path(index).read_bytes())
        image, boxes, labels = self.crop(index, image)
        image, boxes = flip(image, boxes)
        encoded = encode(torch.from_numpy(boxes), torch.from_numpy(labels), self.anchors)
        return Sample(color_jitter(resize(image)), *encoded)

    def crop(self, index: int, image: Image.Image) -> tuple[Image.Image, FloatArray, NDArray[np.int64]]:
        """Return a random crop of image `index`, with its boxes (G, 4), normalized, and labels (G,)."""
        boxes = np.divide(self.split.boxes(index), image.size * 2, dtype=np.float32)
        labels = self.split.image_labels(index)
        crop = sample_crop(boxes)
        if crop is WHOLE_IMAGE:
            return image, boxes, labels
        left, top, right, bottom = (int(edge * length) for edge, length in zip(crop, image.size * 2, strict=True))
        return image.crop((left, top, right, bottom)), *crop_boxes(crop, boxes, labels)


class EvalSamples(Dataset[Tensor]):
    """Images of a split for evaluation: read, decoded, resized, normalized."""

    def __init__(self, split: Split):
        self.split = split
        self.transform = transforms.Compose(
            [resize, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Tensor:
        """Return image `index`, (3, 300, 300) float32."""
        image: Tensor = self.transform(decode_jpeg(self.split.image_path(index).read_bytes()))
        return image


def make_loader(
    dataset: Dataset[Any], batch_size: int, num_workers: int, device: torch.device, *, train: bool = True
) -> DataLoader[Any]:
    """Return a loader with `num_workers` persistent workers. train: shuffle, and drop the last partial batch."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type != "cpu",
    )


class BaselineSSD300(nn.Module):
    """SSD300 with one convolution for boxes and one for classes on each feature map."""

    def __init__(self, num_classes: int = 81) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Backbone()
        channels = feature_map_channels("resnet34")
        self.extras = make_extras(channels)
        sizes = list(zip(channels, ANCHORS_PER_CELL, strict=True))
        self.loc = nn.ModuleList(nn.Conv2d(c, 4 * n, kernel_size=3, padding=1) for c, n in sizes)
        self.conf = nn.ModuleList(nn.Conv2d(c, num_classes * n, kernel_size=3, padding=1) for c, n in sizes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return deltas (B, 4, A) and logits (B, K, A), in the reference's layout, of images (B, 3, 300, 300)."""
        maps = [self.backbone(images)]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        deltas = [loc(x).view(len(x), 4, -1) for loc, x in zip(self.loc, maps, strict=True)]
        logits = [conf(x).view(len(x), self.num_classes, -1) for conf, x in zip(self.conf, maps, strict=True)]
        return torch.cat(deltas, dim=2), torch.cat(logits, dim=2)


def multibox_loss(pred_deltas: Tensor, logits: Tensor, deltas: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each image, (B,), which is 0 without a positive anchor.

    pred_deltas: (B, 4, A). logits: (B, K, A). deltas: (B, A, 4). labels: (B, A). A negative is hard if its rank in the
    order of losses, from the sort of the sort, is below three times the number of positives.
    """
    positive = labels > 0
    num_positive = positive.sum(dim=1)
    box_loss = F.smooth_l1_loss(pred_deltas, deltas.transpose(1, 2), reduction="none").sum(dim=1)
    box_loss = (box_loss * positive).sum(dim=1)
    class_loss = F.cross_entropy(logits, labels, reduction="none")
    order = class_loss.masked_fill(positive, 0).sort(dim=1, descending=True).indices
    rank = order.sort(dim=1).indices
    hard = rank < NEGATIVES_PER_POSITIVE * num_positive.unsqueeze(1)
    class_loss = (class_loss * (positive.float() + hard.float())).sum(dim=1)
    return torch.where(num_positive > 0, (box_loss + class_loss) / num_positive.clamp(min=1), 0)


def make_step(device: torch.device, num_classes: int = 81) -> Callable[[Sample], Tensor]:
    """Return a training step: a function of a batch on the device that updates the weights and returns the loss."""
    model = BaselineSSD300(num_classes).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)

    def step(batch: Sample) -> Tensor:
        optimizer.zero_grad()
        pred_deltas, logits = model(batch.image)
        loss = multibox_loss(pred_deltas, logits, batch.deltas, batch.labels).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def detect(deltas: Tensor, logits: Tensor, anchors: Anchors) -> Detections:
    """Return detections of deltas (B, 4, A) and logits (B, K, A): image by image, class by class, box by box."""
    scores = logits.permute(0, 2, 1).softmax(dim=-1)
    boxes_xyxy = decode(deltas.permute(0, 2, 1), anchors)
    detections = []
    for image, (image_boxes, image_scores) in enumerate(zip(boxes_xyxy, scores, strict=True)):
        boxes, labels, confidences = detect_one(image_boxes, image_scores)
        detections.append(Detections(torch.full_like(labels, image), boxes, labels, confidences))
    return Detections(*map(torch.cat, zip(*detections, strict=True)))


def detect_one(
    boxes_xyxy: Tensor, scores: Tensor, threshold: float = 0.05, nms_threshold: float = 0.5, max_detections: int = 200
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (D, 4), labels (D,) and scores (D,) of one image, best first. Inputs: (A, 4) and (A, K)."""
    boxes, labels, confidences = [boxes_xyxy[:0]], [scores.new_zeros(0, dtype=torch.int64)], [scores[:0, 0]]
    for label in range(1, scores.shape[1]):
        class_scores = scores[:, label]
        (candidates,) = (class_scores > threshold).nonzero(as_tuple=True)
        if not len(candidates):
            continue
        order = class_scores[candidates].argsort(descending=True, stable=True)[:max_detections]
        candidates = candidates[order]
        kept = candidates[nms(boxes_xyxy[candidates], nms_threshold)]
        boxes.append(boxes_xyxy[kept])
        labels.append(torch.full_like(kept, label))
        confidences.append(class_scores[kept])
    all_scores = torch.cat(confidences)
    order = all_scores.argsort(descending=True, stable=True)[:max_detections]
    return torch.cat(boxes)[order], torch.cat(labels)[order], all_scores[order]


def nms(boxes_xyxy: Tensor, nms_threshold: float) -> list[int]:
    """Return the indices of the boxes (N, 4), best first, that non-maximum suppression keeps."""
    remaining = torch.arange(len(boxes_xyxy), device=boxes_xyxy.device)
    kept = []
    while len(remaining):
        best = int(remaining[0])
        kept.append(best)
        rest = remaining[1:]
        iou = pairwise_iou(boxes_xyxy[best].unsqueeze(0), boxes_xyxy[rest])[0]
        remaining = rest[iou < nms_threshold]
    return kept
