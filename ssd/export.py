"""Write a trained network as one file that needs none of this code: python -m ssd.export CHECKPOINT OUT.onnx|OUT.pt2

    input   images  (B, 3, 300, 300) uint8 RGB, the whole picture resized; nothing else is to be done to it
    output  boxes   (B, D, 4) float32: left, top, right, bottom as shares of width and height, not clipped
            labels  (B, D) int64: 1, 2, ... as in the categories that the file carries; 0 where there is no detection
            scores  (B, D) float32, falling; 0 where there is no detection

Suppression is inside. OUT.onnx is for any runtime of ONNX, OUT.pt2 for torch.export.load. The categories travel as
JSON, [{id, name}, ...]: in ONNX's metadata, or among the extra files of the other, under "categories". The file is held
against this program on pictures, drawn ones unless --images names others, and is not there unless it answers alike.
"""

import argparse
import importlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection import atomic_file
from detection.config.settings import InputError
from detection.data import coco, image_io, pillow_io
from detection.synthetic import toy
from ssd import augment, pretrained
from ssd.anchors import IMAGE_SIZE_PX, make_anchors
from ssd.export_module import Detector
from ssd.postprocess import detect
from ssd.pretrained import Trained

OUTPUTS = ("boxes", "labels", "scores")
DRAWN_PICTURES = 8

# Two detections are alike where they are of one label and differ by no more, in score and as a share of the picture.
TOLERANCE = 1e-3
# Rounding may bring one over the threshold, or let one more be suppressed, in so many.
LEAST_ALIKE = 0.99

Answer = tuple[Tensor, Tensor, Tensor]
"""Boxes (B, D, 4), labels (B, D), scores (B, D)."""


def main(argv: Sequence[str]) -> int:
    """Export, check and write; returns the exit status."""
    arguments = parse(argv)
    try:
        kind = arguments.out.suffix
        if kind not in (".onnx", ".pt2"):
            raise InputError(f"{arguments.out}: should end in .onnx or .pt2, which says what is written")
        if kind == ".onnx":
            require("onnx", "onnxscript", "onnxruntime")
        network = pretrained.load(arguments.checkpoint)
        seen = read_pictures(arguments.images)
        score = network.score_threshold if arguments.score is None else arguments.score
        detector = Detector(
            network.model,
            score_threshold=score,
            nms_threshold=network.nms_threshold,
            max_detections=network.max_detections,
        )
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file.writing(arguments.out) as partial:
            write, open_file = (write_onnx, open_onnx) if kind == ".onnx" else (write_pt2, open_pt2)
            write(trace(detector.eval(), arguments.batch_size), network, partial)
            print(check(network, score, open_file(partial), seen, arguments.batch_size))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {arguments.out}: cannot be written ({error.strerror or error})", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB, scores from {score}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; a mistake in it ends the process with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m ssd.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="file in a run's checkpoints/")
    parser.add_argument("out", type=Path, help="file to write, .onnx or .pt2")
    parser.add_argument("--batch-size", type=int, default=0, help="pictures at once, always; 0: any number (0)")
    parser.add_argument("--score", type=float, help="detections below are left out (as the run was evaluated)")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="pictures or folders of them to check it on")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 0:
        parser.error("argument --batch-size: should be at least 0")
    if arguments.score is not None and not 0 <= arguments.score < 1:
        parser.error("argument --score: should be at least 0 and below 1")
    return arguments


def require(*packages: str) -> None:
    """Raise InputError where one of the packages of the extra `export` is not installed."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"{error}: an ONNX file takes more packages. Run: pip install '.[export]'") from None


def read_pictures(paths: Sequence[Path]) -> Tensor:
    """What the check is made on, (N, 3, 300, 300) uint8; raises InputError where a picture cannot be read."""
    if paths:
        read = [torch.from_numpy(np.array(pillow_io.read(path).image)) for path in pillow_io.find(paths)]
        return torch.stack([image_io.resize(image.permute(2, 0, 1), IMAGE_SIZE_PX) for image in read])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "toy"
        toy.draw(folder, toy.Drawing(train_images=1, val_images=DRAWN_PICTURES))
        _, drawn = coco.layout(folder, "val")
        return torch.stack([image_io.resize(image_io.read(path), IMAGE_SIZE_PX) for path in sorted(drawn.iterdir())])


def trace(detector: Detector, batch_size: int) -> torch.export.ExportedProgram:
    """The graph of the detector, for so many images at once, or for any number where that is 0."""
    example = torch.zeros(batch_size or 2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, dtype=torch.uint8)
    shapes = {"images": None if batch_size else {0: torch.export.Dim("batch")}}
    return torch.export.export(detector, (example,), dynamic_shapes=shapes)


def categories(network: Trained) -> str:
    """What the labels 1, 2, ... stand for, as JSON."""
    return json.dumps([asdict(category) for category in network.categories])


def write_pt2(program: torch.export.ExportedProgram, network: Trained, path: Path) -> None:
    """Write torch's own format."""
    logging.getLogger("torch._export").setLevel(logging.ERROR)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"categories": categories(network)})


def open_pt2(path: Path) -> Callable[[Tensor], Answer]:
    """The network in such a file."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_onnx(program: torch.export.ExportedProgram, network: Trained, path: Path) -> None:
    """Write ONNX."""
    save_onnx(program, path, ["images"], {"categories": categories(network)})


def save_onnx(
    program: torch.export.ExportedProgram, path: Path, inputs: Sequence[str], metadata: Mapping[str, str]
) -> None:
    """Write a graph with these inputs, and boxes, labels and scores for output, as one file of ONNX."""
    from onnxscript import opset18

    def stable_sort(self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # By its specification TopK gives equal values in their order.
        return opset18.TopK(self, opset18.Shape(self, start=dim), axis=dim, largest=int(descending), sorted=1)

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=OUTPUTS,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
    assert exported is not None
    exported.model.metadata_props.update(metadata)
    exported.save(path, external_data=False)


def open_onnx(path: Path) -> Callable[[Tensor], Answer]:
    """The network in such a file, run by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> Answer:
        boxes, labels, scores = session.run(OUTPUTS, {"images": images.numpy()})
        return torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(scores)

    return answer


@torch.inference_mode()
def check(network: Trained, score: float, exported: Callable[[Tensor], Answer], seen: Tensor, batch_size: int) -> str:
    """Hold what was exported against this program; says how alike they are, raises InputError where they are not."""
    count, alike, furthest = 0, 0, 0.0
    for batch in seen.split(batch_size or 3):  # of several sizes, where any will do
        missing = batch_size - len(batch) if batch_size else 0
        padded = torch.cat([batch, batch[:1].expand(missing, -1, -1, -1)]) if missing > 0 else batch
        deltas, logits = network.model(augment.normalise(augment.to_unit(padded)))
        wanted = detect(
            deltas,
            logits,
            make_anchors(),
            score_threshold=score,
            nms_threshold=network.nms_threshold,
            max_detections=network.max_detections,
        )
        boxes, labels, scores = exported(padded)
        for index in range(len(batch)):
            here, there = wanted.images == index, scores[index] > 0
            mine = torch.cat([wanted.boxes_xyxy[here], wanted.scores[here, None]], dim=1)
            theirs = torch.cat([boxes[index, there], scores[index, there, None]], dim=1)
            differ = (mine[:, None] - theirs).abs().amax(dim=-1)
            differ[wanted.labels[here, None] != labels[index, there]] = torch.inf
            count += max(differ.shape)
            nearest = differ.amin(dim=1) if differ.shape[1] else differ.new_zeros(0)
            nearest = nearest[nearest <= TOLERANCE]
            alike += len(nearest)
            furthest = max([furthest, *nearest.tolist()])
    if not count:
        raise InputError(
            f"nothing was detected on the {len(seen)} pictures of the check, with a score of {score} or more: it would "
            "prove nothing. Pass --images with pictures of what the network knows, or a lower --score"
        )
    if alike < LEAST_ALIKE * count:
        raise InputError(
            f"what was exported answers otherwise: {alike} of {count} detections are alike. It is not kept"
        )
    return f"checked on {len(seen)} pictures: {alike} of {count} detections are alike, the furthest by {furthest:.1e}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
