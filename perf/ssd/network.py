"""The network: its forward pass, its loss, and the training step from a batch on the device to updated weights.

B images, A anchors, K classes with background 0.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.data.batch import Share
from detection.data.prefetch import move
from detection.engine import train_loop
from detection.engine.state import State
from detection.engine.train_loop import Benchmark
from detection.runtime.device import precision
from perf.harness import Bench, Result
from perf.roofline import Work, count_network, moved
from perf.ssd import baseline
from perf.ssd.input import first_batch
from perf.timing import Side, seconds, spread
from ssd import augment
from ssd.anchors import IMAGE_SIZE_PX, NUM_ANCHORS, make_anchors
from ssd.config import Config
from ssd.data import Batch
from ssd.evaluator import Evaluation
from ssd.loss import multibox_loss
from ssd.model import SSD300
from ssd.train import make_benchmark, prepare


def build(bench: Bench, config: Config) -> tuple[Benchmark[Batch], State]:
    """What a run trains, built as a run builds it, with random weights."""
    torch.manual_seed(bench.seed)
    model = SSD300(config.num_classes)
    benchmark = make_benchmark(config, bench.ranks, bench.seed, model, Evaluation(config, bench.ranks))
    return benchmark, train_loop.build(benchmark, config, bench.ranks)


def in_precision(name: str, bench: Bench, run: Callable[[], object]) -> Callable[[], object]:
    """Choose the precision of matrix products, which holds for the whole process, before each call."""

    def chosen() -> object:
        precision(name, bench.device)
        return run()

    return chosen


def plain_side(bench: Bench, variant: str, run: Callable[[], object], images: int) -> Side:
    """A plain way in float32; on an accelerator convolutions are then in TF32, as PyTorch has it by default."""
    return Side(variant, in_precision("fp32" if bench.device.type == "cpu" else "tf32", bench, run), images)


def time_forward(bench: Bench) -> Iterator[Result]:
    """The forward pass of evaluation, by batch size."""
    for size in bench.scale.batch_sizes:
        yield from forward_of(bench, size)


def forward_of(bench: Bench, size: int) -> Iterator[Result]:
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
        Side(f"{bench.precision.name}, batch {size}", in_precision(bench.precision.name, bench, ours), size),
        *bench.plain([plain_forward(bench, images)] if size == bench.scale.batch_size else []),
        work=count_network(SSD300, bench.precision.dtype, backward=False, batch_size=size),
    )


def plain_forward(bench: Bench, images: Tensor) -> Side:
    """The plain forward pass of images (B, 3, 300, 300)."""
    model = baseline.PlainSSD300().to(bench.device).eval()

    @torch.inference_mode()
    def run() -> None:
        model(images)

    return plain_side(bench, f"float32, channels first, batch {len(images)}", run, len(images))


def time_loss(bench: Bench) -> Iterator[Result]:
    """The loss of given predictions and its gradient with respect to them."""
    size = bench.scale.batch_size
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
        Side(f"one sort, batch {size}", ours, size),
        *bench.plain([Side(f"two sorts, float32, batch {size}", two_sorts, size)]),
        work=Work(bytes=moved(together, together, ready.deltas, ready.labels) / size),
    )


def time_step(bench: Bench) -> Iterator[Result]:
    """The training step: against the plain one, then with all that a run does in it, by precision and batch size."""
    size = bench.scale.batch_size
    ready = ready_batch(bench, size)
    work = count_network(SSD300, bench.precision.dtype, backward=True, batch_size=size)
    ours = network_step(bench, ready)
    yield from bench.compare(
        "step",
        Side(f"network, loss and update, {bench.precision.name}, batch {size}", ours, size),
        *bench.plain(plain_steps(bench, ready)),
        unit="img/s",
        work=work,
        requirement="training step",
    )
    for choice in ("off", "on") if bench.scale.compiled else ("off",):
        yield from step_of(bench, size, compile=choice)
    for name in ("fp32", "bf16") if bench.device.type == "cpu" else ("fp32", "tf32", "bf16", "fp16"):
        if name != bench.precision.name:
            yield from step_of(bench, size, precision=name)
    for other in bench.scale.batch_sizes:
        if other != size:
            yield from step_of(bench, other)


def ready_batch(bench: Bench, size: int) -> baseline.Sample:
    """Photos as the network sees them, with what it is to say of them, on the device."""
    batch = move(first_batch(bench, size), bench.device)
    return baseline.Sample(*prepare(batch, make_anchors(bench.device)))


def network_step(bench: Bench, ready: baseline.Sample) -> Callable[[], object]:
    """The run's own step on a batch that is ready for the network, as the plain step gets it."""
    config = bench.config(num_classes=bench.photos.num_classes, batch_size=len(ready.labels))
    benchmark, state = build(bench, config)

    def loss(model: nn.Module, batch: baseline.Sample) -> Tensor:
        pred_deltas, logits = model(batch.image)
        return multibox_loss(pred_deltas, logits, batch.deltas, batch.labels).sum()

    from_ready: Benchmark[Any] = replace(cast("Benchmark[Any]", benchmark), loss=loss)
    share: Share[Any] = Share(ready, len(ready.labels), 1 / len(ready.labels))

    def step() -> None:
        lr = benchmark.learning_rate(state.step, 1)
        train_loop.train_step(state, share, lr, from_ready, config, bench.ranks)

    return in_precision(config.precision, bench, step)


def whole_step(bench: Bench, config: Config) -> Callable[[], object]:
    """The run's own step on the device, from pixels and boxes to updated weights."""
    benchmark, state = build(bench, config)
    batch = move(first_batch(bench, config.batch_size), bench.device)
    share = Share(batch, config.batch_size, 1 / config.batch_size)

    def step() -> None:
        lr = benchmark.learning_rate(state.step, 1)
        train_loop.train_step(state, share, lr, benchmark, config, bench.ranks)

    return in_precision(config.precision, bench, step)


def step_of(bench: Bench, size: int, **settings: str) -> Iterator[Result]:
    """The whole step with these settings; nothing where they cannot be compiled."""
    config = bench.config(num_classes=bench.photos.num_classes, batch_size=size, **settings)
    step = Side(f"all of it, {config.precision}, batch {size}", whole_step(bench, config), size)
    if config.compile == "on":
        step = step._replace(variant=f"{step.variant}, compiled")
        first = first_step("step", step, bench.device)
        if not first:
            return
        yield first
    work = count_network(SSD300, precision(config.precision, bench.device).dtype, backward=True, batch_size=size)
    limits = bench.limits(precision_name=config.precision)
    yield from bench.compare("step", step, unit="img/s", work=work, limits=limits)


def first_step(part: str, step: Side, device: torch.device) -> Result | None:
    """What compiling a step takes; None, and a line that says so, where that is not possible."""
    try:
        first_s = seconds(step, 1, device)
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"no compiled step: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return None
    return Result(part, "compiling it, and the first step", "s", spread([first_s]))


def plain_steps(bench: Bench, ready: baseline.Sample) -> Iterator[Side]:
    """The plain step, and that of torchvision's SSD300, which is another network."""
    size = len(ready.labels)
    step = baseline.make_step(bench.device, bench.photos.num_classes)
    contiguous = ready._replace(image=ready.image.contiguous())
    yield plain_side(bench, f"float32, channels first, batch {size}", lambda: step(contiguous), size)

    vgg_step = baseline.make_vgg_step(bench.device, bench.photos.num_classes)
    batch = move(first_batch(bench, size), bench.device)
    pixels = augment.to_unit(batch.images).contiguous()
    targets = [
        {"boxes": IMAGE_SIZE_PX * boxes[labels > 0], "labels": labels[labels > 0]}
        for boxes, labels in zip(batch.boxes_xyxy, batch.labels, strict=True)
    ]
    yield plain_side(bench, f"torchvision's ssd300_vgg16, batch {size}", lambda: vgg_step(pixels, targets), size)
