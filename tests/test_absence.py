"""Only "not found" means absent: what cannot be listed or has moved is an error, never an empty store."""

from __future__ import annotations

import errno
import http.server
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from tiny_store import make_card, make_index, make_store

from mmkd.base.errors import MmkdError, NotAStoreError, StoreError, UnreachableError
from mmkd.base.files import list_folder, write_atomically
from mmkd.base.places.remote import as_root
from mmkd.cli.main import cli
from mmkd.store import FeatureStore
from mmkd.store.inputs import read_inputs_ledger
from mmkd.store.ledger import entries_of_shard, read_ledger
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.selections import selection_names
from mmkd.store.verify import verify
from mmkd.store.writer import append_rows, move_corpus, note_encoding_error


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_store(tmp_path / "st", 300, [make_card()])
    return tmp_path / "st"


@pytest.fixture
def unlistable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of folders that may not be listed; a test puts some in."""
    names: list[str] = []
    listdir, scandir = os.listdir, os.scandir

    def refuse(real: Any) -> Any:
        def list_or_refuse(folder: Any = ".") -> Any:
            if Path(folder).name in names:
                raise PermissionError(errno.EACCES, "Permission denied", str(folder))
            return real(folder)

        return list_or_refuse

    monkeypatch.setattr(os, "listdir", refuse(listdir))
    monkeypatch.setattr(os, "scandir", refuse(scandir))
    return names


def test_a_folder_that_may_not_be_listed_is_no_empty_folder(root: Path, unlistable: list[str]) -> None:
    assert list_folder(root / "nowhere") == []
    for folder, look in (
        ("ledger", lambda: read_ledger(root)),
        ("ledger", lambda: entries_of_shard(root, 0)),
        ("ledger", lambda: verify(root)),
        ("teachers", lambda: FeatureStore.open(root)),
        ("inputs", lambda: read_inputs_ledger(root)),
        ("selections", lambda: selection_names(root)),
        ("samples", lambda: verify(root)),
    ):
        (root / folder).mkdir(exist_ok=True)
        unlistable[:] = [folder]
        with pytest.raises(StoreError, match="Permission denied"):
            look()


def test_commands_say_that_the_ledger_cannot_be_read(root: Path, unlistable: list[str], tmp_path: Path) -> None:
    unlistable.append("ledger")
    for words in (("info",), ("verify",), ("subset", str(tmp_path / "o"), "--where", "row < 3")):
        result = CliRunner().invoke(cli, ["store", words[0], str(root), *words[1:]])
        assert isinstance(result.exception, StoreError), words
        assert not (tmp_path / "o" / "zarr.json").exists()


def test_a_file_in_place_of_the_ledger_is_an_error(root: Path) -> None:
    for path in (root / "ledger").iterdir():
        path.unlink()
    (root / "ledger").rmdir()
    (root / "ledger").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        read_ledger(root)


def test_a_store_that_was_moved_while_open_is_not_read_as_missing(root: Path) -> None:
    store = FeatureStore.open(root)
    root.rename(root.with_name("elsewhere"))
    with pytest.raises(NotAStoreError, match="not there any more"):
        store.image("alpha")
    with pytest.raises(MmkdError):
        store.sample_table()


class Listing(http.server.SimpleHTTPRequestHandler):
    """A web server of a store whose listings take several shapes."""

    mode = ""
    directory_served = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, directory=self.directory_served, **kwargs)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def list_directory(self, path: Any) -> Any:
        """As python, or with other links, or not at all."""
        if self.mode == "plain":
            return super().list_directory(path)
        if self.mode in ("404", "403"):
            self.send_error(int(self.mode))
            return None
        names = [file.name + "/" * file.is_dir() for file in Path(path).iterdir()]
        before = {"absolute": self.path, "dotted": "./", "app": ""}[self.mode]
        links = ["/about", "news"] if self.mode == "app" else [before + name for name in names]
        self.send_page("".join(f'<a href="{link}">x</a>' for link in links))
        return None

    def send_page(self, body: str) -> None:
        """A page of HTML."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        """In mode `app` every unknown address gives the same page."""
        if self.mode == "app" and not Path(self.translate_path(self.path)).is_file():
            self.send_page('<a href="/about">x</a>')
        else:
            super().do_GET()


@pytest.fixture
def serve(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Listing, "directory_served", str(root.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/st"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mode", ["plain", "absolute", "dotted"])
def test_listings_of_several_servers_are_understood(serve: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Listing, "mode", mode)
    root = as_root(serve)
    assert len(read_ledger(root)) == 2
    assert read_inputs_ledger(root) == {}
    assert FeatureStore.open(root).verify().sound


@pytest.mark.parametrize("mode", ["404", "403", "app"])
def test_a_server_without_listings_is_said(
    serve: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Listing, "mode", mode)
    with pytest.raises(UnreachableError, match="list"):
        read_ledger(as_root(serve + "/ledger").parent) if mode != "app" else FeatureStore.open(serve)
    result = CliRunner().invoke(cli, ["store", "pull", serve, str(tmp_path / "out")])
    assert result.exit_code != 0


def test_outputs_that_are_no_regular_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name in ("pipe", "folder", "dangling"):
        before = os.lstat(tmp_path / name).st_mode
        with pytest.raises(StoreError, match=f"{name}") as caught:
            write_atomically(tmp_path / name, b"x")
        assert "\n" not in str(caught.value)
        assert os.lstat(tmp_path / name).st_mode == before
    with pytest.raises(StoreError, match="device"):
        write_atomically(Path("/dev/null"), b"x")


def test_a_link_to_a_file_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def in_place(other: Path, root: Path) -> None:
    for file in (path for path in other.rglob("*") if path.is_file()):
        shutil.copy2(file, root / file.relative_to(other))


def by_rename(other: Path, root: Path) -> None:
    root.rename(root.with_name("old"))
    other.rename(root)


def by_link(other: Path, root: Path) -> None:
    root.rename(root.with_name("old"))
    root.symlink_to(other)


@pytest.mark.parametrize("replace", [in_place, by_rename, by_link])
def test_a_store_that_is_replaced_while_it_is_open_is_not_mixed_with_the_other(
    root: Path, replace: Callable[[Path, Path], None]
) -> None:
    make_store(root.with_name("other"), 300, [make_card()], seed=1)
    opened = FeatureStore.open(root)
    image = opened.image("alpha")[:].copy()
    replace(root.with_name("other"), root)
    for look in (
        lambda: opened.text("alpha"),
        lambda: opened.valid("alpha"),
        opened.available,
        opened.sample_table,
        opened.summary,
    ):
        with pytest.raises(StoreError, match="was replaced by another store since it was opened; open it again"):
            look()
    assert not np.array_equal(FeatureStore.open(root).image("alpha")[:], image)


def test_a_store_that_grows_or_moves_its_corpus_while_it_is_open_stays_itself(root: Path, tmp_path: Path) -> None:
    opened = FeatureStore.open(root)
    image = opened.image("alpha")[:].copy()
    move_corpus(root, tmp_path)
    corpus = CorpusRecord(kind="test", location="more", root="/img", rows=5, labels=("site", "own"), digest="e")
    index = make_index(5, ("site", "own"))
    append_rows(Store.open(root), corpus, index.set_column(0, index.field(0), pa.array(range(512, 517))))
    note_encoding_error(Store.open(root), "alpha")
    assert len(opened.text("alpha")) == len(opened.sample_table()) == 300
    assert np.array_equal(opened.image("alpha")[:], image)
    assert pickle.loads(pickle.dumps(opened)).record.rows == 517


def test_another_store_is_not_opened_by_a_worker(root: Path) -> None:
    message = pickle.dumps(FeatureStore.open(root))
    shutil.rmtree(root)
    make_store(root, 301, [make_card()])
    with pytest.raises(StoreError, match="was replaced by another store"):
        pickle.loads(message)


def test_a_store_below_a_folder_that_may_not_be_searched_is_not_absent(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", refuse)
    with pytest.raises(StoreError, match=r"cannot look for .*zarr.json: Permission denied"):
        FeatureStore.open(root)
