"""A server in front of an S3 server: adds time to each request, counts the bytes of each object that it hands out, and
fails or stalls where it is told to."""

from __future__ import annotations

import http.client
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class SlowS3:
    """What it does, and what it has done."""

    address: str = ""
    delay: float = 0.0
    """Seconds before each answer."""
    fault: Callable[[str], str] = lambda name: ""
    """`fail` (500) or `stall` (half of the answer, and then nothing) for a request of this object; else empty."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of GET by object."""


@contextmanager
def slow_s3(behind: str) -> Iterator[SlowS3]:
    """Serve what the server at `behind` has."""
    told, target = SlowS3(), urllib.parse.urlsplit(behind).netloc
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(told.delay)
            name = urllib.parse.urlsplit(self.path).path
            fault = told.fault(name) if self.command == "GET" else ""
            if fault == "fail":
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(target, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for header, value in answer.getheaders():
                if header.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(header, value)
            self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
            self.end_headers()
            if fault == "stall":
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                over.wait(60)
                return
            if self.command == "GET":
                told.sent[name] += len(data)
            self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        told.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield told
        finally:
            over.set()
            server.shutdown()
