"""Sizes and checksums of COCO 2017's annotation files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PublishedSplit:
    """Published size of one split, and the SHA-256 of its instances_*.json."""

    num_images: int
    num_annotations: int
    sha256: str


PUBLISHED = {
    "train": PublishedSplit(118_287, 860_001, "610fce4944abdeb15354cc765333805529359d12d88f2f711393ca586901d01d"),
    "val": PublishedSplit(5_000, 36_781, "e8c7f7908f1d7278341fae127d0da654f102f11bd7b21d8aeefa635b8c810b6f"),
}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
