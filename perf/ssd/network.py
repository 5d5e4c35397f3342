"""The network: its forward pass, its loss, and the training step from a batch on the device to updated weights.

B images, A anchors, K classes with background 0.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.data.batch import RankBatch
from detection.data.prefetch import to_device
from detection.engine import train_loop
from detection.engine.state import TrainState
from detection.engine.workload import Workload
from detection.runtime.device import select_precision
from perf.harness import BenchContext, Result
from perf.roofline import Work, bytes_moved, count_flop
from perf.ssd import baseline
from perf.ssd.input import first_batch
from perf.timing import Variant, quartiles, time_calls
from ssd import augment
from ssd.anchors import IMAGE_SIZE_PX, NUM_ANCHORS, make_anchors
from ssd.config import Config
from ssd.data import Batch
from ssd.evaluator import SSDEvaluator
from ssd.loss import multibox_loss
from ssd.model import SSD300
from ssd.train import make_workload, prepare_batch


def build(bench: BenchContext, config: Config) -> tuple[Workload[Batch], TrainState]:
    """What a run trains, built as a run builds it, with random weights."""
    torch.manual_seed(bench.seed)
    model = SSD300(config.num_classes)
    benchmark = make_workload(config, bench.ranks, bench.seed, model, SSDEvaluator(config, bench.ranks))
    return benchmark, train_loop.build_state(benchmark, config, bench.ranks)


def in_precision(name: str, bench: BenchContext, run: Callable[[], object]) -> Callable[[], object]:
    """Choose the precision of matrix products, which holds for the whole process, before each call."""

    def chosen() -> object:
        select_precision(name, bench.device)
        return run()

    return chosen


def baseline_variant(bench: BenchContext, variant: str, run: Callable[[], object], images: int) -> Variant:
    """A plain way in float32; on an accelerator convolutions are then in TF32, as PyTorch has it by default."""
    return Variant(variant, in_precision("fp32" if bench.device.type == "cpu" else "tf32", bench, run), images)


def time_forward(bench: BenchContext) -> Iterator[Result]:
    """The forward pass of evaluation, by batch size."""
    for size in bench.size.batch_sizes:
        yield from forward_of(bench, size)


def forward_of(bench: BenchContext, size: int) -> Iterator[Result]:
    """The forward pass of a batch of noise."""
    model = SSD300().to(bench.device).to(memory_format=torch.channels_last).eval()
    images = torch.randn(size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, device=bench.device)
    channels_last = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def ours() -> None:
        with bench.precision.autocast(bench.device):
            model(channels_last)

    yield from bench.compare(
        "forward",
        Variant(f"{bench.precision.name}, batch {size}", in_precision(bench.precision.name, bench, ours), size),
        *bench.baselines([baseline_forward(bench, images)] if size == bench.size.batch_size else []),
        work=count_flop(SSD300, bench.precision.dtype, backward=False, batch_size=size),
    )


def baseline_forward(bench: BenchContext, images: Tensor) -> Variant:
    """The plain forward pass of images (B, 3, 300, 300)."""
    model = baseline.BaselineSSD300().to(bench.device).eval()

    @torch.inference_mode()
    def run() -> None:
        model(images)

    return baseline_variant(bench, f"float32, channels first, batch {len(images)}", run, len(images))


def time_loss(bench: BenchContext) -> Iterator[Result]:
    """The loss of given predictions and its gradient with respect to them."""
    size = bench.size.batch_size
    ready = ready_batch(bench, size)
    classes = bench.photos.num_classes
    together = torch.randn(size, NUM_ANCHORS, 4 + classes, device=bench.device, dtype=bench.precision.dtype)
    together.requires_grad_()
    deltas, logits = (torch.randn(size, n, NUM_ANCHORS, device=bench.device, requires_grad=True) for n in (4, classes))

    def ours() -> None:
        loss = multibox_loss(together[..., :4], together[..., 4:], ready.deltas, ready.labels)
        torch.autograd.grad(loss.sum(), together)

    def two_sorts() -> None:
        loss = baseline.multibox_loss(deltas, logits, ready.deltas, ready.labels)
        torch.autograd.grad(loss.sum(), (deltas, logits))

    yield from bench.compare(
        "loss",
        Variant(f"one sort, batch {size}", ours, size),
        *bench.baselines([Variant(f"two sorts, float32, batch {size}", two_sorts, size)]),
        work=Work(bytes=bytes_moved(together, together, ready.deltas, ready.labels) / size),
    )


def time_step(bench: BenchContext) -> Iterator[Result]:
    """The training step: against the plain one, then with all that a run does in it, by precision and batch size."""
    size = bench.size.batch_size
    ready = ready_batch(bench, size)
    work = count_flop(SSD300, bench.precision.dtype, backward=True, batch_size=size)
    ours = network_step(bench, ready)
    yield from bench.compare(
        "step",
        Variant(f"network, loss and update, {bench.precision.name}, batch {size}", ours, size),
        *bench.baselines(baseline_steps(bench, ready)),
        unit="img/s",
        work=work,
        requirement="training step",
    )
    for choice in ("off", "on") if bench.size.compiled else ("off",):
        yield from step_of(bench, size, compile=choice)
    for name in ("fp32", "bf16") if bench.device.type == "cpu" else ("fp32", "tf32", "bf16", "fp16"):
        if name != bench.precision.name:
            yield from step_of(bench, size, precision=name)
    for other in bench.size.batch_sizes:
        if other != size:
            yield from step_of(bench, other)


def ready_batch(bench: BenchContext, size: int) -> baseline.Sample:
    """Photos as the network sees them, with what it is to say of them, on the device."""
    batch = to_device(first_batch(bench, size), bench.device)
    return baseline.Sample(*prepare_batch(batch, make_anchors(bench.device)))


def network_step(bench: BenchContext, ready: baseline.Sample) -> Callable[[], object]:
    """The run's own step on a batch that is ready for the network, as the plain step gets it."""
    config = bench.config(num_classes=bench.photos.num_classes, batch_size=len(ready.labels))
    benchmark, state = build(bench, config)

    def loss(model: nn.Module, batch: baseline.Sample) -> Tensor:
        pred_deltas, logits = model(batch.image)
        return multibox_loss(pred_deltas, logits, batch.deltas, batch.labels).sum()

    from_ready: Workload[Any] = replace(cast("Workload[Any]", benchmark), loss=loss)
    share: RankBatch[Any] = RankBatch(ready, len(ready.labels), 1 / len(ready.labels))

    def step() -> None:
        lr = benchmark.lr_schedule(state.step, 1)
        train_loop.train_step(state, share, lr, from_ready, config, bench.ranks)

    return in_precision(config.precision, bench, step)


def whole_step(bench: BenchContext, config: Config) -> Callable[[], object]:
    """The run's own step on the device, from pixels and boxes to updated weights."""
    benchmark, state = build(bench, config)
    batch = to_device(first_batch(bench, config.batch_size), bench.device)
    share = RankBatch(batch, config.batch_size, 1 / config.batch_size)

    def step() -> None:
        lr = benchmark.lr_schedule(state.step, 1)
        train_loop.train_step(state, share, lr, benchmark, config, bench.ranks)

    return in_precision(config.precision, bench, step)


def step_of(bench: BenchContext, size: int, **settings: str) -> Iterator[Result]:
    """The whole step with these settings; nothing where they cannot be compiled."""
    config = bench.config(num_classes=bench.photos.num_classes, batch_size=size, **settings)
    step = Variant(f"all of it, {config.precision}, batch {size}", whole_step(bench, config), size)
    if config.compile == "on":
        step = step._replace(variant=f"{step.variant}, compiled")
        first = first_step("step", step, bench.device)
        if not first:
            return
        yield first
    work = count_flop(SSD300, select_precision(config.precision, bench.device).dtype, backward=True, batch_size=size)
    limits = bench.roofline(precision_name=config.precision)
    yield from bench.compare("step", step, unit="img/s", work=work, limits=limits)


def first_step(part: str, step: Variant, device: torch.device) -> Result | None:
    """What compiling a step takes; None, and a line that says so, where that is not possible."""
    try:
        first_s = time_calls(step, 1, device)
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"no compiled step: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return None
    return Result(part, "compiling it, and the first step", "s", quartiles([first_s]))


def baseline_steps(bench: BenchContext, ready: baseline.Sample) -> Iterator[Variant]:
    """The plain step, and that of torchvision's SSD300, which is another network."""
    size = len(ready.labels)
    step = baseline.make_step(bench.device, bench.photos.num_classes)
    contiguous = ready._replace(image=ready.image.contiguous())
    yield baseline_variant(bench, f"float32, channels first, batch {size}", lambda: step(contiguous), size)

    vgg_step = baseline.make_vgg_step(bench.device, bench.photos.num_classes)
    batch = to_device(first_batch(bench, size), bench.device)
    pixels = augment.to_float(batch.images).contiguous()
    targets = [
        {"boxes": IMAGE_SIZE_PX * boxes[labels > 0], "labels": labels[labels > 0]}
        for boxes, labels in zip(batch.boxes_xyxy, batch.labels, strict=True)
    ]
    yield baseline_variant(bench, f"torchvision's ssd300_vgg16, batch {size}", lambda: vgg_step(pixels, targets), size)
