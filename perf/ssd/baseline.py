"""The plain way: what a user would pick instead of this project, and what its speed is measured against.

Pillow and torchvision for the pictures, one at a time; float32 and channels first for the network; a sort and a
sort of the sort for hard negatives; a loop over images and classes for detections. It computes what ssd/ computes,
which tests/perf/test_ssd_baseline.py holds, and is written as one would write it: nothing here is slower than it need be
for what it is. Of ssd/ it uses what no choice of speed lies in: anchors, box formats, the law of the crop, the trunk.

B images, G boxes of one image, A anchors, K classes with background 0.
"""

import io
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

from detection.boxes import pairwise_iou, xyxy_to_cxcywh
from detection.data.coco import Split
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
from ssd.postprocess import Detections

resize = transforms.Resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX))
color_jitter = transforms.Compose(
    [transforms.ColorJitter(*JITTER_RANGES), transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
)
"""A picture to (3, 300, 300) float32, normalised; jittered with Pillow before."""


class Sample(NamedTuple):
    """A training sample, ready for the network; a batch has B first.

    image: (3, 300, 300) float32, normalised. deltas: (A, 4) and labels: (A,), 0 at negative anchors.
    """

    image: Tensor
    deltas: Tensor
    labels: Tensor


def decode_jpeg(encoded: bytes) -> Image.Image:
    """A picture from the bytes of its file."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def draw_crop(boxes_xyxy: FloatArray, max_samples: int = 1) -> FloatArray:
    """Draw the random IoU crop (4,) for boxes (G, 4), all normalised: one try after another, until one is accepted."""
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
            # "Any" overlap is an overlap of 0 as well.
            if minimum and not (crop_box_iou(crop, boxes_xyxy) > minimum).all():
                continue
            if centers_inside(crop, boxes_xyxy).any():
                return crop


def flip(image: Image.Image, boxes_xyxy: FloatArray) -> tuple[Image.Image, FloatArray]:
    """Mirror every second picture left to right, with its boxes (G, 4), normalised."""
    if random.random() < 0.5:
        return image, boxes_xyxy
    mirrored = boxes_xyxy.copy()
    mirrored[:, 0], mirrored[:, 2] = 1 - boxes_xyxy[:, 2], 1 - boxes_xyxy[:, 0]
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored


def encode(boxes_xyxy: Tensor, labels: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """Deltas (A, 4) and labels (A,) of the boxes (G, 4) and labels (G,) of one image."""
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
    """The training images of a split, one at a time, each made ready for the network where it is read."""

    def __init__(self, split: Split):
        self.split, self.anchors = split, make_anchors("cpu")

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        """Read, decode, crop, flip, resize, jitter, normalise and encode image `index`."""
        image = decode_jpeg(self.split.image_path(index).read_bytes())
        image, boxes, labels = self.crop(index, image)
        image, boxes = flip(image, boxes)
        encoded = encode(torch.from_numpy(boxes), torch.from_numpy(labels), self.anchors)
        return Sample(color_jitter(resize(image)), *encoded)

    def crop(self, index: int, image: Image.Image) -> tuple[Image.Image, FloatArray, NDArray[np.int64]]:
        """A random part of image `index`, with the boxes (G, 4), normalised, and labels (G,) that lie in it."""
        boxes = np.divide(self.split.boxes(index), image.size * 2, dtype=np.float32)
        labels = self.split.image_labels(index)
        drawn = draw_crop(boxes)
        if drawn is WHOLE_IMAGE:
            return image, boxes, labels
        left, top, right, bottom = (int(side * length) for side, length in zip(drawn, image.size * 2, strict=True))
        return image.crop((left, top, right, bottom)), *crop_boxes(drawn, boxes, labels)


class EvalSamples(Dataset[Tensor]):
    """The images of a split to evaluate: read, decode, resize, normalise."""

    def __init__(self, split: Split):
        self.split = split
        self.transform = transforms.Compose(
            [resize, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Tensor:
        """Image `index`, (3, 300, 300) float32."""
        image: Tensor = self.transform(decode_jpeg(self.split.image_path(index).read_bytes()))
        return image


class V2Samples(Dataset[Tensor]):
    """The same by torchvision's transforms of the second version: for information, since its crop is another law."""

    def __init__(self, split: Split):
        self.split = split
        self.transform = v2.Compose(
            [
                v2.RandomIoUCrop(),
                v2.RandomHorizontalFlip(),
                v2.Resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX)),
                v2.ColorJitter(*JITTER_RANGES),
                v2.SanitizeBoundingBoxes(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __getitem__(self, index: int) -> Tensor:
        """Image `index`, (3, 300, 300) normalised; its boxes go along, but are not encoded."""
        image = tv_tensors.Image(decode_jpeg(self.split.image_path(index).read_bytes()))
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(self.split.boxes(index)),
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=image.shape[-2:],
        )
        labels = torch.from_numpy(self.split.image_labels(index))
        pixels: Tensor = self.transform({"image": image, "boxes": boxes, "labels": labels})["image"]
        return pixels


def make_loader(
    dataset: Dataset[Any], batch_size: int, num_workers: int, device: torch.device, *, train: bool = True
) -> DataLoader[Any]:
    """Batches made by `num_workers` processes that stay; for training shuffled and all of one size."""
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
    """The same network with one convolution for boxes and one for classes on each map."""

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
        """(B, 3, 300, 300) normalised images to deltas (B, 4, A) and logits (B, K, A), as the reference has them."""
        maps = [self.backbone(images)]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        deltas = [loc(x).view(len(x), 4, -1) for loc, x in zip(self.loc, maps, strict=True)]
        logits = [conf(x).view(len(x), self.num_classes, -1) for conf, x in zip(self.conf, maps, strict=True)]
        return torch.cat(deltas, dim=2), torch.cat(logits, dim=2)


def multibox_loss(pred_deltas: Tensor, logits: Tensor, deltas: Tensor, labels: Tensor) -> Tensor:
    """Loss of each image, (B,); 0 for an image without a positive anchor.

    pred_deltas: (B, 4, A); logits: (B, K, A); deltas: (B, A, 4) and labels: (B, A). A negative is hard if its place
    in the order of losses, the sort of the sort, is below three times the number of positives.
    """
    positive = labels > 0
    num_positive = positive.sum(dim=1)
    box_loss = F.smooth_l1_loss(pred_deltas, deltas.transpose(1, 2), reduction="none").sum(dim=1)
    box_loss = (box_loss * positive).sum(dim=1)
    class_loss = F.cross_entropy(logits, labels, reduction="none")
    order = class_loss.masked_fill(positive, 0).sort(dim=1, descending=True).indices
    place = order.sort(dim=1).indices
    hard = place < NEGATIVES_PER_POSITIVE * num_positive.unsqueeze(1)
    class_loss = (class_loss * (positive.float() + hard.float())).sum(dim=1)
    return torch.where(num_positive > 0, (box_loss + class_loss) / num_positive.clamp(min=1), 0)


def make_step(device: torch.device, num_classes: int = 81) -> Callable[[Sample], Tensor]:
    """A training step, from a batch of samples on the device to updated weights, as a function that gives the loss."""
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


def make_vgg(num_classes: int = 81) -> Any:
    """torchvision's SSD300, whose trunk is VGG-16, with the detection settings of MLPerf's; nothing is fetched."""
    return torchvision.models.detection.ssd300_vgg16(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        score_thresh=0.05,
        nms_thresh=0.5,
        topk_candidates=200,
        detections_per_img=200,
    )


def make_vgg_step(device: torch.device, num_classes: int = 81) -> Callable[[Tensor, list[dict[str, Tensor]]], None]:
    """A training step of torchvision's SSD300 on images (B, 3, 300, 300) and their `boxes` in pixels and `labels`."""
    model = make_vgg(num_classes).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)

    def step(images: Tensor, targets: list[dict[str, Tensor]]) -> None:
        optimizer.zero_grad()
        sum(model(list(images), targets).values()).backward()
        optimizer.step()

    return step


def detect(deltas: Tensor, logits: Tensor, anchors: Anchors) -> Detections:
    """Detections of deltas (B, 4, A) and logits (B, K, A): image by image, class by class, box by box."""
    scores = logits.permute(0, 2, 1).softmax(dim=-1)
    boxes_xyxy = decode(deltas.permute(0, 2, 1), anchors)
    found = []
    for image, (image_boxes, image_scores) in enumerate(zip(boxes_xyxy, scores, strict=True)):
        boxes, labels, confidences = detect_one(image_boxes, image_scores)
        found.append(Detections(torch.full_like(labels, image), boxes, labels, confidences))
    return Detections(*map(torch.cat, zip(*found, strict=True)))


def detect_one(
    boxes_xyxy: Tensor, scores: Tensor, threshold: float = 0.05, nms_threshold: float = 0.5, max_detections: int = 200
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (D, 4), labels (D,) and scores (D,) of one image, best first, of boxes (A, 4) and scores (A, K)."""
    boxes, labels, confidences = [boxes_xyxy[:0]], [scores.new_zeros(0, dtype=torch.int64)], [scores[:0, 0]]
    for label in range(1, scores.shape[1]):
        of_class = scores[:, label]
        (candidates,) = (of_class > threshold).nonzero(as_tuple=True)
        if not len(candidates):
            continue
        order = of_class[candidates].argsort(descending=True, stable=True)[:max_detections]
        candidates = candidates[order]
        kept = candidates[suppress(boxes_xyxy[candidates], nms_threshold)]
        boxes.append(boxes_xyxy[kept])
        labels.append(torch.full_like(kept, label))
        confidences.append(of_class[kept])
    together = torch.cat(confidences)
    order = together.argsort(descending=True, stable=True)[:max_detections]
    return torch.cat(boxes)[order], torch.cat(labels)[order], together[order]


def suppress(boxes_xyxy: Tensor, nms_threshold: float) -> list[int]:
    """Which of the boxes (N, 4), best first, stay: the best, then the best of those that it overlaps by less, ..."""
    left = torch.arange(len(boxes_xyxy), device=boxes_xyxy.device)
    kept = []
    while len(left):
        best = int(left[0])
        kept.append(best)
        rest = left[1:]
        overlap = pairwise_iou(boxes_xyxy[best].unsqueeze(0), boxes_xyxy[rest])[0]
        left = rest[overlap < nms_threshold]
    return kept
