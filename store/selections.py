"""A selection on disk: `selections/<name>`, a Zarr array (N, T) of 0 and 1 with the rule in its attributes, complete or
absent, never overwritten."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.config import Frozen
from mmkd.base.errors import CorruptStoreError, FormatVersionError, TeacherMismatchError, UserError
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors, write_atomically
from mmkd.base.places.remote import StorePath
from mmkd.store import hierarchy
from mmkd.store.card import TeacherCard
from mmkd.store.chunk import checked_body, encode_chunk, pad_rows
from mmkd.store.layout import check_slug, is_slug, shard_count
from mmkd.store.record import Store

FORMAT = 1
FOLDER = "selections"


class SelectionCard(Frozen):
    """`attributes.mmkd` of a selection's array."""

    format: int = FORMAT
    rule: dict[str, Any]
    teachers: dict[str, str]
    """Slug to the digest of its card, in the order of the columns."""
    rows: int
    counts: dict[str, Any]
    thresholds: dict[str, dict[str, float | None]]
    """Each line that the rule drew: teacher to the score that divides its pairs; None where none does."""
    examples: dict[str, list[dict[str, Any]]]
    """Each line: pairs just above and just below it, best first; see `mmkd.store.selection.compute.Example`."""
    digest: str
    """SHA-256 in hex over the array's values (row-major, uint8): recorded by training runs."""


@dataclass(frozen=True)
class Selection:
    """One selection, read."""

    name: str
    card: SelectionCard
    kept: NDArray[np.bool_]
    """bool (N, T'), T' in the order of `card.teachers`."""


def check_name(root: StorePath, name: str) -> Path:
    """Return `root`, on this machine. Raises UserError if a selection `name` cannot be a folder, or is taken."""
    if not isinstance(root, Path):
        raise UserError(f"{root} is not on this machine; `mmkd store pull` it first, and select there")
    check_slug(name, what="selection")
    if (root / FOLDER / name).exists():
        raise UserError(f"{root} has a selection {name!r} already; choose another --name, or delete {FOLDER}/{name}")
    return root


def digest_of(kept: NDArray[np.bool_]) -> str:
    """Return the digest of bool (N, T')."""
    return hashlib.sha256(np.ascontiguousarray(kept, dtype=np.uint8).tobytes()).hexdigest()


def write_selection(store: Store, name: str, kept: NDArray[np.bool_], card: SelectionCard) -> None:
    """Write a selection, bool (N, T'), whole or not at all. Raises UserError if the name is taken; StoreError if the
    disk is full or read-only."""
    root = check_name(store.root, name)
    per_chunk, teachers = _rows_per_chunk(store), kept.shape[1]
    document = hierarchy.array_document(kept.shape, (per_chunk, teachers), "uint8", axis="teacher")
    content = card.model_dump(mode="json")
    document["attributes"] = {"mmkd": content | {hierarchy.SEAL: hierarchy.seal_of(content)}}
    folder = root / FOLDER
    temporary = folder / f".{name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        hierarchy.write_document(temporary / "zarr.json", document)
        for number, start in enumerate(range(0, len(kept), per_chunk)):
            part = kept[start : start + per_chunk].astype(np.uint8)
            write_atomically(temporary / f"c/{number}/0", encode_chunk(pad_rows(part, per_chunk, 0))[0])
        if not (folder / "zarr.json").is_file():
            hierarchy.write_document(folder / "zarr.json", hierarchy.group_document())
        with disk_errors(folder / name):
            if (folder / name).exists():
                check_name(store.root, name)
            temporary.rename(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rows_per_chunk(store: Store) -> int:
    """Return the rows of a pack: a selection is written whole, in few files."""
    return store.record.rows_per_shard * store.record.shards_per_pack


def selection_names(root: StorePath) -> list[str]:
    folders = [path for path in hierarchy.list_part(root, FOLDER) if is_slug(path.name)]
    return [path.name for path in folders if hierarchy.is_there(path / "zarr.json")]


def read_selection(store: Store, name: str) -> Selection:
    """Read a selection and check every byte of it. Raises UserError if there is none of this name, or it is of other
    rows; FormatVersionError if it was written by a newer mmkd; CorruptStoreError if it was changed since."""
    folder = store.root / FOLDER / name
    if not is_slug(name) or not hierarchy.is_there(folder / "zarr.json"):
        known = ", ".join(selection_names(store.root)) or "none"
        raise UserError(f"{store.root} has no selection {name!r}; it has {known}; `mmkd select` makes one")
    card = read_selection_card(store.root, name)
    if card.rows != store.record.rows:
        raise UserError(
            f"selection {name!r} is of {card.rows:,} rows, {store.root} has {store.record.rows:,} by now; "
            "run `mmkd select` again"
        )
    per_chunk, teachers = _rows_per_chunk(store), len(card.teachers)
    kept = np.zeros((shard_count(store.record.rows, per_chunk), per_chunk, teachers), dtype=np.uint8)
    for number in range(len(kept)):
        chunk = f"{FOLDER}/{name}/c/{number}/0"
        body, _ = checked_body(hierarchy.read_file(store.root / chunk), per_chunk * teachers, chunk)
        kept[number] = np.frombuffer(body, dtype=np.uint8).reshape(per_chunk, teachers)
    values = kept.reshape(-1, teachers)[: store.record.rows].astype(bool)
    if digest_of(values) != card.digest:
        raise CorruptStoreError(f"selection {name!r} of {store.root} is not what was written; run `mmkd select` again")
    return Selection(name, card, values)


def apply_selection(
    selection: Selection, digests: Mapping[str, str], available: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return pairs of `available`, bool (N, T) in the order of `digests` (slug to card digest), that a selection keeps;
    none of a teacher added since. Raises TeacherMismatchError if a teacher was extracted again since."""
    columns = {slug: column for column, slug in enumerate(selection.card.teachers)}
    out = np.zeros_like(available)
    for t, (slug, digest) in enumerate(digests.items()):
        if slug not in columns:
            continue
        if selection.card.teachers[slug] != digest:
            raise TeacherMismatchError(
                f"selection {selection.name!r} judged teacher {slug} of digest {selection.card.teachers[slug]}, "
                f"the store's has {digest}; run `mmkd select` again"
            )
        out[:, t] = available[:, t] & selection.kept[:, columns[slug]]
    return out


def read_selection_card(root: StorePath, name: str) -> SelectionCard:
    """Read what a selection says of itself. Raises FormatVersionError if it was written by a newer mmkd;
    CorruptStoreError if it was changed since."""
    folder = root / FOLDER / name
    content = hierarchy.own_attributes(hierarchy.read_json(folder / "zarr.json")) or {}
    if content.get("format") != FORMAT:
        raise FormatVersionError(f"{folder} is of selection format {content.get('format')!r}, this mmkd reads {FORMAT}")
    if content.get(hierarchy.SEAL) != hierarchy.seal_of(content):
        raise CorruptStoreError(f"{folder}/zarr.json was changed after it was written; run `mmkd select` again")
    content.pop(hierarchy.SEAL)
    return hierarchy.parse_document(SelectionCard, content, folder / "zarr.json")


def selection_faults(store: Store, cards: Mapping[str, TeacherCard]) -> Iterator[tuple[str, str]]:
    """Yield file and fault of every selection that training would refuse or should not trust; reads every byte.
    `cards`: sound cards by slug; a selection may be of fewer teachers, not of others."""
    for name in selection_names(store.root):
        file = f"{FOLDER}/{name}/zarr.json"
        try:
            selection = read_selection(store, name)
        except (CorruptStoreError, FormatVersionError, UserError) as error:
            yield file, f"{error}; delete {FOLDER}/{name} first"
            continue
        chunk = (_rows_per_chunk(store), selection.kept.shape[1])
        expected = hierarchy.array_document(selection.kept.shape, chunk, "uint8", axis="teacher")
        if wrong := hierarchy.document_fault(hierarchy.read_json(store.root / file), expected):
            yield file, f"{file} is not the metadata that its card asks for ({wrong}); delete {FOLDER}/{name} first"
        for what in _faults(selection, cards):
            yield file, f"selection {name!r} {what}; delete {FOLDER}/{name} and run `mmkd select` again"


def _faults(selection: Selection, cards: Mapping[str, TeacherCard]) -> Iterator[str]:
    for column, (slug, digest) in enumerate(selection.card.teachers.items()):
        if slug not in cards:
            yield f"judged teacher {slug}, which has no sound card in this store"
        elif cards[slug].digest != digest:
            yield f"judged teacher {slug} of digest {digest}, the store's has {cards[slug].digest}"
        stated: Any = selection.card.counts
        for name in ("teachers", slug, "kept"):  # whoever can seal a card can put anything there
            stated = stated.get(name) if isinstance(stated, dict) else None
        if (kept := int(selection.kept[:, column].sum())) != stated:
            yield f"keeps {kept:,} pairs of teacher {slug}, its counts say {stated}"
