"""Headers of image files: size and EXIF orientation. Imports no torch."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple, TypeVar

from PIL import Image

from detection.config.settings import InputError
from detection.data.image_file import ImageFile, displayed_hw, read_orientation, read_stored_hw
from detection.data.pillow_io import read_errors

T = TypeVar("T")

NUM_THREADS = 16  # hide the latency of network disks
FILES_PER_TASK = 64


class Header(NamedTuple):
    """Size, EXIF orientation, and the orientation that the rule of the split applies."""

    stored_hw: tuple[int, int]
    orientation: int
    applied: int

    @property
    def size_hw(self) -> tuple[int, int]:
        """Size of the image to which the boxes refer."""
        return displayed_hw(self.stored_hw, self.applied)


def read_header(file: ImageFile) -> Header | InputError:
    """Read the header of an image file. Return the error of an unreadable file, or of a size that is not annotated."""
    try:
        with read_errors(file.path), Image.open(file.path) as image:
            stored_hw, orientation = read_stored_hw(image), read_orientation(image)
            return Header(stored_hw, orientation, file.select_orientation(stored_hw, lambda: orientation))
    except InputError as error:
        return error


def map_files(function: Callable[[ImageFile], T], files: Sequence[ImageFile]) -> list[T]:
    """Apply a function to each file in threads. Return the results in order."""
    tasks = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(chain.from_iterable(pool.map(lambda task: [function(file) for file in task], tasks)))
