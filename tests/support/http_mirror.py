"""HTTP server on loopback that breaks connections as real servers do."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from detection.data import http_download


class Server(http.server.ThreadingHTTPServer):
    """Mirror of `files` on loopback. It cuts or fails the next requests of a path as `faults` says, in order."""

    def __init__(self):
        self.files, self.faults, self.requests = {}, {}, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        requested = self.headers.get("Range", "")
        self.server.requests.append(f"{self.path} {requested}".strip())
        fault = next(iter(self.server.faults.get(self.path, ())), None)
        if fault is not None:
            self.server.faults[self.path].pop(0)
        content = self.server.files.get(self.path)
        start = int(requested.removeprefix("bytes=").removesuffix("-") or 0)
        status = fault["status"] if fault and "status" in fault else 404 if content is None else 0
        if not status and start >= len(content):
            status = 416
        if status:
            self.send_error(status)
            return
        self.send_response(206 if requested else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + fault["cut"] if fault else None])

    def log_message(self, *_):
        pass


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve from a thread, and let clients retry at once."""
    monkeypatch.setattr(http_download, "RETRY_DELAY_S", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
