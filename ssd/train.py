"""Train SSD300, or what else --mode says: puts model, loss, data and evaluation into detection/engine/train_loop.py."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from detection.checkpoint import pretrained_backbone
from detection.data import device_cache, num_classes
from detection.engine import entrypoint, modes, optim, train_loop
from detection.engine.finalize import conclude
from detection.engine.state import Run
from detection.runtime import device
from detection.runtime.distributed import Ranks
from mlperf.log import MlperfLog
from mlperf.rules import ssd_tensor_name
from ssd import augment, weights
from ssd.anchors import IMAGE_SIZE_PX, Anchors, make_anchors
from ssd.box_coder import encode
from ssd.config import Config, load
from ssd.data import FLIP_DIRECTIONS, SIZE_HW, Batch, EvalBatch, SSDData, SSDEvalData
from ssd.evaluator import Evaluation
from ssd.loss import LOSSES, multibox_loss
from ssd.model import SSD300, make_model


def main(argv: list[str]) -> int:
    """Run on this rank; returns the exit status."""
    return entrypoint.main(argv, lambda flags: load(flags).config, run_mode)


def run_mode(config: Config, process: entrypoint.Process) -> int:
    """Do what --mode says; returns the exit status."""
    ranks = process.ranks
    config = ranks.broadcast(num_classes.followed(config) if ranks.is_first else None)
    evaluation = Evaluation(config, ranks)
    with entrypoint.opened(config, process) as run:
        model = make_model(config)
        if not run.resumed:
            load_weights(model, config, run)
        benchmark = make_benchmark(config, ranks, run.seed, model, evaluation)
        outcome = modes.do(benchmark, run, partial(log_hyperparameters, run.log, config, ranks, model))
    return conclude(outcome, run, evaluation) if outcome else 0


def load_weights(model: SSD300, config: Config, run: Run) -> None:
    """Load what the settings name: the whole network, or else its trunk, or nothing; raises InputError."""
    if config.weights:
        origin = weights.load(model, Path(config.weights)).origin
        run.log.point("checkpoint", Path(config.weights).name)
        run.progress.say(f"{config.weights}: the weights of a checkpoint of {origin}")
    elif config.trunk_weights:
        pretrained_backbone.load(model.backbone, config.trunk_name, Path(config.trunk_weights))


def make_benchmark(
    config: Config, ranks: Ranks, seed: int, model: SSD300, evaluation: Evaluation
) -> train_loop.Benchmark[Batch]:
    """SSD300 as the loop sees it."""
    return train_loop.Benchmark(
        model=model,
        loss=make_loss(ranks.device, compiled=device.compiles(config.compile, ranks.device)),
        loss_names=LOSSES,
        made_up_batch=partial(made_up_batch, config, ranks),
        made_up_eval_batch=partial(made_up_eval_batch, config),
        open_data=partial(SSDData, config, ranks, seed),
        open_eval_data=partial(SSDEvalData, config, ranks),
        learning_rate=partial(
            optim.learning_rate,
            peak=config.peak_lr(ranks.world_size),
            warmup_steps=config.warmup_steps,
            warmup_factor=config.warmup_factor,
            lr_decay_epochs=config.lr_decay_epochs,
            lr_decay_factor=config.lr_decay_factor,
        ),
        detect=evaluation.detect,
        evaluate=evaluation,
        targets={"AP": config.target},
        accuracy=lambda metrics: metrics["AP"],
    )


def make_loss(device: torch.device, *, compiled: bool) -> Callable[[nn.Module, Batch], Tensor]:
    """The losses (2,) of a batch, each summed over its images, as a function of model and batch: all on the device."""
    anchors = make_anchors(device)
    before, after = (torch.compile(prepare), torch.compile(multibox_loss)) if compiled else (prepare, multibox_loss)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if compiled:  # once for any number of boxes
            for tensor in (batch.boxes_xyxy, batch.labels):
                torch._dynamo.mark_dynamic(tensor, 1)
        images, deltas, labels = before(batch, anchors)
        pred_deltas, logits = model(images)
        return after(pred_deltas, logits, deltas, labels).sum(dim=0)

    return loss


def prepare(batch: Batch, anchors: Anchors) -> tuple[Tensor, Tensor, Tensor]:
    """What the network sees and is to say: images (B, 3, 300, 300), deltas (B, A, 4), labels (B, A)."""
    with torch.autocast(batch.images.device.type, enabled=False):
        flipped, boxes_xyxy = augment.flip(batch.images, batch.boxes_xyxy, batch.flips)  # as bytes: a quarter to move
        images = augment.jitter(augment.to_unit(flipped), batch.jitter, batch.jitter_order)
        images = augment.normalise(images)
        return images, *encode(boxes_xyxy, batch.labels, anchors)


def made_up_batch(config: Config, ranks: Ranks) -> Batch:
    """A batch of noise with two boxes an image, in the shape of the real ones."""
    device_cache.warm_up(config, ranks, SIZE_HW)
    size = config.batch_size
    return Batch(
        images=noise(size),
        boxes_xyxy=torch.tensor([0.25, 0.25, 0.75, 0.75]).expand(size, 2, 4).contiguous(),
        labels=torch.ones(size, 2, dtype=torch.int64),
        flips=torch.zeros(size, FLIP_DIRECTIONS[config.flip], dtype=torch.bool),
        jitter=torch.from_numpy(augment.NO_JITTER).repeat(size, 1),
        jitter_order=torch.arange(4).repeat(size, 1),
    )


def made_up_eval_batch(config: Config) -> EvalBatch:
    """A batch of noise in the shape of the real ones to evaluate."""
    size = config.eval_batch_size
    return EvalBatch(noise(size), torch.arange(size), torch.full((size, 2), IMAGE_SIZE_PX))


def noise(size: int) -> Tensor:
    """Images (B, 3, 300, 300) uint8 of noise, channels last."""
    pixels = torch.randint(0, 256, (size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX), dtype=torch.uint8)
    return pixels.contiguous(memory_format=torch.channels_last)


def log_hyperparameters(log: MlperfLog, config: Config, ranks: Ranks, model: SSD300) -> None:
    """Say what the run is made of: the recipe, and each tensor that was initialised."""
    for key, value in config.hyperparameters(ranks.world_size).items():
        log.point(key, value)
    named = ssd_tensor_name if config.network_name == "ssd300-r34" else str  # the rules know no other network
    for name, _ in model.named_parameters():
        log.point("weights_initialization", tensor=named(name))


if __name__ == "__main__":
    entrypoint.end(main(sys.argv[1:]))
