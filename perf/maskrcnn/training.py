"""Mask R-CNN's training step and its stages, compared with torchvision's.

Where torchvision is the baseline, ours runs with `--variant torchvision`. Both then compute the same from the same
weights, so that the ratio is that of speed alone. The first variant of each list is ours. All of them return what they
compute, so that tests can compare them. A network with random weights finds fewer regions with an object than one in
training, so the step underestimates the cost of the mask head. Part `maskrcnn_mask_head` measures that.

B images, A anchors.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from detection.data.batch import RankBatch
from detection.data.image_pipeline import HostImagePipeline
from detection.data.prefetch import to_device
from detection.engine import optim, train_loop
from detection.engine.initialization import build_state
from detection.nn import box_coder
from detection.nn.resnet_fpn import NUM_CHANNELS
from detection.runtime.device import should_compile
from detection.synthetic import coco_scenes
from maskrcnn import rpn
from maskrcnn.anchors import STRIDES_PX, make_anchors
from maskrcnn.config import Config, RoiAlignMethod, load
from maskrcnn.data import Batch, MaskRCNNTrainDataset, aspect_groups
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.model import POOLED_STRIDES_PX, MaskRCNN, make_model
from maskrcnn.roi_align import Rois, has_torchvision_kernel, roi_align
from maskrcnn.roi_heads import BOX_POOL_SIZE, MASK_POOL_SIZE, MASK_SIZE, MaskHead
from maskrcnn.train import make_workload, predict
from maskrcnn.weights import from_torchvision
from perf.harness import BenchContext, Result
from perf.maskrcnn import baseline
from perf.roofline import count_work
from perf.ssd.network import baseline_variant, time_compilation, with_precision
from perf.timing import Variant

SLOW_ROUNDS = 3

# Regions per image. Training samples at most 512, of which at most 128 have an object and a mask. Half of those is
# typical of the middle of training.
BOX_REGIONS, MASK_REGIONS = 512, 64


def time_step(context: BenchContext) -> Iterator[Result]:
    """Time Mask R-CNN's training step, from pixels to updated weights, against torchvision's."""
    for name in dict.fromkeys((context.precision.name, "fp32")):
        config = load_config(context, "--variant", "torchvision", "--precision", name)
        variants = step_variants(context, config)
        is_default = name == context.precision.name
        yield from context.compare(
            "maskrcnn_step",
            *variants,
            unit="img/s",
            work=count_work(variants[0].run, config.batch_size),
            roofline=context.roofline(precision_name=name),
            requirement="maskrcnn step" if is_default else "",
            rounds=None if is_default else slow_rounds(context),
        )
    for choice in ("off", "on") if context.size.compiled and should_compile("auto", context.device) else ("off",):
        yield from time_reference_step(context, choice)


def time_reference_step(context: BenchContext, compile: str) -> Iterator[Result]:
    """Time the step with the MLPerf reference's settings. Yield nothing if it cannot be compiled."""
    config = load_config(context, "--compile", compile)
    run = optimized_step(context, config, torchvision_model(context, config))
    name = f"reference settings, {context.precision.name}, {shape_text(context)}"
    step = Variant(name + ", compiled" * (compile == "on"), run, config.batch_size)
    if compile == "on":
        compilation = time_compilation("maskrcnn_step", step, context.device)
        if not compilation:
            return
        yield compilation
    work = None if compile == "on" else count_work(run, config.batch_size)
    yield from context.compare("maskrcnn_step", step, unit="img/s", work=work, rounds=slow_rounds(context))


def step_variants(context: BenchContext, config: Config) -> list[Variant]:
    """Return the step, and torchvision's with the same images and weights. Both return five losses."""
    batch_size = config.batch_size
    model = torchvision_model(context, config)
    run = optimized_step(context, config, model)
    model = model.to(context.device)
    parameters = baseline.trained_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=baseline.LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    step = baseline.make_step(model, baseline.to_model_input(make_batch(context)), optimizer, baseline.LOSSES)
    name = f"torchvision, float32, channels first, {shape_text(context)}"
    optimized = Variant(f"{config.precision}, channels last, {shape_text(context)}", run, batch_size)
    return [optimized, baseline_variant(context, name, step, batch_size)]


def optimized_step(context: BenchContext, config: Config, torchvision: nn.Module) -> Callable[[], object]:
    """Return the run's own step on a batch on the device, with the weights of torchvision's model."""
    evaluator = MaskRCNNEvaluator(config, context.ranks, predict)
    model = copy_weights_from(torchvision, config)
    workload = make_workload(config, context.ranks, context.seed, model, evaluator)
    state = build_state(workload, config, context.ranks)
    optim.set_learning_rates(state.optimizer, lambda factor: baseline.LEARNING_RATE * factor)
    rank_batch = RankBatch(make_batch(context), config.batch_size, 1 / config.batch_size)

    def step() -> Tensor:
        return train_loop.train_step(state, rank_batch, workload, config, context.ranks)

    return with_precision(config.precision, context, step)


def time_backbone(context: BenchContext) -> Iterator[Result]:
    """Time Mask R-CNN's ResNet and FPN, forward and backward: folded frozen batch norm against separate modules."""
    variants = backbone_variants(context, load_config(context, "--variant", "torchvision"))
    work = count_work(variants[0].run, variants[0].images)
    yield from context.compare("maskrcnn_backbone", *variants, work=work)


def backbone_variants(context: BenchContext, config: Config) -> list[Variant]:
    """Return the backbone, torchvision's, and torchvision's in our precision and layout. Each returns P2 to P6."""
    batch = make_batch(context)
    pixels = torch.randn(batch.images.shape, device=context.device)
    model = torchvision_model(context, config)
    optimized = copy_weights_from(model, config).backbone.to(context.device).to(memory_format=torch.channels_last)
    torchvision = model.backbone.to(context.device)
    tuned = deepcopy(torchvision).to(memory_format=torch.channels_last)
    channels_last = pixels.contiguous(memory_format=torch.channels_last)

    def features(backbone: nn.Module, images: Tensor) -> list[Tensor]:
        backbone.zero_grad()
        levels = backbone(images)
        levels = list(levels.values()) if isinstance(levels, dict) else levels
        sum(level.float().sum() for level in levels).backward()
        return [level.detach() for level in levels]

    return precision_variants(
        context,
        (f"folded, {shape_text(context)}", lambda: features(optimized, channels_last)),
        (shape_text(context), lambda: features(torchvision, pixels)),
        lambda: features(tuned, channels_last),
    )


def precision_variants(
    context: BenchContext,
    optimized: tuple[str, Callable[[], object]],
    torchvision: tuple[str, Callable[[], object]],
    run_tuned: Callable[[], object],
) -> list[Variant]:
    """Return our stage, torchvision's in float32, and torchvision's in our precision and layout.

    optimized, torchvision: title and function.
    """
    images, precision = context.size.maskrcnn_batch_size, context.precision.name
    title, run_torchvision = torchvision
    return [
        Variant(f"{precision}, {optimized[0]}", with_autocast(context, optimized[1]), images),
        baseline_variant(context, f"torchvision, float32, channels first, {title}", run_torchvision, images),
        Variant(f"torchvision, {precision}, channels last, {title}", with_autocast(context, run_tuned), images),
    ]


def time_roi_align(context: BenchContext) -> Iterator[Result]:
    """Time both methods of RoIAlign over Mask R-CNN's FPN levels, forward and backward, against torchvision's."""
    for pool_size, regions in ((BOX_POOL_SIZE, BOX_REGIONS), (MASK_POOL_SIZE, MASK_REGIONS)):
        yield from context.compare("maskrcnn_roi_align", *roi_align_variants(context, pool_size, regions))


def roi_align_variants(context: BenchContext, pool_size: int, per_image: int) -> list[Variant]:
    """Return RoIAlign on P2 to P5: the default method, torchvision's selection by level, and our other method.

    Each variant returns the pooled regions and the gradient of the finest level.
    """
    batch = make_batch(context)
    batch_size, (height, width) = len(batch.images), batch.images.shape[2:]
    gt = zip(batch.boxes_xyxy, batch.labels, strict=True)
    image_boxes = [jitter_boxes(boxes[labels > 0], per_image) for boxes, labels in gt]
    boxes = torch.cat(image_boxes)
    image_indices = torch.arange(batch_size, device=context.device).repeat_interleave(per_image)
    float_levels = [
        torch.randn(batch_size, NUM_CHANNELS, height // s, width // s, device=context.device) for s in POOLED_STRIDES_PX
    ]
    dtype = context.precision.dtype or torch.float32
    levels = [level.to(dtype, memory_format=torch.channels_last) for level in float_levels]
    upstream = torch.randn(len(boxes), NUM_CHANNELS, pool_size, pool_size, device=context.device)
    pooler = MultiScaleRoIAlign([str(index) for index in range(len(levels))], pool_size, sampling_ratio=2)
    for level in (*float_levels, *levels):
        level.requires_grad_()

    def run(method: RoiAlignMethod) -> tuple[Tensor, Tensor]:
        rois = Rois(boxes, image_indices)
        pooled = roi_align(levels, rois, pool_size, strides_px=POOLED_STRIDES_PX, legacy=False, method=method)
        return pooled.detach(), torch.autograd.grad(pooled, levels, upstream.to(dtype))[0]

    def run_torchvision() -> tuple[Tensor, Tensor]:
        named_levels = {str(index): level for index, level in enumerate(float_levels)}
        pooled = pooler(named_levels, image_boxes, [(height, width)] * batch_size)
        return pooled.detach(), torch.autograd.grad(pooled, float_levels, upstream)[0]

    precision, title = context.precision.name, f"{per_image} regions of {pool_size} × {pool_size} per image"
    methods: tuple[RoiAlignMethod, ...] = ("gather", "torchvision")
    default, other = (
        Variant(f"{precision}, {method}, {title}", with_precision(precision, context, partial(run, method)), batch_size)
        for method in (methods[::-1] if has_torchvision_kernel(context.device) else methods)
    )
    return [default, baseline_variant(context, f"torchvision, float32, {title}", run_torchvision, batch_size), other]


def jitter_boxes(boxes_xyxy: Tensor, count: int) -> Tensor:
    """Return `count` regions (count, 4) near the boxes (G, 4)."""
    rows = boxes_xyxy[torch.arange(count, device=boxes_xyxy.device) % len(boxes_xyxy)]
    sides = (rows[:, 2:] - rows[:, :2]).repeat(1, 2)
    moved = rows + 0.1 * sides * torch.rand(rows.shape, device=rows.device)
    return torch.cat([moved[:, :2], moved[:, 2:].maximum(moved[:, :2] + 1)], dim=1)


def time_proposals(context: BenchContext) -> Iterator[Result]:
    """Time Mask R-CNN's region proposals of given RPN outputs against torchvision's."""
    yield from context.compare("maskrcnn_proposals", *proposal_variants(context))


def proposal_variants(context: BenchContext) -> list[Variant]:
    """Return proposals of given RPN outputs. Each variant returns the boxes (P, 4) of the first image.

    As in a trained network, anchors that overlap an object have a higher score, and their boxes move towards it.
    """
    config = load_config(context, "--variant", "torchvision")
    batch = make_batch(context)
    batch_size, (height, width) = len(batch.images), batch.images.shape[2:]
    anchors = make_anchors(height, width, context.device, legacy=False)
    iou, matched = box_coder.pairwise_iou(batch.boxes_xyxy, anchors, legacy=False).max(dim=1)  # (B, A)
    nearest = batch.boxes_xyxy.gather(1, matched[..., None].expand(-1, -1, 4)).maximum(anchors.new_tensor([0, 0, 1, 1]))
    logits = 8 * iou - 4 + torch.randn(iou.shape, device=context.device)
    targets = box_coder.encode(nearest, anchors, legacy=False)
    noise = 0.05 * torch.randn(targets.shape, device=context.device)
    deltas = torch.where(iou[..., None] > 0.3, 0.8 * targets, 0.0) + noise
    network = torchvision_model(context, config).rpn
    maps = [torch.empty(1, 0, -(-height // s), -(-width // s), device=context.device) for s in STRIDES_PX]
    anchors_per_level = [3 * level.shape[2] * level.shape[3] for level in maps]
    image_list = ImageList(batch.images, [tuple(hw) for hw in batch.sizes_hw.tolist()])

    def run_optimized() -> Tensor:
        proposals = rpn.generate_proposals(logits, deltas, anchors, batch.images, batch.sizes_hw, config, training=True)
        return proposals.boxes_xyxy[0, proposals.valid[0]]

    @torch.no_grad()
    def run_torchvision() -> Tensor:
        image_anchors = network.anchor_generator(image_list, maps)
        decoded = network.box_coder.decode(deltas.flatten(0, 1), image_anchors).view(batch_size, -1, 4)
        image_sizes = image_list.image_sizes
        boxes: list[Tensor] = network.filter_proposals(decoded, logits, image_sizes, anchors_per_level)[0]
        return boxes[0]

    optimized = Variant(f"all levels at once, {shape_text(context)}", run_optimized, batch_size)
    return [optimized, Variant("torchvision", run_torchvision, batch_size)]


def time_mask_head(context: BenchContext) -> Iterator[Result]:
    """Time Mask R-CNN's mask head and loss, forward and backward: masks of one class against those of all."""
    variants = mask_head_variants(context)
    work = count_work(variants[0].run, variants[0].images)
    yield from context.compare("maskrcnn_mask_head", *variants, work=work)


def mask_head_variants(context: BenchContext) -> list[Variant]:
    """Return the mask head with its loss. Each variant returns the loss and the gradient of the regions."""
    config = load_config(context)
    num_regions = config.batch_size * MASK_REGIONS
    regions = torch.randn(num_regions, NUM_CHANNELS, MASK_POOL_SIZE, MASK_POOL_SIZE, device=context.device)
    labels = torch.randint(1, config.num_classes, (num_regions,), device=context.device)
    targets = torch.randint(0, 2, (num_regions, MASK_SIZE, MASK_SIZE), device=context.device).float()
    optimized, torchvision, tuned = (MaskHead(config.num_classes).to(context.device) for _ in range(3))
    for head in (torchvision, tuned):
        head.load_state_dict(optimized.state_dict())
    for head in (optimized, tuned):
        head.to(memory_format=torch.channels_last)
    channels_last = regions.contiguous(memory_format=torch.channels_last)

    def one_class(head: MaskHead, x: Tensor) -> Tensor:
        return head(x, labels)

    def all_classes(head: MaskHead, x: Tensor) -> Tensor:
        logits: Tensor = head.predictor(head.features(x))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()

    def train(head_fn: Callable[[MaskHead, Tensor], Tensor], head: MaskHead, x: Tensor) -> tuple[Tensor, Tensor]:
        head.zero_grad()
        x = x.detach().requires_grad_()
        loss = F.binary_cross_entropy_with_logits(head_fn(head, x), targets)
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    return precision_variants(
        context,
        (f"one class, {MASK_REGIONS} regions per image", lambda: train(one_class, optimized, channels_last)),
        ("all classes", lambda: train(all_classes, torchvision, regions)),
        lambda: train(all_classes, tuned, channels_last),
    )


def with_autocast(context: BenchContext, run: Callable[[], object]) -> Callable[[], object]:
    """Run in the precision of the context, as the training loop does."""

    def run_with_autocast() -> object:
        with context.precision.autocast(context.device):
            return run()

    return with_precision(context.precision.name, context, run_with_autocast)


def load_config(context: BenchContext, *flags: str) -> Config:
    """Return the settings of a run in this context, with COCO's classes, not compiled."""
    min_px, max_px = context.size.maskrcnn_image_px
    defaults = {
        "--device": context.device,
        "--precision": context.precision.name,
        "--seed": context.seed,
        "--batch-size": context.size.maskrcnn_batch_size,
        "--num-workers": context.num_workers,
        "--num-classes": 1 + len(coco_scenes.COCO_CATEGORIES),
        "--min-image-size": min_px,
        "--max-image-size": max_px,
        "--compile": "off",
    }
    return load([*(str(word) for pair in defaults.items() for word in pair), *flags], {}).config


def torchvision_model(context: BenchContext, config: Config) -> Any:
    """Return torchvision's model in training mode, with random weights that depend only on the seed."""
    torch.manual_seed(context.seed)
    return baseline.make_model(config).train()


def copy_weights_from(torchvision: nn.Module, config: Config) -> MaskRCNN:
    """Return our model in training mode, with the weights of torchvision's."""
    model = make_model(config)
    model.load_state_dict(model.state_dict() | from_torchvision(torchvision.state_dict()))
    model.train()
    optim.freeze_batch_norm(model)
    return model


def make_batch(context: BenchContext) -> Batch:
    """Return landscape synthetic photos with polygons as a run gets them, on the device."""
    split = context.polygon_split()
    min_px, max_px = context.size.maskrcnn_image_px
    sizes = {"min_size_px": min_px, "max_size_px": max_px}
    pixels = HostImagePipeline()
    images = MaskRCNNTrainDataset(split, seed=context.seed, **sizes, flip=False, legacy=False, pixels=pixels)
    landscape = np.resize(np.flatnonzero(aspect_groups(split.sizes_hw) == 0), context.size.maskrcnn_batch_size)
    batch = images.__getitems__([(1, index) for index in landscape.tolist()])
    assert isinstance(batch, Batch)
    return to_device(batch, context.device)


def slow_rounds(context: BenchContext) -> int:
    """Return the number of samples of a variant that takes many seconds, or answers no requirement."""
    return min(context.size.rounds, SLOW_ROUNDS)


def shape_text(context: BenchContext) -> str:
    """Return batch size and length of the images' short side as text."""
    return f"batch {context.size.maskrcnn_batch_size}, {context.size.maskrcnn_image_px[0]} px"
