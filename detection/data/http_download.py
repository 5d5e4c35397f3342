"""Downloads over HTTP: retried when the connection breaks, resumed, and renamed only when complete."""

import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MAX_ATTEMPTS = 4
"""Consecutive attempts that transfer nothing before a download fails."""

RETRY_DELAY_S = 1.0
"""Delay after the first attempt. It grows by as much with each further one."""

TIMEOUT_S = 60
CHUNK_BYTES = 1 << 20
MISSING_STATUS = (403, 404, 410)  # a bucket that cannot be listed answers 403 for a file that it does not have
TRANSIENT_STATUS = (408, 429)  # and 500 to 599
RANGE_NOT_SATISFIABLE = 416

# A context for each connection would read the certificates each time.
_OPENER = urllib.request.build_opener(urllib.request.HTTPSHandler(context=ssl.create_default_context()))


class DownloadError(Exception):
    """A failure of the network or the server. Another call continues."""


class MissingFileError(DownloadError):
    """A file that the server does not have."""


class _BrokenConnectionError(Exception):
    """A failure that another attempt may repair."""


class _Content(NamedTuple):
    """Bytes of a file from byte `start`, and the size of the whole file if the server reports it."""

    start: int
    chunks: Iterator[bytes]
    total: int | None


def fetch(url: str) -> bytes:
    """Return the content of a small file. Raises MissingFileError or DownloadError."""
    attempt = 0
    while True:
        try:
            return b"".join(_open(url, 0).chunks)
        except _BrokenConnectionError as error:
            attempt += 1
            _wait(url, attempt, error)


def fetch_file(
    url: str, path: Path, report: Callable[[int, int | None], object], is_intact: Callable[[Path], bool] | None = None
) -> None:
    """Download a large file to PATH.part, from where an earlier call stopped, and rename it to `path`.

    report: called with the bytes on disk, and with those at the end if the server reports them. is_intact: called with
    the complete PATH.part, which is removed if it is not.
    Raises MissingFileError, DownloadError, or OSError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    attempt = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            content = _open(url, before)
            _append(content, part, report)
            if is_intact and not is_intact(part):
                part.unlink()
                raise DownloadError(
                    f"{url}: the checksum of the downloaded file is wrong. The file was removed: run this again, or "
                    "use another mirror"
                )
            part.replace(path)
            return
        except _BrokenConnectionError as error:
            attempt = 1 if part.exists() and part.stat().st_size > before else attempt + 1
            _wait(url, attempt, error)


def _append(content: _Content, part: Path, report: Callable[[int, int | None], object]) -> None:
    size = content.start
    try:
        with part.open("ab" if size else "wb") as file:
            for chunk in content.chunks:
                file.write(chunk)
                size += len(chunk)
                report(size, content.total)
    except OSError as error:  # a full disk names no file
        error.filename = error.filename or str(part)
        raise


def _open(url: str, start: int) -> _Content:
    """Request a file from byte `start`. Its `start` is 0 if the server sends the whole file."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = _OPENER.open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == RANGE_NOT_SATISFIABLE and start:  # nothing is left to send
            return _Content(start, iter(()), start)
        if error.code in MISSING_STATUS:
            raise MissingFileError(f"{url}: the server returned status {error.code}") from None
        if error.code >= 500 or error.code in TRANSIENT_STATUS:
            raise _BrokenConnectionError(f"the server returned status {error.code}") from None
        raise DownloadError(f"{url}: the server returned status {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenConnectionError(_reason(error)) from None
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        start = 0
    length = response.headers.get("Content-Length")
    total = start + int(length) if length and length.isdigit() else None
    return _Content(start, _read(response, start, total), total)


def _read(response: http.client.HTTPResponse, start: int, total: int | None) -> Iterator[bytes]:
    size = start
    with response:
        while True:
            try:
                chunk = response.read(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenConnectionError(_reason(error)) from None
            if not chunk:
                break
            size += len(chunk)
            yield chunk
    if total is not None and size < total:
        raise _BrokenConnectionError(f"the connection closed after {size} of {total} bytes")


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _wait(url: str, attempt: int, error: _BrokenConnectionError) -> None:
    """Wait before another attempt. Raises DownloadError instead after the last one."""
    if attempt >= MAX_ATTEMPTS:
        raise DownloadError(f"{url}: the download failed: {error}. Run this again: it continues") from None
    time.sleep(attempt * RETRY_DELAY_S)
