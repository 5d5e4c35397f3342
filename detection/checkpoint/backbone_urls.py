"""Files of ImageNet weights for a backbone: how to fetch them, and their integrity."""

import hashlib
import re
import zipfile
from pathlib import Path

from detection.checkpoint.public_weights import PUBLIC_WEIGHTS
from detection.config.settings import InputError

BACKBONE_FILES = {name: weights.file for name, weights in PUBLIC_WEIGHTS.items() if weights.data == "ImageNet-1k"}
"""File names by backbone."""

MSRA_R50_URL = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl"
"""ResNet-50 from its authors, published by Detectron. The MLPerf reference of Mask R-CNN starts from it."""


def fetch_command(backbone: str, path: Path | None = None) -> str:
    """Return the command that fetches the ImageNet weights of a backbone. The suffix of `path` selects the format."""
    if path is not None and path.suffix == ".pkl":
        return f"curl --fail --location --output {path} {MSRA_R50_URL}"
    return f"./get_weights.sh {backbone}"


def verify_file(path: Path) -> str:
    """Verify a file of weights: the SHA-256 prefix in torchvision's file names, and the checksums of an archive.

    Return a one-line description. Raise InputError if the file is missing or damaged.
    """
    if path.suffix not in (".pth", ".npz", ".pkl"):
        raise InputError(f"backbone {path}: not a .pth, .npz or .pkl file")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            start = file.read(2)
        # torchvision's .pth files and Detectron's .pkl predate torch's zip format: plain pickles without checksums.
        is_intact = start == b"\x80\x02" and path.suffix in (".pth", ".pkl")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                is_intact = archive.testzip() is None
    except FileNotFoundError:
        raise InputError(f"backbone {path}: no such file") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"backbone {path}: cannot be read: {error}") from error
    expected_digest = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if expected_digest and not digest.startswith(expected_digest[1]):
        raise InputError(
            f"backbone {path}: damaged, its SHA-256 starts with {digest[:8]} instead of {expected_digest[1]}"
        )
    if not is_intact:
        raise InputError(f"backbone {path}: damaged or truncated")
    return f"backbone: {path} ({path.stat().st_size:,} bytes, SHA-256 {digest[:8]}...)"
