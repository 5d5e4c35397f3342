"""Diagnosis of file names that an annotation file lists and its image folder lacks."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray


def describe_missing(file_names: Sequence[str], has_file: NDArray[np.bool_], image_dir: Path) -> str:
    """Describe the missing files, and name existing files that are probably meant.

    has_file: (N,) whether each name exists.
    """
    missing = [file_names[index] for index in np.flatnonzero(~has_file).tolist()]
    existing = index_files(image_dir)
    matches = [(name, match) for name in missing if (match := find_match(name, existing))]
    counts = f"{len(missing)} of its {len(file_names)} images are not in {image_dir.name}/"
    if not matches:
        return f"{counts} (first: {missing[0]}). Check the folder, or pass --skip-missing-images to train without them"
    first, (_, existing_file) = matches[0]
    causes = Counter(cause for _, (cause, _) in matches)
    reasons = ", ".join(f"{count} with {cause}" for cause, count in causes.most_common())
    return f"{counts}, but {reasons}: `{first}` exists as `{existing_file}`. Correct 'file_name' in the annotations"


def index_files(image_dir: Path) -> dict[str, str]:
    """Return the files below a folder, relative to it, by the keys of `name_keys`. The first of a key wins."""
    files: dict[str, str] = {}
    for folder, _, names in os.walk(image_dir):
        for name in sorted(names):
            path = (Path(folder) / name).relative_to(image_dir).as_posix()
            for key in name_keys(path):
                files.setdefault(key, path)
    return files


def name_keys(path: str) -> Iterator[str]:
    """Yield a path, its name, and its name without case and without suffix."""
    name = PurePosixPath(path).name
    yield path
    yield f"name {name}"
    yield f"lower {name.lower()}"
    yield f"stem {PurePosixPath(name).stem.lower()}"


def find_match(name: str, existing: dict[str, str]) -> tuple[str, str] | None:
    """Return how a missing name differs from an existing file, and that file's path."""
    path, causes = name, []
    if "\\" in path:
        path, causes = path.replace("\\", "/"), ["backslashes"]
    if unquote(path) != path:
        path, causes = unquote(path), [*causes, "escapes such as %20"]
    path = PurePosixPath(path).as_posix()
    for key, cause in zip(name_keys(path), ("", "another folder", "another case", "another suffix"), strict=True):
        if match := existing.get(key):
            return " and ".join([*causes, *([cause] if cause else [])]), match
    return None
