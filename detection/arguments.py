"""Command lines of the commands that take arguments in place of settings: predict, export, conformance.

Imports nothing heavy, so that `--help` appears at once. An error exits with 2.
"""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from detection.config import device_names

PREDICT = """\
Detect objects on images.

Draws boxes, names, scores and, if the network has them, masks on copies of the images. Reads images of any size and
format that Pillow supports, and writes detections.json:

    format      1
    checkpoint  the file's name
    score       the threshold: lower detections are omitted
    categories  [{id, name}], as in the training annotations
    images      one entry per image, in the order given:
                file        the path as given
                error       why it could not be read, or else
                drawn       the name of the copy
                width, height  in pixels, as displayed
                mode        of the file, in Pillow's terms
                frames      in the file (the first is used)
                detections  by descending score: {category_id, name, score, bbox: [x, y, width, height] in pixels as
                            displayed} and, with masks, segmentation: COCO's compressed RLE {size: [height, width],
                            counts}

Images are rotated by their EXIF orientation. In a folder, files of other kinds are skipped, and reported in one line.
An image that cannot be read is reported and skipped. The exit status is 2 if that is every image. Only files of an
earlier call in the same folder are overwritten.
"""

EXPORT = """\
Export a trained network to a file that runs without this program, OUT.onnx or OUT.pt2.

{interface}
The graph includes non-maximum suppression. OUT.onnx runs in any ONNX runtime, OUT.pt2 with torch.export.load. The file
holds the categories as JSON, [{{id, name}}, ...], as "categories" in the metadata of ONNX or the extra files of .pt2.
The export compares the file's detections with this program's, on synthetic images or those of --images. The file is
kept only if they match.
"""

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def parse_predict(argv: Sequence[str], package: str, score: float, batch_size: int) -> argparse.Namespace:
    """Parse the command line of `predict`, given the defaults of a workload."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package} predict", description=PREDICT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="file in a run's checkpoints/")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image, or folder of images")
    parser.add_argument("--recursive", action="store_true", help="also read the folders in a folder")
    default = Path("results/detections") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parser.add_argument(
        "--folder", type=Path, default=default, help="folder of the results (results/detections/<start>)"
    )
    parser.add_argument("--score", type=parse_score, default=score, help="omit detections below, 0 to 1 (%(default)s)")
    parser.add_argument("--batch-size", type=parse_positive, default=batch_size, help="images per batch (%(default)s)")
    parser.add_argument("--device", default="auto", help=device_names.DEVICE_HELP)
    return parser.parse_args(argv)


def parse_export(argv: Sequence[str], package: str, interface: str) -> argparse.Namespace:
    """Parse the command line of `export`. interface: inputs and outputs of the workload's network."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package} export",
        description=EXPORT.format(interface=interface),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="file in a run's checkpoints/")
    parser.add_argument("out", type=Path, help="file to write, .onnx or .pt2")
    parser.add_argument(
        "--batch-size", type=int, default=0, help="fixed number of images per call, or 0 for any number (0)"
    )
    parser.add_argument(
        "--score", type=float, help="drop detections below this score (default: that of the run's evaluation)"
    )
    parser.add_argument(
        "--images", type=Path, nargs="+", default=[], help="images or folders of images for the verification"
    )
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 0:
        parser.error("argument --batch-size: should be at least 0")
    if arguments.score is not None and not 0 <= arguments.score < 1:
        parser.error("argument --score: should be at least 0 and below 1")
    return arguments


def parse_conformance(argv: Sequence[str], package: str) -> argparse.Namespace:
    """Parse the command line of `conformance`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package} conformance",
        description="Compare every part with the numbers of the MLPerf reference.",
    )
    parser.add_argument("file", type=Path, help="vectors of the reference (.npz)")
    parser.add_argument("--device", default="auto", help=device_names.DEVICE_HELP)
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="precision of the network")
    parser.add_argument(
        "--record-rounding",
        action="store_true",
        help="simulate the precision, and write the errors that rounding causes next to FILE, for later runs",
    )
    parsed = parser.parse_args(argv)
    if parsed.record_rounding and parsed.precision == "fp32":
        parser.error("--record-rounding: the vectors are in fp32. Pass another --precision.")
    return parsed


def parse_score(text: str) -> float:
    """Parse a score threshold."""
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: should be at least 0 and below 1")
    return number


def parse_positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: should be at least 1")
    return number
