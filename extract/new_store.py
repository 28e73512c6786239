"""A new store in one step: two runs that start at once do not write into each other's samples."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path

from mmkd.base.errors import StoreError
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors
from mmkd.base.places.remote import StorePath
from mmkd.extract.corpora import Corpus
from mmkd.extract.index import check_same_corpus, create_indexed_store
from mmkd.store.record import Store


def make_store(corpus: Corpus, root: StorePath) -> Store:
    """Return index the corpus beside `root`, then move the whole to its place; of several runs the first one wins.
    Behind a URL nothing can be moved: there, one run makes the store before others join. Raises CorpusError if the
    corpus cannot be read, or the run that was first had another one; StoreError if `root` holds something else, or the
    disk is full or not writable."""
    if not isinstance(root, Path):
        return create_indexed_store(corpus, root)
    strangers = sorted(path.name for path in root.iterdir() if path.name != "samples") if root.is_dir() else []
    if root.is_file() or (strangers and "zarr.json" not in strangers):
        found = strangers[0] if strangers else "a file"
        raise StoreError(f"{root} is not empty (found {found}) and not an mmkd store; name a new folder for the store")
    beside = folder_beside(root)
    try:
        made = create_indexed_store(corpus, beside)
        if _moved(beside, root):
            return Store(root, made.record)
    finally:
        remove_folder(beside)
    store = Store.open(root)
    check_same_corpus(corpus, store)
    return store


def folder_beside(root: StorePath) -> Path:
    """Return a new name in the same folder, its parents made; a kill leaves it behind, and nothing looks at it then.
    Beside a URL it is a temporary folder of this machine. Raises StoreError if the parent cannot be made."""
    name = f".{root.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    parent = root.absolute().parent if isinstance(root, Path) else Path(tempfile.gettempdir())
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
    return parent / name


def remove_folder(folder: Path) -> None:
    """Delete a folder if it exists."""
    shutil.rmtree(folder, ignore_errors=True)


def _moved(beside: Path, root: Path) -> bool:
    """Rename a folder onto another one that does not exist or is empty; False where there is a store by now."""
    with disk_errors(root):
        try:
            if not (root / "zarr.json").is_file() and (root / "samples").is_dir():
                shutil.rmtree(root / "samples")  # of an import that was interrupted before its record
            beside.rename(root)
        except OSError:
            if not (root / "zarr.json").is_file():
                raise
            return False
    return True
