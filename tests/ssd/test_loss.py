import torch
import torch.nn.functional as F

from ssd.loss import multibox_loss


def loss_by_definition(pred_deltas, logits, deltas, labels):
    """Compute the loss image by image, straight from the definition in the SSD paper."""
    losses = []
    for i in range(len(labels)):
        positive = labels[i] > 0
        count = int(positive.sum())
        if count == 0:
            losses.append(torch.zeros(()))
            continue
        box = F.smooth_l1_loss(pred_deltas[i][positive], deltas[i][positive], reduction="sum")
        entropy = F.cross_entropy(logits[i], labels[i], reduction="none")
        negatives = entropy[~positive].sort(descending=True).values[: 3 * count]
        losses.append((box + entropy[positive].sum() + negatives.sum()) / count)
    return torch.stack(losses)


def random_example(seed, batch=3, anchors=200, classes=5, positives=(4, 0, 190)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(batch, anchors, dtype=torch.int64)
    for i, count in enumerate(positives):
        labels[i, torch.randperm(anchors, generator=generator)[:count]] = torch.randint(
            1, classes, (count,), generator=generator
        )
    shapes = ((batch, anchors, 4), (batch, anchors, classes), (batch, anchors, 4))
    pred_deltas, logits, deltas = (torch.randn(shape, generator=generator) for shape in shapes)
    return pred_deltas.requires_grad_(), logits.requires_grad_(), deltas, labels


def test_loss_and_gradients_match_the_definition():
    for seed in range(5):
        pred_deltas, logits, deltas, labels = random_example(seed)
        actual = multibox_loss(pred_deltas, logits, deltas, labels).sum(dim=1)
        expected = loss_by_definition(pred_deltas, logits, deltas, labels)
        torch.testing.assert_close(actual, expected)
        gradients = torch.autograd.grad(actual.sum(), (pred_deltas, logits), retain_graph=True)
        expected_gradients = torch.autograd.grad(expected.sum(), (pred_deltas, logits))
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient)


def test_image_without_positives_has_zero_loss_and_gradient():
    pred_deltas, logits, deltas, labels = random_example(0, positives=(0, 0, 0))
    loss = multibox_loss(pred_deltas, logits, deltas, labels)
    assert torch.equal(loss, torch.zeros(3, 2))
    loss.sum().backward()
    assert not pred_deltas.grad.any()
    assert not logits.grad.any()


def test_image_without_positives_trains_on_its_three_hardest_negatives_if_asked():
    pred_deltas, logits, deltas, labels = random_example(0, positives=(0, 4, 0))
    loss = multibox_loss(pred_deltas, logits, deltas, labels, train_background=True)
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    hardest = entropy.sort(dim=1, descending=True).values[:, :3].sum(dim=1)
    torch.testing.assert_close(loss[::2], torch.stack([torch.zeros(2), hardest[::2]], dim=1))
    assert torch.equal(loss[1], multibox_loss(pred_deltas, logits, deltas, labels)[1])
    loss[0].sum().backward()
    assert not pred_deltas.grad.any()
    assert (logits.grad.abs().sum(dim=-1) > 0).sum(dim=1).tolist() == [3, 0, 0]


def test_only_three_negatives_per_positive_get_a_gradient():
    pred_deltas, logits, deltas, labels = random_example(1, positives=(4, 4, 4))
    multibox_loss(pred_deltas, logits, deltas, labels).sum().backward()
    has_gradient = logits.grad.abs().sum(dim=-1) > 0
    assert has_gradient.sum(dim=1).tolist() == [16, 16, 16]


def test_loss_of_half_precision_predictions_is_float32():
    pred_deltas, logits, deltas, labels = random_example(2)
    loss = multibox_loss(pred_deltas.bfloat16(), logits.bfloat16(), deltas, labels)
    assert loss.dtype == torch.float32
