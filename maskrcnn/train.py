"""Train Mask R-CNN, or what else --mode says: puts model, data and evaluation into detection/engine/train_loop.py."""

import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from detection.data import device_cache, num_classes
from detection.engine import entrypoint, modes, optim, train_loop
from detection.engine.finalize import conclude
from detection.engine.state import Run
from detection.runtime.distributed import Ranks
from maskrcnn import weights
from maskrcnn.config import Config, load
from maskrcnn.data import STRIDE_PX, Batch, EvalBatch, MaskRCNNData, MaskRCNNEvalData
from maskrcnn.evaluator import Evaluation
from maskrcnn.model import LOSSES, MaskRCNN, Truth, make_model
from maskrcnn.postprocess import Detections
from mlperf.log import MlperfLog
from mlperf.rules import maskrcnn_tensor_names


def main(argv: list[str]) -> int:
    """Run on this rank; returns the exit status."""
    return entrypoint.main(argv, lambda flags: load(flags).config, run_mode)


def run_mode(config: Config, process: entrypoint.Process) -> int:
    """Do what --mode says; returns the exit status."""
    ranks = process.ranks
    config = ranks.broadcast(num_classes.followed(config) if ranks.is_first else None)
    evaluation = Evaluation(config, ranks, detect)
    with entrypoint.opened(config, process) as run:
        model = make_model(config)
        if not run.resumed:
            load_weights(model, config, run)
        benchmark = make_benchmark(config, ranks, run.seed, model, evaluation)
        outcome = modes.do(benchmark, run, partial(log_hyperparameters, run.log, config, ranks))
    return conclude(outcome, run, evaluation) if outcome else 0


def load_weights(model: MaskRCNN, config: Config, run: Run) -> None:
    """Load what the settings name: the whole network, or else its trunk, or nothing; raises InputError."""
    if config.weights:
        origin = weights.load(model, config, Path(config.weights)).origin
        run.log.point("checkpoint", Path(config.weights).name)
        run.progress.say(f"{config.weights}: the weights of a checkpoint of {origin}")
    elif config.trunk_weights:
        weights.load_trunk(model, config)


def make_benchmark(
    config: Config, ranks: Ranks, seed: int, model: MaskRCNN, evaluation: Evaluation
) -> train_loop.Benchmark[Batch]:
    """Mask R-CNN as the loop sees it."""
    return train_loop.Benchmark(
        model=model,
        loss=loss,
        loss_names=LOSSES,
        made_up_batch=partial(made_up_batch, config, ranks),
        made_up_eval_batch=partial(made_up_eval_batch, config),
        open_data=partial(MaskRCNNData, config, ranks, seed),
        open_eval_data=partial(MaskRCNNEvalData, config, ranks),
        learning_rate=partial(
            optim.learning_rate_by_steps,
            peak=config.peak_lr(ranks.world_size),
            warmup_steps=config.warmup_steps,
            warmup_share=config.warmup_factor,
            decay_steps=config.decay_steps(ranks.world_size),
            lr_decay_factor=config.lr_decay_factor,
        ),
        detect=detect,
        evaluate=evaluation,
        targets={"AP": config.target, "mask_AP": config.mask_target},
        accuracy=lambda metrics: {"BBOX": metrics["AP"], "SEGM": metrics["mask_AP"]},
        one_size=False,  # nor have the regions that the mask head sees: their number is another at each step
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The five losses (5,) of a batch, each its mean times the number of images, as the loop adds them up."""
    truth = Truth(batch.boxes_xyxy, batch.labels, batch.edges, batch.seeds)
    losses: Tensor = model(batch.images, batch.sizes_hw, truth)
    return losses * len(batch.images)


def detect(model: nn.Module, batch: EvalBatch) -> Detections:
    """What the model sees in a batch on the device."""
    detections: Detections = model(batch.images, batch.sizes_hw)
    return detections


def made_up_batch(config: Config, ranks: Ranks) -> Batch:
    """A batch of noise with two boxes an image, as large as real ones can be."""
    device_cache.warm_up(config, ranks, (config.min_image_size, config.max_image_size))
    size, images, sizes_hw = config.batch_size, *noise(config, config.batch_size)
    height, width = sizes_hw[0].tolist()
    box = torch.tensor([0.25, 0.25, 0.75, 0.75]) * torch.tensor([width, height, width, height])
    left, top, right, bottom = box.tolist()
    edges = torch.tensor([[left, top, left, bottom], [right, bottom, right, top]])
    return Batch(
        images=images,
        sizes_hw=sizes_hw,
        boxes_xyxy=box.expand(size, 2, 4).contiguous(),
        labels=torch.ones(size, 2, dtype=torch.int64),
        edges=edges.expand(size, 2, 2, 4).contiguous(),
        seeds=torch.arange(size),
    )


def made_up_eval_batch(config: Config) -> EvalBatch:
    """A batch of noise to evaluate, as large as real ones can be."""
    images, sizes_hw = noise(config, config.eval_batch_size)
    return EvalBatch(images, sizes_hw, torch.arange(len(images)), sizes_hw)


def noise(config: Config, size: int) -> tuple[Tensor, Tensor]:
    """Images (size, 3, H, W) uint8 of noise, channels last, and the sizes (size, 2) of what is no padding."""
    height, width = config.min_image_size, config.max_image_size
    padded = [math.ceil(side / STRIDE_PX) * STRIDE_PX for side in (height, width)]
    images = torch.randint(0, 256, (size, 3, *padded), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last), torch.tensor([[height, width]]).expand(size, 2)


def log_hyperparameters(log: MlperfLog, config: Config, ranks: Ranks) -> None:
    """Say what the run is made of: the recipe, and each layer that was initialised."""
    for key, value in config.hyperparameters(ranks.world_size).items():
        log.point(key, value)
    for name in maskrcnn_tensor_names():
        log.point("weights_initialization", tensor=name)


if __name__ == "__main__":
    entrypoint.end(main(sys.argv[1:]))
