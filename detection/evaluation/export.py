"""Export of a trained network to a file that runs without this program, ONNX or torch.export.

The file is kept only if its detections match those of this program. D detections of an image.
"""

import importlib
import json
import logging
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection import atomic_file
from detection.config.settings import InputError
from detection.data import coco, image_io, pillow_io
from detection.data.coco import Category
from detection.nn.detections import Detections
from detection.synthetic import toy

NUM_SYNTHETIC_IMAGES = 8

# Two detections match if their labels are equal, and scores, box coordinates (as fractions of the image) and masks
# differ by at most this.
TOLERANCE = 1e-3
# Rounding may move a few detections across the score or NMS threshold.
MIN_MATCH_RATE = 0.99

ExportedNetwork = Callable[..., Sequence[Tensor]]
# Boxes (D, 4), labels (D,), scores (D,) and, if the network has them, masks (D, S, S).
ImageOutputs = Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Network to export, and what verifies the export.

    module: network with preprocessing and postprocessing, whose outputs are boxes, labels, scores and, if it has them,
    masks, with label 0 where there is no detection. example: inputs by name. dynamic_shapes: as in torch.export.
    outputs: names. categories: of the labels 1, 2, ... score: threshold of the detections.

    images: for the verification, (3, h, w) uint8. batch_size: of a call, or 0 for any. make_inputs: returns the inputs
    for a batch of images. detect: returns this program's detections from these inputs, image by image. boxes_in_pixels:
    rather than in fractions of the image.
    """

    module: nn.Module
    example: Mapping[str, Tensor]
    dynamic_shapes: Mapping[str, Any]
    outputs: Sequence[str]
    categories: Sequence[Category]
    score: float
    images: Sequence[Tensor]
    batch_size: int
    make_inputs: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    detect: Callable[..., Sequence[ImageOutputs]]
    boxes_in_pixels: bool = True

    def trace(self) -> torch.export.ExportedProgram:
        """Trace the network to a graph. Raise InputError if this torch cannot."""
        try:
            return torch.export.export(
                self.module.eval(), tuple(self.example.values()), dynamic_shapes=dict(self.dynamic_shapes)
            )
        except torch._dynamo.exc.Unsupported as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"torch {torch.__version__} cannot export this network ({reason}). Use a newer torch, such as 2.11."
            ) from error

    def metadata(self) -> dict[str, str]:
        """Return what the file holds besides the network: the categories as JSON."""
        return {"categories": json.dumps([asdict(category) for category in self.categories])}


def main(arguments: Namespace, prepare: Callable[[Namespace], ExportJob]) -> int:
    """Export and verify a network, with the arguments of `parse_export`, and return the exit status.

    Raises InputError.
    """
    out: Path = arguments.out
    if out.suffix not in (".onnx", ".pt2"):
        raise InputError(f"{out}: should end in .onnx or .pt2. The suffix selects the format.")
    if out.suffix == ".onnx":
        require_packages("onnx", "onnxscript", "onnxruntime")
    job = prepare(arguments)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file.atomic_write(out) as partial:
        if out.suffix == ".onnx":
            write_onnx(job.trace(), partial, list(job.example), job.outputs, job.metadata())
            exported = load_onnx(partial, list(job.example), job.outputs)
        else:
            write_pt2(job.trace(), partial, job.metadata())
            exported = load_pt2(partial)
        print(verify(job, exported))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, scores from {job.score}")
    return 0


def require_packages(*packages: str) -> None:
    """Raise InputError if a package of the extra `export` is not installed."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"{error}: export to ONNX needs more packages. Run: pip install '.[export]'") from None


def read_images(paths: Sequence[Path]) -> list[Tensor]:
    """Read the images for the verification, or draw synthetic ones without paths: (3, H, W) uint8 RGB each."""
    if paths:
        files, _ = pillow_io.expand_paths(paths)
        images = [torch.from_numpy(np.array(pillow_io.read(path).image)) for path in files]
        return [image.permute(2, 0, 1) for image in images]
    with tempfile.TemporaryDirectory() as tmp_dir:
        folder = Path(tmp_dir) / "toy"
        toy.generate(folder, toy.ToySpec(train_images=1, val_images=NUM_SYNTHETIC_IMAGES))
        _, image_dir = coco.standard_paths(folder, "val")
        return [image_io.read(path) for path in sorted(image_dir.iterdir())]


def write_pt2(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write torch's .pt2 format, with metadata in its extra files."""
    logging.getLogger("torch._export").setLevel(logging.ERROR)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=dict(metadata))


def load_pt2(path: Path) -> ExportedNetwork:
    """Load the network of a .pt2 file."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
) -> None:
    """Write a graph as one ONNX file."""
    from onnxscript import opset18

    def stable_sort(self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # ONNX specifies that TopK keeps the order of ties.
        return opset18.TopK(self, opset18.Shape(self, start=dim), axis=dim, largest=int(descending), sorted=1)

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
    assert exported is not None
    exported.model.metadata_props.update(metadata)
    exported.save(path, external_data=False)


def load_onnx(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> ExportedNetwork:
    """Load the network of an ONNX file into onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> list[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(outputs, arrays)]

    return run


@torch.inference_mode()
def verify(job: ExportJob, exported: ExportedNetwork) -> str:
    """Compare the exported network's detections with this program's, and summarize. Raise InputError on a mismatch."""
    comparison = Comparison()
    for batch, num_images in make_batches(job.images, job.batch_size):
        inputs = job.make_inputs(batch)
        box_unit = max(inputs[0].shape[2:]) if job.boxes_in_pixels else 1
        pairs = zip(job.detect(*inputs), drop_padding(exported(*inputs)), strict=True)
        for expected, actual in islice(pairs, num_images):
            comparison.add(expected, actual, box_unit)
    return comparison.summarize(job.score)


def split_by_image(detections: Detections, num_images: int) -> list[ImageOutputs]:
    """Return boxes, labels and scores of each image of a batch."""
    batch_index, boxes, labels, scores = detections
    return [(boxes[rows], labels[rows], scores[rows]) for rows in (batch_index == image for image in range(num_images))]


def drop_padding(outputs: Sequence[Tensor]) -> list[ImageOutputs]:
    """Return the outputs (B, D, ...) of each image without the rows of label 0."""
    return [tuple(part[image, rows] for part in outputs) for image, rows in enumerate(outputs[1] > 0)]


class Comparison:
    """Comparison of the exported network's detections with this program's, image by image."""

    def __init__(self) -> None:
        self.num_images, self.num_detections, self.num_matched, self.max_diff = 0, 0, 0, 0.0

    def add(self, expected: ImageOutputs, actual: ImageOutputs, box_unit: float) -> None:
        """Add an image. The numbers of detections may differ. Boxes in this unit are fractions of the image."""
        (labels, values), (actual_labels, actual_values) = (
            (labels, torch.cat([boxes / box_unit, scores[:, None], *(mask.flatten(1) for mask in masks)], dim=1))
            for boxes, labels, scores, *masks in (expected, actual)
        )
        diffs = (values[:, None] - actual_values).abs().amax(dim=-1)
        diffs[labels[:, None] != actual_labels] = torch.inf
        nearest = diffs.amin(dim=1) if diffs.shape[1] else diffs.new_zeros(0)
        nearest = nearest[nearest <= TOLERANCE]
        self.num_images += 1
        self.num_detections += max(diffs.shape)
        self.num_matched += len(nearest)
        self.max_diff = max([self.max_diff, *nearest.tolist()])

    def summarize(self, score: float) -> str:
        """Summarize. Raise InputError if too few detections match, or if there are none from this score on."""
        if not self.num_detections:
            raise InputError(
                f"verification: nothing was detected on {self.num_images} images with a score of {score} or more. "
                "Pass --images with objects that the network knows, or a lower --score."
            )
        matches = f"{self.num_matched} of {self.num_detections} detections match"
        if self.num_matched < MIN_MATCH_RATE * self.num_detections:
            raise InputError(f"verification: only {matches}. The export is deleted. Try another format.")
        return f"verified on {self.num_images} images: {matches} within {self.max_diff:.1e}"


def make_batches(images: Sequence[Tensor], batch_size: int) -> Iterator[tuple[list[Tensor], int]]:
    """Yield batches and their number of images. A fixed size, not 0, is filled with copies of the first image."""
    size = batch_size or 3  # 3 also gives a smaller last batch, to test a second size
    for start in range(0, len(images), size):
        batch = list(images[start : start + size])
        yield batch + [images[0]] * (batch_size - len(batch)), len(batch)
