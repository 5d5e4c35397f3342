"""The fast path trains like the plain one: the losses of 3 deterministic steps, and of 50 where slow tests run.

A difference in the last digit grows by half with each step, and is another choice of hard negatives in the end. So the
50 are ten times five, each from the weights that the fast path has then.
"""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from detection.engine import optim
from detection.runtime.distributed import Ranks
from perf.ssd import baseline
from ssd import augment, checkpoint_names, train
from ssd.anchors import make_anchors
from ssd.config import Config
from ssd.data import SSDData
from ssd.model import SSD300

CPU = torch.device("cpu")
STRETCH = 5


def plain_network(model: SSD300) -> baseline.PlainSSD300:
    """The plain network with the weights of the fast one, whose fused heads are two each."""
    plain = baseline.PlainSSD300(model.num_classes).to(next(model.parameters()).dtype)
    state = model.state_dict()
    heads = {name: t for name, t in checkpoint_names.to_reference(state).items() if name.startswith(("loc", "conf"))}
    plain.load_state_dict({name: t for name, t in state.items() if not name.startswith("heads")} | heads)
    return plain


def plain_sample(batch, row: int) -> baseline.Sample:
    """One image of a batch, made ready on its own: mirrored, normalised, encoded box by box."""
    image = batch.images[row].float() / 255
    boxes = batch.boxes_xyxy[row][batch.labels[row] > 0].clone()
    if batch.flips[row, 0]:
        image = image.flip(-1)
        boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
    image = tv.normalize(image, augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    return baseline.Sample(image, *baseline.encode(boxes, batch.labels[row][batch.labels[row] > 0], make_anchors(CPU)))


@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_the_fast_path_has_the_losses_of_the_plain_one(tiny_toy, steps):
    config = Config(data_dir=tiny_toy, dataset="toy", num_classes=4, batch_size=1, num_workers=0, jitter=False)
    torch.manual_seed(1)
    model = SSD300(4)
    # In double precision and without jitter, which test_augment.py holds: which negatives are the hardest of a network
    # of random weights is a matter of the last digit, and another choice is another gradient.
    plain = plain_network(model).double().train()
    fast = model.double().to(memory_format=torch.channels_last).train()
    fast_loss = train.make_loss(CPU, compiled=False)
    fast_sgd = optim.make_sgd(fast, kernels="torch", momentum=0.9, weight_decay=5e-4)
    plain_sgd = torch.optim.SGD(plain.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    data = SSDData(config, Ranks(0, 1, CPU), seed=2)
    batches = (share.batch for epoch in range(1, steps) for share in data.shares(epoch))
    losses = []
    for step, batch in zip(range(steps), batches, strict=False):
        if step % STRETCH == 0:
            plain.load_state_dict(plain_network(model).state_dict())
            for sgd in (fast_sgd, plain_sgd):
                sgd.state.clear()
        for sgd in (fast_sgd, plain_sgd):
            sgd.zero_grad()
            sgd.param_groups[0]["lr"] = 3e-4 * min(1, (step + 1) / 20)
        ours = fast_loss(lambda images: fast(images.double()), batch).sum()
        sample = plain_sample(batch, 0)
        pred_deltas, logits = (prediction.float() for prediction in plain(sample.image[None].double()))
        theirs = baseline.multibox_loss(pred_deltas, logits, sample.deltas[None], sample.labels[None]).sum()
        for loss, sgd in ((ours, fast_sgd), (theirs, plain_sgd)):
            loss.backward()
            sgd.step()
        losses.append((float(ours.detach()), float(theirs.detach())))
    ours, theirs = np.array(losses).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    if steps == 50:
        assert theirs[-10:].mean() < 0.7 * theirs[:5].mean(), "it learns"
