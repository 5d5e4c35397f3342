"""Recorded errors of simulated rounding: one file for a file of vectors, `<stem>_rounding.json`.

The errors depend on the vectors and on the comparisons, and not on the device. So they are computed once.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from detection.atomic_file import atomic_write
from detection.config.settings import InputError
from detection.data.coco2017 import sha256

ErrorsByPrecision = dict[str, dict[str, float]]


def recorded_path(vectors: Path) -> Path:
    """Return the path of the errors of a file of vectors."""
    return vectors.with_name(f"{vectors.stem}_rounding.json")


def read_errors(vectors: Path) -> ErrorsByPrecision:
    """Return the largest error of each comparison, by precision and name. Raise InputError.

    It is empty if none are recorded for these vectors.
    """
    path = recorded_path(vectors)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        digest, errors = content["vectors_sha256"], content["precisions"]
        by_precision = {name: {key: float(error) for key, error in part.items()} for name, part in errors.items()}
        return by_precision if digest == sha256(vectors) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not the errors of rounding ({error!r}). Restore the file, or delete it.") from error


def record_errors(vectors: Path, precision_name: str, errors: Mapping[str, float]) -> Path:
    """Write the errors of a precision next to those of the others; return the path. Raise InputError."""
    path = recorded_path(vectors)
    rounded = {name: float(f"{error:.4g}") for name, error in errors.items()}
    content = {
        "vectors_sha256": sha256(vectors),
        "precisions": read_errors(vectors) | {precision_name: rounded},
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path
