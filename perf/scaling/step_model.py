"""A model of the time of a training step, an epoch and a whole run of SSD300, on 1 to 1,024 accelerators.

A step of a rank is: what does not shrink with the batch, the images at the rate of a large batch, what is left of the
all-reduce of the gradient when the backward pass is over, and what ranks say to each other where they share batch norm.
It is no shorter than the cores take to decode its images. What the network is made of is counted; the two constants of
an accelerator are fitted to published runs; links and latencies are published ones. `docs/SCALING.md` says how far off
it is.

n ranks, on m nodes of g accelerators each; b images a rank and step. GB is 1e9 bytes.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ssd.anchors import IMAGE_SIZE_PX
from ssd.model import SSD300

TRAIN_IMAGES, EVAL_IMAGES = 117_266, 4_952  # of COCO 2017, with boxes: in every published log

# Mean epochs to the target by global batch: the reference convergence points of MLPerf. Below the first there are none:
# the rules hold a smaller batch to as many.
EPOCHS = {1024: 50.0, 1536: 55.0, 2048: 65.1, 4096: 87.0}
EVAL_INTERVAL = 5  # epochs, in rulesets 1.0 and 1.1

# How large a batch norm's batch is at least, by sharing: that of the published runs on 1,024 accelerators is 16 to 24.
MIN_SPAN = 16

# DistributedDataParallel's defaults: gradients travel in buckets, the first of them small.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20

# NCCL's own model of its all-reduce on A100 (github.com/NVIDIA/nccl, commit 01afd20, src/graph/tuning.cc): latency of a
# call, of a hop over NVLink and of one over the network, in µs; an algorithm's share of the ring's bandwidth; the most
# that it has, in GB/s.
ALL_REDUCES = (
    (8.4, 3.4, 9.6, 1.0, math.inf),  # ring, "Simple"
    (4.4, 1.2, 8.5, 0.9 * 0.915, 105 * 0.915),  # tree, "LL128"
    (4.4, 0.52, 5.0, 0.9 / 3.8, 80 / 3.8),  # tree, "LL": for the smallest
)

# Evaluation: an A100 infers 1,058 img/s in the time in which it trains 724 of the same network, detections included
# (NVIDIA's SSD300 v1.1, batches of 64 and 128); COCO's figures take .49 s on one rank.
EVALUATION_SPEED, METRIC_S = 1058 / 724, 0.49

# What a core reads, decodes and resizes where the rest is left to the accelerator: measured, a Xeon with AMX.
IMAGES_PER_CORE_S = 400


class Network(NamedTuple):
    """What a training step of the network is made of, counted by the program.

    arrivals: the parts of the gradient in the order in which the backward pass finishes them: share of its work that is
    done by then, elements. forward_share: of the floating-point work of a step. operations: that it takes, each
    of them a kernel or more.
    """

    grad_ready_times: tuple[tuple[float, int], ...]
    forward_fraction: float
    batch_norms: int
    operations: int

    @property
    def elements(self) -> int:
        """Of one gradient: the network's parameters."""
        return sum(elements for _, elements in self.grad_ready_times)


class Accelerator(NamedTuple):
    """What is fitted: images/s in the limit of a large batch, and the part of a step that every batch takes."""

    images_per_s: float
    overhead_s: float


@dataclass(frozen=True)
class System:
    """What accelerators are put in, and how they are used.

    node_gb_s: bus bandwidth of a ring inside a node, as measured, not its nominal links'. network_gb_s: of a node's
    network adapters together, likewise. cores: for each accelerator. gradient_bytes: of an element as it travels.
    overlaps: whether gradients travel beside the backward pass. evaluates: whether training waits for evaluation.
    metric_s: of COCO's figures, on one rank.
    """

    name: str
    per_node: int
    node_gb_s: float
    network_gb_s: float
    cores: float
    gradient_bytes: int = 2
    overlaps: bool = True
    evaluates: bool = True
    metric_s: float = METRIC_S


class Layout(NamedTuple):
    """How a run is spread. group: ranks that share the statistics of batch norm."""

    nodes: int
    per_node: int
    batch_size: int
    group: int = 1

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.per_node

    @property
    def global_batch_size(self) -> int:
        """Images of a step."""
        return self.ranks * self.batch_size


class Step(NamedTuple):
    """Where the time of a step goes, in seconds. data: what waiting for images adds."""

    fixed: float
    images: float
    gradient: float
    batch_norm: float
    data: float

    @property
    def total(self) -> float:
        """Of the parts."""
        return sum(self)


class Run(NamedTuple):
    """A run to the target."""

    layout: Layout
    step: Step
    epochs: float
    epoch_s: float
    evaluation_s: float

    @property
    def minutes(self) -> float:
        """From the first step to the last evaluation."""
        return (self.epochs * self.epoch_s + self.epochs / EVAL_INTERVAL * self.evaluation_s) / 60


class Operations(TorchDispatchMode):
    """Counts operations, those left out that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count_network(num_classes: int = 81) -> Network:
    """Count what a step of SSD300 is made of; nothing is computed."""
    with torch.device("meta"):
        model = SSD300(num_classes).train()
        images = torch.empty(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    arrived: list[tuple[int, int]] = []
    with FlopCounterMode(display=False) as flops, Operations() as operations:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda tensor: arrived.append((flops.get_total_flops(), tensor.numel()))
            )
        outputs = model(images)
        forward = flops.get_total_flops()
        torch.autograd.backward([output.sum() for output in outputs])
    total = flops.get_total_flops()
    return Network(
        grad_ready_times=tuple(((done - forward) / (total - forward), elements) for done, elements in arrived),
        forward_fraction=forward / total,
        batch_norms=sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()),
        operations=operations.count,
    )


def step(network: Network, accelerator: Accelerator, system: System, layout: Layout) -> Step:
    """The time of a step."""
    images = layout.batch_size / accelerator.images_per_s
    shared = shared_s(network, system, layout)
    # What is fixed is spread over the step as the rest is.
    backward_s = (1 - network.forward_fraction) * (accelerator.overhead_s + images)
    gradient = exposed_s(network, system, layout, backward_s)
    data = layout.batch_size / (system.cores * IMAGES_PER_CORE_S)
    spent = accelerator.overhead_s + images + gradient + shared
    return Step(accelerator.overhead_s, images, gradient, shared, max(0.0, data - spent))


def run(network: Network, accelerator: Accelerator, system: System, layout: Layout) -> Run:
    """A run to the target: as many epochs as the reference needs, each five of them evaluated."""
    a_step = step(network, accelerator, system, layout)
    images = math.ceil(EVAL_IMAGES / layout.ranks)
    evaluation_s = (accelerator.overhead_s + images / accelerator.images_per_s) / EVALUATION_SPEED + system.metric_s
    return Run(
        layout=layout,
        step=a_step,
        epochs=epochs(layout.global_batch_size),
        epoch_s=TRAIN_IMAGES / layout.global_batch_size * a_step.total,
        evaluation_s=evaluation_s if system.evaluates else 0.0,
    )


def best_run(
    network: Network,
    accelerator: Accelerator,
    system: System,
    ranks: int,
    *,
    max_ranks: int = 228,
    max_global_batch_size: int = 4096,
) -> Run:
    """The fastest run on so many accelerators, over the batch sizes that fit: at most `most` images a rank.

    No more than 4,096 images in all, since nobody has said how many epochs that takes.
    """
    nodes = max(1, ranks // system.per_node)
    runs = []
    for batch_size in range(1, min(max_ranks, max_global_batch_size // ranks) + 1):
        group = min(ranks, 2 ** math.ceil(math.log2(max(1, MIN_SPAN / batch_size))))
        layout = Layout(nodes, ranks // nodes, batch_size, group)
        runs.append(run(network, accelerator, system, layout))
    return min(runs, key=lambda found: found.minutes)


def epochs(global_batch_size: int) -> float:
    """Epochs to the target: between the reference's convergence points, in proportion."""
    return float(np.interp(global_batch_size, list(EPOCHS), list(EPOCHS.values())))


def all_reduce_s(num_bytes: float, system: System, nodes: int, per_node: int) -> float:
    """The time of an all-reduce: that of the fastest of the ways there are."""
    ranks = nodes * per_node
    if ranks == 1:
        return 0.0
    bus = min(system.node_gb_s if per_node > 1 else math.inf, system.network_gb_s if nodes > 1 else math.inf)
    times = []
    for number, (call, near, far, share, most) in enumerate(ALL_REDUCES):
        if number == 0:  # a ring: 2(n-1) hops, of which the network carries two for each node
            hops, far_hops, passes = 2.0 * (ranks - 1), 2.0 * (nodes - 1), 2 * (ranks - 1) / ranks
        else:  # a tree over the nodes, a chain inside each
            hops, far_hops, passes = 2 * (per_node - 1 + math.log2(nodes)), 2 * math.log2(nodes), 2.0
        latency = call + (hops - far_hops) * near + far_hops * far
        times.append(latency * 1e-6 + passes * num_bytes / (1e9 * min(share * bus, most)))
    return min(times)


def exposed_s(network: Network, system: System, layout: Layout, backward_s: float) -> float:
    """What is left of the all-reduces, one after the other, when the backward pass is over."""
    free = 0.0
    for share, elements in buckets(network):
        arrived = share * backward_s if system.overlaps else backward_s
        free = max(free, arrived)
        free += all_reduce_s(elements * system.gradient_bytes, system, layout.nodes, layout.per_node)
    return free - backward_s if layout.ranks > 1 else 0.0


def buckets(network: Network) -> list[tuple[float, int]]:
    """The gradient as DistributedDataParallel sends it: share of the backward pass after which it can, elements."""
    found: list[tuple[float, int]] = []
    elements, limit = 0, FIRST_BUCKET_BYTES
    for share, count in network.grad_ready_times:
        elements += count
        if 4 * elements >= limit:
            found.append((share, elements))
            elements, limit = 0, BUCKET_BYTES
    return [*found, (1.0, elements)] if elements else found


def shared_s(network: Network, system: System, layout: Layout) -> float:
    """What ranks that share batch norm say to each other: forward and backward, for each layer, next to no bytes."""
    near = min(layout.group, layout.per_node)
    return 2 * network.batch_norms * all_reduce_s(2048, system, math.ceil(layout.group / near), near)
