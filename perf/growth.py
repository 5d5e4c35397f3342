"""What it costs as work grows: time and memory against images, boxes, detections, workers and the batch size.

    python -m perf.growth [NAME ...] [--out DIR] [--page FILE] [--rounds 5] [--quick]

Each point is measured in a process of its own, so that its peak of memory is its own. A round goes through all points
of an axis once, so that a machine that slows down slows all of them alike. A point's time in a round is the median of
its calls; reported are the median over rounds, the least and the greatest.

Memory is the peak of resident memory (VmHWM) above what the process held before the first call, 1 MiB or more, since
less cannot be told apart; on an accelerator it is that of the tensors on it. Data are those of detection.rehearsal.

B images, G ground-truth boxes an image, N images of a data set, A anchors, K classes.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from detection import coco, engine, scenes
from detection.config import InputError
from detection.device import choose
from detection.distributed import Ranks
from detection.metric import BoxMetric
from detection.prefetch import move
from perf.machine import machine
from perf.photos import make_up, make_up_truth
from perf.predictions import make_rows
from perf.timing import Side, calls_per_sample, seconds, spread
from ssd import augment
from ssd.anchors import NUM_ANCHORS, make_anchors
from ssd.box_coder import encode
from ssd.config import Config
from ssd.data import SSDData
from ssd.detect import detect
from ssd.evaluation import Evaluation
from ssd.loss import multibox_loss
from ssd.model import SSD300
from ssd.train import make_benchmark

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

OUT = Path(__file__).parent.parent / "docs" / "performance"

CLASSES = 81  # of COCO, with the background
BATCH_SIZE = 8
CROPPED_IMAGES = 100
PICTURES = 64  # different ones that are loaded, again and again
VAL_IMAGES = 50
LOADED_BATCHES = 40
LOADED_BATCH_SIZE = 16

UNITS = {
    "time": "ms",
    "memory": "MiB",
    "rate": "img/s",
    "first batch": "ms",
    "all processes": "MiB",
    "private to a worker": "MiB",
}
FITTED = ("time", "memory")  # what is a power of the work, if anything is
MOST_TICKS = 7
UPPER_END = 3  # points that the exponent is fitted to: fixed costs hide in them least

PEAK_RESET = Path("/proc/self/clear_refs")

Values = dict[str, float]
"""What one process measured: a value for each of some of `UNITS`."""


@dataclass(frozen=True)
class Curve:
    """One thing whose cost is measured at each of `works`: with --quick at each of `quick`.

    measure: of a work, in a folder for what it needs; it runs in a process of its own.
    """

    name: str
    works: tuple[int, ...]
    quick: tuple[int, ...]
    measure: Callable[[int, Path], Values]


@dataclass(frozen=True)
class Axis:
    """One kind of work that grows, and what grows with it."""

    name: str
    work: str
    curves: tuple[Curve, ...]


def axes() -> tuple[Axis, ...]:
    """All that is measured."""
    images = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)
    few_images = (40,)
    boxes = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
    few_boxes = (0, 8)
    detections = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    candidates = (1, 10, 100, 1000, 10_000, 100_000)
    batches = (1, 2, 4, 8, 16, 32) if choose("auto", 0).type == "cpu" else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    return (
        Axis(
            "images",
            "images",
            (
                Curve("read annotations", (*images, scenes.TRAIN_IMAGES), few_images, read),
                Curve("open for the metric", images, few_images, open_metric),
                Curve("metric, 10 detections an image", images, few_images, judge_images),
            ),
        ),
        Axis(
            "boxes",
            "boxes per image",
            (
                Curve(f"draw {CROPPED_IMAGES} crops", boxes, few_boxes, crop),
                Curve(f"encode {BATCH_SIZE} images", boxes, few_boxes, encode_boxes),
                Curve(f"loss of {BATCH_SIZE} images, with gradients", boxes, few_boxes, loss),
            ),
        ),
        Axis(
            "detections",
            "detections or candidates per image",
            (
                Curve("metric, 40 images, by detections", (), (2,), partial(judge_detections, 40)),
                Curve("metric, 1,000 images, by detections", detections, (), partial(judge_detections, 1000)),
                Curve(f"detect in {BATCH_SIZE} images, by candidates", candidates, (100,), detect_candidates),
            ),
        ),
        Axis(
            "workers",
            "workers",
            (
                Curve("100 images", (), (0, 1), partial(load, 100)),
                Curve("1,000 images", (0, 1, 2, 4), (), partial(load, 1000)),
                Curve(f"{scenes.TRAIN_IMAGES:,} images", (0, 1, 2, 4), (), partial(load, scenes.TRAIN_IMAGES)),
            ),
        ),
        Axis("batch", "images in a batch", (Curve("training step", batches, (1,), step),)),
    )


def main(argv: list[str]) -> int:
    """Measure, write and draw; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = {axis.name: axis for axis in axes()}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all of them if none is named")
    parser.add_argument("--out", type=Path, default=OUT, help="for growth.json and a picture of each NAME")
    parser.add_argument("--page", type=Path, help="a page of Markdown to bring the tables of up to date")
    parser.add_argument("--rounds", type=int, default=5, help="processes that measure each point")
    parser.add_argument("--quick", action="store_true", help="sizes so small that only the program is tested")
    arguments = parser.parse_args(argv)
    try:
        if unknown := [name for name in arguments.names if name not in known]:
            raise InputError(f"{', '.join(unknown)}: not measured here. What is: {', '.join(known)}.")
        if arguments.rounds < 1:
            raise InputError(f"--rounds {arguments.rounds}: should be at least 1.")
        if not PEAK_RESET.exists():
            raise InputError(f"The peak of memory is measured with {PEAK_RESET}, which this system lacks.")
        measure_all(
            [known[name] for name in arguments.names] or list(known.values()),
            arguments.out,
            arguments.page,
            rounds=arguments.rounds,
            quick=arguments.quick,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure_all(wanted: Sequence[Axis], out: Path, page: Path | None, *, rounds: int, quick: bool) -> None:
    """Measure each axis; what is known of the others in out/growth.json stays there."""
    for axis in wanted:
        if page:
            place(page, axis.name)  # hours before it is filled
    out.mkdir(parents=True, exist_ok=True)
    results = out / "growth.json"
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        for axis in wanted:
            record = measure(axis, Path(folder), rounds=rounds, quick=quick)
            records = json.loads(results.read_text()) if results.exists() else {}
            results.write_text(json.dumps(records | {axis.name: record}, indent=1) + "\n")
            draw(record, out / f"{axis.name}.png")
            print(f"\n{table(record)}", flush=True)
            if page:
                fill(page, axis.name, table(record))


def measure(axis: Axis, folder: Path, *, rounds: int, quick: bool) -> dict[str, Any]:
    """What one axis showed: machine, date, and each curve's measures, point by point."""
    points = [(curve, work) for curve in axis.curves for work in (curve.quick if quick else curve.works)]
    values: dict[tuple[str, int], list[Values]] = {(curve.name, work): [] for curve, work in points}
    with tqdm(total=rounds * len(points), unit="point", disable=None, leave=False) as progress:
        for _ in range(rounds):
            for curve, work in points:
                progress.set_description(f"{axis.name}: {curve.name}, {work:,}")
                values[curve.name, work].append(in_a_process(curve.measure, work, folder))
                progress.update()
    return {
        "work": axis.work,
        "machine": machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "n": rounds,
        "series": list(series(values)),
    }


def series(values: dict[tuple[str, int], list[Values]]) -> Iterator[dict[str, Any]]:
    """Each measure of each curve, with n, median, least and greatest at each work."""
    for name in dict.fromkeys(curve for curve, _ in values):
        of_curve = {work: found for (curve, work), found in values.items() if curve == name}
        for measured in UNITS:
            points = [
                {"work": work} | asdict(spread(found))
                for work, found in (
                    (work, [one[measured] for one in rounds if measured in one]) for work, rounds in of_curve.items()
                )
                if found
            ]
            if points:
                yield {
                    "curve": name,
                    "measure": measured,
                    "unit": UNITS[measured],
                    "exponent": exponent(points) if measured in FITTED else None,
                    "points": points,
                }


def exponent(points: Sequence[dict[str, float]]) -> float | None:
    """The power of the work that a measure grows with at the upper end, by least squares; None of one point.

    That of the least of each point, from which other work on the machine has taken least.
    """
    upper = [point for point in points if point["work"] > 0][-UPPER_END:]
    if len(upper) < 2:
        return None
    work, least = (np.log([point[key] for point in upper]) for key in ("work", "min"))
    return float(np.polyfit(work, least, 1)[0])


def in_a_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a process that is started for it and shares nothing with this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def cost(call: Callable[[], object], warm_up: Callable[[], object] | None = None) -> Values:
    """Time of a call, and its peak of memory above what is held before it.

    The memory is that of the first call. Its time counts only where it took a second or more: what takes less is
    called again, since the first call pays for what later ones find ready.
    """
    device = choose("auto", 0)
    side = Side("", call)
    if warm_up:
        warm_up()
    gc.collect()
    before = forget_peak(device)
    once_s = seconds(side, 1, device)
    memory = max(1.0, peak_mib(device) - before)
    if once_s < 1:
        calls = calls_per_sample(side, device)
        once_s = statistics.median(seconds(side, calls, device) for _ in range(3))
    return {"time": 1000 * once_s, "memory": memory}


def forget_peak(device: torch.device) -> float:
    """Let the peak of memory begin anew at what is held now, and say how much that is, in MiB."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated() / 2**20
    PEAK_RESET.write_text("5")
    return memory_mib("status", "VmRSS", process=os.getpid())


def peak_mib(device: torch.device) -> float:
    """The most memory that was held since `forget_peak`."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**20
    return memory_mib("status", "VmHWM", process=os.getpid())


def memory_mib(file: str, *fields: str, process: int) -> float:
    """Sum of some fields of a file of a process in /proc, which gives them in kB."""
    text = Path(f"/proc/{process}/{file}").read_text()
    return sum(int(kb) for kb in re.findall(rf"^(?:{'|'.join(fields)}):\s+(\d+) kB", text, re.MULTILINE)) / 1024


def read(images: int, folder: Path) -> Values:
    """Reading and checking the annotations of N images, with their polygons."""
    return cost(partial(coco.read, *coco.layout(data_set(folder, images), "train")))


def open_metric(images: int, folder: Path) -> Values:
    """What the metric reads for itself, once a run."""
    annotation_file, _ = coco.layout(data_set(folder, images), "train")
    return cost(partial(BoxMetric, annotation_file, "hotcoco"))


def judge_images(images: int, folder: Path) -> Values:
    """The metric by images."""
    return judge_detections(images, 10, folder)


def judge_detections(images: int, per_image: int, folder: Path) -> Values:
    """The metric over N images, by detections in each."""
    annotation_file, image_folder = coco.layout(data_set(folder, images), "train")
    rows = make_rows(coco.read(annotation_file, image_folder), per_image, seed=0)
    return cost(partial(BoxMetric(annotation_file, "hotcoco"), rows))


def crop(boxes: int, folder: Path) -> Values:
    """What a worker draws and cuts for images of G boxes each, besides their pixels."""
    rng = np.random.default_rng(0)
    boxes_xyxy = made_up_boxes(boxes)[0][0, :boxes].cpu().numpy()
    labels = np.ones(boxes, dtype=np.int64)

    def call() -> None:
        for _ in range(CROPPED_IMAGES):
            augment.crop_boxes(augment.draw(rng, boxes_xyxy, 1).crop_xyxy, boxes_xyxy, labels)

    return cost(call)


def encode_boxes(boxes: int, folder: Path) -> Values:
    """Ground truth to the targets of a batch."""
    few, many = made_up_boxes(1), made_up_boxes(boxes)
    anchors = make_anchors(few[0].device)
    return cost(partial(encode, *many, anchors), warm_up=partial(encode, *few, anchors))


def loss(boxes: int, folder: Path) -> Values:
    """The loss of a batch and its gradients."""
    boxes_xyxy, labels = made_up_boxes(boxes)
    targets = encode(boxes_xyxy, labels, make_anchors(labels.device))
    deltas = torch.zeros(BATCH_SIZE, NUM_ANCHORS, 4, device=labels.device, requires_grad=True)
    logits = torch.randn(BATCH_SIZE, NUM_ANCHORS, CLASSES, device=labels.device, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(multibox_loss(deltas, logits, *targets).sum(), (deltas, logits))

    return cost(call)


def made_up_boxes(boxes: int) -> tuple[Tensor, Tensor]:
    """Boxes (B, G, 4) normalised, of sizes spread evenly on a logarithmic scale, and labels (B, G): all 1.

    No boxes are a row of padding, since a batch always has one.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, max(boxes, 1), 2)
    size = torch.exp(torch.empty(shape).uniform_(math.log(0.03), math.log(0.9), generator=generator))
    lower = torch.rand(shape, generator=generator) * (1 - size)
    device = choose("auto", 0)
    labels = torch.full(shape[:2], min(boxes, 1), dtype=torch.int64, device=device)
    return torch.cat([lower, lower + size], dim=-1).to(device), labels


def detect_candidates(candidates: int, folder: Path) -> Values:
    """Detection in a batch where as many scores of an image are above the threshold, spread evenly over classes."""
    device = choose("auto", 0)
    deltas = torch.zeros(BATCH_SIZE, NUM_ANCHORS, 4, device=device)
    logits, few = (made_up_logits(number).to(device) for number in (candidates, 1))
    anchors = make_anchors(device)
    return cost(partial(detect, deltas, logits, anchors), warm_up=partial(detect, deltas, few, anchors))


def made_up_logits(candidates: int) -> Tensor:
    """Logits (B, A, K), the same for every image, of which as many give a score above .05: up to 12 of an anchor."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_ANCHORS, CLASSES - 1)
    classes = torch.rand(shape, generator=generator).argsort(dim=1)
    anchor = torch.randperm(NUM_ANCHORS, generator=generator)
    count = (candidates // NUM_ANCHORS + (anchor < candidates % NUM_ANCHORS)).unsqueeze(1)
    share = torch.empty(shape).uniform_(0.8, 1, generator=generator) * 0.9 / count
    scores = torch.zeros(shape).scatter_(1, classes, torch.where(torch.arange(CLASSES - 1) < count, share, 1e-6))
    background = 1 - scores.sum(dim=1, keepdim=True)
    return torch.cat([background, scores], dim=1).log().expand(BATCH_SIZE, -1, -1).contiguous()


def load(images: int, workers: int, folder: Path) -> Values:
    """The input pipeline over N images: from JPEGs that the system holds in memory, to batches."""
    config = Config(
        data_dir=laid_out(folder, images), num_workers=workers, num_classes=CLASSES, batch_size=LOADED_BATCH_SIZE
    )
    data = SSDData(config, Ranks(0, 1, choose("auto", 0)), seed=0)
    shares = data.shares(1)
    start = time.perf_counter()
    next(shares)
    first = time.perf_counter()
    for _ in islice(shares, 2 * workers):  # made while the first was waited for
        pass
    clock = time.perf_counter()
    seen = sum(len(share.batch.images) for share in islice(shares, LOADED_BATCHES))
    values = {"rate": seen / (time.perf_counter() - clock), "first batch": 1000 * (first - start)}
    pids = [child.pid for child in multiprocessing.active_children() if child.pid]
    private = [memory_mib("smaps_rollup", "Private_Clean", "Private_Dirty", process=pid) for pid in pids]
    if private:
        values["private to a worker"] = statistics.mean(private)
    shares_of_memory = [memory_mib("smaps_rollup", "Pss", process=pid) for pid in (os.getpid(), *pids)]
    return values | {"all processes": sum(shares_of_memory)}


def step(batch_size: int, folder: Path) -> Values:
    """A training step on made-up pictures, the first of a process in memory: gradients and momenta included."""
    config = Config(data_dir=folder, batch_size=batch_size, num_classes=CLASSES)
    ranks = Ranks(0, 1, choose(config.device, 0))
    torch.manual_seed(0)
    benchmark = make_benchmark(config, ranks, 0, SSD300(CLASSES), Evaluation(config, ranks))
    state = engine.build(benchmark, config, ranks)
    share = move(engine.Share(benchmark.made_up_batch(), batch_size, 1 / batch_size), ranks.device)
    values = cost(partial(engine.train_step, state, share, 1e-3, benchmark, config, ranks))
    return values | {"rate": 1000 * batch_size / values["time"]}


def data_set(folder: Path, images: int) -> Path:
    """Annotations of N images in COCO's layout, of empty files, written where they are not there yet."""
    data_dir = folder / f"annotations-{images}"
    if not data_dir.exists():
        in_a_process(make_up_truth, data_dir, images, 0)
    return data_dir


def laid_out(folder: Path, images: int) -> Path:
    """A data set of N images, which are a few pictures again and again, laid out where it is not there yet."""
    pictures, data_dir = folder / "pictures", folder / f"pictures-{images}"
    if not data_dir.exists():
        in_a_process(lay_out, pictures, data_dir, images)
    return data_dir


def lay_out(pictures: Path, data_dir: Path, images: int) -> None:
    """Draw the pictures where they are not there yet, and lay them out."""
    make_up(pictures, PICTURES, seed=0).lay_out(data_dir, images, VAL_IMAGES)


def table(record: dict[str, Any]) -> str:
    """A record as a table in Markdown: a row for each work, the exponents, and what it was measured on."""
    columns = record["series"]
    works = sorted({point["work"] for column in columns for point in column["points"]})
    header = [record["work"], *(f"{column['curve']}: {column['measure']}, {column['unit']}" for column in columns)]
    rows = [header, ["---:"] * len(header)]
    for work in works:
        found = [[point for point in column["points"] if point["work"] == work] for column in columns]
        rows.append([f"{work:,}", *(cell(points[0]) if points else "" for points in found)])
    powers = [column["exponent"] for column in columns]
    if any(power is not None for power in powers):
        rows.append(["grows with the power", *("" if power is None else f"{power:.2f}" for power in powers)])
    on = record["machine"]
    below = (
        f"n = {record['n']}, {record['date']}, {on['hardware']}, {on['processor']}, torch {on['versions']['torch']}, "
        f"commit {on['commit']}."
    )
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", below])


def cell(point: dict[str, float]) -> str:
    """Median, and in brackets the least and the greatest where they differ from it."""
    median, least, greatest = (digits(point[key]) for key in ("median", "min", "max"))
    return median if least == greatest else f"{median} ({least} to {greatest})"


def digits(value: float) -> str:
    """A number with three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def fill(page: Path, name: str, text: str) -> None:
    """Put a table in its place on a page."""
    before, after = place(page, name)
    page.write_text(f"{before}{text}\n{after}")


def place(page: Path, name: str) -> tuple[str, str]:
    """What is before and after a table on a page, which two comments mark; InputError where they are missing."""
    try:
        text = page.read_text()
    except OSError as error:
        raise InputError(f"--page {page}: {error.strerror}.") from None
    found = re.fullmatch(rf"(.*<!-- {name} -->\n).*?(<!-- end -->.*)", text, re.DOTALL)
    if not found:
        raise InputError(f"--page {page}: has no place for a table: <!-- {name} --> and, further down, <!-- end -->.")
    return found[1], found[2]


def draw(record: dict[str, Any], path: Path) -> None:
    """A panel for each measure, a line for each curve; the dotted lines grow in proportion to the work."""
    measures = list(dict.fromkeys(column["measure"] for column in record["series"]))
    width = 4.6 if len(measures) < 3 else 3.4
    sheet, panels = plt.subplots(1, len(measures), figsize=(width * len(measures), 3.8), layout="constrained")
    for panel, measured in zip(np.atleast_1d(panels), measures, strict=True):
        columns = [column for column in record["series"] if column["measure"] == measured]
        for column in columns:
            work, median, least, greatest = (
                np.array([point[key] for point in column["points"]]) for key in ("work", "median", "min", "max")
            )
            (line, *_) = panel.errorbar(
                work, median, yerr=(median - least, greatest - median), marker="o", markersize=4, label=column["curve"]
            )
            if column["exponent"] is not None:
                proportional = median[-1] * work[work > 0] / work[-1]
                panel.plot(work[work > 0], proportional, linestyle=":", linewidth=1, color=line.get_color())
        panel.set(title=f"{measured}, {columns[0]['unit']}", xlabel=record["work"])
        panel.grid(alpha=0.3)
        works = sorted({point["work"] for column in columns for point in column["points"]})
        if measured in FITTED:
            panel.set_xscale("symlog", linthresh=1)
            panel.set_yscale("log")
            panel.set_ylim(bottom=min(point["min"] for column in columns for point in column["points"]) / 2)
            panel.yaxis.set_major_formatter("{x:,g}")
            panel.yaxis.set_minor_formatter(ticker.NullFormatter())
            if np.divide(*reversed(panel.get_ylim())) < 100:
                panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        else:
            panel.set_xscale("linear" if 0 in works else "log")
            panel.set_ylim(bottom=0)
        shown = works if len(works) <= MOST_TICKS else [work for work in works if f"{work}"[0] == "1" or work == 0]
        panel.set_xticks(shown, [f"{work:,}" for work in shown], rotation=30 if shown[-1] > 1000 else 0)
        panel.xaxis.set_minor_locator(ticker.NullLocator())
    handles, labels = np.atleast_1d(panels)[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    sheet.savefig(path, dpi=110)
    plt.close(sheet)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
