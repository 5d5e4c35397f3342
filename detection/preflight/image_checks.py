"""Checks of all image files of a split before the timer starts."""

from collections.abc import Iterator, Sequence

from detection.config.settings import InputError
from detection.data.coco import Split
from detection.data.image_file import SizeMismatch, displayed_hw
from detection.data.image_headers import Header, map_files, read_header


def check_headers(name: str, split: Split) -> tuple[list[str], list[str]]:
    """Read the headers of all images of a split. Return information and errors."""
    files = [split.image_file(index) for index in range(len(split))]
    headers = map_files(read_header, files)
    errors = [header for header in headers if isinstance(header, InputError)]
    mismatches = [error for error in errors if isinstance(error, SizeMismatch)]
    unreadable = [error for error in errors if not isinstance(error, SizeMismatch)]
    info = describe_orientations(name, split, [header for header in headers if isinstance(header, Header)])
    return [*info], [line for group in (unreadable, mismatches) for line in summarize(group, len(files))]


def summarize(errors: Sequence[InputError], num_files: int) -> Iterator[str]:
    """Yield the first error, with the number of all."""
    if errors:
        more = f" This is the first of {len(errors)} such images of {num_files}." if len(errors) > 1 else ""
        yield f"{errors[0]}{more}"


def describe_orientations(name: str, split: Split, headers: Sequence[Header]) -> Iterator[str]:
    """Yield how many images have an EXIF orientation, and which pixels were selected."""
    rotated = [header for header in headers if header.orientation != 1]
    if not rotated:
        return
    num_applied = sum(header.applied != 1 for header in rotated)
    yield (
        f"{name}: {len(rotated)} of {len(headers)} images have an EXIF orientation: {num_applied} are read as "
        f"displayed, {len(rotated) - num_applied} as stored (--exif {split.exif})"
    )
    undecided = [header for header in rotated if displayed_hw(header.stored_hw, header.orientation) == header.stored_hw]
    if split.exif == "auto" and num_applied and undecided:
        yield (
            f"warning: {name}: {len(undecided)} images with an EXIF orientation have the same size as stored and as "
            "displayed, and are read as stored, but others are read as displayed. If all boxes are of displayed "
            "images, pass --exif apply."
        )
