"""Tests of RoIAlign: both methods equal torchvision's, for any regions."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from maskrcnn import roi_align as roi_align_module
from maskrcnn.anchors import STRIDES_PX
from maskrcnn.roi_align import Rois, flatten_rois, roi_align


def make_pyramid(generator, dtype=torch.float32):
    """Return features (2, 16, h, w) of P2 to P5 for images of 256 × 384."""
    shapes = ((2, 16, 64 // 2**level, 96 // 2**level) for level in range(4))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def pool_with_gradients(levels, rois, method):
    """Return the pooled ROIs and the gradients of the levels."""
    pooled = roi_align(levels, rois, 7, strides_px=STRIDES_PX[:4], legacy=False, method=method)
    upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(3))
    return pooled.detach(), torch.autograd.grad(pooled, levels, upstream.to(pooled.dtype))


@pytest.mark.parametrize("method", ["gather", "torchvision"])
def test_roi_align_matches_torchvision(method):
    generator = torch.Generator().manual_seed(2)
    levels = make_pyramid(generator)
    corners = torch.rand(60, 2, generator=generator) * torch.tensor([390.0, 262.0]) - 10  # some cross the border
    boxes = torch.cat([corners, corners + torch.rand(60, 2, generator=generator) ** 3 * 300], dim=1)
    boxes[::20], boxes[1::20] = torch.tensor([[-50.0, -140, 430, 390], [20, -40, 330, 260]])  # of the coarse levels
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = pooler({str(i): x for i, x in enumerate(levels)}, [boxes[:30], boxes[30:]], [(256, 384)] * 2)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(expected, levels, upstream)
    actual, actual_gradients = pool_with_gradients(levels, flatten_rois(boxes.view(2, 30, 4)), method)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for gradient, other in zip(actual_gradients, gradients, strict=True):
        assert gradient.any()
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["gather", "torchvision"])
def test_roi_align_of_no_regions_is_empty(method):
    levels = make_pyramid(torch.Generator().manual_seed(2))
    pooled, gradients = pool_with_gradients(levels, Rois(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), method)
    assert pooled.shape == (0, 16, 7, 7)
    assert not any(gradient.any() for gradient in gradients)


def test_roi_align_methods_agree_in_low_precision():
    levels = make_pyramid(torch.Generator().manual_seed(2), torch.bfloat16)
    rois = flatten_rois(torch.tensor([[[0.0, 0, 383, 255], [10, 20, 40, 60]], [[380, 250, 383, 255], [0, 0, 0, 0]]]))
    gathered, torchvision_pooled = (pool_with_gradients(levels, rois, m)[0] for m in ("gather", "torchvision"))
    assert gathered.dtype == torchvision_pooled.dtype == torch.bfloat16
    torch.testing.assert_close(gathered, torchvision_pooled, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("kind", "expected"), [("cpu", "gather"), ("cuda", "torchvision"), ("vendor", "gather")])
def test_default_method_follows_the_device(kind, expected, monkeypatch):
    monkeypatch.setattr(roi_align_module, "has_own_kernel", lambda name, device: device.type in ("cpu", "cuda"))
    supported = roi_align_module.has_torchvision_kernel.__wrapped__(SimpleNamespace(type=kind))
    monkeypatch.setattr(roi_align_module, "has_torchvision_kernel", lambda _: supported)
    monkeypatch.setattr(roi_align_module, "pool_by_gathering", lambda *_: "gather")
    monkeypatch.setattr(roi_align_module, "pool_with_torchvision", lambda *_: "torchvision")
    rois = Rois(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    assert roi_align([torch.zeros(1, 1, 8, 8)], rois, 7, strides_px=(4,), legacy=False) == expected
