"""Profile of SSD300's training step: its most expensive kernels, its launches, and the time without a kernel.

    python -m perf.accelerator.step_profile FILE [--device auto] [--rehearse]

Writes the trace next to FILE, for Perfetto.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detection.config.settings import report_errors
from detection.runtime.device import select_device, should_compile
from perf.accelerator.arguments import parse
from perf.harness import BenchContext, bench_size, has_compiler
from perf.profiler import trace
from perf.ssd.network import full_step
from perf.ssd.training import run_config

REHEARSED_BATCH = 2
LAUNCH_NAMES = ("LaunchKernel", "GraphLaunch")  # parts of the names of CUDA's and HIP's functions


class Interval(NamedTuple):
    """Time of a kernel, in microseconds."""

    start: float
    end: float


@report_errors
def main(argv: list[str]) -> int:
    """Profile and write; return the exit status."""
    arguments = parse(argv, "step_profile", __doc__)
    device = select_device(arguments.device, local_rank=0)
    compiled = should_compile("auto", device) and has_compiler(device)
    batch_size = REHEARSED_BATCH if arguments.rehearse else bench_size(on_cpu=False).batch_size
    with tempfile.TemporaryDirectory(prefix="perf-") as scratch:
        context = BenchContext(device, "auto", 0, bench_size(on_cpu=device.type == "cpu", quick=True), Path(scratch))
        step = full_step(context, run_config(context, batch_size))
        trace_file = arguments.file.with_name(f"{arguments.file.stem}_trace.json")
        operations = trace(step, device, trace_file)
    events = json.loads(trace_file.read_text())["traceEvents"]
    content = {
        "batch_size": batch_size,
        "compiled": compiled,
        "top_kernels": [operation._asdict() for operation in operations],
        **summarize_kernels(events),
    }
    arguments.file.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def summarize_kernels(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return number of launches and kernels, and the time with and without a kernel, of a Chrome trace.

    Without kernels, on a CPU, its operations count as kernels.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    launches = sum(any(name in event["name"] for name in LAUNCH_NAMES) for event in complete)
    kernels = [event for event in complete if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        kernels = [event for event in complete if event.get("cat") == "cpu_op"]
    intervals = sorted(Interval(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in kernels)
    if not intervals:
        return {"launches": launches, "kernels": 0, "busy_ms": 0.0, "idle_ms": 0.0, "longest_gap_ms": 0.0}
    busy_us, longest_gap_us, end_us = 0.0, 0.0, intervals[0].start
    for interval in intervals:
        longest_gap_us = max(longest_gap_us, interval.start - end_us)
        busy_us += max(0.0, interval.end - max(end_us, interval.start))
        end_us = max(end_us, interval.end)
    idle_us = end_us - intervals[0].start - busy_us
    return {
        "launches": launches,
        "kernels": len(kernels),
        "busy_ms": busy_us / 1000,
        "idle_ms": idle_us / 1000,
        "longest_gap_ms": longest_gap_us / 1000,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
