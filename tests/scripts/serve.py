"""HTTP server on loopback with Range support, which can also fail like real servers.

python serve.py FOLDER PORT_FILE LOG [--cut-after BYTES] [--corrupt] [--no-range] [--status CODE]
Write the port to PORT_FILE, and each request as a line (method, path, range) to LOG.
"""

import argparse
import http.server
import os
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("port_file", type=Path)
parser.add_argument("log", type=Path)
parser.add_argument("--cut-after", type=int, help="close each connection after this many bytes")
parser.add_argument("--corrupt", action="store_true", help="change the last byte of every file")
parser.add_argument("--no-range", action="store_true", help="always send the whole file")
parser.add_argument("--status", type=int, help="respond to every request with this status")
options = parser.parse_args()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.respond(with_body=False)

    def do_GET(self) -> None:
        self.respond(with_body=True)

    def respond(self, with_body: bool) -> None:
        requested = self.headers.get("Range", "")
        with options.log.open("a") as log:
            log.write(f"{self.command} {self.path} {requested}\n")
        path = options.folder / self.path.lstrip("/")
        if options.status or not path.is_file():
            self.send_error(options.status or 404)
            return
        body = path.read_bytes()
        if options.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        start = 0
        if requested and not options.no_range:
            start = int(requested.removeprefix("bytes=").split("-")[0])
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if with_body:
            end = start + options.cut_after if options.cut_after else None
            self.wfile.write(body[start:end])


with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    part = options.port_file.with_suffix(".part")
    part.write_text(str(server.server_port))
    os.replace(part, options.port_file)
    server.serve_forever()
