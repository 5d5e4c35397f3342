"""Model of the time of a training step, an epoch and a run of SSD300 on 1 to 1,024 accelerators.

The step of a rank is the sum of a fixed overhead, the images at the rate of a large batch, the part of the gradient
all-reduce that extends beyond the backward pass, and the all-reduces of synchronized batch norm. It is at least as long
as the cores need to decode its images. The network's operations are counted, the two constants of an accelerator are
fitted to published runs, and bandwidths and latencies are published ones. `docs/SCALING.md` states the accuracy.

GB is 1e9 bytes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssd.anchors import IMAGE_SIZE_PX
from ssd.model import SSD300

TRAIN_IMAGES, EVAL_IMAGES = 117_266, 4_952  # images of COCO 2017 with boxes, from the published logs

# Mean epochs to the target by global batch: MLPerf's reference convergence points. The rules apply the first one to
# smaller batches, too.
EPOCHS = {1024: 50.0, 1536: 55.0, 2048: 65.1, 4096: 87.0}
EVAL_INTERVAL = 5  # epochs, in rulesets 1.0 and 1.1

# Minimum images per batch norm group. The published runs on 1,024 accelerators have 16 to 24.
MIN_SPAN = 16

# DistributedDataParallel's defaults: gradients travel in buckets, the first of them small.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20

# NCCL's own model of its all-reduce on A100 (github.com/NVIDIA/nccl, commit 01afd20, src/graph/tuning.cc): latency of a
# call, of a hop over NVLink and of a hop over the network in µs, fraction of the ring's bandwidth, and limit in GB/s.
ALL_REDUCES = (
    (8.4, 3.4, 9.6, 1.0, math.inf),  # ring, "Simple"
    (4.4, 1.2, 8.5, 0.9 * 0.915, 105 * 0.915),  # tree, "LL128"
    (4.4, 0.52, 5.0, 0.9 / 3.8, 80 / 3.8),  # tree, "LL": for the smallest
)

# An A100 evaluates 1,058 img/s, detections included, and trains 724 img/s of the same network (NVIDIA's SSD300 v1.1,
# batches of 64 and 128). The COCO metric takes 0.49 s on one rank.
EVALUATION_SPEED, METRIC_S = 1058 / 724, 0.49

# Rate at which a core reads, decodes and resizes, with the rest on the accelerator: measured on a Xeon with AMX.
IMAGES_PER_CORE_S = 400


class Network(NamedTuple):
    """Counted operations of a training step.

    grad_ready_times: for each gradient, in the order of the backward pass, the fraction of the backward pass after
    which it is ready, and its elements. forward_fraction: of the floating-point operations of a step.
    """

    grad_ready_times: tuple[tuple[float, int], ...]
    forward_fraction: float
    batch_norms: int


class Accelerator(NamedTuple):
    """Fitted constants: images/s in the limit of a large batch, and fixed overhead of a step."""

    images_per_s: float
    overhead_s: float


@dataclass(frozen=True)
class System:
    """Nodes of the accelerators, and settings of the run.

    node_gb_s: measured bus bandwidth of a ring inside a node. network_gb_s: the same for all network adapters of a
    node. cores: per accelerator. gradient_bytes: per element on the wire. overlaps: the all-reduce overlaps with the
    backward pass. evaluates: training waits for evaluation. metric_s: time of the COCO metric on one rank.
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
    """Nodes, ranks per node and batch size of a run. group: ranks of a batch norm group."""

    nodes: int
    per_node: int
    batch_size: int
    group: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks on all nodes."""
        return self.nodes * self.per_node

    @property
    def global_batch_size(self) -> int:
        """Number of images per step."""
        return self.ranks * self.batch_size


class Step(NamedTuple):
    """Seconds of each part of a step. data: additional time to wait for images."""

    overhead: float
    images: float
    gradient: float
    batch_norm: float
    data: float


class Run(NamedTuple):
    """Predicted run to the target."""

    layout: Layout
    step: Step
    epochs: float
    epoch_s: float
    evaluation_s: float

    @property
    def minutes(self) -> float:
        """Minutes from the first step to the last evaluation."""
        return (self.epochs * self.epoch_s + self.epochs / EVAL_INTERVAL * self.evaluation_s) / 60


def count_network(num_classes: int = 81) -> Network:
    """Count the operations of a step of SSD300 without computing anything."""
    with torch.device("meta"):
        model = SSD300(num_classes).train()
        images = torch.empty(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    ready: list[tuple[int, int]] = []
    with FlopCounterMode(display=False) as flops:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda tensor: ready.append((flops.get_total_flops(), tensor.numel()))
            )
        outputs = model(images)
        forward = flops.get_total_flops()
        torch.autograd.backward([output.sum() for output in outputs])
    total = flops.get_total_flops()
    return Network(
        grad_ready_times=tuple(((flop - forward) / (total - forward), elements) for flop, elements in ready),
        forward_fraction=forward / total,
        batch_norms=sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()),
    )


def step(network: Network, accelerator: Accelerator, system: System, layout: Layout) -> Step:
    """Predict the time of a step."""
    images = layout.batch_size / accelerator.images_per_s
    batch_norm = batch_norm_s(network, system, layout)
    # The overhead is spread over forward and backward pass as the rest is.
    backward_s = (1 - network.forward_fraction) * (accelerator.overhead_s + images)
    gradient = exposed_s(network, system, layout, backward_s)
    data = layout.batch_size / (system.cores * IMAGES_PER_CORE_S)
    compute = accelerator.overhead_s + images + gradient + batch_norm
    return Step(accelerator.overhead_s, images, gradient, batch_norm, max(0.0, data - compute))


def run(network: Network, accelerator: Accelerator, system: System, layout: Layout) -> Run:
    """Predict a run to the target: as many epochs as the reference needs, with an evaluation every five epochs."""
    predicted_step = step(network, accelerator, system, layout)
    images = math.ceil(EVAL_IMAGES / layout.ranks)
    evaluation_s = (accelerator.overhead_s + images / accelerator.images_per_s) / EVALUATION_SPEED + system.metric_s
    return Run(
        layout=layout,
        step=predicted_step,
        epochs=epochs(layout.global_batch_size),
        epoch_s=TRAIN_IMAGES / layout.global_batch_size * sum(predicted_step),
        evaluation_s=evaluation_s if system.evaluates else 0.0,
    )


def best_run(network: Network, accelerator: Accelerator, system: System, ranks: int) -> Run:
    """Return the fastest run on `ranks` accelerators over all batch sizes per rank up to 228.

    The global batch is limited to 4,096 images, since no convergence point is published beyond.
    """
    nodes = max(1, ranks // system.per_node)
    runs = []
    for batch_size in range(1, min(228, max(EPOCHS) // ranks) + 1):
        group = min(ranks, 2 ** math.ceil(math.log2(max(1, MIN_SPAN / batch_size))))
        layout = Layout(nodes, ranks // nodes, batch_size, group)
        runs.append(run(network, accelerator, system, layout))
    return min(runs, key=lambda candidate: candidate.minutes)


def epochs(global_batch_size: int) -> float:
    """Return the epochs to the target, interpolated linearly between the reference convergence points."""
    return float(np.interp(global_batch_size, list(EPOCHS), list(EPOCHS.values())))


def all_reduce_s(num_bytes: float, system: System, nodes: int, per_node: int) -> float:
    """Predict the time of an all-reduce with the fastest algorithm."""
    ranks = nodes * per_node
    if ranks == 1:
        return 0.0
    bus = min(system.node_gb_s if per_node > 1 else math.inf, system.network_gb_s if nodes > 1 else math.inf)
    times = []
    for index, (call_us, node_us, network_us, fraction, max_gb_s) in enumerate(ALL_REDUCES):
        if index == 0:  # ring: 2(n-1) hops, two of them over the network for each node
            hops, network_hops, passes = 2.0 * (ranks - 1), 2.0 * (nodes - 1), 2 * (ranks - 1) / ranks
        else:  # tree over the nodes, chain inside each node
            hops, network_hops, passes = 2 * (per_node - 1 + math.log2(nodes)), 2 * math.log2(nodes), 2.0
        latency_us = call_us + (hops - network_hops) * node_us + network_hops * network_us
        times.append(latency_us * 1e-6 + passes * num_bytes / (1e9 * min(fraction * bus, max_gb_s)))
    return min(times)


def exposed_s(network: Network, system: System, layout: Layout, backward_s: float) -> float:
    """Predict how long the all-reduces, one after another, extend beyond the backward pass."""
    end_s = 0.0
    for fraction, elements in buckets(network):
        end_s = max(end_s, fraction * backward_s if system.overlaps else backward_s)
        end_s += all_reduce_s(elements * system.gradient_bytes, system, layout.nodes, layout.per_node)
    return end_s - backward_s if layout.ranks > 1 else 0.0


def buckets(network: Network) -> list[tuple[float, int]]:
    """Return DDP's gradient buckets: the fraction of the backward pass after which each is ready, and its elements."""
    result: list[tuple[float, int]] = []
    elements, limit = 0, FIRST_BUCKET_BYTES
    for fraction, count in network.grad_ready_times:
        elements += count
        if 4 * elements >= limit:
            result.append((fraction, elements))
            elements, limit = 0, BUCKET_BYTES
    return [*result, (1.0, elements)] if elements else result


def batch_norm_s(network: Network, system: System, layout: Layout) -> float:
    """Predict the time of synchronized batch norm: two small all-reduces for each layer, forward and backward."""
    per_node = min(layout.group, layout.per_node)
    return 2 * network.batch_norms * all_reduce_s(2048, system, math.ceil(layout.group / per_node), per_node)
