"""The root group's attributes: format, size, corpora and creation time of a store."""

from collections import Counter
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

from pydantic import Field, model_validator

from mmkd.base.errors import FormatVersionError, NotAStoreError, UnreachableError
from mmkd.base.places.remote import RemotePath, StorePath, as_root
from mmkd.store.cache import Cache
from mmkd.store.card import TeacherCard
from mmkd.store.hierarchy import Document, is_there, own_attributes, parse_document, read_json, sealed_content
from mmkd.store.layout import (
    FORMAT_VERSION,
    MAX_ROWS_PER_SHARD,
    MAX_SHARDS,
    MAX_SHARDS_PER_PACK,
    MIN_ROWS_PER_SHARD,
    TOWERS,
    Tower,
    shard_count,
)

_NAMES = "row key caption modality uri offset length status reason width height image_sha256"
FIXED_NAMES = frozenset([*_NAMES.split(), "image_rows", "view_number", "caption_kind"])
"""Columns that every sample table has; labels come beside them. `store.samples` gives their types."""


class CorpusRecord(Document):
    """The corpus that the rows come from."""

    kind: str
    """Reader that made the index, for example `table` or `webdataset`."""
    location: str
    root: str
    """Absolute folder that the sample rows' `uri` is relative to."""
    rows: int = Field(ge=0)
    labels: tuple[str, ...] = ()
    towers: tuple[Tower, ...] = TOWERS
    """Towers that its rows are inputs of by design: only `image` for views, only `text` for further captions."""
    recipe: dict[str, Any] | None = None
    """How the rows of views were drawn, all that is needed to draw them again; None for other rows."""
    digest: str
    """SHA-256 over names, sizes and change times of the corpus' index files: notices a changed corpus."""

    @property
    def is_linked(self) -> bool:
        """True where its rows are views or further captions of other rows."""
        return self.towers != TOWERS

    @model_validator(mode="after")
    def _labels_are_columns(self) -> "CorpusRecord":
        taken = FIXED_NAMES & set(self.labels)
        if taken or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels {self.labels} are not distinct names beside {sorted(FIXED_NAMES)}")
        if self.towers not in (TOWERS, *((tower,) for tower in TOWERS)):
            raise ValueError(f"towers are {list(self.towers)}, expected image, text, or both in this order")
        return self


@dataclass(frozen=True)
class CorpusSpan:
    """Place of one corpus in the grid: whole shards, of which the last may be part full."""

    corpus: CorpusRecord
    shards: range
    rows: range
    """The grid rows of its inputs; those from `rows.stop` to the next shard boundary are absent."""


class StoreRecord(Document):
    """`attributes["mmkd"]` of the root group."""

    format: int
    rows: int = Field(ge=0)
    """Grid rows N: the first axis of every array."""
    rows_per_shard: int = Field(gt=0)
    shards_per_pack: int = Field(gt=0)
    """Consecutive shards of an array that are packed into one file."""
    corpus: CorpusRecord
    appended: tuple[CorpusRecord, ...] = ()
    """Corpora that came later, each from the next shard boundary on."""
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]

    @model_validator(mode="after")
    def _grid_is_possible(self) -> "StoreRecord":
        per_shard = self.rows_per_shard
        if per_shard & (per_shard - 1) or not MIN_ROWS_PER_SHARD <= per_shard <= MAX_ROWS_PER_SHARD:
            raise ValueError(
                f"rows_per_shard is {per_shard}, expected a power of two "
                f"from {MIN_ROWS_PER_SHARD} to {MAX_ROWS_PER_SHARD}"
            )
        packed = self.shards_per_pack
        if packed & (packed - 1) or packed > MAX_SHARDS_PER_PACK:
            raise ValueError(f"shards_per_pack is {packed}, expected a power of two from 1 to {MAX_SHARDS_PER_PACK}")
        if shard_count(self.rows, per_shard) > MAX_SHARDS:
            raise ValueError(f"{self.rows} rows are more than {MAX_SHARDS} shards of {per_shard}")
        if self.rows != (last := self.spans()[-1].rows).stop:
            raise ValueError(f"rows is {self.rows}, but the corpora end at row {last.stop}")
        return self

    def spans(self) -> tuple[CorpusSpan, ...]:
        found: list[CorpusSpan] = []
        for corpus in (self.corpus, *self.appended):
            first = found[-1].shards.stop if found else 0
            shards = range(first, first + shard_count(corpus.rows, self.rows_per_shard))
            start = first * self.rows_per_shard
            found.append(CorpusSpan(corpus, shards, range(start, start + corpus.rows)))
        return tuple(found)

    @property
    def input_spans(self) -> tuple[CorpusSpan, ...]:
        """The corpora that are no views or further captions of other rows; all where each is."""
        return tuple(span for span in self.spans() if not span.corpus.is_linked) or self.spans()

    @property
    def linked(self) -> str:
        """Rows that are views or further captions of others, as text: `600 views, 7 captions`; empty without any."""
        counts = Counter[str]()
        for span in self.spans():
            counts[span.corpus.kind] += len(span.rows) if span.corpus.is_linked else 0
        return ", ".join(f"{count:,} {kind}" for kind, count in (+counts).items())

    def span_of(self, row: int) -> CorpusSpan:
        """Return the corpus whose shards hold a grid row."""
        shard = row // self.rows_per_shard
        return next(span for span in self.spans() if shard in span.shards)

    def shard_rows(self, shard: int) -> range:
        """Return the grid rows of one shard that belong to inputs; absent rows are left out."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.span_of(start).rows.stop))

    def asked_towers(self, shard: int, card: TeacherCard) -> tuple[Tower, ...]:
        """Return the teacher's towers that the rows of a shard are inputs of."""
        asked = self.span_of(shard * self.rows_per_shard).corpus.towers
        return tuple(tower for tower in card.towers if tower in asked)

    def asked_shards(self, card: TeacherCard) -> tuple[int, ...]:
        """Return the shards that a teacher is complete with: those with inputs of one of its towers."""
        spans = (span for span in self.spans() if set(card.towers) & set(span.corpus.towers))
        return tuple(shard for span in spans for shard in span.shards)

    def image_root(self, row: int) -> str:
        """Return the folder or URL prefix that the `uri` of a grid row is relative to."""
        return self.span_of(row).corpus.root

    @property
    def grid(self) -> tuple[str, int, int]:
        """Return what never changes in a store."""
        return self.created, self.rows_per_shard, self.shards_per_pack

    def is_start_of(self, other: "StoreRecord") -> bool:
        """Return True if `other` is this store, perhaps with corpora appended or moved since."""
        ours, theirs = ([span.rows for span in record.spans()] for record in (self, other))
        facts = self.grid == other.grid
        return facts and theirs[: len(ours)] == ours

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(label for corpus in (self.corpus, *self.appended) for label in corpus.labels))


class Store:
    """Place and record of a store, for writing and checking it; cheap to send to a worker."""

    cache: Cache | None = None
    """Where what is read of a store behind a URL is kept; set it before anything is read."""

    def __init__(self, root: StorePath, record: StoreRecord) -> None:
        self.root = root
        self.record = record

    @classmethod
    def open(cls, path: str | PathLike[str] | RemotePath) -> Self:
        """Read the record of the store at `path`, a folder or URL. Raises as `read_record` and `as_root`."""
        root = as_root(path)
        return cls(root, read_record(root))

    @property
    def shards(self) -> int:
        return shard_count(self.record.rows, self.record.rows_per_shard)


def read_record(root: StorePath) -> StoreRecord:
    """Read the record of a store. Raises NotAStoreError if nothing or another Zarr hierarchy is there;
    FormatVersionError if it was written by a newer mmkd; CorruptStoreError if the metadata cannot be understood."""
    path = root / "zarr.json"
    if not is_there(path):
        what = "does not exist" if not root.exists() else "holds no zarr.json"
        raise NotAStoreError(f"{root} is not an mmkd store: it {what}; `mmkd extract CORPUS {root}` makes one")
    if isinstance(root, RemotePath) and root.is_web and "zarr.json" not in (file.name for file in root.iterdir()):
        raise UnreachableError(f"{root}/ does not list its zarr.json: a store needs a server that lists folders")
    document = read_json(path)
    content = own_attributes(document)
    if content is None:
        raise NotAStoreError(f"{root} is a Zarr hierarchy, but its attributes hold no 'mmkd': it was not made by mmkd")
    # The version before everything else: a newer format may seal its record in another way.
    version = content.get("format")
    if version != FORMAT_VERSION:
        step = "make it again, no release wrote it" if version == 1 else "install a newer mmkd"
        raise FormatVersionError(f"{root} is of format {version!r}, this mmkd reads format {FORMAT_VERSION}; {step}")
    return parse_document(StoreRecord, sealed_content(path, document), path)
