"""Download of public weights: resumed after an interruption, verified, and renamed only when complete.

    python -m detection.checkpoint.weights_download [--npz] [NAME [FOLDER]]

Without --npz, it imports only the standard library, so that ./get_weights.sh works before ./setup.sh.
"""

import argparse
import errno
import fcntl
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from detection import atomic_file
from detection.checkpoint.public_weights import PUBLIC_WEIGHTS, SOURCE_URL
from detection.data.http_download import DownloadError, fetch_file
from mlperf import stdio
from mlperf.errors import InputError, report_errors

FILE_NAME = re.compile(r"[\w.-]+-([0-9a-f]{8})\.pth")


@report_errors
def main(argv: Sequence[str]) -> int:
    """Download a file, or list the names. Return 2 on a user's mistake, and 1 if the network or the disk fails."""
    parser = argparse.ArgumentParser(
        prog="./get_weights.sh",
        description="Download public weights and verify them. Without NAME, list them.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="name in the list, or URL of a .pth file")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="target folder")
    parser.add_argument("--npz", action="store_true", help="also write the weights as a NumPy archive")
    parser.add_argument("--pretrained-dir", default="data", help="target folder without FOLDER (PRETRAINED_DIR, data)")
    parser.add_argument("--source-url", help=f"mirror of {SOURCE_URL} (WEIGHTS_URL)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.name is None:
        print(
            *(f"{name:17} {file.data:11} {file.metric:25} {file.flags}" for name, file in PUBLIC_WEIGHTS.items()),
            sep="\n",
        )
        return 0
    url, digest = resolve(arguments.name, arguments.source_url or SOURCE_URL)
    folder = Path(arguments.folder or arguments.pretrained_dir)
    path = folder / url.rsplit("/", 1)[-1]
    try:
        with lock(folder):
            download(url, path, digest)
            if arguments.npz:
                write_npz(path)
    except DownloadError as error:
        problem = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = f"{error.filename}: {error.strerror}. Free some space and run this again: it continues"
    except KeyboardInterrupt:
        problem = "interrupted. Run this again: it continues"
    else:
        return 0
    print(f"error: {problem}", file=sys.stderr)
    return 1


def resolve(name: str, source_url: str) -> tuple[str, str]:
    """Return the URL of a name, and the first 8 digits of the file's SHA-256. Raise InputError for another name."""
    url = name
    if "/" not in name:
        if name not in PUBLIC_WEIGHTS:
            raise InputError(f"{name}: no such weights. Choose one of {', '.join(PUBLIC_WEIGHTS)}.")
        url = PUBLIC_WEIGHTS[name].url.replace(SOURCE_URL, source_url.rstrip("/"))
    match = FILE_NAME.fullmatch(url.rsplit("/", 1)[-1])
    if not match:
        raise InputError(
            f"{url}: the file name must end in the first 8 digits of its SHA-256, as in resnet34-333f7ec4.pth."
        )
    return url, match[1]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock, which ends with this process. Raise InputError if another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{folder}: another download is running there. Wait for it to finish.") from None
    finally:
        os.close(descriptor)


def download(url: str, path: Path, digest: str) -> None:
    """Download a file unless it exists. Raise InputError if its SHA-256 does not begin with `digest`.

    Raise DownloadError if the download fails, or OSError if the file cannot be written.
    """

    def is_intact(file: Path) -> bool:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest().startswith(digest)

    if path.exists():
        if not is_intact(path):
            raise InputError(f"{path}: its SHA-256 does not begin with {digest}. Remove it and run this again.")
        print(f"{path} already exists")
        return
    print(f"downloading {url}")
    fetch_file(url, path, show_progress if sys.stderr.isatty() else lambda *_: None, is_intact)
    print(f"{path} is ready")


def show_progress(size: int, total: int | None) -> None:
    """Show the bytes on disk on one line of the terminal."""
    end = "\n" if size == total else ""
    print(f"\r{size >> 20} of {total >> 20 if total else '?'} MiB", end=end, file=sys.stderr, flush=True)


def write_npz(path: Path) -> None:
    """Write the tensors of a file also as a NumPy archive."""
    import numpy as np  # these need the environment
    import torch

    archive = path.with_suffix(".npz")
    if not archive.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        with atomic_file.atomic_write(archive) as partial, partial.open("wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    print(f"{archive} is ready")


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
