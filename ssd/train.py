"""Training program of SSD300, and of the other runs that --mode selects.

This module assembles the model, loss, data and evaluator to a `Workload`. detection/engine/train_loop.py runs it.

Shapes: B images, A anchors.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
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
from ssd import augment, weights
from ssd.anchors import IMAGE_SIZE_PX, Anchors, make_anchors
from ssd.box_coder import encode
from ssd.config import Config, load
from ssd.data import SIZE_HW, Batch, EvalBatch, SSDEvalSource, SSDTrainSource
from ssd.evaluator import SSDEvaluator
from ssd.loss import LOSS_NAMES, multibox_loss
from ssd.model import SSD300, make_model


def main(argv: list[str]) -> int:
    """Run this rank and return the exit status."""
    return entrypoint.main(argv, lambda flags: load(flags).config, run_mode)


def run_mode(config: Config, process: entrypoint.ProcessContext) -> int:
    """Run the mode of the settings and return the exit status."""
    ranks = process.ranks
    config = ranks.broadcast(num_classes.resolve_num_classes(config) if ranks.is_main else None)
    evaluator = SSDEvaluator(config, ranks)
    with entrypoint.open_run(config, process) as run:
        model = make_model(config)
        if not run.resume_point:
            load_weights(
                run,
                partial(weights.load, model, config),
                partial(pretrained_backbone.load, model.backbone, config.backbone_name),
            )
        workload = make_workload(config, ranks, run.seed, model, evaluator)
        hyperparameters = config.hyperparameters(ranks.world_size)
        log_recipe = partial(log_hyperparameters, run.log, hyperparameters, partial(initialized_tensors, config, model))
        result = entrypoint.run_mode(workload, run, log_recipe)
    return finalize_run(result, run, evaluator) if result else 0


def make_workload(
    config: Config, ranks: DistContext, seed: int, model: SSD300, evaluator: SSDEvaluator
) -> Workload[Batch]:
    """Assemble SSD300 for the training loop."""
    return Workload(
        model=model,
        loss=make_loss(
            ranks.device,
            compiled=device.should_compile(config.compile, ranks.device),
            train_background=config.background_images == "keep",
        ),
        loss_names=LOSS_NAMES,
        dummy_batch=partial(dummy_batch, config, ranks),
        dummy_eval_batch=partial(dummy_eval_batch, config),
        make_train_source=partial(SSDTrainSource, config, ranks, seed),
        make_eval_source=partial(SSDEvalSource, config, ranks),
        lr_schedule=partial(
            optim.mlperf_ssd_lr,
            peak=config.peak_lr(ranks.world_size),
            warmup_steps=config.warmup_steps,
            warmup_factor=config.warmup_factor,
            lr_decay_epochs=config.lr_decay_epochs,
            lr_decay_factor=config.lr_decay_factor,
        ),
        predict=evaluator.predict,
        evaluate=evaluator,
        evaluate_other=evaluator.evaluate_other,
        targets={"AP": config.target},
        mlperf_accuracy=lambda metrics: metrics["AP"],
    )


def make_loss(
    device: torch.device, *, compiled: bool, train_background: bool = False
) -> Callable[[nn.Module, Batch], Tensor]:
    """Make the function that computes the losses (2,) of a batch, each summed over its images, on the device."""
    anchors = make_anchors(device)
    prepare_fn, loss_fn = prepare_batch, multibox_loss
    if compiled:
        prepare_fn, loss_fn = torch.compile(prepare_batch), torch.compile(multibox_loss)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if compiled:  # compile once for any number of boxes
            for tensor in (batch.boxes_xyxy, batch.labels):
                torch._dynamo.mark_dynamic(tensor, 1)
        images, deltas, labels = prepare_fn(batch, anchors)
        pred_deltas, logits = model(images)
        return loss_fn(pred_deltas, logits, deltas, labels, train_background=train_background).sum(dim=0)

    return loss


def prepare_batch(batch: Batch, anchors: Anchors) -> tuple[Tensor, Tensor, Tensor]:
    """Return the network inputs and targets: images (B, 3, 300, 300), deltas (B, A, 4), labels (B, A)."""
    with torch.autocast(batch.images.device.type, enabled=False):
        images, boxes_xyxy = augment.augment_batch(batch.images, batch.boxes_xyxy, batch.augmentation)
        return augment.normalize(images), *encode(boxes_xyxy, batch.labels, anchors)


def dummy_batch(config: Config, ranks: DistContext) -> Batch:
    """Make a training batch of random images with two boxes each, in the shape of real batches."""
    device_cache.warm_up(config, ranks, SIZE_HW)
    size, boxes = config.batch_size, np.array([[0.25, 0.25, 0.75, 0.75]] * 2, dtype=np.float32)
    _, params = augment.sample_augmentation(config, np.random.default_rng(0), boxes)
    return Batch(
        images=image_io.random_images(size, SIZE_HW),
        boxes_xyxy=torch.from_numpy(boxes).repeat(size, 1, 1),
        labels=torch.ones(size, 2, dtype=torch.int64),
        augmentation=augment.AugmentParams.stack([params] * size),
    )


def dummy_eval_batch(config: Config) -> EvalBatch:
    """Make an evaluation batch of random images, in the shape of real batches."""
    size = config.eval_batch_size
    return EvalBatch(image_io.random_images(size, SIZE_HW), torch.arange(size), torch.full((size, 2), IMAGE_SIZE_PX))


def initialized_tensors(config: Config, model: SSD300) -> list[str]:
    """Return the names of the initialized tensors: those of the rules, which name the tensors of no other network."""
    return (
        tensor_names("ssd") if config.network_name == "ssd300-r34" else [name for name, _ in model.named_parameters()]
    )
