"""RetinaNet's detection and evaluation without the network, compared with torchvision's and pycocotools."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from detection.data.coco import Split
from detection.data.prefetch import to_device
from detection.evaluation.coco_metric import CocoBoxMetric
from detection.nn.detections import Detections
from perf.harness import BenchContext, Result
from perf.maskrcnn.training import slow_rounds
from perf.retinanet import baseline
from perf.retinanet.predictions import EARLY, TRAINED, SyntheticScores, make_scenes, predict, write_split
from perf.retinanet.training import load_config
from perf.timing import Variant
from retinanet.anchors import make_anchors
from retinanet.config import Config
from retinanet.data import EvalBatch, RetinaNetEvalSource
from retinanet.evaluator import RetinaNetEvaluator
from retinanet.model import HeadOutputs
from retinanet.postprocess import detect

NUM_SCENES = 4


def time_decode(context: BenchContext) -> Iterator[Result]:
    """Time RetinaNet's decoding and NMS, with outputs of a trained network and early in training."""
    for name, scores in (("trained", TRAINED), ("early", EARLY)):
        variants = decode_variants(context, load_config(context), name, scores)
        yield from context.compare("retinanet_decode", *variants, requirement=f"retinanet {name} scores")


@torch.inference_mode()
def decode_variants(context: BenchContext, config: Config, name: str, scores: SyntheticScores) -> list[Variant]:
    """Return detection of given outputs. Each variant returns boxes, labels from 0 and scores of all images."""
    side = config.image_size
    scenes = make_scenes(config, NUM_SCENES, context.seed)
    outputs = to_device(predict(scenes, config, scores, context.seed), context.device)
    anchors = make_anchors(side, side, context.device, config.anchor_sizes)
    model = baseline.make_model(config)

    @torch.inference_mode()
    def run() -> tuple[Tensor, Tensor, Tensor]:
        detections = detect(outputs, anchors, (side, side))
        return detections.boxes_xyxy, detections.labels - 1, detections.scores

    @torch.inference_mode()
    def run_torchvision() -> tuple[Tensor, Tensor, Tensor]:
        detections = baseline.detect(model, outputs, anchors, side)
        boxes, labels, image_scores = (
            torch.cat([image[key] for image in detections]) for key in ("boxes", "labels", "scores")
        )
        return boxes, labels, image_scores

    title = f"{name} scores, {side} px"
    optimized = Variant(f"{title}, {len(run()[1]) / NUM_SCENES:.0f} detections per image", run, NUM_SCENES)
    return [optimized, Variant(f"torchvision, {title}", run_torchvision, NUM_SCENES)]


def time_evaluation(context: BenchContext) -> Iterator[Result]:
    """Time RetinaNet's evaluation of given outputs, from logits to metrics, against torchvision and pycocotools."""
    yield from context.compare(
        "retinanet_evaluation",
        *evaluation_variants(context, load_config(context)),
        requirement="retinanet evaluation",
        rounds=slow_rounds(context),
        warm_up=False,
    )


def evaluation_variants(context: BenchContext, config: Config) -> list[Variant]:
    """Return evaluations without network and files. Each returns the metrics."""
    num_images = context.size.retinanet_eval_images
    scenes = make_scenes(config, NUM_SCENES, context.seed)
    split = write_split(context.scratch / f"retinanet-{config.image_size}-{num_images}", scenes, config, num_images)
    outputs = to_device(predict(scenes, config, TRAINED, context.seed), context.device)
    model, data = FixedOutputModel(outputs), SyntheticEvalSource(split, config)
    anchors = make_anchors(config.image_size, config.image_size, context.device, config.anchor_sizes)
    evaluator, pycocotools = OutputEvaluator(config, context.ranks), CocoBoxMetric(split)
    torchvision = baseline.make_model(config)

    @torch.inference_mode()
    def run_torchvision() -> dict[str, float]:
        detections: list[dict[str, Tensor]] = []
        scales_wh: list[Tensor] = []
        for batch in data.eval_batches():
            detections += baseline.detect(torchvision, model(batch.images), anchors, config.image_size)
            scales_wh += evaluator.scales_wh(batch)
        return baseline.evaluate(detections, scales_wh, pycocotools)

    title = f"{num_images} images, {config.image_size} px"
    run = torch.inference_mode()(partial(evaluator, model, data))
    return [
        Variant(title, run, num_images),
        Variant(f"torchvision, pycocotools, {title}", run_torchvision, num_images),
    ]


class FixedOutputModel(nn.Module):
    """Network that returns given outputs of `NUM_SCENES` images in turn."""

    def __init__(self, outputs: HeadOutputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor) -> HeadOutputs:
        """Return the first outputs, for any images (B, ...)."""
        logits, deltas = ([level[: len(images)] for level in levels] for levels in self.outputs)
        return HeadOutputs(logits, deltas)


class OutputEvaluator(RetinaNetEvaluator):
    """Evaluator of a network that needs no images."""

    def predict(self, model: nn.Module, batch: EvalBatch) -> Detections:
        """Return the detections in a batch."""
        return self.detect(model(batch.images))


class SyntheticEvalSource(RetinaNetEvalSource):
    """Evaluation data without pixels, `NUM_SCENES` images in a batch."""

    def __init__(self, split: Split, config: Config):
        self.val, self.eval_samples, self.categories = split, len(split), split.categories
        self.metric = CocoBoxMetric(split, config.coco_eval_backend)
        self.size_px = config.image_size

    def eval_batches(self) -> Iterator[EvalBatch]:
        """Yield all batches."""
        for indices in torch.arange(len(self.val)).split(NUM_SCENES):
            yield EvalBatch(torch.zeros(len(indices), 3, 0, 0), torch.full((len(indices), 2), self.size_px), indices)
