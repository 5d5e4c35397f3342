"""RetinaNet's training step and loss, compared with torchvision's.

Both compute the same from the same weights, so that the ratio is that of speed alone. The first variant of each list is
ours. All of them return what they compute, so that tests can compare them.

B images, A_l anchors of level l, K classes without a background.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from detection.data import coco
from detection.data.batch import RankBatch
from detection.data.image_pipeline import HostImagePipeline
from detection.data.prefetch import to_device
from detection.engine import optim, train_loop
from detection.engine.initialization import build_state
from detection.runtime.device import should_compile
from perf.harness import BenchContext, Result
from perf.machine import peak_mib, reports_memory
from perf.maskrcnn.baseline import LEARNING_RATE, make_step, trained_parameters
from perf.maskrcnn.training import slow_rounds
from perf.retinanet import baseline
from perf.retinanet.predictions import EARLY, make_scenes, predict
from perf.roofline import Work, bytes_moved, count_work
from perf.ssd.network import baseline_variant, time_compilation, with_precision
from perf.timing import Variant, quartiles
from retinanet.anchors import make_anchors
from retinanet.config import Config, load
from retinanet.data import Batch, RetinaNetTrainDataset
from retinanet.evaluator import RetinaNetEvaluator
from retinanet.loss import retinanet_loss
from retinanet.model import RetinaNet, make_model
from retinanet.train import make_workload

NUM_CLASSES = 265  # MLPerf's, with the background


def time_step(context: BenchContext) -> Iterator[Result]:
    """Time RetinaNet's training step, from pixels to updated weights, against torchvision's."""
    for name in dict.fromkeys((context.precision.name, "fp32")):
        config = load_config(context, "--precision", name)
        variants = step_variants(context, config)
        is_default = name == context.precision.name
        yield from context.compare(
            "retinanet_step",
            *variants,
            unit="img/s",
            work=count_work(variants[0].run, config.batch_size),
            roofline=context.roofline(precision_name=name),
            requirement="retinanet step" if is_default else "",
            rounds=slow_rounds(context),
        )
    if context.size.compiled and should_compile("auto", context.device):
        yield from time_compiled_step(context)


def time_compiled_step(context: BenchContext) -> Iterator[Result]:
    """Time the compiled step. Yield nothing if it cannot be compiled."""
    config = load_config(context, "--compile", "on")
    step = step_variants(context, config)[0]
    step = step._replace(name=f"{step.name}, compiled")
    if compilation := time_compilation("retinanet_step", step, context.device):
        yield compilation
        yield from context.compare("retinanet_step", step, unit="img/s", rounds=slow_rounds(context))


def step_variants(context: BenchContext, config: Config) -> list[Variant]:
    """Return the step, and torchvision's with the same images and weights. Both return two losses."""
    torch.manual_seed(context.seed)
    model = baseline.make_model(config).train()
    run = optimized_step(context, config, model)
    model = model.to(context.device)
    optimizer = torch.optim.Adam(trained_parameters(model), lr=LEARNING_RATE)
    step = make_step(model, baseline.to_model_input(make_batch(context, config)), optimizer, baseline.LOSSES)
    shape = f"batch {config.batch_size}, {config.image_size} px"
    optimized = Variant(f"{config.precision}, {shape}", run, config.batch_size)
    name = f"torchvision, float32, channels first, {shape}"
    return [optimized, baseline_variant(context, name, step, config.batch_size)]


def optimized_step(context: BenchContext, config: Config, torchvision: nn.Module) -> Callable[[], object]:
    """Return the run's own step on a batch on the device, with the weights of torchvision's model."""
    model = copy_weights_from(torchvision, config)
    evaluator = RetinaNetEvaluator(config, context.ranks)
    workload = make_workload(config, context.ranks, context.seed, model, evaluator)
    state = build_state(workload, config, context.ranks)
    optim.set_learning_rates(state.optimizer, lambda factor: LEARNING_RATE * factor)
    rank_batch = RankBatch(make_batch(context, config), config.batch_size, 1 / config.batch_size)

    def step() -> Tensor:
        return train_loop.train_step(state, rank_batch, workload, config, context.ranks)

    return with_precision(config.precision, context, step)


def time_loss(context: BenchContext) -> Iterator[Result]:
    """Time RetinaNet's loss of given outputs with its gradient, and measure its memory, against torchvision's.

    Yield no memory of a device that reports none.
    """
    variants, moved = loss_variants(context, load_config(context))
    work = Work(bytes=moved / variants[0].images)
    yield from context.compare("retinanet_loss", *variants, work=work, requirement="retinanet loss")
    if not reports_memory(context.device):
        return
    memory = [peak_mib(variant.run, context.device) for variant in variants]
    for variant, mib, requirement in zip(variants, memory, ("", "retinanet loss memory"), strict=True):
        result = Result("retinanet_loss", f"memory beyond the logits: {variant.name}", "MiB", quartiles([mib]))
        if requirement:
            ratio = quartiles([mib / memory[0]])
            result = replace(result, is_baseline=True, speedup=ratio, requirement=requirement)
        yield result


def loss_variants(context: BenchContext, config: Config) -> tuple[list[Variant], int]:
    """Return the loss, and torchvision's, and the bytes of outputs and gradients.

    Each variant returns the losses (2,), the gradient of the first level's logits, and that of its deltas.
    """
    scenes = to_device(make_scenes(config, config.batch_size, context.seed), context.device)
    outputs = to_device(predict(make_scenes(config, config.batch_size, 0), config, EARLY, context.seed), context.device)
    anchors = make_anchors(config.image_size, config.image_size, context.device, config.anchor_sizes)
    tensors = [*outputs.logits, *outputs.deltas]
    for tensor in tensors:
        tensor.requires_grad_()
    head_input = baseline.HeadInput(
        [{"boxes": boxes, "labels": labels} for boxes, labels in zip(*scenes, strict=True)], anchors
    )
    model, num_levels = baseline.make_model(config), len(anchors)

    def run(loss_fn: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        losses = loss_fn()
        gradients = torch.autograd.grad(losses.sum(), tensors)
        return losses.detach(), gradients[0], gradients[num_levels]

    def optimized() -> Tensor:
        valid = torch.ones_like(scenes.labels, dtype=torch.bool)
        return retinanet_loss(*outputs, anchors, *scenes, valid).mean(dim=0)

    def torchvision() -> Tensor:
        return baseline.head_loss(model, outputs, head_input)

    title = f"batch {config.batch_size}, {config.image_size} px"
    variants = [
        Variant(title, lambda: run(optimized), config.batch_size),
        Variant(f"torchvision, {title}", lambda: run(torchvision), config.batch_size),
    ]
    return variants, 2 * bytes_moved(*tensors)


def load_config(context: BenchContext, *flags: str) -> Config:
    """Return the settings of a run in this context, with MLPerf's classes, not compiled."""
    defaults = {
        "--device": context.device,
        "--precision": context.precision.name,
        "--seed": context.seed,
        "--batch-size": context.size.retinanet_batch_size,
        "--num-workers": context.num_workers,
        "--num-classes": NUM_CLASSES,
        "--image-size": context.size.retinanet_image_px,
        "--compile": "off",
        "--division": "open",
    }
    return load([*(str(word) for pair in defaults.items() for word in pair), *flags], {}).config


def copy_weights_from(torchvision: nn.Module, config: Config) -> RetinaNet:
    """Return our model in training mode, with the weights of torchvision's."""
    model = make_model(config)
    model.load_state_dict(model.state_dict() | torchvision.state_dict())
    return model.train()


def make_batch(context: BenchContext, config: Config) -> Batch:
    """Return synthetic photos at their original size as a run gets them, on the device."""
    folder = context.make_data_dir(context.photo_sets[0], config.batch_size)
    split = coco.read(*coco.standard_paths(folder, "train"), torchvision_boxes=True)
    dataset = RetinaNetTrainDataset(split, seed=context.seed, flip=False, pixels=HostImagePipeline())
    batch = dataset.__getitems__([(1, index) for index in range(config.batch_size)])
    assert isinstance(batch, Batch)
    return to_device(batch, context.device)
