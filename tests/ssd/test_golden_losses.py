"""Losses of the optimized path and the baseline match over 3 steps of a narrow network, and over 50 of the real one.

Each step amplifies a difference in the last digit by half, until it changes the choice of hard negatives. Therefore the
baseline takes over the optimized path's weights every five steps.
"""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from detection.engine import optim
from detection.runtime.distributed import DistContext
from narrow_ssd import make_narrow
from perf.ssd import baseline
from ssd import augment, checkpoint_names, train
from ssd.anchors import make_anchors
from ssd.config import Config
from ssd.data import SSDTrainSource
from ssd.model import SSD300

CPU = torch.device("cpu")
SYNC_INTERVAL = 5


def make_baseline(model: SSD300) -> baseline.BaselineSSD300:
    """Build the baseline network with the weights of the optimized one, and split its fused heads."""
    baseline_model = baseline.BaselineSSD300(model.num_classes).to(next(model.parameters()).dtype)
    state = model.state_dict()
    heads = {name: t for name, t in checkpoint_names.to_reference(state).items() if name.startswith(("loc", "conf"))}
    baseline_model.load_state_dict({name: t for name, t in state.items() if not name.startswith("heads")} | heads)
    return baseline_model


def baseline_sample(batch, row: int) -> baseline.Sample:
    """Prepare one image of a batch separately: flip, normalize, and encode box by box."""
    image = batch.images[row].float() / 255
    boxes = batch.boxes_xyxy[row][batch.labels[row] > 0].clone()
    if batch.augmentation.flips[row, 0]:
        image = image.flip(-1)
        boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
    image = tv.normalize(image, augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    return baseline.Sample(image, *baseline.encode(boxes, batch.labels[row][batch.labels[row] > 0], make_anchors(CPU)))


@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_optimized_losses_match_the_baseline(small_toy, steps, monkeypatch):
    if steps < 50:
        make_narrow(monkeypatch)
    config = Config(data_dir=small_toy, dataset="toy", num_classes=4, batch_size=1, num_workers=0, jitter=False)
    torch.manual_seed(1)
    model = SSD300(4)
    # Run in double precision: with random weights, the choice of the hardest negatives depends on the last digit, and
    # it changes the gradient. Run without jitter, which test_augment.py covers.
    baseline_model = make_baseline(model).double().train()
    optimized = model.double().to(memory_format=torch.channels_last).train()
    optimized_loss = train.make_loss(CPU, compiled=False)
    optimized_sgd = optim.build_optimizer(optimized, backend="torch", momentum=0.9, weight_decay=5e-4)
    baseline_sgd = torch.optim.SGD(baseline_model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    data = SSDTrainSource(config, DistContext(0, 1, CPU), seed=2)
    batches = (rank_batch.batch for epoch in range(1, steps) for rank_batch in data.train_batches(epoch))
    losses = []
    for step, batch in zip(range(steps), batches, strict=False):
        if step % SYNC_INTERVAL == 0:
            baseline_model.load_state_dict(make_baseline(model).state_dict())
            for sgd in (optimized_sgd, baseline_sgd):
                sgd.state.clear()
        for sgd in (optimized_sgd, baseline_sgd):
            sgd.zero_grad()
            sgd.param_groups[0]["lr"] = 3e-4 * min(1, (step + 1) / 20)
        actual = optimized_loss(lambda images: optimized(images.double()), batch).sum()
        sample = baseline_sample(batch, 0)
        pred_deltas, logits = (prediction.float() for prediction in baseline_model(sample.image[None].double()))
        expected = baseline.multibox_loss(pred_deltas, logits, sample.deltas[None], sample.labels[None]).sum()
        for loss, sgd in ((actual, optimized_sgd), (expected, baseline_sgd)):
            loss.backward()
            sgd.step()
        losses.append((float(actual.detach()), float(expected.detach())))
    actual, expected = np.array(losses).T
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    if steps == 50:
        assert expected[-10:].mean() < 0.7 * expected[:5].mean(), "the loss falls"
