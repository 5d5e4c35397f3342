import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd import augment
from ssd.augment import BRIGHTNESS, CONTRAST, HUE, NO_JITTER, SATURATION, WHOLE_IMAGE

BOXES = np.array([[0.1, 0.2, 0.4, 0.5], [0.5, 0.5, 0.9, 0.95], [0.3, 0.3, 0.35, 0.4]], dtype=np.float32)

OPERATIONS = {
    BRIGHTNESS: tv.adjust_brightness,
    CONTRAST: tv.adjust_contrast,
    SATURATION: tv.adjust_saturation,
    HUE: tv.adjust_hue,
}


def drawn(count, seed=0, max_samples=1):
    return [augment.draw(np.random.default_rng((seed, i)), BOXES, max_samples) for i in range(count)]


def test_jitter_is_torchvisions_with_each_images_own_factors_and_order():
    draws = drawn(12)
    images = torch.rand(12, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    factors = torch.from_numpy(np.stack([draw.jitter for draw in draws]))
    order = torch.from_numpy(np.stack([draw.jitter_order for draw in draws]))
    got = augment.jitter(images.clone(), factors, order)
    for i, draw in enumerate(draws):
        wanted = images[i]
        for operation in draw.jitter_order:
            wanted = OPERATIONS[operation](wanted, float(draw.jitter[operation]))
        torch.testing.assert_close(got[i], wanted, atol=2e-5, rtol=0)


def test_accelerators_and_compiled_code_shift_the_hue_of_the_same_images(monkeypatch):
    draws = drawn(12, seed=2)
    images = torch.rand(12, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    factors = torch.from_numpy(np.stack([draw.jitter for draw in draws]))
    order = torch.from_numpy(np.stack([draw.jitter_order for draw in draws]))
    by_rows = augment.jitter(images.clone(), factors, order)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(augment.jitter(images.clone(), factors, order), by_rows, atol=1e-6, rtol=0)


def test_an_image_is_jittered_alike_alone_and_in_a_batch():
    draws = drawn(6, seed=1)
    images = torch.rand(6, 3, 8, 8)
    factors = torch.from_numpy(np.stack([draw.jitter for draw in draws]))
    order = torch.from_numpy(np.stack([draw.jitter_order for draw in draws]))
    together = augment.jitter(images.clone(), factors, order)
    for i in range(6):
        alone = augment.jitter(images[i : i + 1].clone(), factors[i : i + 1], order[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])


def test_no_jitter_changes_nothing():
    images = torch.rand(2, 3, 8, 8)
    factors = torch.from_numpy(NO_JITTER).expand(2, 4)
    got = augment.jitter(images.clone(), factors, torch.arange(4).expand(2, 4))
    torch.testing.assert_close(got, images, atol=1e-6, rtol=0)


def test_jitter_factors_fill_their_ranges_evenly():
    factors = np.stack([draw.jitter for draw in drawn(4000)]) - NO_JITTER
    for column, half_width in zip(factors.T, augment.JITTER_RANGES, strict=True):
        assert np.abs(column).max() <= half_width
        quartiles = np.quantile(column, [0.25, 0.5, 0.75]) / half_width
        np.testing.assert_allclose(quartiles, [-0.5, 0, 0.5], atol=0.06)


def test_every_order_of_the_four_operations_occurs():
    orders = {tuple(draw.jitter_order) for draw in drawn(1000)}
    assert len(orders) == 24


def test_half_of_the_images_are_mirrored_each_way_and_independently():
    flips = np.array([draw.flips for draw in drawn(4000)])
    assert flips.mean(axis=0) == pytest.approx(0.5, abs=0.03)
    assert flips.all(axis=1).mean() == pytest.approx(0.25, abs=0.03)


def test_a_flip_mirrors_pixels_and_boxes_where_it_is_asked_for():
    images = torch.arange(36, dtype=torch.float32).view(3, 1, 3, 4).expand(3, 3, 3, 4)
    boxes = torch.tensor([[[0.0, 0.125, 0.25, 0.5]]]).expand(3, 1, 4)
    flipped, mirrored = augment.flip(images, boxes, torch.tensor([[True, False], [False, False], [True, True]]))
    assert torch.equal(flipped[0], images[0].flip(-1))
    assert torch.equal(flipped[1], images[1])
    assert torch.equal(flipped[2], images[2].flip(-1, -2))
    assert mirrored.tolist() == [[[0.75, 0.125, 1.0, 0.5]], [[0.0, 0.125, 0.25, 0.5]], [[0.75, 0.5, 1.0, 0.875]]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 50]))
def test_a_crop_keeps_a_box_and_obeys_its_shape(seed, max_samples):
    crop = augment.draw_crop(np.random.default_rng(seed), BOXES, max_samples)
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


def test_a_crop_drops_boxes_whose_centre_is_outside_and_clips_the_rest():
    crop = np.array([0.0, 0.0, 0.5, 0.5], dtype=np.float32)
    boxes, labels = augment.crop_boxes(crop, BOXES, np.array([7, 8, 9]))
    assert labels.tolist() == [7, 9]
    np.testing.assert_allclose(boxes[0], [0.2, 0.4, 0.8, 1.0], atol=1e-6)


def test_the_same_generator_state_draws_the_same():
    one, other = drawn(5, seed=4), drawn(5, seed=4)
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.crop_xyxy, b.crop_xyxy)
        assert np.array_equal(a.jitter, b.jitter)
        assert np.array_equal(a.flips, b.flips)


def test_normalised_images_keep_their_memory_format():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    got = augment.normalise(augment.to_unit(images))
    assert got.is_contiguous(memory_format=torch.channels_last)
    wanted = tv.normalize(images.float() / 255, augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    torch.testing.assert_close(got, wanted)
