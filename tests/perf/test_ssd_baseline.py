"""The plain way computes what the fast one does: else its speed would say nothing."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from detection.data import coco, image_io
from perf.ssd import baseline
from perf.ssd.predictions import EARLY, TRAINED, predict
from ssd import augment, checkpoint_names
from ssd.anchors import NUM_ANCHORS, make_anchors
from ssd.box_coder import encode
from ssd.data import crop_to_px
from ssd.loss import multibox_loss
from ssd.model import SSD300
from ssd.postprocess import detect
from tiny_ssd import TinyBackbone

ANCHORS = make_anchors()


@pytest.fixture(scope="module")
def toy_split(small_toy):
    return coco.read(*coco.standard_paths(small_toy, "train")).drop_empty_images()


def boxes_and_labels(seed, count=9):
    rng = np.random.default_rng(seed)
    lower = rng.random((count, 2)) * 0.7
    boxes = np.concatenate([lower, lower + 0.02 + 0.28 * rng.random((count, 2))], axis=1)
    return torch.from_numpy(boxes).float(), torch.from_numpy(rng.integers(1, 81, count))


def test_it_decodes_to_the_same_pixels(toy_split):
    encoded = toy_split.image_path(0).read_bytes()
    pixels = np.asarray(baseline.decode_jpeg(encoded))
    assert np.array_equal(pixels, image_io.decode(encoded).permute(1, 2, 0).numpy())


def test_the_same_crop_is_resized_to_the_same_pixels(toy_split, monkeypatch):
    crop = np.array([0.1, 0.2, 0.7, 0.9], dtype=np.float32)
    monkeypatch.setattr(baseline, "draw_crop", lambda boxes: crop)
    encoded = toy_split.image_path(0).read_bytes()
    picture, boxes, labels = baseline.Samples(toy_split).crop(0, baseline.decode_jpeg(encoded))
    image = image_io.decode(encoded)
    left, top, right, bottom = crop_to_px(crop, image.shape[1:])
    wanted = image_io.resize(image[:, top:bottom, left:right], 300).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(np.asarray(baseline.resize(picture), dtype=int) - wanted).max() <= 1
    whole = toy_split.boxes(0) / np.tile(toy_split.sizes_hw[0, ::-1], 2).astype(np.float32)
    ours = augment.crop_boxes(crop, whole, toy_split.image_labels(0))
    assert np.array_equal(boxes, ours[0])
    assert np.array_equal(labels, ours[1])


@pytest.mark.parametrize("max_samples", [1, 50])
def test_its_crops_follow_the_same_law(max_samples):
    random.seed(0)
    boxes = boxes_and_labels(1, count=3)[0].numpy()
    theirs = np.array([baseline.draw_crop(boxes, max_samples) for _ in range(1500)])
    ours = np.array([augment.sample_iou_crop(np.random.default_rng(i), boxes, max_samples) for i in range(1500)])
    deciles = np.arange(1, 10) / 10
    for column in range(4):
        apart = np.quantile(theirs[:, column], deciles) - np.quantile(ours[:, column], deciles)
        assert np.abs(apart).max() < 0.06
    whole = [np.mean((crops == augment.WHOLE_IMAGE).all(axis=1)) for crops in (theirs, ours)]
    assert whole[0] == pytest.approx(whole[1], abs=0.04)
    assert 0.1 < whole[0] < 0.9


def test_it_flips_half_of_the_pictures_with_their_boxes():
    random.seed(0)
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    boxes = np.array([[0.0, 0.1, 0.25, 0.5]], dtype=np.float32)
    flipped = 0
    for _ in range(400):
        mirrored, moved = baseline.flip(picture, boxes)
        if moved is boxes:
            assert mirrored is picture
        else:
            flipped += 1
            assert np.array_equal(np.asarray(mirrored), np.asarray(picture)[:, ::-1])
            assert moved.tolist() == [[0.75, pytest.approx(0.1), 1.0, 0.5]]
    assert 160 < flipped < 240


def test_jitter_and_normalisation_are_ours_with_the_same_factors(monkeypatch):
    pixels = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    factors, order = (1.1, 0.7, 1.4, 0.03), torch.tensor([2, 0, 3, 1])
    jitter = baseline.color_jitter.transforms[0]
    monkeypatch.setattr(jitter, "get_params", lambda *ranges: (order, *factors))
    got = baseline.color_jitter(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()))
    jittered = augment.color_jitter(augment.to_float(pixels), torch.tensor([factors]), order.unsqueeze(0))
    wanted = augment.normalize(jittered)[0]
    # Pillow rounds to 8 bits after each of the four, and turns hue in 256 steps.
    assert float((got - wanted).abs().mean()) < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_targets_are_the_same(seed):
    boxes, labels = boxes_and_labels(seed)
    boxes[3] = boxes[5]  # two boxes with one best anchor: the later one wins
    theirs = baseline.encode(boxes, labels, ANCHORS)
    ours = encode(boxes.unsqueeze(0), labels.unsqueeze(0), ANCHORS)
    assert torch.equal(theirs[1], ours[1][0])
    assert (theirs[1] > 0).any()
    torch.testing.assert_close(theirs[0], ours[0][0])


def test_a_sample_is_ready_for_the_network(toy_split):
    sample = baseline.Samples(toy_split)[1]
    assert [tuple(part.shape) for part in sample] == [(3, 300, 300), (NUM_ANCHORS, 4), (NUM_ANCHORS,)]
    assert sample.image.is_floating_point()
    assert sample.labels.any()
    evaluated = baseline.EvalSamples(toy_split)[1]
    wanted = augment.normalize(augment.to_float(image_io.resize(image_io.read(toy_split.image_path(1)), 300)[None]))[0]
    assert float((evaluated - wanted).abs().max()) < 0.02


def test_the_loss_and_its_gradients_are_the_same():
    generator = torch.Generator().manual_seed(0)
    deltas, logits = (torch.randn(2, n, NUM_ANCHORS, generator=generator) for n in (4, 81))
    targets = [encode(*(t[None] for t in boxes_and_labels(seed)), ANCHORS) for seed in (0, 1)]
    true_deltas, labels = (torch.cat(parts) for parts in zip(*targets, strict=True))
    deltas.requires_grad_()
    logits.requires_grad_()
    theirs = baseline.multibox_loss(deltas, logits, true_deltas, labels)
    ours = multibox_loss(deltas.transpose(1, 2), logits.transpose(1, 2), true_deltas, labels).sum(dim=1)
    torch.testing.assert_close(theirs, ours)
    for one, other in zip(
        torch.autograd.grad(theirs.sum(), (deltas, logits)),
        torch.autograd.grad(ours.sum(), (deltas, logits)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_network_is_the_same():
    torch.manual_seed(0)
    ours, theirs = SSD300(21).eval(), baseline.BaselineSSD300(21).eval()
    heads = {k: v for k, v in checkpoint_names.to_reference(ours.state_dict()).items() if k.startswith(("loc", "conf"))}
    trunk = {k: v for k, v in ours.state_dict().items() if not k.startswith("heads")}
    theirs.load_state_dict(trunk | heads)
    images_in = torch.randn(1, 3, 300, 300)
    with torch.inference_mode():
        for one, other in zip(theirs(images_in), ours(images_in), strict=True):
            torch.testing.assert_close(one.transpose(1, 2), other, atol=1e-4, rtol=1e-4)


def test_a_step_changes_the_weights(monkeypatch):
    monkeypatch.setattr(baseline, "Backbone", TinyBackbone)
    torch.manual_seed(0)
    step = baseline.make_step(torch.device("cpu"), 5)
    boxes, labels = boxes_and_labels(0)
    batch = baseline.Sample(torch.randn(1, 3, 300, 300), *encode(boxes[None], labels.clamp(max=4)[None], ANCHORS))
    losses = [float(step(batch)) for _ in range(2)]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_torchvisions_network_takes_a_step_on_our_batches():
    step = baseline.make_vgg_step(torch.device("cpu"), 5)
    boxes, labels = boxes_and_labels(0)
    step(torch.rand(1, 3, 300, 300), [{"boxes": 300 * boxes, "labels": labels.clamp(max=4)}])


@pytest.mark.parametrize("scores", [TRAINED, EARLY], ids=["trained", "early"])
def test_detections_are_the_same(toy_split, scores):
    deltas, logits = predict(scores, toy_split, ANCHORS, 2, seed=0)
    ours = detect(deltas, logits, ANCHORS)
    theirs = baseline.detect(deltas.transpose(1, 2), logits.transpose(1, 2), ANCHORS)
    assert len(ours.scores) > 20
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other)
