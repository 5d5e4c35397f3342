from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.data import image_io
from detection.data.device_resize import (
    MIN_TAPS,
    BatchCrops,
    bilinear_taps,
    flip_taps,
    get_resampler,
    resample,
    stack_taps,
)


def random_crops(rng, count, max_px):
    """Return noise images (3, H, W) with one crop each: left, top, width, height."""
    crops = []
    for height, width in rng.integers(1, max_px, (count, 2)).tolist():
        left, top = int(rng.integers(width)), int(rng.integers(height))
        box = left, top, int(rng.integers(width - left)) + 1, int(rng.integers(height - top)) + 1
        pixels = torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        crops.append((pixels.permute(2, 0, 1), box))
    return crops


def resample_arguments(images, sizes_hw, flips, height, width):
    """Return the arguments of `resample` for crops of images, padded to (height, width)."""
    flat = [image.permute(1, 2, 0).reshape(-1) for image, _ in images]
    offsets = torch.tensor([0, *(len(pixels) for pixels in flat[:-1])]).cumsum(0)
    boxes = [box for _, box in images]
    columns = [bilinear_taps(w, size[1], start=left) for (left, _, w, _), size in zip(boxes, sizes_hw, strict=True)]
    columns = [flip_taps(taps) if flip else taps for taps, flip in zip(columns, flips, strict=True)]
    rows = [bilinear_taps(h, size[0]) for (_, _, _, h), size in zip(boxes, sizes_hw, strict=True)]
    crops = BatchCrops(
        torch.tensor([top for _, top, _, _ in boxes]),
        torch.arange(max(h for *_, h in boxes)),
        stack_taps(columns, width),
        stack_taps(rows, height),
    )
    return torch.cat(flat), offsets, torch.tensor([image.shape[2] for image, _ in images]), crops


def resize_one_by_one(images, sizes_hw, flips, multiple_px=1):
    """Return the batch that `image_io.resize` produces."""
    batch = []
    for (image, (left, top, width, height)), size, flip in zip(images, sizes_hw, flips, strict=True):
        resized = image_io.resize(image[:, top : top + height, left : left + width], size)
        batch.append(resized.flip(2) if flip else resized)
    return image_io.pad_to_batch(batch, multiple_px)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 4), max_px=st.sampled_from([2, 9, 80, 900]))
def test_resample_matches_resize_on_each_image(seed, count, max_px):
    rng = np.random.default_rng(seed)
    images = random_crops(rng, count, max_px)
    sizes_hw = [(40, 60)] * count
    actual = resample(*resample_arguments(images, sizes_hw, [False] * count, 40, 60))
    assert torch.equal(actual, resize_one_by_one(images, sizes_hw, [False] * count))


def test_resample_matches_resize_for_mixed_sizes_flips_and_padding():
    rng = np.random.default_rng(1)
    images = random_crops(rng, 20, 300)
    sizes_hw = [tuple(size) for size in rng.integers(1, 100, (20, 2)).tolist()]
    flips = [bool(i % 2) for i in range(20)]
    height, width = image_io.padded_hw(sizes_hw, 32)
    inputs = resample_arguments(images, sizes_hw, flips, height, width)
    expected = resize_one_by_one(images, sizes_hw, flips, multiple_px=32)
    actual = get_resampler(compiled=False)(*inputs)  # in chunks
    assert torch.equal(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.compile(resample, backend="aot_eager", dynamic=True)(*inputs), expected)


def test_taps_for_an_unchanged_size_are_the_identity():
    first, weights, shift = bilinear_taps(50, 50)
    assert (weights.sum(axis=1) == 2**shift).all()
    assert (first + weights.argmax(axis=1) == np.arange(50)).all()
    assert (weights.max(axis=1) == 2**shift).all()


@pytest.mark.parametrize(("length", "size"), [(640, 300), (64, 2000), (5000, 300), (1, 7), (7, 1)])
def test_weights_fit_in_16_bits_and_stay_inside_the_image(length, size):
    first, weights, shift = bilinear_taps(length, size)
    assert 0 <= weights.min() <= weights.max() < 2**15
    assert first.min() >= 0
    used = (first[:, None] + np.arange(weights.shape[1]))[weights > 0]
    assert used.max() < length
    np.testing.assert_allclose(weights.sum(axis=1) / 2**shift, 1, atol=weights.shape[1] / 2**shift)


def test_number_of_taps_is_the_same_for_all_coco_sizes():
    assert stack_taps([bilinear_taps(640, 300), bilinear_taps(90, 300)], 300).weights.shape == (2, 300, MIN_TAPS)
    assert stack_taps([bilinear_taps(1400, 300)], 300).weights.shape[2] == 2 * MIN_TAPS


def test_resample_compiles_once_for_any_number_of_images_and_rows(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    resample_compiled = get_resampler.__wrapped__(compiled=True)
    rng = np.random.default_rng(2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count, max_px in ((3, 40), (5, 90), (2, 20), (1, 30)):
            images = random_crops(rng, count, max_px)
            sizes_hw = [(30, 30)] * count
            actual = resample_compiled(*resample_arguments(images, sizes_hw, [False] * count, 30, 30))
            assert torch.equal(actual, resize_one_by_one(images, sizes_hw, [False] * count))
    torch._dynamo.reset()
