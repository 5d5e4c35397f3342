import torch
import torch.nn.functional as F

from ssd.loss import multibox_loss


def written_out(pred_deltas, logits, deltas, labels):
    """The loss image by image and anchor by anchor, with the ranks of the reference's double sort."""
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


def example(seed, batch=3, anchors=200, classes=5, positives=(4, 0, 190)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(batch, anchors, dtype=torch.int64)
    for i, count in enumerate(positives):
        labels[i, torch.randperm(anchors, generator=generator)[:count]] = torch.randint(
            1, classes, (count,), generator=generator
        )
    shapes = ((batch, anchors, 4), (batch, anchors, classes), (batch, anchors, 4))
    pred_deltas, logits, deltas = (torch.randn(shape, generator=generator) for shape in shapes)
    return pred_deltas.requires_grad_(), logits.requires_grad_(), deltas, labels


def test_one_sort_gives_the_loss_and_gradients_of_the_rule_written_out():
    for seed in range(5):
        pred_deltas, logits, deltas, labels = example(seed)
        got = multibox_loss(pred_deltas, logits, deltas, labels).sum(dim=1)
        wanted = written_out(pred_deltas, logits, deltas, labels)
        torch.testing.assert_close(got, wanted)
        gradients = torch.autograd.grad(got.sum(), (pred_deltas, logits), retain_graph=True)
        for gradient, other in zip(gradients, torch.autograd.grad(wanted.sum(), (pred_deltas, logits)), strict=True):
            torch.testing.assert_close(gradient, other)


def test_an_image_without_positives_has_no_loss_and_no_gradient():
    pred_deltas, logits, deltas, labels = example(0, positives=(0, 0, 0))
    loss = multibox_loss(pred_deltas, logits, deltas, labels)
    assert torch.equal(loss, torch.zeros(3, 2))
    loss.sum().backward()
    assert not pred_deltas.grad.any()
    assert not logits.grad.any()


def test_negatives_beyond_three_a_positive_are_left_alone():
    pred_deltas, logits, deltas, labels = example(1, positives=(4, 4, 4))
    multibox_loss(pred_deltas, logits, deltas, labels).sum().backward()
    touched = logits.grad.abs().sum(dim=-1) > 0
    assert touched.sum(dim=1).tolist() == [16, 16, 16]


def test_half_precision_predictions_are_compared_in_float32():
    pred_deltas, logits, deltas, labels = example(2)
    loss = multibox_loss(pred_deltas.bfloat16(), logits.bfloat16(), deltas, labels)
    assert loss.dtype == torch.float32
