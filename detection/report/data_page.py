"""Page of training data: augmented images with targets and matched anchors, and statistics of the data set.

    python -m WORKLOAD data [--show 16] [--out data.html] [--name value ...]

It is the first thing to look at when a detector does not learn.
"""

import argparse
import base64
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from detection.atomic_file import atomic_write
from detection.config.run_config import RunConfig
from detection.data.coco import Split
from detection.data.num_classes import resolve_num_classes
from detection.data.statistics import histograms, summarize
from detection.report.formatting import percent_of
from detection.report.html_report import render_page

if TYPE_CHECKING:
    from detection.data.train_sample import TrainSample
    from detection.runtime.distributed import DistContext

JPEG_QUALITY = 85

OpenSamples = Callable[[Any, "DistContext", int], tuple[Split, Iterator["TrainSample"]]]
"""Open the training images of a workload, for its settings, a rank and a seed."""


def main(argv: Sequence[str], load: Callable[[Sequence[str]], RunConfig], open_samples: OpenSamples) -> int:
    """Write the page of the data of the settings. Return the exit status. Raise InputError for invalid data."""
    options, flags = parse(argv)
    config = load(flags)
    import torch

    from detection.runtime.distributed import DistContext

    # Few images, at once and on the CPU, whatever the settings of the system are.
    config = replace(
        resolve_num_classes(config),
        batch_size=min(config.batch_size, max(1, options.show)),
        grad_accum_steps=1,
        num_workers=0,
        jpeg_decoder="cpu",
        image_cache="none",
    )
    split, samples = open_samples(config, DistContext(0, 1, torch.device("cpu")), config.seed or 0)
    page = make_page(split, list(itertools.islice(samples, max(0, options.show))), config)
    with atomic_write(options.out) as partial:
        partial.write_text(page, encoding="utf-8")
    print(f"data: {options.out}")
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the page, and the flags of the settings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--show", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("data.html"))
    return parser.parse_known_args(argv)


def make_page(split: Split, samples: "Sequence[TrainSample]", config: RunConfig) -> str:
    """Return the page as HTML."""
    names = ["?", *(category.name for category in split.categories)]
    charts = [
        {
            "title": histogram.title,
            "rows": [
                {"name": name, "count": f"{count:,}", "percent": percent_of(count, max(n for _, n in histogram.rows))}
                for name, count in histogram.rows
            ],
        }
        for histogram in histograms(split)
    ]
    return render_page(
        "data.html",
        {"charts": [], "curves": [], "confusions": []},
        title=f"Training data of {config.benchmark}: {config.dataset}",
        source=str(split.annotation_file),
        facts=summarize(split),
        histograms=charts,
        images=[describe_sample(sample, names) for sample in samples],
    )


def describe_sample(sample: "TrainSample", names: Sequence[str]) -> dict[str, Any]:
    """Return a sample as the template draws it. An object without an anchor counts as missed."""
    buffer = io.BytesIO()
    Image.fromarray(sample.image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    height, width = sample.image.shape[:2]
    num_anchors = [int((sample.matched == index).sum()) for index in range(len(sample.labels))]
    objects = [
        {"name": f"{names[label]}, {count} anchors", "state": "found" if count else "missed", "box": to_xywh(box)}
        for box, label, count in zip(sample.boxes_xyxy.tolist(), sample.labels.tolist(), num_anchors, strict=True)
    ]
    anchors = [{"name": "", "state": "correct", "box": to_xywh(box)} for box in sample.anchors_xyxy.tolist()]
    without = num_anchors.count(0)
    return {
        "uri": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "group": "without anchors" if without else "",
        "caption": f"{len(objects)} objects, {len(anchors)} matched anchors"
        + (f", {without} objects without" if without else ""),
        "width": width,
        "height": height,
        "objects": objects,
        "detections": anchors,
    }


def to_xywh(box_xyxy: Sequence[float]) -> list[float]:
    """Return left, top, width and height of a box."""
    left, top, right, bottom = box_xyxy
    return [round(side, 1) for side in (left, top, right - left, bottom - top)]
