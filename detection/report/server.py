"""The report of a run in progress as a web page, which follows metrics.jsonl."""

from functools import partial
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from detection.report.html_report import make_report
from detection.report.run_record import read_runs
from detection.run_dir import METRICS
from mlperf.errors import InputError

FILES = (METRICS, "result_*.txt", "classes.json", "confusion.json", "pictures.json")
"""Files of a run whose change changes its page."""

WAITING = (
    '<!DOCTYPE html><html lang="en"><meta http-equiv="refresh" content="2"><title>Waiting</title>'
    "<p>The run has recorded nothing yet."
)


class ReportHandler(BaseHTTPRequestHandler):
    """Handler of requests for the page of one run."""

    def __init__(self, folder: Path, *request: Any):
        self.folder = folder
        super().__init__(*request)

    def do_GET(self) -> None:
        """Answer with the page, or with 304 if the browser has it."""
        if self.path.partition("?")[0] != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        tag = page_tag(self.folder)
        if self.headers.get("If-None-Match") == tag:
            self.send_response(HTTPStatus.NOT_MODIFIED)
            self.end_headers()
            return
        try:
            page = make_report(read_runs(self.folder), live=True)
        except InputError:
            page = WAITING
        content = page.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing: the page asks every two seconds."""


def page_tag(folder: Path) -> str:
    """Return a quoted hash of the state of a run's files, as an HTTP entity tag."""
    states = [
        (path.name, (stat := path.stat()).st_mtime_ns, stat.st_size) for name in FILES for path in folder.glob(name)
    ]
    return f'"{sha256(repr(states).encode()).hexdigest()[:16]}"'


def make_server(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server of the page of a run. Raise InputError if the port is not available. port: 0 for any free one."""
    try:
        return ThreadingHTTPServer((host, port), partial(ReportHandler, folder))
    except (OSError, OverflowError) as error:
        raise InputError(f"--serve {port}: {host} cannot be served ({error}). Pass another port.") from error


def serve(folder: Path, host: str, port: int) -> None:
    """Serve the page of a run until it is interrupted."""
    with make_server(folder, host, port) as server:
        print(f"{folder} at http://{host}:{server.server_port}/ until Ctrl-C", flush=True)
        server.serve_forever()
