"""Small SSD300 networks, their checkpoints and predictions."""

from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import checkpoints
from checkpoints import CATEGORY_NAMES
from ssd.anchors import NUM_ANCHORS
from ssd.config import Config
from ssd.model import SSD300


def write_checkpoint(folder: Path, model: SSD300) -> Path:
    categories = [{"id": 10 * label, "name": name} for label, name in enumerate(CATEGORY_NAMES, start=1)]
    config = Config(dataset="toy", num_classes=model.num_classes)
    return checkpoints.write_checkpoint(folder, model, config, categories=categories)


def square_detector() -> SSD300:
    """Build a network that detects one square, label 2, with score 0.9 in the center of any image."""
    model = SSD300(4)
    for head in model.heads:
        torch.nn.init.zeros_(head.weight)
        with torch.no_grad():
            per_anchor = head.bias.view(-1, 8)
            per_anchor[:] = torch.tensor([0.0, 0, 0, 0, 20, 0, 0, 0])
    with torch.no_grad():
        logits = torch.tensor([0.05, 0.025, 0.9, 0.025]).log()
        model.heads[-1].bias.view(-1, 8)[0, 4:] = logits
    return model


def predictions(seed, batch=2, classes=4, peak=6.0):
    generator = torch.Generator().manual_seed(seed)
    deltas = 0.5 * torch.randn(batch, NUM_ANCHORS, 4, generator=generator)
    logits = torch.randn(batch, NUM_ANCHORS, classes, generator=generator)
    logits[..., 0] += peak
    hot = torch.randint(0, NUM_ANCHORS, (60,), generator=generator)
    logits[:, hot, torch.randint(1, classes, (60,), generator=generator)] += 8
    return deltas, logits


def batches_equal(one, other):
    """Compare the tensors of two batches, which may hold batches as fields."""
    return all(torch.equal(*pair) for pair in zip(tree_leaves(one), tree_leaves(other), strict=True))


def load_batches(data, count, after_first=lambda: None):
    """Return the training batches of `count` epochs of a data source."""
    batches = []
    for epoch in range(1, count + 1):
        batches += [rank_batch.batch for rank_batch in data.train_batches(epoch)]
        if epoch == 1:
            after_first()
    return batches


class TinyBackbone(nn.Sequential):
    """One convolution with the output shape of ResNet-34, at a hundredth of its cost."""

    def __init__(self, name="resnet34"):
        super().__init__(nn.Conv2d(3, 256, kernel_size=8, stride=8, padding=2))
