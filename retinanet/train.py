"""Training program of RetinaNet, and of the other runs that --mode selects.

This module assembles the model, loss, data and evaluator to a `Workload`. detection/engine/train_loop.py runs it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from detection.checkpoint import pretrained_backbone
from detection.data import device_cache, image_io, num_classes
from detection.engine import entrypoint, optim
from detection.engine.finalize import finalize_run
from detection.engine.initialization import load_weights
from detection.engine.metadata import log_hyperparameters
from detection.engine.workload import Workload
from detection.runtime import device
from detection.runtime.distributed import DistContext
from mlperf.rules import tensor_names
from retinanet import weights
from retinanet.anchors import make_anchors
from retinanet.config import Config, load
from retinanet.data import Batch, EvalBatch, RetinaNetEvalSource, RetinaNetTrainSource
from retinanet.evaluator import RetinaNetEvaluator
from retinanet.loss import LOSS_NAMES, loss_of_matched, match_images
from retinanet.model import RetinaNet, make_model
from retinanet.resize import normalize_and_resize, resize_boxes


def main(argv: list[str]) -> int:
    """Run this rank and return the exit status."""
    return entrypoint.main(argv, lambda flags: load(flags).config, run_mode)


def run_mode(config: Config, process: entrypoint.ProcessContext) -> int:
    """Run the mode of the settings and return the exit status."""
    ranks = process.ranks
    config = ranks.broadcast(num_classes.resolve_num_classes(config) if ranks.is_main else None)
    evaluator = RetinaNetEvaluator(config, ranks)
    with entrypoint.open_run(config, process) as run:
        model = make_model(config)
        if not run.resume_point:
            load_weights(
                run,
                partial(weights.load, model, config),
                partial(pretrained_backbone.load, model.backbone.body, config.backbone_name),
            )
        workload = make_workload(config, ranks, run.seed, model, evaluator)
        hyperparameters = config.hyperparameters(ranks.world_size)
        log_recipe = partial(log_hyperparameters, run.log, hyperparameters, partial(tensor_names, "retinanet"))
        result = entrypoint.run_mode(workload, run, log_recipe)
    return finalize_run(result, run, evaluator) if result else 0


def make_workload(
    config: Config, ranks: DistContext, seed: int, model: RetinaNet, evaluator: RetinaNetEvaluator
) -> Workload[Batch]:
    """Assemble RetinaNet for the training loop."""
    return Workload(
        model=model,
        loss=make_loss(config, ranks.device),
        loss_names=LOSS_NAMES,
        dummy_batch=partial(dummy_batch, config, ranks),
        dummy_eval_batch=partial(dummy_eval_batch, config),
        make_train_source=partial(RetinaNetTrainSource, config, ranks, seed),
        make_eval_source=partial(RetinaNetEvalSource, config, ranks),
        lr_schedule=partial(
            optim.linear_warmup_lr,
            peak=config.peak_lr(ranks.world_size),
            warmup_epochs=config.warmup_epochs,
            warmup_start_factor=config.warmup_factor,
        ),
        predict=evaluator.predict,
        evaluate=evaluator,
        evaluate_other=evaluator.evaluate_other,
        targets={"AP": config.target},
        mlperf_accuracy=lambda metrics: metrics["AP"],
    )


def make_loss(config: Config, on_device: torch.device) -> Callable[[nn.Module, Batch], Tensor]:
    """Make the function that computes the losses (2,) of a batch, each summed over its images, on the device."""
    size = config.image_size
    anchors = make_anchors(size, size, on_device, config.anchor_sizes)
    resize_fn, loss_fn = normalize_and_resize, loss_of_matched
    compiled = device.should_compile(config.compile, on_device)
    if compiled:
        resize_fn = torch.compile(normalize_and_resize, dynamic=True)
        loss_fn = torch.compile(loss_of_matched)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(on_device.type, enabled=False):
            images = resize_fn(batch.images, batch.sizes_hw, batch.flips, size)
            boxes_xyxy = resize_boxes(batch.boxes_xyxy, batch.sizes_hw, batch.flips, size)
        outputs = model(images)
        with torch.autocast(on_device.type, enabled=False):
            labels = batch.labels - 1
            if compiled:  # compile once for any number of boxes
                for tensor in (boxes_xyxy, labels):
                    torch._dynamo.mark_dynamic(tensor, 1)
            matched = match_images(boxes_xyxy, labels >= 0, anchors)
            return loss_fn(outputs.logits, outputs.deltas, anchors, boxes_xyxy, labels, matched).sum(dim=0)

    return loss


def dummy_batch(config: Config, ranks: DistContext) -> Batch:
    """Make a training batch of random images with two boxes each, in the shape of a photo.

    Code that is compiled for squares would compile again for other shapes.
    """
    height, width = config.image_size, config.image_size * 4 // 3
    device_cache.warm_up(config, ranks, (height, width))
    count = config.batch_size
    box_xyxy = torch.tensor([0.25, 0.25, 0.75, 0.75]) * torch.tensor([width, height, width, height])
    return Batch(
        images=image_io.random_images(count, (height, width)),
        sizes_hw=torch.tensor([[height, width]] * count),
        boxes_xyxy=box_xyxy.expand(count, 2, 4).contiguous(),
        labels=torch.ones(count, 2, dtype=torch.int64),
        flips=torch.zeros(count, dtype=torch.bool),
    )


def dummy_eval_batch(config: Config) -> EvalBatch:
    """Make an evaluation batch of random images."""
    count, size = config.eval_batch_size, config.image_size
    return EvalBatch(image_io.random_images(count, (size, size)), torch.full((count, 2), size), torch.arange(count))
