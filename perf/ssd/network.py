"""SSD300's network: forward pass, loss, and the training step from a batch on the device to updated weights.

B images, A anchors, K classes with background 0.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.data.batch import RankBatch
from detection.data.prefetch import to_device
from detection.engine import optim, train_loop
from detection.engine.initialization import build_state
from detection.engine.state import TrainState
from detection.engine.workload import Workload
from detection.runtime.device import select_precision
from perf.harness import BenchContext, Result
from perf.roofline import Work, bytes_moved, count_flop
from perf.ssd import baseline
from perf.ssd.input import make_batch
from perf.timing import Variant, quartiles, time_calls
from ssd.anchors import IMAGE_SIZE_PX, NUM_ANCHORS, make_anchors
from ssd.config import Config
from ssd.data import Batch
from ssd.evaluator import SSDEvaluator
from ssd.loss import multibox_loss
from ssd.model import SSD300
from ssd.train import make_workload, prepare_batch


def build(context: BenchContext, config: Config) -> tuple[Workload[Batch], TrainState]:
    """Return workload and training state, built as a run builds them, with random weights."""
    torch.manual_seed(context.seed)
    model = SSD300(config.num_classes)
    workload = make_workload(config, context.ranks, context.seed, model, SSDEvaluator(config, context.ranks))
    return workload, build_state(workload, config, context.ranks)


def with_precision(name: str, context: BenchContext, run: Callable[[], object]) -> Callable[[], object]:
    """Set the precision of matrix products, which is global to the process, before each call."""

    def run_in_precision() -> object:
        select_precision(name, context.device)
        return run()

    return run_in_precision


def baseline_variant(context: BenchContext, name: str, run: Callable[[], object], images: int) -> Variant:
    """Return a baseline in float32. On an accelerator, its convolutions use TF32, PyTorch's default."""
    precision_name = "fp32" if context.device.type == "cpu" else "tf32"
    return Variant(name, with_precision(precision_name, context, run), images)


def time_forward(context: BenchContext) -> Iterator[Result]:
    """Time the forward pass of evaluation by batch size, with images of noise."""
    model = SSD300().to(context.device).to(memory_format=torch.channels_last).eval()
    name = context.precision.name
    for batch_size in context.size.batch_sizes:
        images = torch.randn(batch_size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, device=context.device)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        run = with_precision(name, context, partial(forward, model, channels_last, context))
        yield from context.compare(
            "forward",
            Variant(f"{name}, batch {batch_size}", run, batch_size),
            *([baseline_forward(context, images)] if batch_size == context.size.batch_size else []),
            work=count_flop(SSD300, context.precision.dtype, backward=False, batch_size=batch_size),
        )


@torch.inference_mode()
def forward(model: nn.Module, images: Tensor, context: BenchContext | None = None) -> None:
    """Run the forward pass in the precision of the context, or in float32 without one."""
    with context.precision.autocast(context.device) if context else nullcontext():
        model(images)


def baseline_forward(context: BenchContext, images: Tensor) -> Variant:
    """Return the baseline's forward pass of images (B, 3, 300, 300)."""
    model = baseline.BaselineSSD300().to(context.device).eval()
    name = f"float32, channels first, batch {len(images)}"
    return baseline_variant(context, name, partial(forward, model, images), len(images))


def time_loss(context: BenchContext) -> Iterator[Result]:
    """Time the loss of given predictions and its gradient."""
    batch_size = context.size.batch_size
    sample = prepared_batch(context, batch_size)
    num_classes = context.photos.num_classes
    shape = (batch_size, NUM_ANCHORS, 4 + num_classes)
    fused = torch.randn(shape, device=context.device, dtype=context.precision.dtype).requires_grad_()
    deltas, logits = (
        torch.randn(batch_size, n, NUM_ANCHORS, device=context.device, requires_grad=True) for n in (4, num_classes)
    )

    def run_one_sort() -> None:
        loss = multibox_loss(fused[..., :4], fused[..., 4:], sample.deltas, sample.labels)
        torch.autograd.grad(loss.sum(), fused)

    def run_two_sorts() -> None:
        loss = baseline.multibox_loss(deltas, logits, sample.deltas, sample.labels)
        torch.autograd.grad(loss.sum(), (deltas, logits))

    yield from context.compare(
        "loss",
        Variant(f"one sort, batch {batch_size}", run_one_sort, batch_size),
        Variant(f"two sorts, float32, batch {batch_size}", run_two_sorts, batch_size),
        work=Work(bytes=bytes_moved(fused, fused, sample.deltas, sample.labels) / batch_size),
    )


def time_step(context: BenchContext) -> Iterator[Result]:
    """Time the training step against its baseline, then the full step of a run by precision and batch size."""
    batch_size = context.size.batch_size
    sample = prepared_batch(context, batch_size)
    work = count_flop(SSD300, context.precision.dtype, backward=True, batch_size=batch_size)
    run = network_step(context, sample)
    baseline_step = baseline.make_step(context.device, context.photos.num_classes)
    contiguous = sample._replace(image=sample.image.contiguous())
    name = f"float32, channels first, batch {batch_size}"
    results = context.compare(
        "step",
        Variant(f"network, loss and update, {context.precision.name}, batch {batch_size}", run, batch_size),
        baseline_variant(context, name, lambda: baseline_step(contiguous), batch_size),
        unit="img/s",
        work=work,
    )
    yield replace(next(results), requirement="training step")
    yield from results
    for choice in ("off", "on") if context.size.compiled else ("off",):
        yield from time_full_step(context, batch_size, compile=choice)
    for name in ("fp32", "bf16") if context.device.type == "cpu" else ("fp32", "tf32", "bf16", "fp16"):
        if name != context.precision.name:
            yield from time_full_step(context, batch_size, precision=name)
    for other in context.size.batch_sizes:
        if other != batch_size:
            yield from time_full_step(context, other)


def prepared_batch(context: BenchContext, batch_size: int) -> baseline.Sample:
    """Return network inputs and targets of a batch of photos, on the device."""
    batch = to_device(make_batch(context, batch_size), context.device)
    return baseline.Sample(*prepare_batch(batch, make_anchors(context.device)))


def network_step(context: BenchContext, sample: baseline.Sample) -> Callable[[], object]:
    """Return the run's own step on a prepared batch, which the baseline gets, too."""
    batch_size = len(sample.labels)
    config = context.config(num_classes=context.photos.num_classes, batch_size=batch_size)
    workload, state = build(context, config)

    def loss(model: nn.Module, batch: baseline.Sample) -> Tensor:
        pred_deltas, logits = model(batch.image)
        return multibox_loss(pred_deltas, logits, batch.deltas, batch.labels).sum()

    prepared_workload: Workload[Any] = replace(cast("Workload[Any]", workload), loss=loss)
    rank_batch: RankBatch[Any] = RankBatch(sample, batch_size, 1 / batch_size)

    def step() -> None:
        optim.set_learning_rates(state.optimizer, partial(workload.lr_schedule, state.step, 1, 1))
        train_loop.train_step(state, rank_batch, prepared_workload, config, context.ranks)

    return with_precision(config.precision, context, step)


def full_step(context: BenchContext, config: Config) -> Callable[[], object]:
    """Return the run's own step on the device, from pixels and boxes to updated weights."""
    workload, state = build(context, config)
    batch = to_device(make_batch(context, config.batch_size), context.device)
    rank_batch = RankBatch(batch, config.batch_size, 1 / config.batch_size)

    def step() -> None:
        optim.set_learning_rates(state.optimizer, partial(workload.lr_schedule, state.step, 1, 1))
        train_loop.train_step(state, rank_batch, workload, config, context.ranks)

    return with_precision(config.precision, context, step)


def time_full_step(context: BenchContext, batch_size: int, **settings: str) -> Iterator[Result]:
    """Time the full step with these settings. Yield nothing if it cannot be compiled."""
    config = context.config(num_classes=context.photos.num_classes, batch_size=batch_size, **settings)
    name = f"full step, {config.precision}, batch {batch_size}" + ", compiled" * (config.compile == "on")
    step = Variant(name, full_step(context, config), batch_size)
    if config.compile == "on":
        compilation = time_compilation("step", step, context.device)
        if not compilation:
            return
        yield compilation
    dtype = select_precision(config.precision, context.device).dtype
    work = count_flop(SSD300, dtype, backward=True, batch_size=batch_size)
    roofline = context.roofline(precision_name=config.precision)
    yield from context.compare("step", step, unit="img/s", work=work, roofline=roofline)


def time_compilation(part: str, step: Variant, device: torch.device) -> Result | None:
    """Time compilation and first step. Print a line and return None if the step cannot be compiled."""
    try:
        first_s = time_calls(step, 1, device)
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"skipping the compiled step: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return None
    return Result(part, "compilation and first step", "s", quartiles([first_s]))
