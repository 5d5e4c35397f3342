"""Comparisons of what has no weights: anchors, matching, losses and decoding."""

from collections.abc import Iterator

import numpy as np
import torch

from detection.evaluation.conformance import (
    Comparison,
    ConformanceContext,
    max_abs_error,
    max_peak_error,
    max_rel_error,
)
from detection.nn import box_coder
from retinanet.anchors import SIZES_PX, cell_anchors, make_anchors
from retinanet.conformance.inputs import image_hw, load_cases
from retinanet.loss import IGNORED, LOSS_NAMES, match, retinanet_loss
from retinanet.model import HeadOutputs
from retinanet.postprocess import detect

TARGET_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-5, 1e-5
BOX_TOLERANCE_PX, SCORE_TOLERANCE = 1e-3, 1e-6
ANCHOR_STEP = 29
LOSS_KEYS = dict(zip(LOSS_NAMES, ("classification", "boxes"), strict=True))


def compare_anchors(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the anchors of a cell and of images, all of them or a part."""
    cells = torch.stack([cell_anchors(size) for size in SIZES_PX])
    yield Comparison("anchors: of a cell", max_abs_error(cells, context.vector("cell_anchors").cpu()), 0)
    for height, width in context.vectors["anchor_sizes"].tolist():
        key, name = f"anchors_{height}x{width}", f"anchors {height}x{width}"
        anchors = torch.cat(make_anchors(height, width, context.device))
        if key in context.vectors:
            yield Comparison(name, max_abs_error(anchors, context.vector(key)), 0)
        else:
            yield Comparison(f"{name}: number", abs(len(anchors) - context.scalar(f"{key}_count")), 0)
            expected = context.vector(f"{key}_every_{ANCHOR_STEP}th")
            yield Comparison(name, max_abs_error(anchors[::ANCHOR_STEP], expected), 0)


def compare_matching(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the positive anchors and their boxes, the ignored anchors, and the encoded targets."""
    for case in range(context.scalar("match_cases")):
        key, name = f"match{case}", f"matching {case}"
        gt = load_cases(context, [case])
        anchors = torch.cat(make_anchors(*image_hw(context, [case]), context.device))
        matched = match(gt.boxes_xyxy[0], gt.valid[0], anchors)
        (positive,) = (matched >= 0).nonzero(as_tuple=True)
        (ignored,) = (matched == IGNORED).nonzero(as_tuple=True)
        for part, actual in (("positive", positive), ("gt_index", matched[positive]), ("ignored", ignored)):
            yield Comparison(f"{name}: {part}", max_abs_error(actual, context.vector(f"{key}_{part}")), 0)
        sampled = positive[:: context.scalar(f"{key}_target_stride")]
        boxes = gt.boxes_xyxy[0, matched[sampled]]
        targets = box_coder.encode(boxes, anchors[sampled], legacy=False)
        error = max_abs_error(targets, context.vector(f"{key}_targets"))
        yield Comparison(f"{name}: targets", error, TARGET_TOLERANCE)


def compare_losses(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare both losses and their gradients."""
    num_outputs = context.scalar("classes")
    for case in range(context.scalar("loss_cases")):
        key, name = f"loss{case}", f"loss {case}"
        cases = context.vectors[f"{key}_match_cases"].tolist()
        anchors = make_anchors(*image_hw(context, cases), context.device)
        sizes = [len(level) for level in anchors]
        rng = np.random.default_rng(context.scalar(f"{key}_seed"))
        shift, scale = context.vectors[f"{key}_logit_shift_scale"].tolist()
        logits = context.as_tensor(shift + scale * rng.standard_normal((len(cases), sum(sizes), num_outputs)))
        box_scale = float(context.vectors[f"{key}_box_scale"])
        deltas = context.as_tensor(box_scale * rng.standard_normal((len(cases), sum(sizes), 4)))
        logit_levels, delta_levels = (tensor.requires_grad_().split(sizes, dim=1) for tensor in (logits, deltas))
        losses = retinanet_loss(logit_levels, delta_levels, anchors, *load_cases(context, cases)).mean(dim=0)
        for (part, suffix), loss in zip(LOSS_KEYS.items(), losses, strict=True):
            error = max_rel_error(loss, context.vector(f"{key}_{suffix}"))
            yield Comparison(f"{name}: {part}", error, LOSS_TOLERANCE)

        logit_grad, box_grad = torch.autograd.grad(losses.sum(), [logits, deltas])
        error = max_peak_error(logit_grad[:, ::97, ::9], context.vector(f"{key}_logit_grad"))
        yield Comparison(f"{name}: gradient of logits", error, GRADIENT_TOLERANCE)
        yield from compare_sums(context, f"{key}_logit_grad", f"{name}: gradient", logit_grad, GRADIENT_TOLERANCE)
        rows = box_grad.any(dim=2).nonzero()
        error = max_abs_error(rows, context.vector(f"{key}_box_grad_rows"))
        yield Comparison(f"{name}: anchors with a box", error, 0)
        error = max_peak_error(box_grad[rows.unbind(dim=1)], context.vector(f"{key}_box_grad"))
        yield Comparison(f"{name}: gradient of boxes", error, GRADIENT_TOLERANCE)


def compare_sums(
    context: ConformanceContext, key: str, name: str, actual: torch.Tensor, tolerance: float
) -> Iterator[Comparison]:
    """Compare the sums of all values and of their magnitudes, relative to the latter."""
    values = actual.detach().cpu()
    magnitude = float(context.vectors[f"{key}_abs_sum"])
    for part, tensor in (("sum", values), ("abs_sum", values.abs())):
        error = abs(float(tensor.sum(dtype=torch.float64)) - float(context.vectors[f"{key}_{part}"])) / magnitude
        yield Comparison(f"{name}, {part}", error, tolerance)


def compare_decoding(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the detections of random predictions, best first, in pixels of the original image."""
    for case in range(context.scalar("decode_cases")):
        key, name = f"decode{case}", f"decoding {case}"
        height, width = context.vectors[f"{key}_size"].tolist()
        anchors = make_anchors(height, width, context.device)
        sizes = [len(level) for level in anchors]
        logits, deltas = (
            list(torch.from_numpy(array).to(context.device).split(sizes, dim=1))
            for array in draw_predictions(context, key, sum(sizes))
        )
        detections = detect(HeadOutputs(logits, deltas), anchors, (height, width))
        original_hw = context.vector(f"{key}_original").float()
        scales_wh = (original_hw / torch.tensor([height, width], device=context.device)).flip(0)
        for part, actual, tolerance in (
            ("boxes", detections.boxes_xyxy * scales_wh.repeat(2), BOX_TOLERANCE_PX),
            ("labels", detections.labels - 1, 0),
            ("scores", detections.scores, SCORE_TOLERANCE),
        ):
            yield Comparison(f"{name}: {part}", max_abs_error(actual, context.vector(f"{key}_{part}")), tolerance)


def draw_predictions(context: ConformanceContext, key: str, num_anchors: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits (1, A, K) and deltas (1, A, 4), both float32, with objects that many anchors near them see."""
    num_outputs = context.scalar("classes")
    rng = np.random.default_rng(context.scalar(f"{key}_seed"))
    bias, noise, box_scale = (float(context.vectors[f"{key}_{part}"]) for part in ("bias", "noise", "box_scale"))
    num_objects, near = (context.scalar(f"{key}_{part}") for part in ("objects", "near"))
    deltas = (box_scale * rng.standard_normal((1, num_anchors, 4))).astype(np.float32)
    logits = bias + noise * rng.standard_normal((1, num_anchors, num_outputs), dtype=np.float32)
    if num_objects:
        centers, labels = rng.integers(0, num_anchors, num_objects), rng.integers(0, num_outputs, num_objects)
        offsets = rng.integers(-36, 37, (num_objects, near))
        values = rng.uniform(-3.5, 4, (num_objects, near)).astype(np.float32)
        logits[0, np.clip(centers[:, None] + offsets, 0, num_anchors - 1), labels[:, None]] = values
    return logits, deltas
