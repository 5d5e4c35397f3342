"""Comparisons of the network with the reference's weights: its outputs, losses, gradients and detections.

B images of a batch. Sizes of images come from the ground truth, and are not in the file for the pipeline.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from detection.data.image_io import pad_to_batch
from detection.engine.model_mode import set_train_mode
from detection.evaluation.conformance import (
    MAX_UNMATCHED,
    Comparison,
    ConformanceContext,
    ReferenceNetwork,
    ReferenceTensor,
    compare_rows,
    max_peak_error,
    max_rel_error,
    place_model,
)
from detection.nn.detections import Detections
from detection.runtime.distributed import DistContext
from retinanet import weights
from retinanet.anchors import make_anchors
from retinanet.conformance.boxes import LOSS_KEYS, compare_sums
from retinanet.conformance.inputs import image_hw, load_cases, load_gt, reference_config
from retinanet.data import Batch, EvalBatch
from retinanet.evaluator import RetinaNetEvaluator
from retinanet.loss import retinanet_loss
from retinanet.model import RetinaNet, make_model
from retinanet.postprocess import detect
from retinanet.train import make_loss

PIPELINE_SIZE_PX = 256
CHANNEL_STEP = 32  # of the pyramid
NUM_LISTED = 100  # detections of an image in the file
# Kind of each tensor, by a pattern of its name.
TENSOR_KINDS = (
    (r"bn3\.weight$", "norm_weight_last"),
    (r"(bn\d|downsample\.1)\.weight$", "norm_weight"),
    (r"(bn\d|downsample\.1)\.bias$", "norm_bias"),
    (r"running_mean$", "running_mean"),
    (r"running_var$", "running_var"),
    (r"\.fpn\..*\.weight$", "linear"),
    (r"cls_logits\.weight$", "class_weight"),
    (r"bbox_reg\.weight$", "box_weight"),
    (r"cls_logits\.bias$", "class_bias"),
    (r"\.weight$", "conv"),
    (r"\.bias$", "bias"),
)


# Largest errors in float32. Outputs: relative to the largest. Loss, gradients: relative. Unmatched: fraction of
# detections without a counterpart.
OUTPUT_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE, UNMATCHED_TOLERANCE = 1e-4, 1e-5, 1e-3, 0.03
# Largest distances to a counterpart: boxes in pixels, labels, scores.
MATCH_LIMITS = {
    "fp32": {"boxes": 0.05, "labels": 0, "scores": 1e-4},
    "tf32": {"boxes": 1, "labels": 0, "scores": 0.02},
    "bf16": {"boxes": 4, "labels": 0, "scores": 0.1},
    "fp16": {"boxes": 1, "labels": 0, "scores": 0.02},
}


def reference_network() -> ReferenceNetwork:
    """Return the reference's tensors and trained parameters, in the order of its checkpoints."""
    config = reference_config()
    with torch.device("meta"):
        model = make_model(config)
    set_train_mode(model, config)
    tensors = [
        ReferenceTensor(name, tuple(tensor.shape), tensor_kind(name))
        for name, tensor in weights.to_reference(model.state_dict()).items()
    ]
    return ReferenceNetwork(tensors, list(trained_parameters(model)))


def tensor_kind(name: str) -> str:
    """Return how `draw_state` fills a tensor."""
    return next(kind for pattern, kind in TENSOR_KINDS if re.search(pattern, name))


def trained_parameters(model: RetinaNet) -> dict[str, Tensor]:
    """Return the trained parameters under the reference's names."""
    return weights.to_reference({name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad})


def reference_state(context: ConformanceContext) -> dict[str, Tensor]:
    """Draw the reference's state dict from the seed."""
    seed = context.network.seed
    if seed is None:
        seed = context.scalar("model_seed_base")
    return draw_state(seed, tuple(context.network.tensors))


@lru_cache(maxsize=1)
def draw_state(seed: int, tensors: tuple[ReferenceTensor, ...]) -> dict[str, Tensor]:
    """Draw tensors of a state dict, each from a seed of its own."""
    state = {}
    for i, (name, shape, kind, _) in enumerate(tensors):
        noise = np.random.default_rng(seed + i).standard_normal(shape)
        fan_in = prod(shape[1:])
        match kind:
            case "conv":
                noise *= np.sqrt(2 / fan_in)
            case "linear":
                noise *= np.sqrt(1 / fan_in)
            case "class_weight":
                noise *= 0.15 * np.sqrt(1 / fan_in)
            case "box_weight":
                noise *= 0.1 * np.sqrt(1 / fan_in)
            case "class_bias":
                noise = -4.6 + 0.1 * noise
            case "norm_weight":
                noise = 1 + 0.1 * noise
            case "norm_weight_last":
                noise = 0.25 * (1 + 0.1 * noise)
            case "running_var":
                noise = np.exp(0.1 * noise)
            case _:
                noise *= 0.1
        state[name] = torch.from_numpy(noise.astype(np.float32))
    return state


def reference_model(context: ConformanceContext) -> RetinaNet:
    """Build the network with the reference's weights, on the device, in training mode."""
    config = reference_config()
    with torch.device("meta"):
        model = make_model(config)
    model = place_model(context, model, weights.from_reference(reference_state(context)), config)
    set_train_mode(model, config)
    return model


def compare_netsmall(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the network and its gradients on small images."""
    return compare_network(context, "netsmall", with_gradients=True)


def compare_net256(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the network and its gradients on images of 256 pixels."""
    return compare_network(context, "net256", with_gradients=True)


def compare_net800(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the network on images of 800 pixels."""
    return compare_network(context, "net800", with_gradients=False)


def compare_network(context: ConformanceContext, key: str, *, with_gradients: bool) -> Iterator[Comparison]:
    """Compare the pyramid, the outputs, the losses, the gradients and the detections on normalized images."""
    cases = context.vectors[f"{key}_match_cases"].tolist()
    size_hw = image_hw(context, cases)
    rng = np.random.default_rng(context.scalar(f"{key}_input_seed"))
    images = context.as_tensor(rng.standard_normal((len(cases), 3, *size_hw)))
    model, anchors = reference_model(context), make_anchors(*size_hw, context.device)
    with torch.set_grad_enabled(with_gradients):
        with context.precision.autocast(context.device):
            levels = model.backbone(images)
            outputs = model.predict(levels)
        losses = retinanet_loss(*outputs, anchors, *load_cases(context, cases)).mean(dim=0)

    for number, level in enumerate(levels, start=3):
        step = context.scalar(f"{key}_p{number}_stride")
        error = max_peak_error(level[:, ::CHANNEL_STEP, ::step, ::step], context.vector(f"{key}_p{number}"))
        yield Comparison(f"{key}: P{number}", error, OUTPUT_TOLERANCE)
    _, *steps = context.vectors[f"{key}_strides"].tolist()
    for part, per_level, sampled in (
        ("logits", outputs.logits, (slice(None), slice(None, None, steps[0]), slice(None, None, steps[1]))),
        ("boxes", outputs.deltas, (slice(None), slice(None, None, steps[0]))),
    ):
        actual = torch.cat(per_level, dim=1).detach()
        error = max_peak_error(actual[sampled], context.vector(f"{key}_{part}"))
        yield Comparison(f"{key}: {part}", error, OUTPUT_TOLERANCE)
        yield from compare_sums(context, f"{key}_{part}", f"{key}: {part}", actual, OUTPUT_TOLERANCE)
    yield from compare_network_losses(context, key, losses)
    with torch.no_grad():
        yield from compare_detections(context, key, detect(outputs, anchors, size_hw), len(cases))
    if with_gradients:
        losses.sum().backward()
        yield from compare_gradients(context, key, model)


def compare_network_losses(context: ConformanceContext, key: str, losses: Tensor) -> Iterator[Comparison]:
    """Compare the losses (2,) of a batch."""
    for (part, suffix), loss in zip(LOSS_KEYS.items(), losses, strict=True):
        error = max_rel_error(loss, context.vector(f"{key}_loss_{suffix}"))
        yield Comparison(f"{key}: {part} loss", error, LOSS_TOLERANCE)


def compare_gradients(context: ConformanceContext, key: str, model: RetinaNet) -> Iterator[Comparison]:
    """Compare the norm of each gradient."""
    gradients = {name: tensor.grad for name, tensor in trained_parameters(model).items()}
    yield Comparison(f"{key}: trained parameters", float(list(gradients) != context.network.parameters), 0)
    norms = torch.stack([gradient.cpu().double().norm() for gradient in gradients.values() if gradient is not None])
    error = max_each_error(norms, context.vectors[f"{key}_grad_norm"])
    yield Comparison(f"{key}: gradient norms", error, GRADIENT_TOLERANCE)


def max_each_error(actual: Tensor, expected: np.ndarray) -> float:
    """Return the largest relative error of positive numbers (N,), each by its own size, or nan if one is missing."""
    target = torch.from_numpy(expected)
    if actual.shape != target.shape:
        return float("nan")
    return float(((actual.detach().cpu().double() - target).abs() / target).max())


def compare_detections(
    context: ConformanceContext, key: str, detections: Detections, num_images: int
) -> Iterator[Comparison]:
    """Compare the number of detections of each image, and the best of them as sets."""
    images = range(num_images)
    rows = [detections.batch_index == image for image in images]
    for image in images:
        expected = context.scalar(f"{key}_det{image}_count")
        error = abs(int(rows[image].sum()) - expected) / max(expected, 1)
        yield Comparison(f"{key}: detections, image {image}", error, UNMATCHED_TOLERANCE, MAX_UNMATCHED)
    columns = {"boxes": detections.boxes_xyxy, "labels": detections.labels - 1, "scores": detections.scores}
    yield from compare_rows(
        f"{key}: detections",
        {column: [values[row][:NUM_LISTED] for row in rows] for column, values in columns.items()},
        {column: [context.vector(f"{key}_det{image}_{column}") for image in images] for column in columns},
        MATCH_LIMITS[context.precision.name],
        unmatched_tolerance=UNMATCHED_TOLERANCE,
        columns=False,
    )


def compare_pipeline(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare what a run does with images of several sizes: losses, gradients, and detections in their pixels."""
    config = reference_config("--image-size", str(PIPELINE_SIZE_PX), "--compile", "off", "--division", "open")
    sizes_hw = context.vectors["pipeline_sizes"].tolist()
    rng = np.random.default_rng(context.scalar("pipeline_seed"))
    pixels = [torch.from_numpy(rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8)) for size_hw in sizes_hw]
    images = pad_to_batch([image.permute(2, 0, 1) for image in pixels]).to(context.device)
    gt = load_gt(context, [f"pipeline_gt{image}" for image in range(len(images))])
    sizes = torch.tensor(sizes_hw, device=context.device)
    flips = torch.zeros(len(images), dtype=torch.bool, device=context.device)
    batch = Batch(images, sizes, gt.boxes_xyxy, torch.where(gt.valid, gt.labels + 1, 0), flips)

    model = reference_model(context)
    with context.precision.autocast(context.device):
        losses = make_loss(config, context.device)(model, batch) / len(images)
    yield from compare_network_losses(context, "pipeline", losses)
    losses.sum().backward()
    yield from compare_gradients(context, "pipeline", model)

    evaluator = RetinaNetEvaluator(config, DistContext(0, 1, context.device))
    eval_batch = EvalBatch(images, sizes, torch.arange(len(images)))
    with torch.no_grad(), context.precision.autocast(context.device):
        detections = evaluator.predict(model.eval(), eval_batch)
    scales = evaluator.scales_wh(eval_batch)[detections.batch_index].repeat(1, 2)
    detections = detections._replace(boxes_xyxy=detections.boxes_xyxy * scales)
    yield from compare_detections(context, "pipeline", detections, len(images))
