import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, sigmoid_focal_loss

from detection.data import coco
from retinanet import loss
from retinanet.anchors import make_anchors
from retinanet.config import Config
from retinanet.train_images import select_train_images

CPU = torch.device("cpu")


def random_boxes(count, size_px, generator):
    corners = torch.rand(count, 2, generator=generator) * size_px * 0.8
    return torch.cat([corners, corners + 4 + torch.rand(count, 2, generator=generator) * size_px * 0.4], dim=1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 3, 40, 70])  # of more than one chunk of boxes
def test_anchors_are_matched_as_by_torchvision(seed, count):
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.cat(make_anchors(128, 160, CPU))
    boxes = random_boxes(count, 128, generator)
    boxes[-1] = boxes[0]  # equal boxes: the first one wins
    expected = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(boxes, anchors))
    padded, valid = torch.cat([boxes, torch.zeros(3, 4)]), torch.arange(count + 3) < count
    assert torch.equal(loss.match(padded, valid, anchors), expected)


def test_all_images_at_once_are_matched_as_image_by_image():
    generator = torch.Generator().manual_seed(0)
    anchors = make_anchors(128, 160, CPU)
    boxes = torch.stack([random_boxes(40, 128, generator) for _ in range(3)])
    valid = torch.rand(3, 40, generator=generator) < 0.7
    expected = loss.match_images(boxes, valid, anchors)
    for boxes_per_chunk in (7, 100):
        assert torch.equal(loss.match(boxes, valid, torch.cat(anchors), boxes_per_chunk), expected)


@pytest.mark.parametrize("shape", [(2, 50), (3, 150)])
def test_focal_loss_does_not_depend_on_its_chunks(monkeypatch, shape):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 150, 7, generator=generator)
    labels = torch.randint(-2, 7, (3, 150), generator=generator)
    results = []
    for chunk_shape in (loss.chunk_shape, lambda _: shape):
        monkeypatch.setattr(loss, "chunk_shape", chunk_shape)
        leaf = logits.clone().requires_grad_()
        totals = loss.focal_loss(leaf, labels)
        totals.sum().backward()
        results.append((totals.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def test_an_image_without_boxes_has_only_negatives():
    anchors = torch.cat(make_anchors(128, 128, CPU))
    matched = loss.match(torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool), anchors)
    assert (matched == loss.NEGATIVE).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_focal_loss_and_its_gradient_equal_torchvisions(monkeypatch, dtype, scale):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 700)  # several chunks, the last one smaller
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(2, 150, 7, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(-2, 7, (2, 150), generator=generator)
    weights = torch.tensor([1.0, 3.0])
    actual = loss.focal_loss(logits, labels)
    (actual * weights).sum().backward()

    reference = logits.detach().double().requires_grad_()
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), 7) * (labels >= 0)[..., None]
    terms = sigmoid_focal_loss(reference, one_hot.double()) * (labels != loss.IGNORED)[..., None]
    expected = terms.sum(dim=(1, 2))
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=rtol, atol=1e-6)


def test_second_backward_through_the_focal_loss_is_an_error_not_a_wrong_gradient():
    logits = torch.randn(1, 5, 3, requires_grad=True)
    total = loss.focal_loss(logits, torch.tensor([[0, 1, -1, -2, 2]])).sum() * 2
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_loss_of_an_image_does_not_depend_on_the_others_or_on_padding():
    generator = torch.Generator().manual_seed(1)
    anchors = make_anchors(128, 128, CPU)
    sizes = [len(level) for level in anchors]
    logits, deltas = (
        torch.randn(2, sum(sizes), 3, generator=generator),
        torch.randn(2, sum(sizes), 4, generator=generator),
    )
    boxes, labels = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    boxes[0, :3], labels[0, :3] = random_boxes(3, 128, generator), torch.tensor([2, 0, 1])
    valid = torch.zeros(2, 5, dtype=torch.bool)
    valid[0, :3] = True

    def compute(rows, num_boxes):
        parts = (logits[rows].split(sizes, 1), deltas[rows].split(sizes, 1), anchors)
        return loss.retinanet_loss(*parts, boxes[rows, :num_boxes], labels[rows, :num_boxes], valid[rows, :num_boxes])

    together = compute(slice(0, 2), 5)
    torch.testing.assert_close(torch.cat([compute(slice(0, 1), 3), compute(slice(1, 2), 2)]), together)
    assert together[1, 1] == 0  # no box, no box loss
    assert together[1, 0] > 0


def test_images_without_boxes_are_dropped_if_asked(small_toy):
    train = coco.read(*coco.standard_paths(small_toy, "train"))
    assert len(select_train_images(Config(), train)) == len(train)
    dropped = select_train_images(Config(background_images="drop"), train)
    assert dropped.image_ids.tolist() == train.image_ids[train.has_boxes].tolist()
    assert len(dropped) < len(train)
