"""Comparisons of the ROI heads: targets, sampling, losses, RoIAlign, masks, detections."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from detection.data.loader import pad
from detection.data.rle import decode_mask
from detection.evaluation.conformance import (
    Comparison,
    ConformanceContext,
    compare_rows,
    max_abs_error,
    max_peak_error,
    max_rel_error,
)
from detection.nn import box_coder, matcher
from maskrcnn import evaluator, loss, masks
from maskrcnn.conformance.inputs import (
    BOX_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    SCORE_TOLERANCE,
    coco_content,
    pad_boxes,
    padded_hw,
    permutation_priority,
    read_polygons,
    reference_config,
    write_split,
)
from maskrcnn.data import pad_vertices
from maskrcnn.model import POOLED_STRIDES_PX
from maskrcnn.postprocess import select_detections
from maskrcnn.roi_align import Rois, assign_levels, roi_align
from maskrcnn.rpn import Proposals

RPN, BOX_HEAD = 0, 1  # in `sampling_counts`
ROI_ALIGN_TOLERANCE = 5e-5  # of features with a standard deviation of 1
ROI_ALIGN_CHANNEL_STEPS = {7: 2, 14: 4}  # by cells per side
DETECTION_TOLERANCES = {"boxes": BOX_TOLERANCE, "scores": SCORE_TOLERANCE, "labels": 0.0}


def box_target_images(context: ConformanceContext, case: int) -> range:
    """Return the images of a case of box targets."""
    return range(len(context.vectors[f"box_target{case}_priority_seeds"]))


def box_target_gt(context: ConformanceContext, case: int) -> tuple[Tensor, Tensor]:
    """Return the ground truth of a case of box targets: boxes (B, G, 4) and labels (B, G)."""
    keys = [f"box_target{case}_image{image}_truth" for image in box_target_images(context, case)]
    boxes, _ = pad_boxes([context.vector(f"{key}_xyxy") for key in keys])
    labels, _ = pad_boxes([context.vector(f"{key}_labels") for key in keys])
    return boxes, labels


def compare_box_targets(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the labels, matches and deltas of all proposals, and the ROIs drawn from them."""
    config = reference_config()
    for case in range(context.scalar("box_target_cases")):
        images = box_target_images(context, case)
        gt_boxes, gt_labels = box_target_gt(context, case)
        num_gt = (gt_labels > 0).sum(dim=1).tolist()
        candidates = [context.vector(f"box_target{case}_image{image}_proposals_xyxy") for image in images]
        boxes, valid = pad_boxes(candidates)
        matched, match_labels = loss.match_rois(boxes, valid, gt_boxes, gt_labels, legacy=True)
        for image, image_boxes in enumerate(candidates):
            key, name = f"box_target{case}_image{image}", f"box targets {case}, image {image}"
            positive = match_labels[image, : len(image_boxes)] == 1
            index = matched[image, : len(image_boxes)]
            labels = gt_labels[image, index] * positive
            yield Comparison(f"{name}: labels", max_abs_error(labels, context.vector(f"{key}_labels")), 0)
            matches = index.masked_fill(~positive, -1)
            yield Comparison(f"{name}: matched", max_abs_error(matches, context.vector(f"{key}_matched")), 0)
            deltas = box_coder.encode(
                gt_boxes[image, index[positive]], image_boxes[positive], box_coder.BOX_HEAD_WEIGHTS, legacy=True
            )
            yield Comparison(f"{name}: deltas", max_abs_error(deltas, context.vector(f"{key}_deltas")), 1e-5)

        boxes, valid = pad_boxes([rows[:-count] for rows, count in zip(candidates, num_gt, strict=True)])
        proposals = Proposals(boxes, torch.zeros_like(boxes[..., 0]), valid)
        seeds = context.vectors[f"box_target{case}_priority_seeds"].tolist()
        priority = roi_priority(context, seeds, proposals, gt_labels)
        rois, _, labels = loss.sample_rois(proposals, gt_boxes, gt_labels, priority, config)
        yield from match_drawn_rows(context, f"box_target{case}", f"box targets {case}, drawn", rois, labels)


def roi_priority(context: ConformanceContext, seeds: list[int], proposals: Proposals, gt_labels: Tensor) -> Tensor:
    """Return the priorities (B, P + G) of the candidates of each image: its proposals, then its ground truth."""
    valid = torch.cat([proposals.valid, gt_labels > 0], dim=1).cpu()
    priority = torch.ones(valid.shape, dtype=torch.float64)
    for row, is_candidate, seed in zip(priority, valid, seeds, strict=True):
        row[is_candidate] = torch.from_numpy(permutation_priority(seed, int(is_candidate.sum())))
    return priority.float().to(context.device)


def match_drawn_rows(
    context: ConformanceContext, key: str, name: str, rois: Rois, labels: Tensor
) -> Iterator[Comparison]:
    """Compare the drawn ROIs (R, 4) and their labels (R,) as from `loss.sample_rois`."""
    images = range(int(rois.batch_index.max()) + 1)
    is_drawn = [(rois.batch_index == image) & (labels != matcher.IGNORED) for image in images]
    actual = {
        "boxes": [rois.boxes_xyxy[mask] for mask in is_drawn],
        "labels": [labels[mask] for mask in is_drawn],
    }
    expected = {
        column: [context.vector(f"{key}_image{image}_drawn_{suffix}") for image in images]
        for column, suffix in (("boxes", "xyxy"), ("labels", "labels"))
    }
    yield from compare_rows(name, actual, expected, {"boxes": 0.0, "labels": 0.0})


def compare_box_losses(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the losses of the drawn ROIs, and their gradients."""
    config = reference_config()
    for case in range(context.scalar("box_target_cases")):
        rng = np.random.default_rng(context.scalar(f"box_loss{case}_seed"))
        gt_boxes, gt_labels = box_target_gt(context, case)
        drawn = [
            context.vector(f"box_target{case}_image{image}_drawn_xyxy") for image in box_target_images(context, case)
        ]
        boxes, valid = pad_boxes(drawn)
        matched, match_labels = loss.match_rois(boxes, valid, gt_boxes, gt_labels, legacy=True)
        labels = (gt_labels.gather(1, matched) * (match_labels == 1))[valid]
        targets = gt_boxes.gather(1, matched[..., None].expand(-1, -1, 4))[valid]
        positives = labels.nonzero()[:, 0]
        target_deltas = box_coder.encode(
            targets[positives], boxes[valid][positives], box_coder.BOX_HEAD_WEIGHTS, legacy=True
        )
        logits = context.as_tensor(2 * rng.standard_normal((len(labels), config.num_classes))).requires_grad_()
        deltas = context.as_tensor(0.7 * rng.standard_normal((len(labels), 4 * config.num_classes))).requires_grad_()
        losses = loss.box_losses(
            logits, deltas.view(*logits.shape, 4), labels, positives, target_deltas, config.box_smooth_l1_beta
        )
        key, name = f"box_loss{case}", f"box loss {case}"
        for actual, value, part in zip(losses, context.vector(f"{key}_values"), ("class", "boxes"), strict=True):
            yield Comparison(f"{name}: {part}", max_rel_error(actual, value), LOSS_TOLERANCE)
        grads = torch.autograd.grad(losses, [logits, deltas])
        sums = torch.stack([grad.abs().sum() for grad in grads])
        error = max_rel_error(sums, context.vector(f"{key}_grad_abs"))
        yield Comparison(f"{name}: sum of |gradient|", error, GRADIENT_TOLERANCE)
        for part, grad in (("logits", grads[0][::13, ::4]), ("deltas", grads[1][::13])):
            error = max_peak_error(grad, context.vector(f"{key}_grad_{part}"))
            yield Comparison(f"{name}: gradient of {part}", error, GRADIENT_TOLERANCE)


def compare_sampling(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare how many positives and negatives are drawn of those that there are."""
    config = reference_config()
    limits = {
        RPN: (config.rpn_batch_size_per_image, config.rpn_positive_fraction),
        BOX_HEAD: (config.box_batch_size_per_image, config.box_positive_fraction),
    }
    rows = context.vectors["sampling_counts"].tolist()
    drawn = []
    for sampler, num_positives, num_negatives, *_ in rows:
        match_labels = (
            torch.cat([torch.ones(num_positives), torch.zeros(num_negatives)]).long()[None].to(context.device)
        )
        priority = matcher.hash_uniform(match_labels.new_zeros(1), match_labels.shape[1])
        sampled, is_sampled = matcher.sample_pos_neg(match_labels, priority, *limits[sampler])
        labels = match_labels.gather(1, sampled)[is_sampled]
        drawn.append([int((labels == 1).sum()), int((labels == 0).sum())])
    for sampler, name in ((RPN, "RPN"), (BOX_HEAD, "box head")):
        actual, expected = (
            torch.tensor([counts for counts, row in zip(part, rows, strict=True) if row[0] == sampler])
            for part in (drawn, [row[3:] for row in rows])
        )
        yield Comparison(f"sampling: {name}", max_abs_error(actual, expected), 0)


def compare_roi_align(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare RoIAlign and its gradients, and the level of each ROI."""
    batch, channels_step = len(context.vectors["anchors_sizes_hw"]), 4
    for case in range(context.scalar("roi_align_cases")):
        key, name = f"roi_align{case}", f"RoIAlign {case}"
        rng = np.random.default_rng(context.scalar(f"{key}_features_seed"))
        features = [
            context.as_tensor(rng.standard_normal((batch, context.scalar(f"{key}_channels"), *cells))).requires_grad_()
            for cells in [[side // stride for side in padded_hw(context)] for stride in POOLED_STRIDES_PX]
        ]
        rois = Rois(context.vector(f"{key}_xyxy"), context.vector(f"{key}_image"))
        levels = assign_levels(rois.boxes_xyxy, len(features), legacy=True)[:-1]
        yield Comparison(f"{name}: level", max_abs_error(levels, context.vector(f"{key}_level")), 0)
        cells = context.scalar(f"{key}_cells")
        pooled = roi_align(features, rois, cells, strides_px=POOLED_STRIDES_PX, legacy=True)
        error = max_abs_error(pooled[:, :: ROI_ALIGN_CHANNEL_STEPS[cells]], context.vector(f"{key}_out"))
        yield Comparison(f"{name}: output", error, ROI_ALIGN_TOLERANCE)
        weights = np.random.default_rng(context.scalar(f"{key}_grad_seed")).standard_normal(pooled.shape)
        grads = torch.autograd.grad((pooled * context.as_tensor(weights)).sum(), features)
        for level, grad in enumerate(grads, start=2):
            step = 2 if level == 2 else 1
            expected = context.vector(f"{key}_grad_p{level}")
            error = max_abs_error(grad[:, ::channels_step, ::step, ::step], expected)
            yield Comparison(f"{name}: gradient of P{level}", error, ROI_ALIGN_TOLERANCE)


def load_vertices(context: ConformanceContext, key: str) -> Tensor:
    """Read polygons as the training data set does: (G, V, 3), as for `masks.rasterize_polygons`."""
    polygons = read_polygons(context, key)
    height, width = context.vectors[f"{key}_size_hw"].tolist()
    boxes = np.tile(np.array([0, 0, width - 1, height - 1], np.float32), (len(polygons), 1))
    with TemporaryDirectory() as folder:
        split = write_split(Path(folder), coco_content([(height, width)], [boxes], [polygons]))
    return pad_vertices([masks.mask_vertices(split, 0)])[0].to(context.device)


def unpack_masks(context: ConformanceContext, key: str) -> Tensor:
    """Return the masks (R, 28, 28) of packed bits."""
    bits = np.unpackbits(context.vectors[key], axis=1)
    return torch.from_numpy(bits).view(-1, masks.MASK_SIZE, masks.MASK_SIZE).to(context.device)


def compare_mask_targets(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the bits of the mask of each ROI, by kind of polygon."""
    index = context.vector("mask_target_object")
    vertices, rois = load_vertices(context, "mask_target")[index], context.vector("mask_target_xyxy")
    differs = masks.rasterize_polygons(vertices, rois) != unpack_masks(context, "mask_target_bits")
    kinds = context.vectors["mask_target_kinds"][context.vectors["mask_target_object"]]
    for kind in dict.fromkeys(kinds.tolist()):
        error = float(differs.float()[torch.from_numpy(kinds == kind)].mean())
        yield Comparison(f"mask targets: {kind}", error, 0)


def compare_mask_losses(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the labels and masks of ROIs, the loss, and its gradient."""
    config = reference_config()
    gt_boxes, gt_labels = context.vector("mask_loss_truth_xyxy")[None], context.vector("mask_loss_truth_labels")[None]
    rois = context.vector("mask_loss_xyxy")
    valid = torch.ones_like(rois[None, :, 0], dtype=torch.bool)
    matched, match_labels = loss.match_rois(rois[None], valid, gt_boxes, gt_labels, legacy=True)
    labels = gt_labels[0, matched[0]] * (match_labels[0] == 1)
    yield Comparison("mask loss: labels", max_abs_error(labels, context.vector("mask_loss_labels")), 0)
    targets = masks.rasterize_polygons(load_vertices(context, "mask_loss")[matched[0]], rois)
    error = float((targets != unpack_masks(context, "mask_loss_bits")).float().mean())
    yield Comparison("mask loss: bits", error, 0)
    rng = np.random.default_rng(context.scalar("mask_loss_seed"))
    all_logits = context.as_tensor(rng.standard_normal((len(rois), config.num_classes, *targets.shape[1:])))
    logits = all_logits[torch.arange(len(rois), device=context.device), labels].requires_grad_()
    value = loss.mask_loss(logits, targets)
    yield Comparison("mask loss", max_rel_error(value, context.vector("mask_loss_value")), LOSS_TOLERANCE)
    (grad,) = torch.autograd.grad(value, logits)
    error = max_rel_error(grad.abs().sum(), context.vector("mask_loss_grad_abs"))
    yield Comparison("mask loss: sum of |gradient|", error, GRADIENT_TOLERANCE)
    error = max_peak_error(grad[::5], context.vector("mask_loss_grad"))
    yield Comparison("mask loss: gradient", error, GRADIENT_TOLERANCE)


def compare_detections(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the detections of box-head outputs: decoding, score threshold, NMS by class, the best 100."""
    config, sizes_hw = reference_config(), context.vector("anchors_sizes_hw")
    for case in range(context.scalar("detections_cases")):
        key, logits, deltas = f"detections{case}", [], []
        hot, scale = context.scalar(f"{key}_hot"), float(context.vectors[f"{key}_delta_scale"])
        proposals = [context.vector(f"{key}_image{image}_proposals_xyxy") for image in range(len(sizes_hw))]
        for boxes, seed in zip(proposals, context.vectors[f"{key}_seeds"].tolist(), strict=True):
            rng, count = np.random.default_rng(seed), len(boxes)
            rng.uniform(size=4 * count)  # drew the stored proposals
            image_logits = rng.standard_normal((count, config.num_classes)).astype(np.float32)
            deltas.append(context.as_tensor(scale * 0.8 * rng.standard_normal((count, 4 * config.num_classes))))
            rows, classes = rng.integers(0, count, hot), rng.integers(1, config.num_classes, hot)
            image_logits[rows, classes] += rng.uniform(3, 9, hot)
            logits.append(torch.from_numpy(image_logits).to(context.device))
        boxes, valid = pad_boxes(proposals)
        padded = Proposals(boxes, torch.zeros_like(boxes[..., 0]), valid)
        detections = select_detections(pad(logits), pad(deltas).unflatten(2, (-1, 4)), padded, sizes_hw, config)
        yield from match_detection_rows(context, f"detections {case}", key, *detections)


def match_detection_rows(
    context: ConformanceContext, name: str, key: str, boxes_xyxy: Tensor, scores: Tensor, labels: Tensor
) -> Iterator[Comparison]:
    """Compare the detections of each image as sets."""
    actual = {"boxes": boxes_xyxy, "scores": scores, "labels": labels}
    yield from compare_rows(
        name,
        {
            column: [image_rows[valid] for image_rows, valid in zip(rows, labels > 0, strict=True)]
            for column, rows in actual.items()
        },
        {
            column: [context.vector(f"{key}_image{image}_{suffix}") for image in range(len(labels))]
            for column, suffix in (("boxes", "xyxy"), ("scores", "scores"), ("labels", "labels"))
        },
        DETECTION_TOLERANCES,
    )


def compare_pasting(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare what COCO gets, in pixels of the original image: boxes, areas and run lengths of the masks."""
    for case in range(context.scalar("paste_cases")):
        key, name = f"paste{case}", f"pasting {case}"
        boxes, scores, labels, masks, size_hw = (
            context.vectors[f"{key}_{part}"] for part in ("xyxy", "scores", "labels", "masks", "resized_hw")
        )
        rows, results = evaluator.to_original_scale(
            boxes,
            scores,
            labels,
            masks,
            size_hw,
            np.int64(case),
            context.vectors[f"{key}_original_hw"],
            legacy=True,
        )
        error = max_abs_error(torch.from_numpy(rows[:, 1:5]), context.vector(f"{key}_xywh").cpu())
        yield Comparison(f"{name}: boxes", error, BOX_TOLERANCE)
        areas = torch.tensor([int(decode_mask(mask).sum()) for mask in results])
        yield Comparison(f"{name}: areas", max_abs_error(areas, context.vector(f"{key}_areas").cpu()), 0)
        expected = context.vectors[f"{key}_counts"].tolist()
        num_different = sum(mask["counts"] != text for mask, text in zip(results, expected, strict=True))
        yield Comparison(f"{name}: run lengths", num_different / len(expected), 0)
