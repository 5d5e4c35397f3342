from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.data import image_io
from detection.data.device_resize import MIN_TAPS, Cuts, mirrored, resample, resampler, side_of, taps


def drawn(rng, count, most_px):
    """Images (3, H, W) of noise, and a part of each: left, top, width, height."""
    found = []
    for height, width in rng.integers(1, most_px, (count, 2)).tolist():
        left, top = int(rng.integers(width)), int(rng.integers(height))
        part = left, top, int(rng.integers(width - left)) + 1, int(rng.integers(height - top)) + 1
        pixels = torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found.append((pixels.permute(2, 0, 1), part))
    return found


def arguments(found, sizes_hw, mirrors, height, width):
    """What `resample` takes of images and parts, laid out on (height, width)."""
    flat = [image.permute(1, 2, 0).reshape(-1) for image, _ in found]
    starts = torch.tensor([0, *(len(one) for one in flat[:-1])]).cumsum(0)
    parts = [part for _, part in found]
    across = [taps(w, size[1], start=left) for (left, _, w, _), size in zip(parts, sizes_hw, strict=True)]
    across = [mirrored(one) if mirror else one for one, mirror in zip(across, mirrors, strict=True)]
    down = [taps(h, size[0]) for (_, _, _, h), size in zip(parts, sizes_hw, strict=True)]
    cuts = Cuts(
        torch.tensor([top for _, top, _, _ in parts]),
        torch.arange(max(h for *_, h in parts)),
        side_of(across, width),
        side_of(down, height),
    )
    return torch.cat(flat), starts, torch.tensor([image.shape[2] for image, _ in found]), cuts


def one_by_one(found, sizes_hw, mirrors, multiple_px=1):
    """The same by images.resize."""
    made = []
    for (image, (left, top, width, height)), size, mirror in zip(found, sizes_hw, mirrors, strict=True):
        resized = image_io.resize(image[:, top : top + height, left : left + width], size)
        made.append(resized.flip(2) if mirror else resized)
    return image_io.lay_out(made, multiple_px)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 4), most_px=st.sampled_from([2, 9, 80, 900]))
def test_it_makes_the_bytes_that_resizing_one_by_one_makes(seed, count, most_px):
    rng = np.random.default_rng(seed)
    found = drawn(rng, count, most_px)
    sizes_hw = [(40, 60)] * count
    made = resample(*arguments(found, sizes_hw, [False] * count, 40, 60))
    assert torch.equal(made, one_by_one(found, sizes_hw, [False] * count))


def test_the_same_for_images_of_several_sizes_and_mirrored_ones_with_zeros_around_them():
    rng = np.random.default_rng(1)
    found = drawn(rng, 20, 300)
    sizes_hw = [tuple(size) for size in rng.integers(1, 100, (20, 2)).tolist()]
    mirrors = [bool(i % 2) for i in range(20)]
    height, width = image_io.common_hw(sizes_hw, 32)
    given = arguments(found, sizes_hw, mirrors, height, width)
    wanted = one_by_one(found, sizes_hw, mirrors, multiple_px=32)
    made = resampler(compiled=False)(*given)  # a few at once
    assert torch.equal(made, wanted)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.compile(resample, backend="aot_eager", dynamic=True)(*given), wanted)


def test_a_size_that_stays_changes_nothing():
    first, weights, shift = taps(50, 50)
    assert (weights.sum(axis=1) == 2**shift).all()
    assert (first + weights.argmax(axis=1) == np.arange(50)).all()
    assert (weights.max(axis=1) == 2**shift).all()


@pytest.mark.parametrize(("length", "size"), [(640, 300), (64, 2000), (5000, 300), (1, 7), (7, 1)])
def test_weights_fit_in_16_bits_and_stay_in_the_image(length, size):
    first, weights, shift = taps(length, size)
    assert 0 <= weights.min() <= weights.max() < 2**15
    assert first.min() >= 0
    reached = (first[:, None] + np.arange(weights.shape[1]))[weights > 0]
    assert reached.max() < length
    np.testing.assert_allclose(weights.sum(axis=1) / 2**shift, 1, atol=weights.shape[1] / 2**shift)


def test_there_are_as_many_taps_for_all_that_coco_has():
    assert side_of([taps(640, 300), taps(90, 300)], 300).weights.shape == (2, 300, MIN_TAPS)
    assert side_of([taps(1400, 300)], 300).weights.shape[2] == 2 * MIN_TAPS


def test_it_is_compiled_once_for_any_number_of_images_and_rows(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    make = resampler.__wrapped__(compiled=True)
    rng = np.random.default_rng(2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count, most_px in ((3, 40), (5, 90), (2, 20), (1, 30)):
            found = drawn(rng, count, most_px)
            sizes_hw = [(30, 30)] * count
            made = make(*arguments(found, sizes_hw, [False] * count, 30, 30))
            assert torch.equal(made, one_by_one(found, sizes_hw, [False] * count))
    torch._dynamo.reset()
