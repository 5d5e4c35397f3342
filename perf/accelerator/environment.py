"""Environment of an accelerator: machine, memory, measured peak rates, and what they allow SSD300 at most.

python -m perf.accelerator.environment FILE [--device auto] [--rehearse]
"""

import json
import sys
from functools import partial

import torch

from detection.config.settings import report_errors
from detection.runtime.device import select_device, select_precision, supports_jpeg_decode, total_memory_gib
from perf.accelerator.arguments import parse
from perf.machine import machine
from perf.roofline import Work, count_flop, measure_roofline
from ssd.model import SSD300

NETWORKS = {"ssd300-r34": ("resnet34", False), "ssd300-r50": ("resnet50", True)}  # backbone, extra batch norm
COUNTED_BATCH = 8


@report_errors
def main(argv: list[str]) -> int:
    """Measure and write; return the exit status."""
    arguments = parse(argv, "environment", __doc__)
    device = select_device(arguments.device, local_rank=0)
    side, copy_bytes = (512, 2**24) if arguments.rehearse else (8192, 2**31)
    rooflines = {
        name: measure_roofline(device, name, torch.get_num_threads(), side, copy_bytes)
        for name in ("bf16", "tf32", "fp32")
    }
    limits = {
        network: {
            name: 1 / roofline.min_s(count_training_work(network, name, device)) for name, roofline in rooflines.items()
        }
        for network in NETWORKS
    }
    content = machine(device) | {
        "memory_gib": total_memory_gib(device),
        "decodes_jpeg": supports_jpeg_decode(device),
        "tflop_per_s": {name: roofline.flop_per_s / 1e12 for name, roofline in rooflines.items()},
        "tb_per_s": rooflines["bf16"].bytes_per_s / 1e12,
        "limit_img_per_s": limits,
    }
    arguments.file.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def count_training_work(network: str, precision: str, device: torch.device) -> Work:
    """Return the arithmetic of a training step per image. Its memory traffic depends on what is fused, and is 0."""
    backbone, batch_norm = NETWORKS[network]
    make = partial(SSD300, backbone=backbone, batch_norm=batch_norm)
    dtype = select_precision(precision, device).dtype
    return count_flop(make, dtype, backward=True, batch_size=COUNTED_BATCH)._replace(bytes=0.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
