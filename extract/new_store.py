"""A new store in one step: two runs that start at once do not write into each other's samples."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from mmkd.extract.corpora import Corpus
from mmkd.extract.index import check_same_corpus, create_indexed_store
from mmkd.store.atomic import TEMPORARY_SUFFIX, disk_errors
from mmkd.store.errors import StoreError
from mmkd.store.record import StoreRecord, read_record


def make_store(corpus: Corpus, root: Path) -> StoreRecord:
    """Index the corpus beside `root`, then move the whole to its place; of several runs the first one wins.

    Raises:
        CorpusError: the corpus cannot be read, or the run that was first had another one.
        StoreError: `root` holds something else, or the disk is full or not ours to write.
    """
    strangers = sorted(path.name for path in root.iterdir() if path.name != "samples") if root.is_dir() else []
    if root.is_file() or (strangers and "zarr.json" not in strangers):
        found = strangers[0] if strangers else "a file"
        raise StoreError(f"{root} is not empty (found {found}) and not an mmkd store; name a new folder for the store")
    with disk_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
    beside = folder_beside(root)
    try:
        record = create_indexed_store(corpus, beside)
        if _moved(beside, root):
            return record
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    record = read_record(root)
    check_same_corpus(corpus, record, root)
    return record


def folder_beside(root: Path) -> Path:
    """A new name in the same folder; a kill leaves it behind, and nothing looks at it then."""
    root = root.absolute()
    return root.with_name(f".{root.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _moved(beside: Path, root: Path) -> bool:
    """Rename a folder onto another one that does not exist or is empty; False where there is a store by now."""
    with disk_errors(root):
        try:
            beside.rename(root)
        except OSError:
            if not (root / "zarr.json").is_file():
                raise
            return False
    return True
