"""Mask R-CNN: its training step and the parts of it, each beside torchvision's.

Ours runs with `--variant torchvision` where torchvision's runs beside it, so that both compute the same, from the same
weights: the ratio is of speed alone. A network that nobody has trained finds fewer regions with an object than one in
mid-training, so the step shows little of the mask head; `maskrcnn_mask_head` does.

B images, A anchors.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from detection.data.batch import RankBatch
from detection.data.image_pipeline import HostImagePipeline
from detection.data.prefetch import to_device
from detection.engine import train_loop
from detection.engine.optim import freeze_batch_norm
from detection.runtime.device import should_compile
from detection.synthetic import coco_scenes
from maskrcnn import box_coder, rpn
from maskrcnn.anchors import STRIDES_PX, make_anchors
from maskrcnn.backbone import NUM_CHANNELS
from maskrcnn.config import Config, load
from maskrcnn.data import Batch, MaskRCNNTrainDataset, is_landscape
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.model import POOLED_STRIDES_PX, MaskRCNN, make_model
from maskrcnn.roi_align import Rois, roi_align
from maskrcnn.roi_heads import BOX_POOL_SIZE, MASK_POOL_SIZE, MASK_SIZE, MaskHead
from maskrcnn.train import make_workload, predict
from maskrcnn.weights import from_torchvision
from perf.harness import BenchContext, Result
from perf.maskrcnn import baseline
from perf.roofline import count_work
from perf.ssd.network import baseline_variant, first_step, in_precision
from perf.timing import Variant

SLOW_ROUNDS = 3

# Of the regions of an image that are trained at most 512, those with an object at most 128: half of those, as in the
# midst of training.
BOX_REGIONS, MASK_REGIONS = 512, 64


class VariantPair(NamedTuple):
    """Ours, and what is beside it; a run gives what it has computed, so that both can be compared."""

    optimized: Variant
    baseline: tuple[Variant, ...]


def time_step(bench: BenchContext) -> Iterator[Result]:
    """Mask R-CNN's training step, from pixels to updated weights, beside torchvision's."""
    for name in dict.fromkeys((bench.precision.name, "fp32")):
        ours, plain = step_variants(bench, configured(bench, "--variant", "torchvision", "--precision", name))
        is_usual = name == bench.precision.name
        yield from bench.compare(
            "maskrcnn_step",
            ours,
            *bench.baselines(plain),
            unit="img/s",
            work=count_work(ours.run, ours.images),
            limits=bench.roofline(precision_name=name),
            requirement="maskrcnn step" if is_usual else "",
            rounds=None if is_usual else slow_rounds(bench),
        )
    for choice in ("off", "on") if bench.size.compiled and should_compile("auto", bench.device) else ("off",):
        yield from reference_step(bench, choice)


def reference_step(bench: BenchContext, compile: str) -> Iterator[Result]:
    """The step with the reference's settings, as a run makes it; nothing where it cannot be compiled."""
    config = configured(bench, "--compile", compile)
    run = optimized_step(bench, config, torchvision_model(bench, config))
    step = Variant(f"the reference's settings, {bench.precision.name}, {shape_text(bench)}", run, config.batch_size)
    if compile == "on":
        step = step._replace(variant=f"{step.variant}, compiled")
        first = first_step("maskrcnn_step", step, bench.device)
        if not first:
            return
        yield first
    work = None if compile == "on" else count_work(run, config.batch_size)
    yield from bench.compare("maskrcnn_step", step, unit="img/s", work=work, rounds=slow_rounds(bench))


def step_variants(bench: BenchContext, config: Config) -> VariantPair:
    """The step of the settings, and torchvision's on the same images from the same weights; both give five losses."""
    size = config.batch_size
    theirs = torchvision_model(bench, config)
    run = optimized_step(bench, config, theirs)
    step = baseline.make_step(theirs.to(bench.device), baseline.to_target(ready_batch(bench)))
    return VariantPair(
        Variant(f"{config.precision}, channels last, {shape_text(bench)}", run, size),
        (baseline_variant(bench, f"torchvision's, float32, channels first, {shape_text(bench)}", step, size),),
    )


def optimized_step(bench: BenchContext, config: Config, theirs: nn.Module) -> Callable[[], object]:
    """The run's own step on a batch on the device, from the weights of torchvision's model."""
    evaluation = MaskRCNNEvaluator(config, bench.ranks, predict)
    benchmark = make_workload(config, bench.ranks, bench.seed, copy_weights_from(theirs, config), evaluation)
    state = train_loop.build_state(benchmark, config, bench.ranks)
    share = RankBatch(ready_batch(bench), config.batch_size, 1 / config.batch_size)

    def step() -> Tensor:
        return train_loop.train_step(state, share, baseline.LEARNING_RATE, benchmark, config, bench.ranks)

    return in_precision(config.precision, bench, step)


def time_backbone(bench: BenchContext) -> Iterator[Result]:
    """Mask R-CNN's ResNet and pyramid, forward and backward: frozen norms folded beside modules of their own."""
    config = configured(bench, "--variant", "torchvision")
    yield from compare(bench, "maskrcnn_trunk", backbone_variants(bench, config), counted=True)


def backbone_variants(bench: BenchContext, config: Config) -> VariantPair:
    """The trunk, torchvision's, and torchvision's in our precision and layout; each gives P2 to P6."""
    batch = ready_batch(bench)
    pixels = torch.randn(batch.images.shape, device=bench.device)
    model = torchvision_model(bench, config)
    ours = copy_weights_from(model, config).backbone.to(bench.device).to(memory_format=torch.channels_last)
    theirs = model.backbone.to(bench.device)
    tuned = deepcopy(theirs).to(memory_format=torch.channels_last)

    def features(trunk: nn.Module, images: Tensor) -> list[Tensor]:
        trunk.zero_grad()
        levels = trunk(images)
        levels = list(levels.values()) if isinstance(levels, dict) else levels
        sum(level.float().sum() for level in levels).backward()
        return [level.detach() for level in levels]

    last = pixels.contiguous(memory_format=torch.channels_last)
    size, what = len(pixels), f"float32, channels first, {shape_text(bench)}"
    return VariantPair(
        Variant(
            f"{bench.precision.name}, folded, {shape_text(bench)}", fast(bench, lambda: features(ours, last)), size
        ),
        (
            baseline_variant(bench, f"torchvision's, {what}", lambda: features(theirs, pixels), size),
            Variant(
                f"torchvision's, {bench.precision.name}, channels last",
                fast(bench, lambda: features(tuned, last)),
                size,
            ),
        ),
    )


def time_align(bench: BenchContext) -> Iterator[Result]:
    """RoIAlign over Mask R-CNN's pyramid, forward and backward, beside torchvision's."""
    for cells, regions in ((BOX_POOL_SIZE, BOX_REGIONS), (MASK_POOL_SIZE, MASK_REGIONS)):
        yield from compare(bench, "maskrcnn_align", align_variants(bench, cells, regions))


def align_variants(bench: BenchContext, cells: int, per_image: int) -> VariantPair:
    """Regions of cells × cells cut out of P2 to P5; each gives them, and the gradient of the finest level."""
    batch = ready_batch(bench)
    size, (height, width) = len(batch.images), batch.images.shape[2:]
    truth = zip(batch.boxes_xyxy, batch.labels, strict=True)
    of_image = [jittered(boxes[labels > 0], per_image) for boxes, labels in truth]
    boxes = torch.cat(of_image)
    numbers = torch.arange(size, device=bench.device).repeat_interleave(per_image)
    plain = [torch.randn(size, NUM_CHANNELS, height // s, width // s, device=bench.device) for s in POOLED_STRIDES_PX]
    dtype = bench.precision.dtype or torch.float32
    levels = [level.to(dtype, memory_format=torch.channels_last) for level in plain]
    upstream = torch.randn(len(boxes), NUM_CHANNELS, cells, cells, device=bench.device)
    pooler = MultiScaleRoIAlign([str(number) for number in range(len(plain))], cells, sampling_ratio=2)
    for level in (*plain, *levels):
        level.requires_grad_()

    def ours() -> tuple[Tensor, Tensor]:
        pooled = roi_align(levels, Rois(boxes, numbers), cells, strides_px=POOLED_STRIDES_PX, legacy=False)
        return pooled.detach(), torch.autograd.grad(pooled, levels, upstream.to(dtype))[0]

    def torchvision() -> tuple[Tensor, Tensor]:
        named = {str(number): level for number, level in enumerate(plain)}
        pooled = pooler(named, of_image, [(height, width)] * size)
        return pooled.detach(), torch.autograd.grad(pooled, plain, upstream)[0]

    what = f"{per_image} regions of {cells} × {cells} an image"
    return VariantPair(
        Variant(f"{bench.precision.name}, {what}", in_precision(bench.precision.name, bench, ours), size),
        (baseline_variant(bench, f"torchvision's, float32, {what}", torchvision, size),),
    )


def jittered(boxes_xyxy: Tensor, count: int) -> Tensor:
    """As many regions (count, 4) around the boxes (G, 4)."""
    rows = boxes_xyxy[torch.arange(count, device=boxes_xyxy.device) % len(boxes_xyxy)]
    sides = (rows[:, 2:] - rows[:, :2]).repeat(1, 2)
    moved = rows + 0.1 * sides * torch.rand(rows.shape, device=rows.device)
    return torch.cat([moved[:, :2], moved[:, 2:].maximum(moved[:, :2] + 1)], dim=1)


def time_proposals(bench: BenchContext) -> Iterator[Result]:
    """Mask R-CNN's region proposals of given answers of the network, beside torchvision's."""
    yield from compare(bench, "maskrcnn_proposals", proposal_variants(bench))


def proposal_variants(bench: BenchContext) -> VariantPair:
    """Answers to proposals; each gives the boxes (P, 4) of the first image.

    As of a trained network: anchors that overlap an object are likelier, and their boxes lean towards it.
    """
    config = configured(bench, "--variant", "torchvision")
    batch = ready_batch(bench)
    size, (height, width) = len(batch.images), batch.images.shape[2:]
    anchors = make_anchors(height, width, bench.device, legacy=False)
    overlap, index = box_coder.pairwise_iou(batch.boxes_xyxy, anchors, legacy=False).max(dim=1)  # (B, A)
    nearest = batch.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)).maximum(anchors.new_tensor([0, 0, 1, 1]))
    logits = 8 * overlap - 4 + torch.randn(overlap.shape, device=bench.device)
    towards = box_coder.encode(nearest, anchors, box_coder.RPN_WEIGHTS, legacy=False)
    deltas = torch.where(overlap[..., None] > 0.3, 0.8 * towards, 0.0) + 0.05 * torch.randn(
        towards.shape, device=bench.device
    )
    network = torchvision_model(bench, config).rpn
    maps = [torch.empty(1, 0, -(-height // s), -(-width // s), device=bench.device) for s in STRIDES_PX]
    counts = [3 * level.shape[2] * level.shape[3] for level in maps]
    as_list = ImageList(batch.images, [tuple(hw) for hw in batch.sizes_hw.tolist()])

    def ours() -> Tensor:
        proposals = rpn.generate_proposals(logits, deltas, anchors, batch.images, batch.sizes_hw, config, training=True)
        return proposals.boxes_xyxy[0, proposals.valid[0]]

    @torch.no_grad()
    def torchvision() -> Tensor:
        on_images = network.anchor_generator(as_list, maps)
        decoded = network.box_coder.decode(deltas.flatten(0, 1), on_images).view(size, -1, 4)
        boxes: list[Tensor] = network.filter_proposals(decoded, logits, as_list.image_sizes, counts)[0]
        return boxes[0]

    return VariantPair(
        Variant(f"by level, {shape_text(bench)}", ours, size), (Variant("torchvision's", torchvision, size),)
    )


def time_mask_head(bench: BenchContext) -> Iterator[Result]:
    """Mask R-CNN's mask head and its loss, forward and backward: masks of one class beside those of all."""
    yield from compare(bench, "maskrcnn_mask_head", mask_head_variants(bench), counted=True)


def mask_head_variants(bench: BenchContext) -> VariantPair:
    """Regions to the loss of their masks; each gives it, and the gradient of the first layer."""
    config = configured(bench)
    size, count_regions = config.batch_size, config.batch_size * MASK_REGIONS
    regions = torch.randn(count_regions, NUM_CHANNELS, MASK_POOL_SIZE, MASK_POOL_SIZE, device=bench.device)
    labels = torch.randint(1, config.num_classes, (count_regions,), device=bench.device)
    wanted = torch.randint(0, 2, (count_regions, MASK_SIZE, MASK_SIZE), device=bench.device).float()
    head, theirs, tuned = (MaskHead(config.num_classes).to(bench.device) for _ in range(3))
    for other in (theirs, tuned):
        other.load_state_dict(head.state_dict())
    for fast_one in (head, tuned):
        fast_one.to(memory_format=torch.channels_last)

    def of_one_class(head: MaskHead, x: Tensor) -> Tensor:
        return head(x, labels)

    def of_all_classes(head: MaskHead, x: Tensor) -> Tensor:
        logits: Tensor = head.predictor(head.features(x))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()

    def trained(way: Callable[[MaskHead, Tensor], Tensor], head: MaskHead, x: Tensor) -> tuple[Tensor, Tensor]:
        head.zero_grad()
        x = x.detach().requires_grad_()
        loss = F.binary_cross_entropy_with_logits(way(head, x), wanted)
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    last = regions.contiguous(memory_format=torch.channels_last)
    what = f"{MASK_REGIONS} regions an image"
    return VariantPair(
        Variant(
            f"{bench.precision.name}, one class, {what}", fast(bench, lambda: trained(of_one_class, head, last)), size
        ),
        (
            baseline_variant(
                bench,
                "torchvision's, float32, channels first, all classes",
                lambda: trained(of_all_classes, theirs, regions),
                size,
            ),
            Variant(
                f"torchvision's, {bench.precision.name}, channels last, all classes",
                fast(bench, lambda: trained(of_all_classes, tuned, last)),
                size,
            ),
        ),
    )


def compare(bench: BenchContext, part: str, sides: VariantPair, *, counted: bool = False) -> Iterator[Result]:
    """A part of the step beside torchvision's. counted: whether its operations are ones that can be."""
    work = count_work(sides.optimized.run, sides.optimized.images) if counted else None
    yield from bench.compare(part, sides.optimized, *bench.baselines(sides.baseline), work=work)


def fast(bench: BenchContext, run: Callable[[], object]) -> Callable[[], object]:
    """A call in the precision of the bench, as the loop makes it."""

    def within() -> object:
        with bench.precision.autocast(bench.device):
            return run()

    return in_precision(bench.precision.name, bench, within)


def configured(bench: BenchContext, *flags: str) -> Config:
    """The settings of a run on this bench, of COCO's classes, not compiled."""
    min_px, max_px = bench.size.maskrcnn_image_px
    known = {
        "--device": bench.device,
        "--precision": bench.precision.name,
        "--seed": bench.seed,
        "--batch-size": bench.size.maskrcnn_batch_size,
        "--num-workers": bench.num_workers,
        "--num-classes": 1 + len(coco_scenes.COCO_CATEGORIES),
        "--min-image-size": min_px,
        "--max-image-size": max_px,
        "--compile": "off",
    }
    return load([*(str(word) for pair in known.items() for word in pair), *flags], {}).config


def torchvision_model(bench: BenchContext, config: Config) -> Any:
    """torchvision's model in training, of one seed always the same."""
    torch.manual_seed(bench.seed)
    return baseline.make_model(config).train()


def copy_weights_from(theirs: nn.Module, config: Config) -> MaskRCNN:
    """Our model in training, with the weights of torchvision's."""
    model = make_model(config)
    model.load_state_dict(model.state_dict() | from_torchvision(theirs.state_dict()))
    model.train()
    freeze_batch_norm(model)
    return model


def ready_batch(bench: BenchContext) -> Batch:
    """Made-up photos with outlines, as a run gets them on the device, all of them wide."""
    split = bench.polygon_split()
    min_px, max_px = bench.size.maskrcnn_image_px
    images = MaskRCNNTrainDataset(
        split,
        seed=bench.seed,
        min_size_px=min_px,
        max_size_px=max_px,
        flip=False,
        legacy=False,
        pixels=HostImagePipeline(),
    )
    wide = np.resize(np.flatnonzero(is_landscape(split.sizes_hw)), bench.size.maskrcnn_batch_size)
    batch = images.__getitems__([(1, index) for index in wide.tolist()])
    assert isinstance(batch, Batch)  # drawn here, so that each can be read
    return to_device(batch, bench.device)


def slow_rounds(bench: BenchContext) -> int:
    """Samples of what takes many seconds, or answers no requirement."""
    return min(bench.size.rounds, SLOW_ROUNDS)


def shape_text(bench: BenchContext) -> str:
    """How many images, and how large their short sides are."""
    return f"batch {bench.size.maskrcnn_batch_size}, {bench.size.maskrcnn_image_px[0]} px"
