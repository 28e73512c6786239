"""What a store holds, as digests: to compare two stores, and to give one a name that can be checked later. Taken from
the record, the cards, the ledger and the selections' cards; `mmkd store verify` compares the bytes with these."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from pydantic import Field

from mmkd.base.errors import CorruptStoreError, UserError
from mmkd.base.files import create_atomically, list_folder
from mmkd.base.places.remote import StorePath
from mmkd.store.hierarchy import Document, canonical_sha256, encode_sealed, read_sealed
from mmkd.store.inspect.coverage import ranges_of, shard_ranges
from mmkd.store.layout import check_slug, is_slug
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import part_bytes
from mmkd.store.selections import read_selection_card, selection_names

FOLDER = "tags"
_ROWS = "rows"


@dataclass(frozen=True)
class StoreContent:
    """Digests of a store's parts, by name of the part: `rows`, `teacher SLUG`, `selection NAME`. A part is a summary
    and the digest of each of its shards; a selection has no shards."""

    parts: dict[str, tuple[str, dict[int, str]]]

    def digests(self) -> dict[str, str]:
        """Return one digest for each part, 64 hex digits."""
        return {name: canonical_sha256([facts, sorted(shards.items())]) for name, (facts, shards) in self.parts.items()}


def store_content(store: FeatureStore) -> StoreContent:
    """Collect the digests. Raises CorruptStoreError if the ledger, a sample part or a selection cannot be read."""
    record, rows = store.record, {entry.shard: entry.samples_sha256 for entry in store.ledger.values()}
    for shard in set(range(store.shards)) - rows.keys():
        rows[shard] = hashlib.sha256(part_bytes(store.root, shard)).hexdigest()
    corpora = [[span.corpus.digest, span.corpus.rows, span.corpus.towers] for span in record.spans()]
    parts = {_ROWS: (canonical_sha256([record.rows, record.rows_per_shard, corpora]), rows)}
    for slug, card in store.teachers.items():
        entries = {shard: entry for (shard, teacher), entry in store.ledger.items() if teacher == slug}
        # Rows are a part of their own: a column that was added changes no feature.
        leave_out: Any = {"mode": "json", "exclude": {"samples_sha256"}, "exclude_none": True}
        facts = {shard: canonical_sha256(entry.model_dump(**leave_out)) for shard, entry in entries.items()}
        parts[f"teacher {slug}"] = card.digest, facts
    for name in selection_names(store.root):
        parts[f"selection {name}"] = read_selection_card(store.root, name).digest, {}
    return StoreContent(parts)


def differences(one: StoreContent, other: StoreContent) -> Iterator[str]:
    """Yield a line for each part that is not the same in both."""
    for name in sorted(one.parts.keys() | other.parts.keys(), key=lambda name: (name != _ROWS, name)):
        if name not in one.parts or name not in other.parts:
            yield f"{name}: only in the {'first' if name in one.parts else 'second'}"
            continue
        (summary, shards), (also, theirs) = one.parts[name], other.parts[name]
        if summary != also:
            yield f"{name}: digest {summary[:16]} in the first, {also[:16]} in the second"
        for what, numbers in (
            ("only in the first", shards.keys() - theirs.keys()),
            ("only in the second", theirs.keys() - shards.keys()),
            ("differ", {shard for shard in shards.keys() & theirs.keys() if shards[shard] != theirs[shard]}),
        ):
            if numbers:
                yield f"{name}: shards {shard_ranges(ranges_of(np.array(sorted(numbers))))} {what}"


class Tag(Document):
    """`tags/NAME.json`: what the store held when it got this name."""

    name: str
    created: str
    """UTC, ISO 8601."""
    digest: str
    """SHA-256 over `parts`: what a paper or a run names beside the tag."""
    parts: dict[str, str] = Field(min_length=1)

    def changes(self, now: StoreContent) -> list[str]:
        """Return the parts that are other ones now."""
        found = now.digests()
        names = sorted(self.parts.keys() | found.keys())
        words = {(True, True): "changed", (True, False): "is gone", (False, True): "was added"}
        return [
            f"{name} {words[name in self.parts, name in found]}"
            for name in names
            if self.parts.get(name) != found.get(name)
        ]


def make_tag(store: FeatureStore, name: str) -> Tag:
    """Name what the store holds now. A name that is taken by the same content is that tag. Raises UserError if it is
    taken by another, or cannot name a file; StoreError if it cannot be written."""
    check_slug(name, what="tag")
    content = store_content(store)
    parts = content.digests()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    tag = Tag(name=name, created=now, digest=canonical_sha256(parts), parts=parts)
    if create_atomically(store.root / FOLDER / f"{name}.json", encode_sealed(tag)):
        return tag
    there = read_tag(store.root, name)
    if changes := there.changes(content):
        raise UserError(
            f"{store.root} has a tag {name!r} of {there.created} already, and since then {', '.join(changes[:3])}; "
            "a tag never changes: choose another name"
        )
    return there


def read_tag(root: StorePath, name: str) -> Tag:
    """Read a tag. Raises CorruptStoreError if its file was changed after it was written."""
    path = root / FOLDER / f"{name}.json"
    tag = read_sealed(Tag, path, "; put the file back from a copy")
    if tag.name != name or tag.digest != canonical_sha256(tag.parts):
        raise CorruptStoreError(f"{path} is the tag {tag.name!r}, or not of its digest; put the file back from a copy")
    return tag


def tag_names(root: StorePath) -> list[str]:
    names = (path.name.removesuffix(".json") for path in list_folder(root / FOLDER, "*.json"))
    return [name for name in names if is_slug(name)]
