"""The baseline of SSD300 computes the same as ssd/, so that the ratio of their times is that of speed alone."""

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


def test_decoded_pixels_are_the_same(toy_split):
    encoded = toy_split.image_path(0).read_bytes()
    pixels = np.asarray(baseline.decode_jpeg(encoded))
    assert np.array_equal(pixels, image_io.decode(encoded).permute(1, 2, 0).numpy())


def test_crop_and_resize_give_the_same_pixels(toy_split, monkeypatch):
    crop = np.array([0.1, 0.2, 0.7, 0.9], dtype=np.float32)
    monkeypatch.setattr(baseline, "sample_crop", lambda boxes: crop)
    encoded = toy_split.image_path(0).read_bytes()
    cropped, boxes, labels = baseline.Samples(toy_split).crop(0, baseline.decode_jpeg(encoded))
    image = image_io.decode(encoded)
    left, top, right, bottom = crop_to_px(crop, image.shape[1:])
    expected = image_io.resize(image[:, top:bottom, left:right], 300).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(np.asarray(baseline.resize(cropped), dtype=int) - expected).max() <= 1
    normalized = toy_split.boxes(0) / np.tile(toy_split.sizes_hw[0, ::-1], 2).astype(np.float32)
    expected_boxes, expected_labels = augment.crop_boxes(crop, normalized, toy_split.image_labels(0))
    assert np.array_equal(boxes, expected_boxes)
    assert np.array_equal(labels, expected_labels)


@pytest.mark.parametrize("max_samples", [1, 50])
def test_crops_have_the_same_distribution(max_samples):
    random.seed(0)
    boxes = boxes_and_labels(1, count=3)[0].numpy()
    actual = np.array([baseline.sample_crop(boxes, max_samples) for _ in range(1500)])
    expected = np.array([augment.sample_iou_crop(np.random.default_rng(i), boxes, max_samples) for i in range(1500)])
    deciles = np.arange(1, 10) / 10
    for column in range(4):
        difference = np.quantile(actual[:, column], deciles) - np.quantile(expected[:, column], deciles)
        assert np.abs(difference).max() < 0.06
    uncropped = [np.mean((crops == augment.WHOLE_IMAGE).all(axis=1)) for crops in (actual, expected)]
    assert uncropped[0] == pytest.approx(uncropped[1], abs=0.04)
    assert 0.1 < uncropped[0] < 0.9


def test_half_of_the_images_are_flipped_with_their_boxes():
    random.seed(0)
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    boxes = np.array([[0.0, 0.1, 0.25, 0.5]], dtype=np.float32)
    num_flipped = 0
    for _ in range(400):
        new_image, new_boxes = baseline.flip(image, boxes)
        if new_boxes is boxes:
            assert new_image is image
        else:
            num_flipped += 1
            assert np.array_equal(np.asarray(new_image), np.asarray(image)[:, ::-1])
            assert new_boxes.tolist() == [[0.75, pytest.approx(0.1), 1.0, 0.5]]
    assert 160 < num_flipped < 240


def test_jitter_and_normalization_are_the_same_with_the_same_factors(monkeypatch):
    pixels = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    factors, order = (1.1, 0.7, 1.4, 0.03), torch.tensor([2, 0, 3, 1])
    jitter = baseline.color_jitter.transforms[0]
    monkeypatch.setattr(jitter, "get_params", lambda *ranges: (order, *factors))
    actual = baseline.color_jitter(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()))
    jittered = augment.color_jitter(augment.to_float(pixels), torch.tensor([factors]), order.unsqueeze(0))
    expected = augment.normalize(jittered)[0]
    # Pillow rounds to 8 bits after each of the four operations, and shifts the hue in 256 steps.
    assert float((actual - expected).abs().mean()) < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_targets_are_the_same(seed):
    boxes, labels = boxes_and_labels(seed)
    boxes[3] = boxes[5]  # two boxes with the same best anchor: the later one wins
    deltas, anchor_labels = baseline.encode(boxes, labels, ANCHORS)
    expected_deltas, expected_labels = encode(boxes.unsqueeze(0), labels.unsqueeze(0), ANCHORS)
    assert torch.equal(anchor_labels, expected_labels[0])
    assert (anchor_labels > 0).any()
    torch.testing.assert_close(deltas, expected_deltas[0])


def test_samples_have_the_shapes_and_pixels_of_network_inputs(toy_split):
    sample = baseline.Samples(toy_split)[1]
    assert [tuple(tensor.shape) for tensor in sample] == [(3, 300, 300), (NUM_ANCHORS, 4), (NUM_ANCHORS,)]
    assert sample.image.is_floating_point()
    assert sample.labels.any()
    pixels = image_io.resize(image_io.read(toy_split.image_path(1)), 300)[None]
    expected = augment.normalize(augment.to_float(pixels))[0]
    assert float((baseline.EvalSamples(toy_split)[1] - expected).abs().max()) < 0.02


def test_the_loss_and_its_gradients_are_the_same():
    generator = torch.Generator().manual_seed(0)
    deltas, logits = (torch.randn(2, n, NUM_ANCHORS, generator=generator) for n in (4, 81))
    targets = [encode(*(t[None] for t in boxes_and_labels(seed)), ANCHORS) for seed in (0, 1)]
    target_deltas, labels = (torch.cat(tensors) for tensors in zip(*targets, strict=True))
    deltas.requires_grad_()
    logits.requires_grad_()
    actual = baseline.multibox_loss(deltas, logits, target_deltas, labels)
    expected = multibox_loss(deltas.transpose(1, 2), logits.transpose(1, 2), target_deltas, labels).sum(dim=1)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(loss.sum(), (deltas, logits)) for loss in (actual, expected)]
    for actual_gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(actual_gradient, expected_gradient)


def test_the_network_is_the_same():
    torch.manual_seed(0)
    model, baseline_model = SSD300(21).eval(), baseline.BaselineSSD300(21).eval()
    reference_weights = checkpoint_names.to_reference(model.state_dict())
    heads = {k: v for k, v in reference_weights.items() if k.startswith(("loc", "conf"))}
    baseline_model.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("heads")} | heads)
    images = torch.randn(1, 3, 300, 300)
    with torch.inference_mode():
        for actual, expected in zip(baseline_model(images), model(images), strict=True):
            torch.testing.assert_close(actual.transpose(1, 2), expected, atol=1e-4, rtol=1e-4)


def test_a_step_updates_the_weights(monkeypatch):
    monkeypatch.setattr(baseline, "Backbone", TinyBackbone)
    torch.manual_seed(0)
    step = baseline.make_step(torch.device("cpu"), 5)
    boxes, labels = boxes_and_labels(0)
    batch = baseline.Sample(torch.randn(1, 3, 300, 300), *encode(boxes[None], labels.clamp(max=4)[None], ANCHORS))
    losses = [float(step(batch)) for _ in range(2)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("scores", [TRAINED, EARLY], ids=["trained", "early"])
def test_detections_are_the_same(toy_split, scores):
    deltas, logits = predict(scores, toy_split, ANCHORS, 2, seed=0)
    expected = detect(deltas, logits, ANCHORS)
    actual = baseline.detect(deltas.transpose(1, 2), logits.transpose(1, 2), ANCHORS)
    assert len(expected.scores) > 20
    for actual_column, expected_column in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_column, expected_column)
