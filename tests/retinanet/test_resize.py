import pytest
import torch
import torch.nn.functional as F

from retinanet.resize import PIXEL_MEAN, PIXEL_STD, normalize_and_resize, resize_boxes


@pytest.mark.parametrize("size_px", [48, 200])  # smaller and larger than the images
def test_padded_batch_is_resized_like_each_image_by_torch(size_px):
    generator = torch.Generator().manual_seed(0)
    sizes_hw = torch.tensor([[97, 120], [33, 61], [1, 120]])
    batch = torch.full((3, 3, 97, 120), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    flips = torch.tensor([False, True, False])
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    expected = []
    for row, (height, width) in enumerate(sizes_hw.tolist()):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        batch[row, :, :height, :width] = image
        normalized = (image.flip(2) if flips[row] else image).float().div(255).sub(mean).div(std)
        expected.append(F.interpolate(normalized[None], (size_px, size_px), mode="bilinear", align_corners=False)[0])
    actual = normalize_and_resize(batch, sizes_hw, flips, size_px)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=5e-4)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_boxes_follow_their_image():
    boxes = torch.tensor([[[10.0, 20, 30, 60]], [[0, 0, 40, 100]]])
    sizes_hw = torch.tensor([[100, 40], [100, 40]])
    actual = resize_boxes(boxes, sizes_hw, torch.tensor([True, False]), 200)
    assert actual.tolist() == [[[50, 40, 150, 120]], [[0, 0, 200, 200]]]
