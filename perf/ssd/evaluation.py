"""SSD300's evaluation: detection, the COCO metric, and both with the network.

B images, A anchors, K classes with background 0, D detections.
"""

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from detection.data.prefetch import to_device
from detection.evaluation.coco_metric import CocoBoxMetric
from detection.runtime.device import synchronize
from perf.harness import FULL_METRIC_IMAGES, BenchContext, Result
from perf.ssd import baseline
from perf.ssd.input import SMALL_BATCH
from perf.ssd.network import baseline_variant, build, with_precision
from perf.ssd.predictions import EARLY, TRAINED, make_rows, predict
from perf.timing import Variant, quartiles
from ssd.anchors import IMAGE_SIZE_PX, make_anchors
from ssd.data import SSDTrainSource
from ssd.postprocess import detect

GT_IMAGES = 256
DETECTIONS_PER_IMAGE = 200


def time_detect(context: BenchContext) -> Iterator[Result]:
    """Time detection with predictions of a trained network, and of one early in training."""
    gt, num_images = context.gt_split(GT_IMAGES), context.size.predictions
    for name, scores in (("trained", TRAINED), ("early", EARLY)):
        predictions = predict(scores, gt, make_anchors("cpu"), num_images, context.seed)
        yield from time_detect_scores(context, name, *to_device(predictions, context.device))


def time_detect_scores(context: BenchContext, name: str, deltas: Tensor, logits: Tensor) -> Iterator[Result]:
    """Time detection with deltas (B, A, 4) and logits (B, A, K)."""
    anchors, num_images = make_anchors(context.device), len(deltas)
    reference_deltas, reference_logits = (t.transpose(1, 2).contiguous() for t in (deltas, logits))

    optimized = partial(detect, deltas, logits, anchors)
    per_image = round(len(optimized().scores) / num_images)
    box_by_box = partial(baseline.detect, reference_deltas, reference_logits, anchors)
    yield from context.compare(
        "detect",
        Variant(f"{name} scores, batch {num_images}, {per_image} detections per image", optimized, num_images),
        Variant(f"box by box, {name} scores", box_by_box, num_images),
        requirement=f"detection, {name} scores",
    )


def time_metric(context: BenchContext) -> Iterator[Result]:
    """Time the COCO metric with synthetic detections, 200 per image."""
    for num_images in context.size.metric_images:
        gt = context.gt_split(num_images)
        rows = make_rows(gt, DETECTIONS_PER_IMAGE, context.seed)
        hotcoco, pycocotools = (CocoBoxMetric(gt, name) for name in ("hotcoco", "pycocotools"))
        is_full = num_images >= FULL_METRIC_IMAGES
        title = f"{num_images} images × {DETECTIONS_PER_IMAGE}"
        yield from context.compare(
            "metric",
            Variant(f"hotcoco, {title}", partial(hotcoco, rows)),
            Variant(f"pycocotools, {title}", partial(pycocotools, rows)),
            unit="s",
            requirement="metric" if is_full else "",
            rounds=context.size.full_metric_rounds if is_full else None,
            warm_up=not is_full,
        )


def time_evaluate(context: BenchContext) -> Iterator[Result]:
    """Time an evaluation from files to the COCO metric, and the fraction of the network's forward pass in it."""
    size, device = context.size, context.device
    data = context.make_train_source(
        context.photos, 1, size.eval_images, eval_batch_size=size.eval_batch_size, num_workers=context.num_workers
    )
    config = context.config(num_classes=data.val.num_classes, eval_batch_size=size.eval_batch_size)
    workload, state = build(context, config)
    outputs = to_device(predict(TRAINED, data.val, make_anchors("cpu"), size.eval_batch_size, context.seed), device)
    model = FixedOutputModel(state.model.eval(), *outputs)
    images = torch.randn(size.eval_batch_size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    forward_s: list[float] = []

    @torch.inference_mode()
    def run_evaluation() -> None:
        model.seconds = 0.0
        with state.precision.autocast(device):
            workload.evaluate(model, data)
        forward_s.append(model.seconds)

    @torch.inference_mode()
    def run_forward() -> None:
        with state.precision.autocast(device):
            model.network(images)

    title = f"{size.eval_images} images, batch {size.eval_batch_size}"
    results = list(
        context.compare(
            "evaluate",
            Variant(title, with_precision(config.precision, context, run_evaluation), size.eval_images),
            baseline_evaluation(context, data, *outputs),
            Variant("the forward pass alone", with_precision(config.precision, context, run_forward), len(images)),
            rounds=min(size.rounds, 3),
        )
    )
    yield from results
    total_s = results[0].value.median / 1000 * size.eval_images
    percent = quartiles([100 * seconds / total_s for seconds in forward_s[-results[0].value.n :]])
    yield Result("evaluate", "fraction of the forward pass", "%", percent)


def baseline_evaluation(context: BenchContext, data: SSDTrainSource, deltas: Tensor, logits: Tensor) -> Variant:
    """Return the baseline from files to detections, without the metric, with fewer images."""
    num_images, batch_size = context.size.baseline_eval_images, min(SMALL_BATCH, len(deltas))
    model = baseline.BaselineSSD300(logits.shape[-1]).to(context.device).eval()
    dataset = Subset(baseline.EvalSamples(data.val), range(num_images))
    loader = baseline.make_loader(dataset, batch_size, context.num_workers, context.device, train=False)
    anchors = make_anchors(context.device)
    deltas, logits = (t.transpose(1, 2).contiguous() for t in (deltas, logits))

    @torch.inference_mode()
    def run() -> None:
        for images in loader:
            model(images.to(context.device))
            baseline.detect(deltas[: len(images)], logits[: len(images)], anchors)

    return baseline_variant(context, f"Pillow, float32, box by box, no metric, batch {batch_size}", run, num_images)


class FixedOutputModel(nn.Module):
    """Network whose outputs are replaced by those of a trained one, since random weights detect nothing.

    seconds: total time of its forward passes.
    """

    def __init__(self, network: nn.Module, deltas: Tensor, logits: Tensor):
        super().__init__()
        self.network, self.deltas, self.logits = network, deltas, logits
        self.seconds = 0.0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return deltas (B, A, 4) and logits (B, A, K) for images (B, 3, 300, 300)."""
        synchronize(images.device)
        start_s = time.perf_counter()
        self.network(images)
        synchronize(images.device)
        self.seconds += time.perf_counter() - start_s
        return self.deltas[: len(images)], self.logits[: len(images)]
