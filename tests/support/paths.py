"""Paths of the repository and of the shared material next to it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


def shared(relative: str) -> Path:
    """Return the path of shared material, or skip the test if it is missing."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"../shared/{relative} is missing")
    return path
