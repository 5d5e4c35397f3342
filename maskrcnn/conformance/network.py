"""Comparisons of the whole network: features, RPN outputs, proposals, detections, losses, gradients.

The RPN's and the box head's random draws, and the proposals to train on, are those of the reference.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from detection.engine.model_mode import set_train_mode
from detection.evaluation.conformance import (
    Comparison,
    ConformanceContext,
    ReferenceNetwork,
    ReferenceTensor,
    compare_rows,
    max_norm_error,
    max_peak_error,
    max_rel_error,
    place_model,
)
from maskrcnn import checkpoint_names, masks, rpn
from maskrcnn.backbone import normalize
from maskrcnn.conformance.heads import match_drawn_rows, roi_priority
from maskrcnn.conformance.inputs import (
    coco_content,
    images_u8,
    pad_boxes,
    permutation_priority,
    read_polygons,
    reference_config,
    write_split,
)
from maskrcnn.conformance.rpn import proposal_rows
from maskrcnn.data import pad_to_batch, pad_vertices
from maskrcnn.loss import sample_rois
from maskrcnn.model import LOSS_NAMES, MaskRCNN, Targets, make_model
from maskrcnn.postprocess import Detections
from maskrcnn.rpn import Proposals

# Kind and factor of each tensor, by a pattern of its name.
TENSOR_KINDS = (
    (r"bn3\.weight$|downsample\.1\.weight$", "bn_weight", 0.5),
    (r"bn\d\.weight$", "bn_weight", 1.0),
    (r"(bn\d|downsample\.1)\.bias$", "bias", 0.1),
    (r"running_mean$", "running_mean", 0.1),
    (r"running_var$", "running_var", 0.1),
    (r"stem\.conv1\.weight$", "weight", 0.015),
    (r"rpn\.head\.cls_logits\.weight$", "weight", 0.25),
    (r"rpn\.head\.bbox_pred\.weight$", "weight", 0.035),
    (r"cls_score\.weight$", "weight", 0.4),
    (r"predictor\.bbox_pred\.weight$", "weight", 0.08),
    (r"mask_fcn_logits\.weight$", "weight", 0.6),
    (r"\.weight$", "weight", 1.0),
    (r"\.bias$", "bias", 0.05),
)
NUM_SPARSE_LEVELS = 2  # of whose RPN outputs the file has a part


# Largest errors in float32. Features: relative to the largest. Loss, norms of gradients: relative. Samples: of
# gradients one by one, norm of the error over their norm. The file's README has a tolerance for the gradients' norms
# only. Folding frozen norms into convolutions rounds differently and turns a few ReLUs on or off, which changes the
# samples by 7e-4, and 2e-6 without folding.
FEATURE_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE, SAMPLE_TOLERANCE = 1e-5, 2e-6, 5e-4, 2e-3
# Largest distances to a counterpart: boxes in pixels, labels, scores, probabilities of masks.
MATCH_LIMITS = {
    "fp32": {"boxes": 3e-4, "labels": 0, "scores": 1e-5, "masks": 1e-4},
    "tf32": {"boxes": 1, "labels": 0, "scores": 0.05, "masks": 0.1},
    "bf16": {"boxes": 4, "labels": 0, "scores": 0.1, "masks": 0.3},
    "fp16": {"boxes": 1, "labels": 0, "scores": 0.05, "masks": 0.1},
}
# Gradients that are compared one by one: key and parameter. Each has about this number of values.
SAMPLED_GRADIENTS = {
    "stage3": "backbone.body.layer2.0.conv1.weight",
    "rpn": "rpn.head.bbox_pred.weight",
    "fc6": "roi_heads.box.feature_extractor.fc6.weight",
    "mask": "roi_heads.mask.predictor.conv5_mask.weight",
}
NUM_SAMPLED = 500


def reference_network() -> ReferenceNetwork:
    """Return the reference's tensors and trained parameters, in the order of its checkpoints."""
    config = reference_config()
    with torch.device("meta"):
        model = make_model(config)
    set_train_mode(model, config)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    tensors = [
        ReferenceTensor(name, tuple(tensor.shape), *tensor_kind(name))
        for name, tensor in checkpoint_names.to_reference(model.state_dict()).items()
    ]
    return ReferenceNetwork(tensors, list(checkpoint_names.to_reference(trained)))


def tensor_kind(name: str) -> tuple[str, float]:
    """Return how `draw_state` fills a tensor: kind and factor."""
    return next((kind, factor) for pattern, kind, factor in TENSOR_KINDS if re.search(pattern, name))


def reference_state(context: ConformanceContext) -> dict[str, Tensor]:
    """Draw the reference's state dict from the seed."""
    return draw_state(context.scalar("network_weights_seed"), tuple(context.network.tensors))


@lru_cache(maxsize=1)
def draw_state(seed: int, tensors: tuple[ReferenceTensor, ...]) -> dict[str, Tensor]:
    """Draw tensors of a state dict, each from a seed of its own."""
    state = {}
    for i, (name, shape, kind, factor) in enumerate(tensors):
        noise = np.random.default_rng(seed + i).standard_normal(shape)
        match kind:
            case "weight":
                noise *= factor * np.sqrt(2 / np.prod(shape[1:]))
            case "bn_weight":
                noise = factor * (1 + 0.1 * noise)
            case "running_var":
                noise = np.exp(factor * noise)
            case _:
                noise *= factor
        state[name] = torch.from_numpy(noise.astype(np.float32))
    return state


def reference_model(context: ConformanceContext) -> MaskRCNN:
    """Build the network with the reference's weights, on the device, in training mode."""
    config = replace(reference_config(), batch_size=len(context.vectors["network_sizes_hw"]))
    with torch.device("meta"):
        model = make_model(config)
    model = place_model(context, model, checkpoint_names.from_reference(reference_state(context)), config)
    set_train_mode(model, config)
    return model


def load_vertices(context: ConformanceContext, sizes_hw: list[tuple[int, int]]) -> Tensor:
    """Read the polygons of all images: (B, G, V, 3), as in `data.Batch`."""
    images = range(len(sizes_hw))
    boxes = [context.vectors[f"network_image{image}_truth_xyxy"] for image in images]
    polygons = [read_polygons(context, f"network_image{image}") for image in images]
    with TemporaryDirectory() as folder:
        split = write_split(Path(folder), coco_content(sizes_hw, boxes, polygons))
    return pad_vertices([masks.mask_vertices(split, image) for image in images]).to(context.device)


def compare_network(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare one forward pass, what follows from it in evaluation, and one training step."""
    model = reference_model(context)
    sizes_hw = [tuple(size) for size in context.vectors["network_sizes_hw"].tolist()]
    pixels = images_u8(context.scalar("network_images_seed"), sizes_hw)
    images = pad_to_batch([torch.from_numpy(image).permute(2, 0, 1) for image in pixels]).to(context.device)
    sizes = context.vector("network_sizes_hw")
    anchors = model.rpn.anchors(images)
    autocast = context.precision.autocast(context.device)

    with autocast:
        features = model.backbone(normalize(images, sizes, model.config.input_format))
        levels = model.rpn.head(features)
    yield from compare_features(context, features)
    yield from compare_rpn_outputs(context, *levels)
    outputs = rpn.flatten_levels(*levels)

    with torch.no_grad(), autocast:
        proposals = rpn.generate_proposals(*outputs, anchors, images, sizes, model.config, training=False)
        detections = model.detect(features[:4], proposals, sizes)
    yield from compare_evaluation(context, proposals, detections)
    proposals = rpn.generate_proposals(*outputs, anchors, images, sizes, model.config, training=True)
    yield from compare_training_proposals(context, proposals)

    boxes, _ = pad_boxes([context.vector(f"network_image{image}_truth_xyxy") for image in range(len(images))])
    labels, _ = pad_boxes([context.vector(f"network_image{image}_truth_labels") for image in range(len(images))])
    targets = Targets(boxes, labels, load_vertices(context, sizes_hw), torch.zeros_like(labels[:, 0]))
    seeds = context.vectors["network_priority_seeds"].tolist()
    anchor_priority = np.stack([permutation_priority(seed, len(anchors)) for seed in seeds[: len(images)]])
    proposals = reference_proposals(context, labels)
    region_priority = roi_priority(context, seeds[len(images) :], proposals, labels)
    rois, _, roi_labels = sample_rois(proposals, boxes, labels, region_priority, model.config)
    yield from match_drawn_rows(context, "network_train", "network, training: drawn", rois, roi_labels)
    with autocast:
        losses = torch.stack(
            [
                *model.rpn_losses(*outputs, anchors, sizes, targets, context.as_tensor(anchor_priority)),
                *model.head_losses(features[:4], proposals, images, targets, region_priority),
            ]
        )
    for name, actual, expected in zip(LOSS_NAMES, losses, context.vector("network_losses"), strict=True):
        yield Comparison(f"network, training: {name} loss", max_rel_error(actual, expected), LOSS_TOLERANCE)
    losses.sum().backward()
    yield from compare_gradients(context, model)


def compare_features(context: ConformanceContext, features: list[Tensor]) -> Iterator[Comparison]:
    """Compare P2 to P6, relative to the largest feature, and their standard deviations."""
    strides, deviations = (context.vectors[f"network_feature_{name}"].tolist() for name in ("strides", "std"))
    for level, feature in enumerate(features):
        channel_step, step = strides[level]
        expected = context.vector(f"network_p{level + 2}")
        error = max_peak_error(feature[:, ::channel_step, ::step, ::step], expected)
        yield Comparison(f"network: P{level + 2}", error, FEATURE_TOLERANCE)
        error = abs(float(feature.detach().float().std()) / deviations[level] - 1)
        yield Comparison(f"network: deviation of P{level + 2}", error, FEATURE_TOLERANCE)


def compare_rpn_outputs(
    context: ConformanceContext, logits: list[Tensor], deltas: list[Tensor]
) -> Iterator[Comparison]:
    """Compare the outputs of the RPN on each level, relative to the largest."""
    for level in range(len(logits)):
        logit_step, channel_step, delta_step = (3, 2, 5) if level < NUM_SPARSE_LEVELS else (1, 1, 1)
        for name, actual in (
            ("logits", logits[level][:, :, ::logit_step, ::logit_step]),
            ("deltas", deltas[level][:, ::channel_step, ::delta_step, ::delta_step]),
        ):
            error = max_peak_error(actual, context.vector(f"network_rpn_{name}_p{level + 2}"))
            yield Comparison(f"network: RPN {name} on P{level + 2}", error, FEATURE_TOLERANCE)


def compare_evaluation(
    context: ConformanceContext, proposals: Proposals, detections: Detections
) -> Iterator[Comparison]:
    """Compare the proposals and detections of test mode as sets. The file has every second proposal."""
    images = range(len(detections.labels))
    expected = {
        column: [context.vector(f"network_eval_image{image}_proposals_{suffix}") for image in images]
        for column, suffix in (("boxes", "xyxy"), ("scores", "scores"))
    }
    yield from compare_network_rows(context, "proposals", proposal_rows(proposals), expected, sampled=True)
    rows = {
        "boxes": detections.boxes_xyxy,
        "scores": detections.scores,
        "labels": detections.labels,
        "masks": detections.masks[:, :, ::3, ::3],
    }
    yield from compare_network_rows(
        context,
        "detections",
        {name: [part[image, detections.labels[image] > 0] for image in images] for name, part in rows.items()},
        {
            name: [context.vector(f"network_eval_image{image}_{suffix}") for image in images]
            for name, suffix in (("boxes", "xyxy"), ("scores", "scores"), ("labels", "labels"), ("masks", "masks"))
        },
    )


def compare_training_proposals(context: ConformanceContext, proposals: Proposals) -> Iterator[Comparison]:
    """Compare the proposals of training mode as sets. In the file, the ground truth follows them."""
    expected: dict[str, list[Tensor]] = {}
    for column, suffix in (("boxes", "xyxy"), ("scores", "scores")):
        expected[column] = [
            context.vector(f"network_train_image{image}_proposals_{suffix}")[: -num_gt(context, image)]
            for image in range(len(proposals.valid))
        ]
    yield from compare_network_rows(context, "training: proposals", proposal_rows(proposals), expected)


def compare_network_rows(
    context: ConformanceContext,
    name: str,
    actual: Mapping[str, Sequence[Tensor]],
    expected: Mapping[str, Sequence[Tensor]],
    *,
    sampled: bool = False,
) -> Iterator[Comparison]:
    """Compare rows as sets. In float32 every row has a counterpart; rounding changes which rows there are."""
    precision = context.precision.name
    yield from compare_rows(
        f"network, {name}", actual, expected, MATCH_LIMITS[precision], columns=precision == "fp32", sampled=sampled
    )


def num_gt(context: ConformanceContext, image: int) -> int:
    """Return the number of ground-truth boxes of an image."""
    return len(context.vectors[f"network_image{image}_truth_xyxy"])


def reference_proposals(context: ConformanceContext, labels: Tensor) -> Proposals:
    """Return the reference's proposals of training mode, in its order. labels: (B, G) of the ground truth."""
    boxes, valid = pad_boxes(
        [
            context.vector(f"network_train_image{image}_proposals_xyxy")[: -num_gt(context, image)]
            for image in range(len(labels))
        ]
    )
    return Proposals(boxes, torch.zeros_like(boxes[..., 0]), valid)


def compare_gradients(context: ConformanceContext, model: MaskRCNN) -> Iterator[Comparison]:
    """Compare the norm of every gradient, and values of some."""
    gradients = checkpoint_names.to_reference(
        {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    )
    error = max_norm_error(gradients, context.network.parameters, context.vector("network_gradient_norms"))
    yield Comparison("network, training: gradient norms", error, GRADIENT_TOLERANCE)
    for key, name in SAMPLED_GRADIENTS.items():
        gradient = gradients[name].flatten()
        actual = gradient[:: gradient.numel() // NUM_SAMPLED].cpu().double()
        sampled = context.vector(f"network_gradient_{key}").cpu().double()
        error = float((actual - sampled).norm() / sampled.norm())
        yield Comparison(f"network, training: gradient, {key}", error, SAMPLE_TOLERANCE)
