"""A read-only S3 server over a folder that lets every request wait: what a store behind a network costs."""

from __future__ import annotations

import html
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 1000
"""Names in one answer to a listing, as S3 has it."""


class Storage(BaseHTTPRequestHandler):
    """HEAD, GET with ranges, and listings (ListObjectsV2) of the one bucket `bench`."""

    protocol_version = "HTTP/1.1"
    root: Path
    seconds: float

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        time.sleep(self.seconds)
        split = urlsplit(self.path)
        name = unquote(split.path).lstrip("/").partition("/")[2]
        if not name:
            self._send(200, self._listing(parse_qs(split.query)).encode(), True, {})
            return
        path = self.root / name
        if not path.is_file():
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>", body, {})
            return
        size, status, start, stop = path.stat().st_size, 200, 0, path.stat().st_size
        facts = {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = (int(first), min(int(last or size) + 1, size)) if first else (size - int(last), size)
            status, facts["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            self._send(status, file.read(stop - start) if body else b"", body, facts, stop - start)

    def _send(self, status: int, data: bytes, body: bool, facts: dict[str, str], length: int | None = None) -> None:
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in facts.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _listing(self, query: dict[str, list[str]]) -> str:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for base, folders, files in os.walk(folder):
            inside = Path(base).relative_to(self.root).as_posix().removeprefix(".").lstrip("/")
            found += [f"{inside}/{name}".lstrip("/") for name in files]
            if delimiter:
                found += [f"{inside}/{name}/".lstrip("/") for name in folders]
                break
        names = sorted(name for name in found if name.startswith(prefix) and name > after)
        some, more = names[:PAGE], len(names) > PAGE
        entries = "".join(
            f"<CommonPrefixes><Prefix>{html.escape(name)}</Prefix></CommonPrefixes>"
            if name.endswith("/")
            else f"<Contents><Key>{html.escape(name)}</Key><Size>{(self.root / name).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>1</ETag></Contents>"
            for name in some
        )
        token = f"<NextContinuationToken>{html.escape(some[-1])}</NextContinuationToken>" if more else ""
        return (
            "<?xml version='1.0'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
            f"<Name>bench</Name><Prefix>{html.escape(prefix)}</Prefix><KeyCount>{len(some)}</KeyCount>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}{entries}</ListBucketResult>"
        )


@contextmanager
def slow_bucket(folder: Path, seconds: float) -> Iterator[str]:
    """Serve a folder from a process of its own: the URL of its bucket, which this process' environment leads to."""
    command = [sys.executable, "-P", __file__, str(folder), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
            os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
            os.environ |= {"AWS_ACCESS_KEY_ID": "-", "AWS_SECRET_ACCESS_KEY": "-"}
            yield "s3://bench"
        finally:
            process.terminate()


def serve(folder: str, seconds: float) -> None:
    """Serve until the process is ended; the port is the first line of standard output."""
    Storage.root, Storage.seconds = Path(folder), seconds
    server = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
