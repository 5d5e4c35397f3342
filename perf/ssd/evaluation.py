"""From predictions to COCO's figures: detection, the metric, and the evaluation of many images.

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
from perf.ssd.network import baseline_variant, build, in_precision
from perf.ssd.predictions import EARLY, TRAINED, make_rows, predict
from perf.timing import Variant, quartiles
from ssd.anchors import IMAGE_SIZE_PX, make_anchors
from ssd.data import SSDTrainSource
from ssd.postprocess import Detections, detect

GT_IMAGES = 256
DETECTIONS_PER_IMAGE = 200


def time_detect(bench: BenchContext) -> Iterator[Result]:
    """Predictions to detections: of a trained network, and of one early in training."""
    truth, size = bench.gt_split(GT_IMAGES), bench.size.predictions
    for name, scores in (("trained", TRAINED), ("early", EARLY)):
        predictions = predict(scores, truth, make_anchors("cpu"), size, bench.seed)
        yield from detect_of(bench, name, *to_device(predictions, bench.device))


def detect_of(bench: BenchContext, name: str, deltas: Tensor, logits: Tensor) -> Iterator[Result]:
    """Detections of deltas (B, A, 4) and logits (B, A, K)."""
    anchors, size = make_anchors(bench.device), len(deltas)
    with torch.device("meta"):  # its weights take no part
        vgg = baseline.make_vgg(logits.shape[-1])
    outputs = {"bbox_regression": deltas.contiguous(), "cls_logits": logits.contiguous()}
    as_reference = [t.transpose(1, 2).contiguous() for t in (deltas, logits)]
    anchors_px = [IMAGE_SIZE_PX * anchors.boxes_xyxy] * size
    sizes_px = [(IMAGE_SIZE_PX, IMAGE_SIZE_PX)] * size

    def ours() -> Detections:
        return detect(deltas, logits, anchors)

    def plain() -> Detections:
        return baseline.detect(as_reference[0], as_reference[1], anchors)

    def torchvision() -> object:
        return vgg.postprocess_detections(outputs, anchors_px, sizes_px)

    found = round(len(ours().scores) / size)
    yield from bench.compare(
        "detect",
        Variant(f"{name} scores, batch {size}, {found} found an image", ours, size),
        *bench.baselines(
            [
                Variant(f"box by box, {name} scores", plain, size),
                Variant(f"torchvision's postprocess, {name} scores", torchvision, size),
            ]
        ),
        requirement=f"detection, {name} scores",
    )


def time_metric(bench: BenchContext) -> Iterator[Result]:
    """COCO's figures of made-up detections, 200 of each image."""
    for num_images in bench.size.metric_images:
        truth = bench.gt_split(num_images)
        rows = make_rows(truth, DETECTIONS_PER_IMAGE, bench.seed)
        fast, official = (CocoBoxMetric(truth.annotation_file, library) for library in ("hotcoco", "pycocotools"))
        is_full = num_images >= FULL_METRIC_IMAGES
        size = f"{num_images} images × {DETECTIONS_PER_IMAGE}"
        yield from bench.compare(
            "metric",
            Variant(f"hotcoco, {size}", partial(fast, rows)),
            *bench.baselines([Variant(f"pycocotools, {size}", partial(official, rows))]),
            unit="s",
            requirement="metric" if is_full else "",
            rounds=bench.size.full_metric_rounds if is_full else None,
            warm=not is_full,
        )


def time_evaluate(bench: BenchContext) -> Iterator[Result]:
    """The evaluation of many images, files to COCO's figures, and the share of the network's forward pass in it."""
    scale, device = bench.size, bench.device
    data = bench.open_data(
        bench.photos, 1, scale.eval_images, eval_batch_size=scale.eval_batch_size, num_workers=bench.num_workers
    )
    config = bench.config(num_classes=data.val.num_classes, eval_batch_size=scale.eval_batch_size)
    benchmark, state = build(bench, config)
    answers = to_device(predict(TRAINED, data.val, make_anchors("cpu"), scale.eval_batch_size, bench.seed), device)
    model = FixedOutputModel(state.model.eval(), *answers)
    images = torch.randn(scale.eval_batch_size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    forward_s: list[float] = []

    @torch.inference_mode()
    def ours() -> None:
        model.seconds = 0.0
        with state.precision.autocast(device):
            benchmark.evaluate(model, data)
        forward_s.append(model.seconds)

    @torch.inference_mode()
    def alone() -> None:
        with state.precision.autocast(device):
            model.network(images)

    what = f"{scale.eval_images} images, batch {scale.eval_batch_size}"
    results = list(
        bench.compare(
            "evaluate",
            Variant(what, in_precision(config.precision, bench, ours), scale.eval_images),
            Variant("the forward pass alone", in_precision(config.precision, bench, alone), len(images)),
            *bench.baselines(baseline_evaluation(bench, data, *answers)),
            rounds=min(scale.rounds, 3),
        )
    )
    yield from results
    whole_s = results[0].value.median / 1000 * scale.eval_images
    inside = quartiles([100 * seconds / whole_s for seconds in forward_s[-results[0].value.n :]])
    yield Result("evaluate", "the forward pass's share of it", "%", inside)


def baseline_evaluation(bench: BenchContext, data: SSDTrainSource, deltas: Tensor, logits: Tensor) -> Iterator[Variant]:
    """Files to detections the plain way, without the metric, of fewer images."""
    num_images, size = bench.size.baseline_eval_images, min(SMALL_BATCH, len(deltas))
    model = baseline.BaselineSSD300(logits.shape[-1]).to(bench.device).eval()
    dataset = Subset(baseline.EvalSamples(data.val), range(num_images))
    loader = baseline.make_loader(dataset, size, bench.num_workers, bench.device, train=False)
    anchors = make_anchors(bench.device)
    deltas, logits = (t.transpose(1, 2).contiguous() for t in (deltas, logits))

    @torch.inference_mode()
    def run() -> None:
        for images in loader:
            model(images.to(bench.device))
            baseline.detect(deltas[: len(images)], logits[: len(images)], anchors)

    yield baseline_variant(bench, f"Pillow, float32, box by box, no metric, batch {size}", run, num_images)


class FixedOutputModel(nn.Module):
    """A network whose answers are replaced by those of a trained one: made of random weights it detects nothing.

    seconds: that its forward pass has taken.
    """

    def __init__(self, network: nn.Module, deltas: Tensor, logits: Tensor):
        super().__init__()
        self.network, self.deltas, self.logits = network, deltas, logits
        self.seconds = 0.0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 300, 300) to deltas (B, A, 4) and logits (B, A, K)."""
        synchronize(images.device)
        start_s = time.perf_counter()
        self.network(images)
        synchronize(images.device)
        self.seconds += time.perf_counter() - start_s
        return self.deltas[: len(images)], self.logits[: len(images)]
