"""A web server that knows byte ranges, as all but Python's own do, and lists folders."""

from __future__ import annotations

import http.server
from pathlib import Path


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files whole or in part; says nothing."""

    def do_GET(self) -> None:
        """One range of a file, or all of it."""
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        asked = self.headers.get("Range", "")
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = (int(first), min(int(last or len(data)), len(data) - 1) + 1) if asked else (0, len(data))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:end])

    def log_message(self, *_: object) -> None:
        """Say nothing."""
