"""Every command of inspection on a store behind a URL, on one that is still being written, and on what is no store."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from planted_faults import make_faults
from tiny_store import make_card, make_store

from mmkd.base.errors import MmkdError, NotAStoreError
from mmkd.base.files import write_atomically
from mmkd.base.places.remote import as_root
from mmkd.cli.main import cli, main

COMMANDS = {
    "info": ["store", "info", "STORE", "--json"],
    "stats": ["store", "stats", "STORE", "--json"],
    "show": ["store", "show", "STORE", "row:7", "--json"],
    "shard": ["store", "show", "STORE", "shard:1", "--json"],
    "neighbors": ["store", "neighbors", "STORE", "row:7", "--teacher", "base", "--json"],
    "report": ["store", "report", "STORE", "OUT/report.html", "--json"],
    "atlas": ["store", "atlas", "STORE", "--teacher", "base", "--out", "OUT/rows.parquet"],
    "verify": ["store", "verify", "STORE", "--json"],
}
TEACHERS = ("base", "holed")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def run(name: str, store: str, out: Path) -> str:
    """What a command prints, without the places that differ."""
    words = [word.replace("STORE", store).replace("OUT", str(out)) for word in COMMANDS[name]]
    done = CliRunner().invoke(cli, words)
    if isinstance(done.exception, MmkdError):
        raise done.exception
    assert done.exit_code == 0, (name, done.output)
    return done.stdout.replace(store, "STORE").replace(str(out), "OUT")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_faults(tmp_path_factory.mktemp("faults"), TEACHERS)
    old = time.time() - 3600  # or its hole would count as still being written
    for path in root.rglob("*"):
        os.utime(path, (old, old))
    return root


@pytest.fixture(scope="module")
def url(faults: Path, s3_server: str) -> str:
    pytest.importorskip("obstore", reason="the extra remote is not installed")
    root = as_root("s3://shared/inspected/store")
    for path in faults.rglob("*"):
        if path.is_file():
            write_atomically(root / path.relative_to(faults).as_posix(), path.read_bytes())
    return "s3://shared/inspected/store"


@pytest.mark.integration
@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_behind_a_url_is_told_as_on_disk(name: str, faults: Path, url: str, tmp_path: Path) -> None:
    (here, there) = (run(name, place, tmp_path) for place in (str(faults), url))
    if name == "atlas":
        assert here == there
        return
    mine, theirs = json.loads(here), json.loads(there)
    for told in (mine, theirs):
        # Times of files are not known behind a URL; a page has its own address in it.
        for key in {"activity", "bytes"} & set(told if isinstance(told, dict) else ()):
            del told[key]
    assert theirs == mine


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("what", ["an empty folder", "nothing", "a file"])
def test_what_is_no_store_is_one_line(name: str, what: str, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the extra inspect is not installed")
    place = tmp_path / "place"
    if what == "an empty folder":
        place.mkdir()
    elif what == "a file":
        place.write_text("not a store")
    with pytest.raises(NotAStoreError) as error:
        run(name, str(place), tmp_path)
    assert str(place) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["info", "NOWHERE"], "is not an mmkd store"),
        (["show", "STORE", "shard:9"], "has no shard '9'; its shards are 0 to 4"),
        (["show", "STORE", "K109x"], "did you mean 'k109"),
        (["show", "STORE", "row:5000"], "has no row 5000; its rows are 0 to 1099"),
        (["stats", "STORE", "--teachers", "nobody"], "has no teacher 'nobody'; it has base, holed"),
        (["neighbors", "STORE", "k1", "--teacher", "nobody"], "has no teacher 'nobody'; it has base, holed"),
        (["report", "STORE", "page.txt"], "give one that ends in .html"),
        (["atlas", "STORE", "--teacher", "nobody", "--out", "x.parquet"], "has no teacher 'nobody'"),
        (["stats", "STORE", "--sample", "0"], "neither a number of rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_one(
    words: list[str], told: str, faults: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly", reason="the extra inspect is not installed")
    places = {"STORE": str(faults), "NOWHERE": str(faults / "samples")}
    monkeypatch.setattr(sys, "argv", ["mmkd", "store", *(places.get(word, word) for word in words)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert left.value.code == 1
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("Error: ")
    assert told in said.err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_that_is_being_written_is_told_as_far_as_it_is(name: str, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the extra inspect is not installed")
    root = tmp_path / "store"
    make_store(root, 600, [make_card("base", 8), make_card("other", 16)])
    # The writer is in shard 2 of `base`: features are there and no entry, a temporary file lies about.
    (root / "ledger" / "00002.base.json").unlink()
    (root / "teachers/base/image/loose").mkdir(parents=True, exist_ok=True)
    (root / "teachers/base/image/loose/.0.123-abcd.mmkd-tmp").write_bytes(b"half")
    now = time.time()
    os.utime(root / "ledger" / "00001.base.json", (now, now))
    said = run(name, str(root), tmp_path)
    if name in ("info", "stats", "report"):
        texts = [(finding["severity"], finding["text"]) for finding in json.loads(said)["findings"]]
        assert ("warning", "base lacks 1 of 3 shards (2): being written") in texts
    if name == "info":
        assert json.loads(said)["activity"]["running"]
