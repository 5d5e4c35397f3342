"""Cost curves: time and memory by number of images, data workers and images per batch.

    python -m perf.cost_curves [NAME ...] [--rounds 5] [--page FILE] [--out FILE] [--allow-dirty]

Each point is measured in a separate process, so that its peak memory is its own. A round measures all points of an axis
once, so that drift of the machine affects all of them. The table shows median and range over rounds. It leaves out
times that were measured while other processes computed.

Memory is the peak resident memory above what the process holds before, with a resolution of 1 MiB. On an accelerator it
is the memory of its tensors.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from detection.config.settings import InputError, report_errors
from detection.data import coco
from detection.data.batch import RankBatch
from detection.data.prefetch import to_device
from detection.engine import optim, train_loop
from detection.engine.initialization import build_state
from detection.evaluation.coco_metric import CocoBoxMetric
from detection.runtime.device import select_device
from detection.runtime.distributed import DistContext
from detection.synthetic.coco_scenes import TRAIN_IMAGES
from mlperf import stdio
from perf import open_images
from perf.machine import PEAK_RESET, ROOT, LoadMeter, machine, peak_mib, process_mib, select_out
from perf.page import markdown, split_at_marker, update_table
from perf.photos import synthesize_gt, synthesize_photos
from perf.ssd.predictions import make_rows
from perf.table import caption, format_number
from perf.timing import Variant, calls_per_sample, quartiles, time_calls
from ssd.config import Config
from ssd.data import SSDTrainSource
from ssd.evaluator import SSDEvaluator
from ssd.model import SSD300
from ssd.train import make_workload

RECORDS = ROOT / "perf" / "results" / "cost_curves.json"
NUM_CLASSES = 81  # COCO's categories and the background
NUM_PHOTOS = 64  # different ones, which data sets repeat
LOADED_BATCHES, LOADED_BATCH_SIZE = 40, 16
FITTED = ("time, ms", "memory, MiB")  # measures that may follow a power law
FITTED_POINTS = 3  # at the upper end, where fixed costs matter least

Values = dict[str, float]
"""Measurements of one process by name and unit, such as "memory, MiB"."""


class Axis(NamedTuple):
    """Amounts of work, and the functions that measure at an amount, with a folder for files. title: of the amount."""

    title: str
    amounts: Sequence[int]
    curves: Mapping[str, Callable[[int, Path], Values]]


@report_errors
def main(argv: list[str]) -> int:
    """Measure and write; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.cost_curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(AXES)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="processes per point")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are updated")
    parser.add_argument("--out", type=Path, help=f"file of all records; default: {RECORDS.relative_to(ROOT)}")
    dirty_help = "measure uncommitted code; the record goes to --out or a temporary folder"
    parser.add_argument("--allow-dirty", action="store_true", help=dirty_help)
    arguments = parser.parse_args(argv)
    measure_axes(arguments)
    return 0


def measure_axes(arguments: argparse.Namespace) -> None:
    """Measure each named axis, and keep the records of other axes. Raise InputError for invalid flags."""
    if unknown := [name for name in arguments.names if name not in AXES]:
        raise InputError(f"{', '.join(unknown)}: no such axis. Choose from {', '.join(AXES)}.")
    if arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds}: should be at least 1.")
    if not PEAK_RESET.exists():
        raise InputError(f"{PEAK_RESET}: missing, but needed to measure peak memory. Use Linux.")
    host = machine()
    out = select_out(arguments.out, RECORDS, host["commit"], allow_dirty=arguments.allow_dirty)
    out = out / RECORDS.name if out.is_dir() else out
    names = arguments.names or list(AXES)
    for name in names if arguments.page else ():
        split_at_marker(arguments.page, name)
    records = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="cost-curves-") as folder:
        for name in names:
            load_meter = LoadMeter()
            columns = measure(AXES[name], Path(folder), arguments.rounds)
            records[name] = {
                "machine": host,
                "load": load_meter.read(),
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "n": arguments.rounds,
                "title": AXES[name].title,
                "columns": columns,
            }
            out.write_text(json.dumps(records, indent=1) + "\n")
            print(f"\n{format_record(records[name])}", flush=True)
            if arguments.page:
                update_table(arguments.page, name, format_record(records[name]))


def measure(axis: Axis, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the quartiles of each column at each amount of an axis."""
    points = [(curve, amount) for curve in axis.curves for amount in axis.amounts]
    samples: dict[str, dict[int, list[float]]] = {}
    for curve, amount in tqdm(points * rounds, unit="point", disable=None, leave=False):
        for name, value in run_in_subprocess(axis.curves[curve], amount, folder).items():
            samples.setdefault(f"{curve}: {name}", {}).setdefault(amount, []).append(value)
    return {
        column: {amount: asdict(quartiles(values)) for amount, values in by_amount.items()}
        for column, by_amount in samples.items()
    }


def format_record(record: dict[str, Any]) -> str:
    """Return a Markdown table: one row per amount, the scaling exponents, and the machine below."""
    columns = record["columns"]
    if not record["load"]["is_idle"]:
        columns = {name: column for name, column in columns.items() if name.endswith("MiB")}
    amounts = sorted({int(amount) for column in columns.values() for amount in column})
    rows = [(record["title"], *columns)]
    for amount in amounts:
        points = [{int(key): point for key, point in column.items()}.get(amount) for column in columns.values()]
        rows.append((f"{amount:,}", *(format_point(point) if point else "" for point in points)))
    exponents = [format_exponent(column) if name.endswith(FITTED) else "" for name, column in columns.items()]
    if any(exponents):
        rows.append(("scaling exponent", *exponents))
    return f"{markdown(rows)}\n\n{caption(record)}"


def format_point(point: dict[str, float]) -> str:
    """Return the median as text, with the range in brackets if it differs."""
    median, low, high = (format_number(point[key]) for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low} to {high})"


def format_exponent(column: dict[str, dict[str, float]]) -> str:
    """Return the exponent of a power law, fitted to the minima at the upper end, which other load affects least."""
    points = [(int(amount), point["min"]) for amount, point in column.items() if int(amount) > 0][-FITTED_POINTS:]
    amounts, minima = np.log(points).T
    return f"{np.polyfit(amounts, minima, 1)[0]:.2f}" if len(points) > 1 else ""


def run_in_subprocess(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process that shares nothing with this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def cost(call: Callable[[], object]) -> Values:
    """Return time and additional peak memory of a call.

    The memory is that of the first call. A call shorter than a second repeats, since the first one pays for
    initialization, and the time is that of the repetitions.
    """
    device = select_device("auto", 0)
    variant = Variant("", call)
    first_s: list[float] = []
    memory_mib = peak_mib(lambda: first_s.append(time_calls(variant, 1, device)), device)
    (call_s,) = first_s
    if call_s < 1:
        calls = calls_per_sample(variant, device)
        call_s = statistics.median(time_calls(variant, calls, device) for _ in range(3))
    return {"time, ms": 1000 * call_s, "memory, MiB": memory_mib}


def read(images: int, folder: Path) -> Values:
    """Measure reading and validating the annotations of N images, with polygons."""
    return cost(partial(coco.read, *coco.standard_paths(make_annotations(folder, images), "train")))


def open_metric(images: int, folder: Path) -> Values:
    """Measure opening the annotations for the metric, which happens once per run."""
    split = coco.read(*coco.standard_paths(make_annotations(folder, images), "train"))
    return cost(partial(CocoBoxMetric, split, "hotcoco"))


def evaluate(images: int, folder: Path) -> Values:
    """Measure the metric over N images with 10 detections each."""
    split = coco.read(*coco.standard_paths(make_annotations(folder, images), "train"))
    return cost(partial(CocoBoxMetric(split, "hotcoco"), make_rows(split, 10, seed=0)))


def load(images: int, workers: int, folder: Path) -> Values:
    """Measure the input pipeline over N images: from JPEG files in the page cache to batches."""
    data_dir = folder / f"photos-{images}"
    if not data_dir.exists():
        run_in_subprocess(make_data_dir, data_dir, images)
    config = Config(data_dir=data_dir, num_workers=workers, num_classes=NUM_CLASSES, batch_size=LOADED_BATCH_SIZE)
    data = SSDTrainSource(config, DistContext(0, 1, select_device("auto", 0)), seed=0)
    rank_batches = data.train_batches(1)
    start_s = time.perf_counter()
    next(rank_batches)
    first_s = time.perf_counter() - start_s
    for _ in islice(rank_batches, 2 * workers):  # prefetched while the first was loading
        pass
    start_s = time.perf_counter()
    num_images = sum(len(rank_batch.batch.images) for rank_batch in islice(rank_batches, LOADED_BATCHES))
    rate = num_images / (time.perf_counter() - start_s)
    pids = [child.pid for child in multiprocessing.active_children() if child.pid]
    total_mib = sum(process_mib(pid, "smaps_rollup", "Pss") for pid in (os.getpid(), *pids))
    values = {"rate, img/s": rate, "first batch, ms": 1000 * first_s, "all processes, MiB": total_mib}
    private = [process_mib(pid, "smaps_rollup", "Private_Clean", "Private_Dirty") for pid in pids]
    return values | ({"private to a worker, MiB": statistics.mean(private)} if private else {})


def train(batch_size: int, folder: Path) -> Values:
    """Measure a training step on a dummy batch. Memory is that of the first step, with gradients and momentum."""
    config = Config(data_dir=folder, batch_size=batch_size, num_classes=NUM_CLASSES)
    ranks = DistContext(0, 1, select_device(config.device, 0))
    torch.manual_seed(0)
    workload = make_workload(config, ranks, 0, SSD300(NUM_CLASSES), SSDEvaluator(config, ranks))
    state = build_state(workload, config, ranks)
    rank_batch = to_device(RankBatch(workload.dummy_batch(), batch_size, 1 / batch_size), ranks.device)
    optim.set_learning_rates(state.optimizer, lambda factor: 1e-3 * factor)
    values = cost(partial(train_loop.train_step, state, rank_batch, workload, config, ranks))
    return values | {"rate, img/s": 1000 * batch_size / values["time, ms"]}


def measure_open_images(step: Callable[[Path], None], images: int, folder: Path) -> Values:
    """Measure a step of `perf.open_images` over N images."""
    split = folder / f"open-images-{images}"
    if not split.exists():
        run_in_subprocess(open_images.generate, split, images)
    return cost(partial(step, split))


def make_annotations(folder: Path, images: int) -> Path:
    """Return a folder with the annotations of N images in COCO's layout and empty image files. Create it if missing."""
    data_dir = folder / f"annotations-{images}"
    if not data_dir.exists():
        run_in_subprocess(synthesize_gt, data_dir, images, 0)
    return data_dir


def make_data_dir(data_dir: Path, images: int) -> None:
    """Make a data set of N images that repeats a few synthetic photos."""
    synthesize_photos(data_dir.parent / "photos", NUM_PHOTOS, seed=0).make_data_dir(data_dir, images, 1)


AXES = {
    "images": Axis(
        "images",
        (100, 1000, 10_000, TRAIN_IMAGES),
        {"read annotations": read, "open for the metric": open_metric, "metric, 10 detections per image": evaluate},
    ),
    "workers": Axis(
        "workers", (0, 1, 2, 4), {f"{images:,} images": partial(load, images) for images in (1000, TRAIN_IMAGES)}
    ),
    "open_images": Axis(
        "images",
        (1000, 10_000, 100_000, open_images.TRAIN_IMAGES),
        {
            "convert": partial(measure_open_images, open_images.convert),
            "read the JSON file": partial(measure_open_images, open_images.read_json),
            "read the arrays": partial(measure_open_images, open_images.read_arrays),
        },
    ),
    "batch": Axis("images per batch", (1, 2, 4, 8, 16, 32), {"training step": train}),
}

if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
