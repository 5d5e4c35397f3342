"""Variables that config files export, and the environment of runs in this process."""

import os

import pytest

from perf.systems import exported as exported

VARIABLES = ("RUN_DIR", "NODE_RANK", "RUN_INDEX", "PAGE_CACHE_DROPPED", "ECHO_LOG")


def set_only(patch: pytest.MonkeyPatch, settings: dict[str, object]) -> None:
    """Set these variables, and remove all other ones that are settings of a run."""
    for name in list(os.environ):
        if name.startswith(("SSD_", "MASKRCNN_", "DGX")) or name in VARIABLES:
            patch.delenv(name)
    for name, value in settings.items():
        patch.setenv(name, str(value))
