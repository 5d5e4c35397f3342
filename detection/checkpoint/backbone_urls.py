"""The files of ImageNet weights that a network's trunk starts from: their names, where they come from, their state."""

import hashlib
import re
import zipfile
from pathlib import Path

from detection.config.settings import InputError

# torchvision's ImageNet weights of each trunk (IMAGENET1K_V1), but for resnet34 those that MLPerf Training names.
BACKBONE_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-333f7ec4.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
}


MSRA = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl"
"""ResNet-50 as its authors trained it, from Detectron: what the MLPerf reference of Mask R-CNN starts from."""


def how_to_fetch(trunk: str, path: Path | None = None) -> str:
    """The command that fetches the ImageNet weights of a trunk; path: where they are looked for, by its suffix."""
    if path is not None and path.suffix == ".pkl":
        return f"curl --fail --location --output {path} {MSRA}"
    file = BACKBONE_FILES[trunk]
    url = "" if trunk == "resnet34" else f"BACKBONE_URL=https://download.pytorch.org/models/{file} "
    return f"{url}./get_resnet34_backbone.sh"


def check(path: Path) -> str:
    """Look for damage: the SHA-256 begins with the digits in a torchvision name, an archive has its sums.

    Returns what was found, for people; raises InputError.
    """
    if path.suffix not in (".pth", ".npz", ".pkl"):
        raise InputError(f"backbone {path} is neither .pth, .npz nor .pkl")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            start = file.read(2)
        # The published .pth is older than torch's zip format, as is Detectron's .pkl: bare pickles, without sums.
        sound = start == b"\x80\x02" and path.suffix in (".pth", ".pkl")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                sound = archive.testzip() is None
    except FileNotFoundError:
        raise InputError(f"backbone {path} is not there") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"backbone {path} cannot be read: {error}") from error
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named and not digest.startswith(named[1]):
        raise InputError(f"backbone {path} is damaged: its SHA-256 begins with {digest[:8]}, not with {named[1]}")
    if not sound:
        raise InputError(f"backbone {path} is damaged or cut off")
    return f"backbone: {path} ({path.stat().st_size:,} bytes, SHA-256 {digest[:8]}...)"
