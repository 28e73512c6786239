"""`mmkd evaluate fetch`: files come whole to where a description expects them, or not at all. All on loopback."""

from __future__ import annotations

import hashlib
import http.server
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from mmkd.cli.evaluate import evaluate


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


FILES = {
    "set.zip": zipped(top__yes__1=b"1", top__no__2=b"2", readme=b"x"),
    "set.tar.gz": tarred("top/yes/1", b"1"),
    "table.csv": b"a,b\n",
    "page.html": b"<html>sign in</html>",
    "cut.zip": zipped(top__yes__1=b"1" * 4000)[:-100],
    "evil.tar.gz": tarred("../../outside", b"1"),
}


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name == "short":  # announces more than it sends
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif name in FILES:
            self.send_response(200)
            self.send_header("Content-Length", str(len(FILES[name])))
            self.end_headers()
            self.wfile.write(FILES[name])
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


Fetch = Callable[..., Result]


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Runs the command on a description with these downloads and steps."""
    (tmp_path / "roots.yaml").write_text("data: data\n")
    monkeypatch.setenv("MMKD_ROOTS", str(tmp_path / "roots.yaml"))

    def run(files: list[dict[str, Any]], *options: str, **fetch: Any) -> Result:
        about = {"homepage": "https://example.org", "licence": "CC0", "fetch": {"files": files} | fetch}
        source = {"kind": "imagefolder", "path": "${data}/set"}
        content = {"dataset": "tiny", "about": about, "source": source, "rows": {"test": {}}, "tasks": ["zero_shot"]}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
        return CliRunner().invoke(evaluate, ["fetch", str(tmp_path / "tiny.yaml"), *options])

    return run


def left(folder: Path) -> list[str]:
    """All files and folders that were placed."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".yaml")


def test_an_archive_becomes_the_folder_that_the_description_reads(tmp_path: Path, server: str, fetch: Fetch) -> None:
    checksum = f"md5:{hashlib.md5(FILES['set.zip'], usedforsecurity=False).hexdigest()}"
    archive = {"url": f"{server}/set.zip", "to": "${data}/set", "checksum": checksum, "member": "top"}
    table = {"url": f"{server}/table.csv", "to": "${data}/tables/table.csv"}
    result = fetch([archive, table], "--dry-run")
    assert (result.exit_code, left(tmp_path)) == (1, [])
    assert result.output.count("would download: ") == 2
    result = fetch([archive, table], steps=["put more into ${data}/set"])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "tiny: https://example.org (licence: CC0)",
        f"downloaded: {tmp_path}/data/set ({server}/set.zip)",
        f"downloaded: {tmp_path}/data/tables/table.csv ({server}/table.csv)",
        f"by hand: put more into {tmp_path}/data/set",
        f"here: {tmp_path}/data/set",
    ]
    placed = ["data", "data/set", "data/set/no", "data/set/no/2", "data/set/yes", "data/set/yes/1"]
    assert left(tmp_path) == [*placed, "data/tables", "data/tables/table.csv"]
    (tmp_path / "data/set/yes/1").write_bytes(b"mine")
    assert fetch([archive]).output.count("here: ") == 2
    assert (tmp_path / "data/set/yes/1").read_bytes() == b"mine"


def test_a_whole_archive_and_one_file_of_it(tmp_path: Path, server: str, fetch: Fetch) -> None:
    whole = {"url": f"{server}/set.tar.gz", "to": "${data}/set", "member": "."}
    one = {"url": f"{server}/set.zip", "to": "${data}/terms.txt", "member": "readme"}
    assert fetch([whole, one]).exit_code == 0
    assert left(tmp_path / "data") == ["set", "set/top", "set/top/yes", "set/top/yes/1", "terms.txt"]


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("gone.zip", {}, "did not get to .*/data/set: HTTP Error 404"),
        ("short", {}, "ended after 10 of 1000 bytes; try again"),
        ("set.zip", {"checksum": "sha256:" + "0" * 64}, "has the checksum sha256:[0-9a-f]{64}, expected sha256:0{64}"),
        ("set.zip", {"member": "other"}, "has no other; nothing was placed"),
        ("page.html", {"member": "."}, "is no archive that can be unpacked whole"),
        ("cut.zip", {"member": "."}, "is no archive that can be unpacked whole"),
        ("evil.tar.gz", {"member": "."}, "is no archive that can be unpacked whole: OutsideDestinationError"),
    ],
)
def test_what_does_not_come_whole_leaves_nothing(
    tmp_path: Path, server: str, fetch: Fetch, file: str, options: dict[str, str], message: str
) -> None:
    result = fetch([{"url": f"{server}/{file}", "to": "${data}/set"} | options])
    assert result.exit_code == 1
    text = str(result.exception)
    assert re.search(message, text), text
    assert "\n" not in text
    assert left(tmp_path) == []


def test_no_server(tmp_path: Path, fetch: Fetch) -> None:
    result = fetch([{"url": "http://127.0.0.1:9/x", "to": "${data}/set"}])
    assert "Connection refused; try again, or download it yourself" in str(result.exception)
    assert left(tmp_path) == []


def test_sets_that_come_with_mmkd_by_name_and_gated_ones(tmp_path: Path, fetch: Fetch) -> None:
    fetch([])  # sets the roots
    result = CliRunner().invoke(evaluate, ["fetch", "breastmnist", "--dry-run"])
    assert f"would download: {tmp_path}/data/medmnist/breastmnist.npz (https://zenodo.org/" in result.output
    result = CliRunner().invoke(evaluate, ["fetch", "ddi"])
    assert result.exit_code == 1
    assert "(licence: Stanford research use agreement; registration at Stanford AIMI)" in result.output
    assert "by hand: download DDI from https://" in result.output
    assert result.output.endswith(f"missing: {tmp_path}/data/ddi/ddi_metadata.csv\n")
    assert "cannot read" in str(CliRunner().invoke(evaluate, ["fetch", "nothing"]).exception)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"layout": "confirmed"}, "layout is 'confirmed' without `evidence`"),
        ({"fetch": {"files": [{"url": "file:///etc/passwd", "to": "x"}]}}, "url: String should match pattern"),
        ({"fetch": {"files": [{"url": "https://a.b", "to": "x", "checksum": "md5:1"}]}}, "checksum: String should"),
        ({"expected": {"testing": 3}}, "expected.testing"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"dataset": "tiny", "source": {"path": "x"}, "about": about}))
    result = CliRunner().invoke(evaluate, ["fetch", str(tmp_path / "tiny.yaml")])
    assert message in str(result.exception)
