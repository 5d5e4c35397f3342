"""Comparisons of the region proposal network: anchors, targets, losses, proposals."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from detection.evaluation.conformance import (
    Comparison,
    ConformanceContext,
    compare_rows,
    max_abs_error,
    max_peak_error,
    max_rel_error,
)
from detection.nn import box_coder, matcher
from maskrcnn import rpn
from maskrcnn.anchors import RATIOS, SIZES_PX, STRIDES_PX, cell_anchors, grid_hw, make_anchors
from maskrcnn.conformance.inputs import (
    BOX_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    SCORE_TOLERANCE,
    pad_boxes,
    padded_hw,
    permutation_priority,
    reference_config,
    rpn_outputs,
)

BIG_PADDED_HW, BIG_IMAGE_HW, BIG_STEP = (800, 1344), (800, 1333), 991
PROPOSAL_TOLERANCES = {"boxes": BOX_TOLERANCE, "scores": SCORE_TOLERANCE}
BELOW, BETWEEN = -1, -2  # matches of anchors without an object


def compare_anchors(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the anchors of each level, and which of them lie inside of their image."""
    cells = [cell_anchors(size, stride, legacy=True) for size, stride in zip(SIZES_PX, STRIDES_PX, strict=True)]
    actual = torch.tensor(cells).view(-1, 4)
    yield Comparison("anchors: of a cell", max_abs_error(actual, context.vector("anchors_of_cell").cpu()), 0)
    counts = torch.tensor([len(RATIOS) * height * width for height, width in grid_hw(*padded_hw(context))])
    error = max_abs_error(counts, context.vector("anchors_level_counts").cpu())
    yield Comparison("anchors: number by level", error, 0)
    anchors = make_anchors(*padded_hw(context), context.device, legacy=True)
    yield Comparison("anchors", max_abs_error(anchors, context.vector("anchors_xyxy")), 0)
    for image, is_inside in enumerate(rpn.is_inside(anchors, context.vector("anchors_sizes_hw"))):
        expected = np.unpackbits(context.vectors[f"anchors_inside{image}"], count=len(anchors))
        yield Comparison(f"anchors: inside of image {image}", max_abs_error(is_inside.cpu(), torch.tensor(expected)), 0)

    anchors = make_anchors(*BIG_PADDED_HW, context.device, legacy=True)
    yield Comparison("anchors, big: number", abs(len(anchors) - context.scalar("anchors_big_count")), 0)
    yield Comparison("anchors, big", max_abs_error(anchors[::BIG_STEP], context.vector("anchors_big_xyxy")), 0)
    num_inside = rpn.is_inside(anchors, torch.tensor([BIG_IMAGE_HW], device=context.device)).sum()
    yield Comparison("anchors, big: inside", abs(int(num_inside) - context.scalar("anchors_big_inside_sum")), 0)


def assign_targets(
    context: ConformanceContext, gt_boxes: Tensor, valid: Tensor, sizes_hw: Tensor, *, drop_straddling: bool = True
) -> tuple[Tensor, Tensor]:
    """Match all anchors to the ground truth (B, G, 4)."""
    anchors = make_anchors(*padded_hw(context), context.device, legacy=True)
    return rpn.assign_targets(anchors, gt_boxes, valid, sizes_hw, drop_straddling=drop_straddling, legacy=True)


def compare_rpn_targets(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the labels, matches and deltas of all anchors. All cases form one padded batch."""
    cases = range(context.scalar("rpn_target_cases"))
    gt_boxes, valid = pad_boxes([context.vector(f"rpn_target{case}_truth_xyxy") for case in cases])
    sizes_hw = context.vector("anchors_sizes_hw")[[context.scalar(f"rpn_target{case}_image") for case in cases]]
    matched, labels = assign_targets(context, gt_boxes, valid, sizes_hw)
    _, all_labels = assign_targets(context, gt_boxes, valid, sizes_hw, drop_straddling=False)
    matches = torch.where(all_labels == 1, matched, torch.where(all_labels == 0, BELOW, BETWEEN))
    anchors = make_anchors(*padded_hw(context), context.device, legacy=True)
    for case in cases:
        for name, actual in (("labels", labels), ("matched", matches)):
            expected = context.vector(f"rpn_target{case}_{name}")
            yield Comparison(f"RPN targets {case}: {name}", max_abs_error(actual[case], expected), 0)
        positive = labels[case] == 1
        boxes = gt_boxes[case, matched[case, positive]]
        deltas = box_coder.encode(boxes, anchors[positive], legacy=True)
        expected = context.vector(f"rpn_target{case}_deltas")
        yield Comparison(f"RPN targets {case}: deltas", max_abs_error(deltas, expected), 1e-6)


def compare_rpn_losses(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the losses of the drawn anchors, and their gradients."""
    config, sizes_hw = reference_config(), context.vector("anchors_sizes_hw")
    anchors = make_anchors(*padded_hw(context), context.device, legacy=True)
    for case in range(context.scalar("rpn_loss_cases")):
        key, name = f"rpn_loss{case}", f"RPN loss {case}"
        gt_boxes, valid = pad_boxes([context.vector(f"{key}_truth{image}_xyxy") for image in range(len(sizes_hw))])
        matched, labels = assign_targets(context, gt_boxes, valid, sizes_hw)
        seeds = context.vectors[f"{key}_priority_seeds"].tolist()
        priority = context.as_tensor(np.stack([permutation_priority(seed, len(anchors)) for seed in seeds]))
        samples = matcher.sample_pos_neg(
            labels, priority, config.rpn_batch_size_per_image, config.rpn_positive_fraction
        )
        logits, deltas = rpn_outputs(context, context.scalar(f"{key}_seed"))
        for tensor in (*logits, *deltas):
            tensor.requires_grad_()
        losses = rpn.rpn_loss(
            *rpn.flatten_levels(logits, deltas), anchors, gt_boxes, matched, *samples, labels, legacy=True
        )
        for loss, value, part in zip(losses, context.vector(f"{key}_values"), ("objectness", "boxes"), strict=True):
            yield Comparison(f"{name}: {part}", max_rel_error(loss, value), LOSS_TOLERANCE)
        grads = torch.autograd.grad(losses, [*logits, *deltas])
        sums = torch.stack([grad.abs().sum() for grad in grads]).view(2, -1)
        error = max_rel_error(sums, context.vector(f"{key}_grad_abs"))
        yield Comparison(f"{name}: sum of |gradient|", error, GRADIENT_TOLERANCE)
        for part, grad in (("logits_p3", grads[1]), ("deltas_p4", grads[len(logits) + 2])):
            error = max_peak_error(grad, context.vector(f"{key}_grad_{part}"))
            yield Comparison(f"{name}: gradient of {part}", error, GRADIENT_TOLERANCE)
        num_drawn = torch.stack([grad.count_nonzero() for grad in grads[: len(logits)]])
        yield Comparison(f"{name}: anchors drawn", max_abs_error(num_drawn, context.vector(f"{key}_num_drawn")), 0)


def compare_proposals(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the proposals and their scores, in training and in evaluation."""
    sizes_hw = context.vector("anchors_sizes_hw")
    config = replace(reference_config(), batch_size=len(sizes_hw))
    anchors = make_anchors(*padded_hw(context), context.device, legacy=True)
    images = torch.empty(len(sizes_hw), 3, *padded_hw(context), device=context.device)
    for case in range(context.scalar("proposals_cases")):
        key = f"proposals{case}"
        scale, bias = (float(context.vectors[f"{key}_{name}"]) for name in ("delta_scale", "p2_bias"))
        outputs = rpn.flatten_levels(*rpn_outputs(context, context.scalar(f"{key}_seed"), scale, bias))
        training = bool(context.vectors[f"{key}_training"])
        proposals = rpn.generate_proposals(*outputs, anchors, images, sizes_hw, config, training=training)
        expected = {
            column: [context.vector(f"{key}_image{image}_{suffix}") for image in range(len(sizes_hw))]
            for column, suffix in (("boxes", "xyxy"), ("scores", "scores"))
        }
        yield from compare_rows(f"proposals {case}", proposal_rows(proposals), expected, PROPOSAL_TOLERANCES)


def proposal_rows(proposals: rpn.Proposals) -> dict[str, list[Tensor]]:
    """Return the boxes and scores of each image."""
    boxes, logits = (
        [rows[valid] for rows, valid in zip(part, proposals.valid, strict=True)]
        for part in (proposals.boxes_xyxy, proposals.logits)
    )
    return {"boxes": boxes, "scores": [image_logits.sigmoid() for image_logits in logits]}
