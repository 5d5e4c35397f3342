"""Export of a trained network to a file that runs without this program.

    python -m ssd export CHECKPOINT OUT.onnx|OUT.pt2

    input   images  (B, 3, 300, 300) uint8 RGB, the whole image resized, without other preprocessing
    output  boxes   (B, D, 4) float32: left, top, right, bottom as fractions of width and height, not clipped
            labels  (B, D) int64: 1, 2, ... by the categories in the file, 0 without a detection
            scores  (B, D) float32, descending, 0 without a detection

The graph includes non-maximum suppression. OUT.onnx runs in any ONNX runtime, OUT.pt2 with torch.export.load. The file
holds the categories as JSON, [{id, name}, ...], under "categories": in ONNX's metadata, or in the extra files of .pt2.
The export compares the file's detections with this program's, on synthetic images or those of --images. The file is
kept only if they match.
"""

import importlib
import json
import logging
import tempfile
import warnings
from argparse import Namespace
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
from ssd.export_module import ExportableSSD
from ssd.postprocess import detect
from ssd.pretrained import TrainedModel

OUTPUTS = ("boxes", "labels", "scores")
NUM_SYNTHETIC_IMAGES = 8

# Two detections match if their labels are equal, and scores and box coordinates (normalized) differ by at most this.
TOLERANCE = 1e-3
# Rounding may move a few detections across the score or NMS threshold.
MIN_MATCH_RATE = 0.99

# Boxes (B, D, 4), labels (B, D), scores (B, D).
ExportOutputs = tuple[Tensor, Tensor, Tensor]


def main(arguments: Namespace) -> int:
    """Export and verify the network, with the arguments of `parse_export`, and return the exit status.

    Raises InputError.
    """
    kind = arguments.out.suffix
    if kind not in (".onnx", ".pt2"):
        raise InputError(f"{arguments.out}: should end in .onnx or .pt2. The suffix selects the format.")
    if kind == ".onnx":
        require_packages("onnx", "onnxscript", "onnxruntime")
    network = pretrained.load(arguments.checkpoint)
    images = read_images(arguments.images)
    score = network.score_threshold if arguments.score is None else arguments.score
    exportable = ExportableSSD(
        network.model,
        score_threshold=score,
        nms_threshold=network.nms_threshold,
        max_detections=network.max_detections,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file.atomic_write(arguments.out) as partial:
        write, load = (write_onnx, load_onnx) if kind == ".onnx" else (write_pt2, load_pt2)
        write(trace(exportable.eval(), arguments.batch_size), network, partial)
        print(verify_export(network, score, load(partial), images, arguments.batch_size))
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB, scores from {score}")
    return 0


def require_packages(*packages: str) -> None:
    """Raise InputError if a package of the extra `export` is not installed."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"{error}: export to ONNX needs more packages. Run: pip install '.[export]'") from None


def read_images(paths: Sequence[Path]) -> Tensor:
    """Read the images for the verification, or draw synthetic ones without paths: (N, 3, 300, 300) uint8."""
    if paths:
        images = [torch.from_numpy(np.array(pillow_io.read(path).image)) for path in pillow_io.expand_paths(paths)]
        return torch.stack([image_io.resize(image.permute(2, 0, 1), IMAGE_SIZE_PX) for image in images])
    with tempfile.TemporaryDirectory() as tmp_dir:
        folder = Path(tmp_dir) / "toy"
        toy.generate(folder, toy.ToySpec(train_images=1, val_images=NUM_SYNTHETIC_IMAGES))
        _, image_dir = coco.standard_paths(folder, "val")
        return torch.stack(
            [image_io.resize(image_io.read(path), IMAGE_SIZE_PX) for path in sorted(image_dir.iterdir())]
        )


def trace(model: ExportableSSD, batch_size: int) -> torch.export.ExportedProgram:
    """Trace the model to a graph for `batch_size` images, or for any number of images if it is 0."""
    example = torch.zeros(batch_size or 2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, dtype=torch.uint8)
    shapes = {"images": None if batch_size else {0: torch.export.Dim("batch")}}
    return torch.export.export(model, (example,), dynamic_shapes=shapes)


def categories_json(network: TrainedModel) -> str:
    """Return the categories of the labels 1, 2, ... as JSON."""
    return json.dumps([asdict(category) for category in network.categories])


def write_pt2(program: torch.export.ExportedProgram, network: TrainedModel, path: Path) -> None:
    """Write torch's .pt2 format."""
    logging.getLogger("torch._export").setLevel(logging.ERROR)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"categories": categories_json(network)})


def load_pt2(path: Path) -> Callable[[Tensor], ExportOutputs]:
    """Load the network of a .pt2 file."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_onnx(program: torch.export.ExportedProgram, network: TrainedModel, path: Path) -> None:
    """Write ONNX, with the categories in its metadata."""
    save_onnx(program, path, ["images"], {"categories": categories_json(network)})


def save_onnx(
    program: torch.export.ExportedProgram, path: Path, inputs: Sequence[str], metadata: Mapping[str, str]
) -> None:
    """Write a graph as one ONNX file, with these inputs, and boxes, labels and scores as outputs."""
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
            output_names=OUTPUTS,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
    assert exported is not None
    exported.model.metadata_props.update(metadata)
    exported.save(path, external_data=False)


def load_onnx(path: Path) -> Callable[[Tensor], ExportOutputs]:
    """Load the network of an ONNX file into onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> ExportOutputs:
        boxes, labels, scores = session.run(OUTPUTS, {"images": images.numpy()})
        return torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(scores)

    return run


@torch.inference_mode()
def verify_export(
    network: TrainedModel,
    score: float,
    exported: Callable[[Tensor], ExportOutputs],
    images: Tensor,
    batch_size: int,
) -> str:
    """Compare the exported network's detections with this program's, and summarize. Raise InputError on a mismatch."""
    count, num_matched, max_diff = 0, 0, 0.0
    for batch in images.split(batch_size or 3):  # 3 also gives a smaller last batch, to test a second size
        num_padding = batch_size - len(batch) if batch_size else 0
        padded = torch.cat([batch, batch[:1].expand(num_padding, -1, -1, -1)]) if num_padding > 0 else batch
        deltas, logits = network.model(augment.normalize(augment.to_float(padded)))
        expected = detect(
            deltas,
            logits,
            make_anchors(),
            score_threshold=score,
            nms_threshold=network.nms_threshold,
            max_detections=network.max_detections,
        )
        boxes, labels, scores = exported(padded)
        for index in range(len(batch)):
            in_image, valid = expected.batch_index == index, scores[index] > 0
            ours = torch.cat([expected.boxes_xyxy[in_image], expected.scores[in_image, None]], dim=1)
            theirs = torch.cat([boxes[index, valid], scores[index, valid, None]], dim=1)
            diffs = (ours[:, None] - theirs).abs().amax(dim=-1)
            diffs[expected.labels[in_image, None] != labels[index, valid]] = torch.inf
            count += max(diffs.shape)
            nearest = diffs.amin(dim=1) if diffs.shape[1] else diffs.new_zeros(0)
            nearest = nearest[nearest <= TOLERANCE]
            num_matched += len(nearest)
            max_diff = max([max_diff, *nearest.tolist()])
    if not count:
        raise InputError(
            f"verification: nothing was detected on {len(images)} images with a score of {score} or more. "
            "Pass --images with objects that the network knows, or a lower --score."
        )
    if num_matched < MIN_MATCH_RATE * count:
        raise InputError(
            f"verification: only {num_matched} of {count} detections match. The export is deleted. Try another format."
        )
    return f"verified on {len(images)} images: {num_matched} of {count} detections match within {max_diff:.1e}"
