import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd import augment
from ssd.augment import BRIGHTNESS, CONTRAST, HUE, IDENTITY_JITTER, SATURATION, WHOLE_IMAGE, AugmentParams
from ssd.config import Config
from tiny_ssd import batches_equal

BOXES = np.array([[0.1, 0.2, 0.4, 0.5], [0.5, 0.5, 0.9, 0.95], [0.3, 0.3, 0.35, 0.4]], dtype=np.float32)

OPERATIONS = {
    BRIGHTNESS: tv.adjust_brightness,
    CONTRAST: tv.adjust_contrast,
    SATURATION: tv.adjust_saturation,
    HUE: tv.adjust_hue,
}
CONFIG = Config(flip="horizontal+vertical")


def sample_many(count, seed=0):
    """Return the parameters of a batch of `count` images."""
    rngs = (np.random.default_rng((seed, image)) for image in range(count))
    return AugmentParams.stack([augment.sample_augmentation(CONFIG, rng, BOXES)[1] for rng in rngs])


def test_color_jitter_matches_torchvision_with_separate_factors_and_order_per_image():
    params = sample_many(12)
    images = torch.rand(12, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    actual = augment.color_jitter(images.clone(), params.jitter, params.jitter_order)
    for i, (factors, order) in enumerate(zip(params.jitter, params.jitter_order.tolist(), strict=True)):
        expected = images[i]
        for operation in order:
            expected = OPERATIONS[operation](expected, float(factors[operation]))
        torch.testing.assert_close(actual[i], expected, atol=2e-5, rtol=0)


def test_batched_color_jitter_matches_the_jitter_of_single_images(monkeypatch):
    images = torch.rand(12, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    _, factors, order = sample_many(12, seed=2)
    single = augment.color_jitter(images.clone(), factors, order)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(augment.color_jitter(images.clone(), factors, order), single, atol=1e-6, rtol=0)


def test_color_jitter_of_an_image_does_not_depend_on_its_batch():
    _, factors, order = sample_many(6, seed=1)
    images = torch.rand(6, 3, 8, 8)
    batched = augment.color_jitter(images.clone(), factors, order)
    for i in range(6):
        single = augment.color_jitter(images[i : i + 1].clone(), factors[i : i + 1], order[i : i + 1])
        torch.testing.assert_close(single[0], batched[i])


def test_identity_jitter_changes_nothing():
    images = torch.rand(2, 3, 8, 8)
    factors = torch.from_numpy(IDENTITY_JITTER).expand(2, 4)
    actual = augment.color_jitter(images.clone(), factors, torch.arange(4).expand(2, 4))
    torch.testing.assert_close(actual, images, atol=1e-6, rtol=0)


def test_jitter_factors_are_uniform_in_their_ranges():
    factors = sample_many(4000).jitter.numpy() - IDENTITY_JITTER
    for column, half_width in zip(factors.T, augment.JITTER_RANGES, strict=True):
        assert np.abs(column).max() <= half_width
        quartiles = np.quantile(column, [0.25, 0.5, 0.75]) / half_width
        np.testing.assert_allclose(quartiles, [-0.5, 0, 0.5], atol=0.06)


def test_every_order_of_the_four_operations_occurs():
    orders = set(map(tuple, sample_many(1000).jitter_order.tolist()))
    assert len(orders) == 24


def test_horizontal_and_vertical_flips_are_independent_with_probability_one_half():
    flips = sample_many(4000).flips.numpy()
    assert flips.mean(axis=0) == pytest.approx(0.5, abs=0.03)
    assert flips.all(axis=1).mean() == pytest.approx(0.25, abs=0.03)


def test_flip_mirrors_pixels_and_boxes_of_selected_images():
    images = torch.arange(36, dtype=torch.float32).view(3, 1, 3, 4).expand(3, 3, 3, 4)
    boxes = torch.tensor([[[0.0, 0.125, 0.25, 0.5]]]).expand(3, 1, 4)
    flipped, flipped_boxes = augment.flip(images, boxes, torch.tensor([[True, False], [False, False], [True, True]]))
    assert torch.equal(flipped[0], images[0].flip(-1))
    assert torch.equal(flipped[1], images[1])
    assert torch.equal(flipped[2], images[2].flip(-1, -2))
    assert flipped_boxes.tolist() == [[[0.75, 0.125, 1.0, 0.5]], [[0.0, 0.125, 0.25, 0.5]], [[0.75, 0.5, 1.0, 0.875]]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 50]))
def test_iou_crop_keeps_a_box_and_respects_size_and_aspect_limits(seed, max_samples):
    crop = augment.sample_iou_crop(np.random.default_rng(seed), BOXES, max_samples)
    left, top, right, bottom = crop
    assert 0 <= left < right <= 1 + 1e-6
    assert 0 <= top < bottom <= 1 + 1e-6
    boxes, labels = augment.crop_boxes(crop, BOXES, np.array([1, 2, 3]))
    assert len(boxes) == len(labels) >= 1
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    if crop is not WHOLE_IMAGE:
        assert 0.3 <= right - left <= 1
        assert 0.5 - 1e-4 <= (right - left) / (bottom - top) <= 2 + 1e-4


def test_crop_drops_boxes_with_center_outside_and_clips_the_rest():
    crop = np.array([0.0, 0.0, 0.5, 0.5], dtype=np.float32)
    boxes, labels = augment.crop_boxes(crop, BOXES, np.array([7, 8, 9]))
    assert labels.tolist() == [7, 9]
    np.testing.assert_allclose(boxes[0], [0.2, 0.4, 0.8, 1.0], atol=1e-6)


def test_same_generator_state_gives_same_parameters():
    for seed in range(5):
        (first_crop, first), (crop, second) = (
            augment.sample_augmentation(CONFIG, np.random.default_rng((4, seed)), BOXES) for _ in range(2)
        )
        assert np.array_equal(first_crop, crop)
        assert batches_equal(first, second)


def test_settings_turn_augmentations_off_without_changing_the_others():
    """Each operation draws its numbers in any case."""
    plain = CONFIG, Config(crop=False), Config(flip="none"), Config(jitter=False)
    (crop, params), (whole, _), (_, unflipped), (_, unjittered) = (
        augment.sample_augmentation(config, np.random.default_rng(6), BOXES) for config in plain
    )
    assert crop is not WHOLE_IMAGE
    assert whole is WHOLE_IMAGE
    assert unflipped.flips.tolist() == []
    assert torch.equal(unflipped.jitter, params.jitter)
    assert np.array_equal(unjittered.jitter, IDENTITY_JITTER)
    for without in (unflipped, unjittered):
        assert torch.equal(without.jitter_order, params.jitter_order)


def test_normalize_keeps_the_memory_format():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    actual = augment.normalize(augment.to_float(images))
    assert actual.is_contiguous(memory_format=torch.channels_last)
    expected = tv.normalize(images.float() / 255, augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    torch.testing.assert_close(actual, expected)
