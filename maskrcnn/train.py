"""Entry point that trains Mask R-CNN, or runs another --mode, on the loop of detection/engine/train_loop.py."""

from functools import partial

import torch
from torch import Tensor, nn

from detection.data import device_cache, image_io, num_classes
from detection.engine import entrypoint, optim
from detection.engine.finalize import finalize_run
from detection.engine.initialization import load_weights
from detection.engine.metadata import log_hyperparameters
from detection.engine.workload import Workload
from detection.runtime.distributed import DistContext
from maskrcnn import weights
from maskrcnn.config import Config, load
from maskrcnn.data import STRIDE_PX, Batch, EvalBatch, MaskRCNNEvalSource, MaskRCNNTrainSource
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.model import LOSS_NAMES, MaskRCNN, Targets, make_model
from maskrcnn.postprocess import Detections
from mlperf.rules import tensor_names


def main(argv: list[str]) -> int:
    """Run on this rank and return the exit status."""
    return entrypoint.main(argv, lambda flags: load(flags).config, run_mode)


def run_mode(config: Config, process: entrypoint.ProcessContext) -> int:
    """Run the mode of the settings and return the exit status."""
    ranks = process.ranks
    config = ranks.broadcast(num_classes.resolve_num_classes(config) if ranks.is_main else None)
    evaluator = MaskRCNNEvaluator(config, ranks, predict)
    with entrypoint.open_run(config, process) as run:
        model = make_model(config)
        if not run.resume_point:
            load_weights(run, partial(weights.load, model, config), lambda path: weights.load_backbone(model, config))
        workload = make_workload(config, ranks, run.seed, model, evaluator)
        hyperparameters = config.hyperparameters(ranks.world_size)
        log_recipe = partial(log_hyperparameters, run.log, hyperparameters, partial(tensor_names, "maskrcnn"))
        result = entrypoint.run_mode(workload, run, log_recipe)
    return finalize_run(result, run, evaluator) if result else 0


def make_workload(
    config: Config, ranks: DistContext, seed: int, model: MaskRCNN, evaluator: MaskRCNNEvaluator
) -> Workload[Batch]:
    """Build the workload that the training loop runs."""
    return Workload(
        model=model,
        loss=loss,
        loss_names=LOSS_NAMES,
        dummy_batch=partial(dummy_batch, config, ranks),
        dummy_eval_batch=partial(dummy_eval_batch, config),
        make_train_source=partial(MaskRCNNTrainSource, config, ranks, seed),
        make_eval_source=partial(MaskRCNNEvalSource, config, ranks),
        lr_schedule=partial(
            optim.multistep_lr,
            peak=config.peak_lr(ranks.world_size),
            warmup_steps=config.warmup_steps,
            warmup_method=config.warmup_method,
            warmup_factor=config.warmup_factor,
            decay_steps=config.decay_steps(ranks.world_size),
            lr_decay_factor=config.lr_decay_factor,
            steps_ahead=int(config.lr_schedule_first),
        ),
        predict=predict,
        evaluate=evaluator,
        evaluate_other=evaluator.evaluate_other,
        targets={"AP": config.target, "mask_AP": config.mask_target},
        mlperf_accuracy=lambda metrics: {"BBOX": metrics["AP"], "SEGM": metrics["mask_AP"]},
        fixed_input_size=False,  # and the number of ROIs in the mask head differs at each step
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the five losses (5,) of a batch, each its mean times the number of images, as the loop sums them."""
    targets = Targets(batch.boxes_xyxy, batch.labels, batch.vertices, batch.seeds)
    losses: Tensor = model(batch.images, batch.sizes_hw, targets)
    return losses * len(batch.images)


def predict(model: nn.Module, batch: EvalBatch) -> Detections:
    """Return the model's detections of a batch on the device."""
    detections: Detections = model(batch.images, batch.sizes_hw)
    return detections


def dummy_batch(config: Config, ranks: DistContext) -> Batch:
    """Return a batch of random images with two boxes each, at the largest size of a real batch."""
    device_cache.warm_up(config, ranks, (config.min_image_size, config.max_image_size))
    size, images, sizes_hw = config.batch_size, *random_images(config, config.batch_size)
    height, width = sizes_hw[0].tolist()
    box = torch.tensor([0.25, 0.25, 0.75, 0.75]) * torch.tensor([width, height, width, height])
    left, top, right, bottom = box.tolist()
    corners = ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
    vertices = torch.tensor([(*corner, 1.0) for corner in corners])
    return Batch(
        images=images,
        sizes_hw=sizes_hw,
        boxes_xyxy=box.expand(size, 2, 4).contiguous(),
        labels=torch.ones(size, 2, dtype=torch.int64),
        vertices=vertices.expand(size, 2, *vertices.shape).contiguous(),
        seeds=torch.arange(size),
    )


def dummy_eval_batch(config: Config) -> EvalBatch:
    """Return an evaluation batch of random images, at the largest size of a real batch."""
    images, sizes_hw = random_images(config, config.eval_batch_size)
    return EvalBatch(images, sizes_hw, torch.arange(len(images)), sizes_hw)


def random_images(config: Config, size: int) -> tuple[Tensor, Tensor]:
    """Return random images (size, 3, H, W) uint8, channels last, and their sizes (size, 2) without padding."""
    height, width = config.min_image_size, config.max_image_size
    padded_hw = image_io.padded_hw([(height, width)], STRIDE_PX)
    return image_io.random_images(size, padded_hw), torch.tensor([[height, width]]).expand(size, 2)
