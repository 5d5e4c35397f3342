"""Benchmarks of all parts of training on this machine.

    python -m perf.run [NAME ...] [--quick | --tiny] [--check] [--photos DIR] [--profile] ...

Times every part of training, from JPEG bytes to the COCO metric, interleaved with its baselines, and compares it with
the machine's roofline. Prints a table and writes perf/results/<time>_<hardware>_<commit>.json with the machine and its
load. Uncommitted changes are an error, unless --out is outside the repository.

Exits with 0, with 1 if --check finds a requirement that is not met, or with 2 on invalid input.
"""

import argparse
import difflib
import gc
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from detection.config.settings import InputError, report_errors
from detection.runtime.device import device_name, select_device, set_kernel_autotune
from mlperf import stdio
from perf import table
from perf.harness import FULL_METRIC_IMAGES, TINY, BenchContext, Result, bench_size, has_compiler, num_cores
from perf.machine import RESULTS, LoadMeter, machine, select_out
from perf.maskrcnn import evaluation as maskrcnn_evaluation
from perf.maskrcnn import mask_targets as maskrcnn_mask_targets
from perf.maskrcnn import training as maskrcnn_training
from perf.photos import open_photos
from perf.profiler import Operation, trace
from perf.retinanet import evaluation as retinanet_evaluation
from perf.retinanet import training as retinanet_training
from perf.ssd import evaluation, input, network, training

PARTS: Mapping[str, Callable[[BenchContext], Iterator[Result]]] = {
    "decode": input.time_decode,
    "resize": input.time_resize,
    "jitter": input.time_jitter,
    "encode": input.time_encode,
    "input": input.time_input,
    "memory": input.time_memory,
    "forward": network.time_forward,
    "loss": network.time_loss,
    "step": network.time_step,
    "detect": evaluation.time_detect,
    "metric": evaluation.time_metric,
    "evaluate": evaluation.time_evaluate,
    "end-to-end": training.time_end_to_end,
    "scaling": training.time_scaling,
    "maskrcnn_step": maskrcnn_training.time_step,
    "maskrcnn_backbone": maskrcnn_training.time_backbone,
    "maskrcnn_roi_align": maskrcnn_training.time_roi_align,
    "maskrcnn_proposals": maskrcnn_training.time_proposals,
    "maskrcnn_mask_head": maskrcnn_training.time_mask_head,
    "maskrcnn_mask_targets": maskrcnn_mask_targets.time_mask_targets,
    "maskrcnn_paste": maskrcnn_evaluation.time_paste,
    "maskrcnn_evaluation": maskrcnn_evaluation.time_evaluation,
    "retinanet_step": retinanet_training.time_step,
    "retinanet_loss": retinanet_training.time_loss,
    "retinanet_decode": retinanet_evaluation.time_decode,
    "retinanet_evaluation": retinanet_evaluation.time_evaluation,
}

GROUPS = {
    group: [name for name in PARTS if name.startswith(f"{group}_")] for group in ("maskrcnn", "retinanet")
}  # parts of the workloads other than SSD


@report_errors
def main(argv: list[str]) -> int:
    """Measure, or compare two files; return the exit status."""
    arguments = parse(argv)
    if arguments.list:
        print("\n".join(f"{name:<22}{summary_line(part)}" for name, part in PARTS.items()))
        return 0
    if arguments.compare:
        first, second = (table.read(path)["results"] for path in arguments.compare)
        print(table.compare(first, second))
        return 0
    with tempfile.TemporaryDirectory(prefix="perf-") as scratch:
        return measure(arguments, make_context(arguments, Path(scratch)))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags. An invalid flag ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names_help = "parts to measure (see --list), or maskrcnn or retinanet for all of its parts; default: all"
    parser.add_argument("names", metavar="NAME", nargs="*", help=names_help)
    parser.add_argument("--list", action="store_true", help="list the parts")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="measure less: SSD's parts in ten minutes on two cores")
    sizes.add_argument("--tiny", action="store_true", help="measure as little as possible, to try the benchmarks")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a requirement is not met")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), type=Path, help="compare two files of results")
    photos_help = "also measure on these photos: COCO's layout, or JPEG files"
    parser.add_argument("--photos", metavar="DIR", type=Path, help=photos_help)
    parser.add_argument("--profile", action="store_true", help="also trace a step and an end-to-end epoch")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, xpu ...")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "tf32", "fp32"))
    parser.add_argument("--batch-size", type=int, help="of training; default: depends on the device")
    parser.add_argument("--seed", type=int, default=0, help="of photos, weights and augmentation")
    parser.add_argument("--out", type=Path, help="folder or .json file for the results; default: perf/results")
    dirty_help = "measure uncommitted code; results go to --out or a temporary folder"
    parser.add_argument("--allow-dirty", action="store_true", help=dirty_help)
    return parser.parse_args(argv)


def make_context(arguments: argparse.Namespace, scratch: Path) -> BenchContext:
    """Return the context that the flags select. Raise InputError if the device or the photos are missing."""
    device = select_device(arguments.device, local_rank=0)
    on_cpu = device.type == "cpu"
    selected = TINY if arguments.tiny else bench_size(on_cpu=on_cpu, quick=arguments.quick)
    if arguments.check:
        selected = replace(selected, metric_images=tuple(sorted({*selected.metric_images, FULL_METRIC_IMAGES})))
    if arguments.batch_size is not None:
        if arguments.batch_size < 1:
            raise InputError(f"--batch-size {arguments.batch_size}: should be at least 1.")
        names = ("batch_size", *(f"{group}_batch_size" for group in GROUPS))
        selected = replace(selected, **dict.fromkeys(names, arguments.batch_size))
    if not has_compiler(device):
        selected = replace(selected, compiled=False)
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: should be at least 0.")
    return BenchContext(
        device=device,
        precision_name=arguments.precision,
        seed=arguments.seed,
        size=selected,
        scratch=scratch,
        real_photos=open_photos(arguments.photos, selected.photos) if arguments.photos else None,
    )


def measure(arguments: argparse.Namespace, context: BenchContext) -> int:
    """Measure the parts, print and write the results of each as soon as it ends, and return the exit status."""
    on_cpu = context.device.type == "cpu"
    names = select_parts(arguments, on_cpu=on_cpu)
    metadata = machine(context.device)
    out = select_out(arguments.out, RESULTS, metadata["commit"], allow_dirty=arguments.allow_dirty)
    path, load_meter = result_path(out, context, metadata["commit"]), LoadMeter()
    content: dict[str, Any] = {
        "machine": metadata,
        "load": {},
        "precision": context.precision.name,
        "seed": context.seed,
        "size": asdict(context.size),
        "rooflines": {f"{n} threads": context.roofline(n)._asdict() for n in sorted({1, torch.get_num_threads()})},
        "seconds": {},
        "top_ops": {},
        "results": [],
    }
    print(f"{metadata['hardware']} ({metadata['processor']}), {context.precision.name}: {', '.join(names)}", flush=True)
    results: list[Result] = []
    for name in names:
        start_s = time.perf_counter()
        set_kernel_autotune(context.device, fixed_input_size=name not in GROUPS["maskrcnn"])
        part_results = list(PARTS[name](context))
        gc.collect()  # models and workers of this part
        results += part_results
        content["results"] += [asdict(result) for result in part_results]
        content["seconds"][name] = round(time.perf_counter() - start_s, 1)
        content["load"] = load = load_meter.read()
        print(f"\n{table.format_results(part_results)}", flush=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.profile:
        for name, operations in profile(context, path).items():
            content["top_ops"][name] = [operation._asdict() for operation in operations]
            print(f"\ntop operations of {name}\n{table.format_operations(operations)}")
        path.write_text(json.dumps(content, indent=1) + "\n")
    if not load["is_idle"]:
        print(f"\nnote: other processes used {load['other_cpu_percent']}% of a core, which affects all times")
    print(f"\nwrote {path} after {sum(content['seconds'].values()):.0f} s")
    if not arguments.check:
        return 0
    text, passed = table.check(results, on_cpu=on_cpu)
    print(f"\n{text}")
    return 0 if passed else 1


def select_parts(arguments: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """Return the named parts. The name of a workload selects all of its parts. Raise InputError for unknown names.

    Without names, return those that --check needs, or those of SSD with --quick, or all.
    """
    names = [part for name in arguments.names for part in GROUPS.get(name, [name])]
    for name in names:
        if name not in PARTS:
            matches = difflib.get_close_matches(name, PARTS, n=1)
            hint = f"Did you mean {matches[0]}?" if matches else "--list shows them."
            raise InputError(f"{name}: no such part. {hint}")
    required = {requirement.part for requirement in table.requirements_of(on_cpu)}
    if arguments.check:
        default = [name for name in PARTS if name in required]
    else:
        left_out = {name for group in GROUPS.values() for name in group} if arguments.quick else set()
        default = [name for name in PARTS if name not in left_out]
    return names or default


def result_path(out: Path, context: BenchContext, commit: str) -> Path:
    """Return the named file, or a new file in the named folder. Raise InputError if the folder cannot be created."""
    folder = out.parent if out.suffix == ".json" else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}.") from error
    if out.suffix == ".json":
        return out
    hardware = f"{num_cores()}core_cpu" if context.device.type == "cpu" else device_name(context.device)
    return folder / f"{datetime.now(UTC):%Y-%m-%d_%H%M%S}_{re.sub(r'[^a-z0-9]+', '_', hardware.lower())}_{commit}.json"


def profile(context: BenchContext, path: Path) -> dict[str, list[Operation]]:
    """Trace a step and a short epoch into files next to the results, and return the top operations of each."""
    batch_size = context.size.batch_size
    short = replace(context, size=replace(context.size, epoch_images=context.size.traced_steps * batch_size))
    runs = {
        "step": network.full_step(short, training.run_config(short, batch_size)),
        "end-to-end": training.epochs(short, batch_size, short.num_workers).run,
    }
    return {
        name: trace(run, context.device, path.with_name(f"{path.stem}_{name}_trace.json.gz"))
        for name, run in runs.items()
    }


def summary_line(part: Callable[[BenchContext], Iterator[Result]]) -> str:
    """Return the first line of a part's docstring."""
    return (part.__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
