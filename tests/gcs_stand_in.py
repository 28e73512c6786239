"""A stand-in for Google Cloud Storage on loopback: the requests of its XML API that object_store's client sends.

After https://cloud.google.com/storage/docs/xml-api/reference-methods: objects by path, `x-goog-if-generation-match: 0`
for "only if there is none", listings with `list-type=2`. One bucket or more, in memory, no authentication.
"""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

STAMP = "2026-01-02T03:04:05.000Z"


class Storage(BaseHTTPRequestHandler):
    """`objects`: "/bucket/name" to (generation, bytes)."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[int, bytes]]
    lock: threading.Lock

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _name(self) -> str:
        return urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)

    def do_PUT(self) -> None:
        """Store an object."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            there = self.objects.get(self._name, (0, b""))[0]
            wanted = self.headers.get("x-goog-if-generation-match")
            if wanted is not None and int(wanted) != there:
                self._answer(412)
                return
            self.objects[self._name] = (there + 1, data)
        self._answer(200, ETag=f'"{there + 1}"', x_goog_generation=str(there + 1))

    def do_DELETE(self) -> None:
        """Delete an object."""
        self._answer(204 if self.objects.pop(self._name, None) else 404)

    def do_HEAD(self) -> None:
        """Tell of an object."""
        self.do_GET()

    def do_GET(self) -> None:
        """An object, a range of one, or a listing."""
        asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        if "list-type" in asked:
            self._answer(200, self._listing(asked).encode(), Content_Type="application/xml")
            return
        if self._name not in self.objects:
            self._answer(404)
            return
        generation, data = self.objects[self._name]
        tags = {"ETag": f'"{generation}"', "Last_Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if first:
            part = data[int(first) : int(last) + 1]
            where = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            self._answer(206, part, Content_Range=where, **tags)
            return
        self.send_response(200)
        for name, value in tags.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _listing(self, asked: dict[str, str]) -> str:
        bucket = self._name.strip("/") + "/"
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        names = sorted(name[len(bucket) + 1 :] for name in self.objects if name.startswith(f"/{bucket}{prefix}"))
        folders = dict.fromkeys(
            prefix + name[len(prefix) :].split(delimiter)[0] + delimiter
            for name in names
            if delimiter and delimiter in name[len(prefix) :]
        )
        files = [name for name in names if not (delimiter and delimiter in name[len(prefix) :])]
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{STAMP}</LastModified>"
            f"<Size>{len(self.objects[f'/{bucket}{name}'][1])}</Size></Contents>"
            for name in files
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders)
        return f"<?xml version='1.0'?><ListBucketResult>{contents}{common}</ListBucketResult>"


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Serve; gives the environment that leads object_store's client here. `folder` keeps its settings."""
    handler = type("Handler", (Storage,), {"objects": {}, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    account = {"gcs_base_url": f"http://127.0.0.1:{server.server_port}", "disable_oauth": True}
    key = folder / "account.json"
    key.write_text(json.dumps(account | {"client_email": "", "private_key": "", "private_key_id": ""}))
    try:
        yield {"GOOGLE_SERVICE_ACCOUNT": str(key)}
    finally:
        server.shutdown()
        server.server_close()
