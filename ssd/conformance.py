"""Comparisons of SSD300 with the numbers of the MLPerf reference, part by part."""

from collections.abc import Iterator
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from detection.boxes import xyxy_to_cxcywh
from detection.evaluation.conformance import (
    Comparison,
    ConformanceContext,
    ConformanceSuite,
    ReferenceNetwork,
    ReferenceTensor,
    max_abs_error,
    max_norm_error,
    max_rel_error,
)
from detection.nn.placement import place_model
from ssd import augment, checkpoint_names
from ssd.anchors import NUM_ANCHORS, make_anchors
from ssd.box_coder import encode, match
from ssd.loss import multibox_loss
from ssd.model import SSD300
from ssd.postprocess import detect

NUM_CLASSES = 81

# Largest relative error of the network's outputs and loss in float32, in which all other comparisons run, too.
NETWORK_TOLERANCE = 1e-4
# Largest relative error of the norm of a parameter's gradient in float32. With random weights, the early layers of this
# deep network amplify rounding. Measured against float64 on a CPU, the error is up to 0.22% in float32, and 0.58% with
# the channels-last layout. The reference's own error is 0.19%. Simulated rounding gives up to 23% in bf16 (on a CPU:
# 18%), 8% in fp16 (7%) and 6% in tf32.
GRADIENT_TOLERANCE = 5e-3
# Deciles of two sets of 20,000 samples from one distribution differ by at most about 3 standard errors.
CROP_TOLERANCE = 0.02


def padded_gt(context: ConformanceContext, cases: list[int]) -> tuple[Tensor, Tensor]:
    """Return the ground truth of encode cases, padded: boxes (B, G, 4) and labels (B, G)."""
    boxes = [context.vector(f"encode{case}_gt_xyxy") for case in cases]
    labels = [context.vector(f"encode{case}_gt_labels") for case in cases]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(boxes, batch_first=True), pad(labels, batch_first=True)


def compare_anchors(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the anchors in both box formats."""
    anchors = make_anchors(context.device)
    yield Comparison(
        "anchors cxcywh", max_abs_error(anchors.boxes_cxcywh, context.vector("default_boxes_cxcywh")), 1e-6
    )
    yield Comparison("anchors xyxy", max_abs_error(anchors.boxes_xyxy, context.vector("default_boxes_xyxy")), 1e-6)


def compare_targets(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the positive anchors, and their boxes and labels. All cases form one padded batch."""
    cases = list(range(context.scalar("encode_cases")))
    boxes, labels = padded_gt(context, cases)
    anchors = make_anchors(context.device)
    matched = match(boxes, labels, anchors)
    _, anchor_labels = encode(boxes, labels, anchors)
    for case in cases:
        (positive,) = (anchor_labels[case] > 0).nonzero(as_tuple=True)
        expected = context.vector(f"encode{case}_pos_index")
        yield Comparison(f"encode {case}: anchors", max_abs_error(positive, expected), 0)
        if torch.equal(positive, expected):
            actual = anchor_labels[case, positive]
            yield Comparison(
                f"encode {case}: labels", max_abs_error(actual, context.vector(f"encode{case}_pos_labels")), 0
            )
            actual = xyxy_to_cxcywh(boxes[case, matched[case, positive]])
            yield Comparison(
                f"encode {case}: boxes", max_abs_error(actual, context.vector(f"encode{case}_pos_cxcywh")), 1e-6
            )


def random_predictions(context: ConformanceContext, seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """Draw random predictions (B, A, 4) and (B, A, 81) in the reference's layout, channels before anchors."""
    rng = np.random.default_rng(seed)
    deltas = context.as_tensor(rng.standard_normal((batch, 4, NUM_ANCHORS)))
    logits = context.as_tensor(3 * rng.standard_normal((batch, NUM_CLASSES, NUM_ANCHORS)))
    return deltas.transpose(1, 2).requires_grad_(), logits.transpose(1, 2).requires_grad_()


def compare_losses(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the loss with hard negative mining, and its gradients."""
    anchors = make_anchors(context.device)
    case = 0
    while f"loss{case}_seed" in context.vectors:
        encode_cases = [int(k) for k in context.vectors[f"loss{case}_encode_cases"]]
        pred_deltas, logits = random_predictions(context, context.scalar(f"loss{case}_seed"), len(encode_cases))
        loss = multibox_loss(pred_deltas, logits, *encode(*padded_gt(context, encode_cases), anchors)).sum(dim=1).mean()
        loss.backward()
        yield Comparison(f"loss {case}", max_rel_error(loss.detach(), context.vector(f"loss{case}_value")), 1e-5)
        for name, tensor, stride in (("loc", pred_deltas, 1), ("cls", logits, 9)):
            assert tensor.grad is not None
            gradient = tensor.grad.transpose(1, 2)
            expected = context.vector(f"loss{case}_grad_{name}_sample")
            actual = gradient[:, ::stride, ::97]
            yield Comparison(f"loss {case}: gradient of {name}", max_abs_error(actual, expected), 1e-6)
            expected = context.vector(f"loss{case}_grad_{name}_sum_abs")
            yield Comparison(f"loss {case}: sum of |{name}|", max_rel_error(gradient.abs().sum(), expected), 1e-4)
        case += 1
    boxes, labels = padded_gt(context, [context.scalar("loss_empty_encode_case")])
    boxes, labels = torch.cat([boxes, torch.zeros_like(boxes)]), torch.cat([labels, torch.zeros_like(labels)])
    pred_deltas, logits = random_predictions(context, context.scalar("loss_empty_seed"), 2)
    loss = multibox_loss(pred_deltas, logits, *encode(boxes, labels, anchors)).sum(dim=1).mean()
    yield Comparison("loss with an empty image", max_rel_error(loss.detach(), context.vector("loss_empty_value")), 1e-5)


def compare_detections(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the detections: decoding, score threshold, NMS and the best 200."""
    case = 0
    while f"decode{case}_seed" in context.vectors:
        rng = np.random.default_rng(context.scalar(f"decode{case}_seed"))
        deltas = context.as_tensor(0.7 * rng.standard_normal((1, 4, NUM_ANCHORS)))
        scores = rng.standard_normal((1, NUM_CLASSES, NUM_ANCHORS)).astype(np.float32)
        scores[:, 0] += context.vectors[f"decode{case}_background_bias"]
        hot = context.scalar(f"decode{case}_hot")
        if hot:
            anchor, label = rng.integers(0, NUM_ANCHORS, hot), rng.integers(1, NUM_CLASSES, hot)
            scores[0, label, anchor] += rng.uniform(4, 12, hot).astype(np.float32)
        logits = torch.from_numpy(scores).to(context.device)
        detections = detect(deltas.transpose(1, 2), logits.transpose(1, 2), make_anchors(context.device))
        for name, actual, tolerance in (
            ("xyxy", detections.boxes_xyxy, 1e-5),
            ("labels", detections.labels, 0),
            ("scores", detections.scores, 1e-5),
        ):
            expected = context.vector(f"decode{case}_{name}")
            yield Comparison(f"detect {case}: {name}", max_abs_error(actual, expected), tolerance)
        case += 1


def reference_network() -> ReferenceNetwork:
    """Return the MLPerf reference's tensors and parameters, in the order of its checkpoints.

    The kinds are those of `draw_state`.
    """
    with torch.device("meta"):
        state = checkpoint_names.to_reference(SSD300().state_dict())
    tensors = [ReferenceTensor(name, tuple(tensor.shape), infer_kind(name, tensor)) for name, tensor in state.items()]
    return ReferenceNetwork(tensors, [t.name for t in tensors if t.kind in ("conv", "bias", "bn_weight")])


def infer_kind(name: str, tensor: Tensor) -> str:
    """Infer the kind of a tensor from its name and number of dimensions."""
    last = name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return "counter"
    if last == "weight":
        return "conv" if tensor.dim() == 4 else "bn_weight"
    return last


def reference_state(context: ConformanceContext) -> dict[str, Tensor]:
    """Draw the reference's state dict from the seed."""
    return draw_state(context.scalar("model_seed_base"), tuple(context.network.tensors))


@lru_cache(maxsize=1)
def draw_state(seed: int, tensors: tuple[ReferenceTensor, ...]) -> dict[str, Tensor]:
    """Draw tensors of a state dict, each from a seed of its own."""
    state = {}
    for i, (name, shape, kind, _) in enumerate(tensors):
        noise = np.random.default_rng(seed + i).standard_normal(shape)
        match kind:
            case "conv":
                noise = noise * np.sqrt(2 / prod(shape[1:]))
            case "bn_weight":
                noise = 1 + 0.1 * noise
            case "bias" | "running_mean":
                noise = 0.1 * noise
            case "running_var":
                noise = np.exp(0.1 * noise)
            case "counter":
                noise = np.zeros(shape)
        state[name] = torch.from_numpy(np.asarray(noise, dtype=np.float32))
    return state


def reference_model(context: ConformanceContext) -> SSD300:
    """Build the network with the reference's state dict, on the device, in the memory layout of a run."""
    model = SSD300(NUM_CLASSES)
    model.load_state_dict(checkpoint_names.from_reference(reference_state(context)))
    return place_model(model.to(context.dtype), context.device, context.precision, trains_batch_norm=True)


def compare_network(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the whole network: outputs in eval mode, loss and gradient norms in train mode."""
    images = context.as_tensor(
        np.random.default_rng(context.scalar("model_seed_base") - 1).standard_normal((2, 3, 300, 300))
    )
    model = reference_model(context).eval()
    with torch.no_grad(), context.precision.autocast(context.device):
        deltas, logits = model(images)
    for name, actual, stride in (("loc", deltas, 1), ("cls", logits, 4)):
        actual = actual.float().transpose(1, 2)
        expected = context.vector(f"model_eval_{name}_sample")
        yield Comparison(
            f"network, evaluation: {name}", max_rel_error(actual[:, ::stride, ::53], expected), NETWORK_TOLERANCE
        )
        expected = context.vector(f"model_eval_{name}_abs_mean")
        yield Comparison(
            f"network, evaluation: mean |{name}|", max_rel_error(actual.abs().mean(), expected), NETWORK_TOLERANCE
        )

    model.train()
    targets = encode(*padded_gt(context, [3, 6]), make_anchors(context.device))
    with context.precision.autocast(context.device):
        deltas, logits = model(images)
        loss = multibox_loss(deltas, logits, *targets).sum(dim=1).mean()
    loss.backward()
    yield Comparison(
        "network, training: loss", max_rel_error(loss.detach(), context.vector("model_train_loss")), NETWORK_TOLERANCE
    )
    gradients = checkpoint_names.to_reference(
        {name: t.grad for name, t in model.named_parameters() if t.grad is not None}
    )
    error = max_norm_error(gradients, context.network.parameters, context.vector("model_train_grad_norms"))
    yield Comparison("network, training: gradient norms", error, GRADIENT_TOLERANCE)


def compare_crops(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the distribution of the random IoU crop: the crop rate and the deciles of the crops."""
    samples = context.scalar("crop_samples")
    for max_samples in (1, 50):
        for case, encode_case in enumerate(context.vectors["crop_encode_cases"]):
            key = f"crop_it{max_samples}_case{case}"
            boxes = np.asarray(context.vectors[f"encode{encode_case}_gt_xyxy"], dtype=np.float32)
            rng = np.random.default_rng(case)
            crops = np.stack([augment.sample_iou_crop(rng, boxes, max_samples) for _ in range(samples)])
            crops = crops[(crops != augment.WHOLE_IMAGE).any(axis=1)]
            rate = len(crops) / samples
            yield Comparison(
                f"crop, {max_samples} tries, {case}: rate",
                abs(rate - float(context.vectors[f"{key}_rate"])),
                CROP_TOLERANCE,
            )
            kept = augment.centers_inside(crops, boxes).sum(axis=1)
            left, top, right, bottom = crops.T
            for name, values in (
                ("w", right - left),
                ("h", bottom - top),
                ("left", left),
                ("top", top),
                ("kept", kept),
            ):
                deciles = np.quantile(values, np.arange(1, 10) / 10)
                expected = context.vectors[f"{key}_{name}_deciles"]
                error = float(np.abs(deciles - expected).max())
                # Deciles of a count change by whole boxes where its distribution has a step.
                tolerance = 1.0 if name == "kept" else CROP_TOLERANCE
                yield Comparison(f"crop, {max_samples} tries, {case}: {name}", error, tolerance)


SUITE = ConformanceSuite(
    "SSD300",
    (compare_anchors, compare_targets, compare_losses, compare_detections, compare_network, compare_crops),
    reference_network,
    network_comparisons=(compare_network,),
)
