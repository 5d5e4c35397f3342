"""Measure this machine: python -m perf.run [NAME ...] [--quick] [--check] [--photos DIR] [--profile] ...

Times every part of training, from JPEG bytes to COCO's figures, beside what a user would pick instead, in turns, and
counts what the machine could do at most. Prints a table and writes perf/results/<date>_<hardware>_<commit>.json.

Exits with 0, 1 where --check finds a requirement that is not met, 2 on a mistake.
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
from itertools import count
from pathlib import Path
from typing import Any

import torch

from detection.config.settings import InputError
from detection.runtime.device import choose, describe, tune
from perf import table
from perf.harness import FULL_METRIC_IMAGES, Bench, Result, Scale, cores, quick, whole
from perf.machine import RESULTS, machine
from perf.maskrcnn import evaluation as maskrcnn_evaluation
from perf.maskrcnn import training as maskrcnn_training
from perf.photos import open_photos
from perf.profiler import Operation, trace
from perf.ssd import evaluation, input, network, training

PARTS: Mapping[str, Callable[[Bench], Iterator[Result]]] = {
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
    "maskrcnn_trunk": maskrcnn_training.time_trunk,
    "maskrcnn_align": maskrcnn_training.time_align,
    "maskrcnn_proposals": maskrcnn_training.time_proposals,
    "maskrcnn_mask_head": maskrcnn_training.time_mask_head,
    "maskrcnn_paste": maskrcnn_evaluation.time_paste,
    "maskrcnn_evaluation": maskrcnn_evaluation.time_evaluation,
}

MASK_RCNN = "maskrcnn"  # what the names of its parts begin with


def main(argv: list[str], scale: Scale | None = None) -> int:
    """Measure, or compare what was measured; returns the exit status. scale: in place of what the flags ask for."""
    arguments = parse(argv)
    try:
        if arguments.list:
            print("\n".join(f"{name:<21}{first_line(part)}" for name, part in PARTS.items()))
            return 0
        if arguments.compare:
            first, second = (table.read(path)["results"] for path in arguments.compare)
            print(table.compare(first, second))
            return 0
        with tempfile.TemporaryDirectory(prefix="perf-") as scratch:
            return measure(arguments, open_bench(arguments, scale, Path(scratch)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags; a wrong one ends the process with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names_help = "parts to measure (--list), or maskrcnn for all of its; all if none"
    parser.add_argument("names", metavar="NAME", nargs="*", help=names_help)
    parser.add_argument("--list", action="store_true", help="the parts and what they measure")
    parser.add_argument("--quick", action="store_true", help="less of it: SSD's in ten minutes on two cores")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a requirement is not met")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), type=Path, help="two files of results side by side")
    parser.add_argument("--photos", metavar="DIR", type=Path, help="measure on these too: COCO's layout, or JPEG files")
    parser.add_argument("--profile", action="store_true", help="also trace a step and an epoch from end to end")
    parser.add_argument("--no-baseline", action="store_true", help="leave out what a user would pick instead")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, xpu ...")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "tf32", "fp32"))
    parser.add_argument("--batch-size", type=int, help="of training, in place of the device's usual one")
    parser.add_argument("--seed", type=int, default=0, help="of photos, weights and augmentation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder, or .json file, for the results")
    return parser.parse_args(argv)


def open_bench(arguments: argparse.Namespace, scale: Scale | None, scratch: Path) -> Bench:
    """The bench that the flags ask for; InputError where the device or the photos are not there."""
    device = choose(arguments.device, local_rank=0)
    on_cpu = device.type == "cpu"
    chosen = scale or (quick if arguments.quick else whole)(on_cpu)
    if arguments.check and not scale:
        chosen = replace(chosen, metric_images=tuple(sorted({*chosen.metric_images, FULL_METRIC_IMAGES})))
    if arguments.batch_size is not None:
        if arguments.batch_size < 1:
            raise InputError(f"--batch-size {arguments.batch_size}: should be at least 1")
        chosen = replace(chosen, batch_size=arguments.batch_size, maskrcnn_batch_size=arguments.batch_size)
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: should be at least 0")
    if arguments.check and arguments.no_baseline:
        raise InputError("--check compares with what --no-baseline leaves out. Pass one of them.")
    return Bench(
        device=device,
        precision_name=arguments.precision,
        seed=arguments.seed,
        scale=chosen,
        scratch=scratch,
        real=open_photos(arguments.photos, chosen.photos) if arguments.photos else None,
        baseline=not arguments.no_baseline,
    )


def measure(arguments: argparse.Namespace, bench: Bench) -> int:
    """Measure the parts, show and write the results, each part's as soon as it is done; returns the exit status."""
    names = chosen_parts(arguments, on_cpu=bench.device.type == "cpu")
    facts = machine(bench.device)
    path = out_file(arguments.out, bench, facts["commit"])
    content: dict[str, Any] = {
        "machine": facts,
        "precision": bench.precision.name,
        "seed": bench.seed,
        "scale": asdict(bench.scale),
        "limits": {f"{n} threads": bench.limits(n)._asdict() for n in sorted({1, torch.get_num_threads()})},
        "seconds": {},
        "costliest": {},
        "results": [],
    }
    print(f"{facts['hardware']} ({facts['processor']}), {bench.precision.name}: {', '.join(names)}", flush=True)
    results: list[Result] = []
    for name in names:
        start_s = time.perf_counter()
        tune(bench.device, one_size=not name.startswith(MASK_RCNN))
        measured = list(PARTS[name](bench))
        gc.collect()  # models and workers that are done with
        results += measured
        content["results"] += [asdict(result) for result in measured]
        content["seconds"][name] = round(time.perf_counter() - start_s, 1)
        print(f"\n{table.show(measured)}", flush=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.profile:
        for name, operations in profile(bench, path).items():
            content["costliest"][name] = [operation._asdict() for operation in operations]
            print(f"\nthe costliest operations of {name}\n{table.show_operations(operations)}")
        path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{path} is written after {sum(content['seconds'].values()):.0f} s of measuring")
    if not arguments.check:
        return 0
    text, passed = table.check(results, on_cpu=bench.device.type == "cpu")
    print(f"\n{text}")
    return 0 if passed else 1


def chosen_parts(arguments: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """The parts named, else those that --check needs, else all, if quick those of SSD; InputError for no such name.

    The name maskrcnn stands for all of Mask R-CNN's.
    """
    of_maskrcnn = [name for name in PARTS if name.startswith(MASK_RCNN)]
    names = [part for name in arguments.names for part in (of_maskrcnn if name == MASK_RCNN else [name])]
    for name in names:
        if name not in PARTS:
            nearest = difflib.get_close_matches(name, PARTS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "--list names them"
            raise InputError(f"{name}: no such part; {hint}")
    required = {requirement.part for requirement in table.required_of(on_cpu)}
    if arguments.check:
        default = [name for name in PARTS if name in required]
    else:
        default = [name for name in PARTS if not (arguments.quick and name in of_maskrcnn)]
    return names or default


def out_file(out: Path, bench: Bench, commit: str) -> Path:
    """The file of results that was named, or a new one in the folder; InputError where it cannot be."""
    folder = out.parent if out.suffix == ".json" else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}.") from error
    if out.suffix == ".json":
        return out
    hardware = f"{cores()}core_cpu" if bench.device.type == "cpu" else describe(bench.device)
    stem = f"{datetime.now(UTC):%Y-%m-%d}_{re.sub(r'[^a-z0-9]+', '_', hardware.lower())}_{commit}"
    names = (stem if number == 1 else f"{stem}_{number}" for number in count(1))
    return next(path for name in names if not (path := folder / f"{name}.json").exists())


def profile(bench: Bench, path: Path) -> dict[str, list[Operation]]:
    """Trace a step and a short epoch, into files beside the results; the costliest operations of each."""
    size = bench.scale.batch_size
    short = replace(bench, scale=replace(bench.scale, epoch_images=bench.scale.traced_steps * size))
    runs = {
        "step": network.whole_step(short, training.run_config(short, size)),
        "end-to-end": training.epochs(short, size, short.num_workers).run,
    }
    return {
        name: trace(run, bench.device, path.with_name(f"{path.stem}_{name}_trace.json.gz"))
        for name, run in runs.items()
    }


def first_line(part: Callable[[Bench], Iterator[Result]]) -> str:
    """What a part measures."""
    return (part.__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
