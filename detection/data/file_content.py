"""Content that often replaces a file of a data set: an error page, a pointer, nothing."""

CONTENT_HEAD = 1024
"""Bytes that `describe_other_content` needs."""

HTML_STARTS = (b"<!doctype html", b"<html", b"<head", b"<body")


def describe_other_content(encoded: bytes) -> str | None:
    """Describe the first bytes of a file that is neither an image nor JSON. Return None for unknown content."""
    head = encoded[:CONTENT_HEAD]
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not encoded:
        return "an empty file"
    if not head.strip(b"\0"):
        return "a file of zeros, perhaps of an interrupted download"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a pointer of Git LFS (run git lfs pull)"
    if text.startswith(HTML_STARTS):
        return "an HTML page, perhaps of a failed download"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing"
    if text.startswith(b"<?xml"):
        return "an XML file"
    if head.startswith(b"%PDF"):
        return "a PDF document"
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        return "an archive"
    return None
