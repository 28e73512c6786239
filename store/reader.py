"""FeatureStore: read-only access to a store for training, evaluation and inspection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from html import escape
from os import PathLike
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError, UserError
from mmkd.base.places.remote import RemotePath, StorePath, as_root
from mmkd.base.process import free_memory
from mmkd.base.text import counted
from mmkd.store.array import ChunkedArray, DecodedRows, FeatureArray
from mmkd.store.card import TeacherCard, read_card, teacher_folders
from mmkd.store.encoding import ArraySpec, teacher_arrays, tower_arrays
from mmkd.store.layout import PAIR_SOUND, TOWERS, Tower
from mmkd.store.ledger import LedgerEntry, read_ledger
from mmkd.store.record import Store, StoreRecord, read_record
from mmkd.store.samples import read_samples, sample_dataset
from mmkd.store.selections import apply_selection, read_selection
from mmkd.store.summary import StoreSummary, summarize
from mmkd.store.verify import VerifyReport, verify

_HTML_COLUMNS = ("teacher", "width", "encoding", "shards", "images", "captions", "source", "licence")


class FeatureStore(Store):
    """Features of T teachers for N rows, opened for reading. Use `FeatureStore.open(path)`. Arrays are memory-mapped:
    opening costs milliseconds, and rows are read from disk (or the page cache) when they are indexed. A row without a
    ledger entry reads as NaN and is not available. Behind a URL the values are the same, and rows are fetched by whole
    chunks: fine for inspection, slow for training; `mmkd store pull` brings a store to disk."""

    def __init__(self, root: StorePath, record: StoreRecord, teachers: dict[str, TeacherCard]) -> None:
        super().__init__(root, record)
        self.teachers = teachers
        """Slug to card, in alphabetical order: the T axis of `available`."""
        self._features: dict[tuple[str, Tower], FeatureArray] = {}

    @classmethod
    def open(cls, path: str | PathLike[str] | RemotePath) -> FeatureStore:
        """Open the store at `path`, a folder or a URL (`s3://`, `gs://`, `az://`, `http(s)://`, `memory://`). Raises
        NotAStoreError, FormatVersionError, CorruptStoreError, UnreachableError (see `mmkd.base.errors`). Raises
        UserError for an unknown URL scheme, or if the package for URLs is not installed."""
        root = as_root(path)
        record = read_record(root)
        cards = {}
        for slug in teacher_folders(root):
            card = read_card(root, slug)
            if card is not None:
                cards[slug] = card
        return cls(root, record, cards)

    def __len__(self) -> int:
        """Return grid rows N."""
        return self.record.rows

    def __repr__(self) -> str:
        done = len(self.ledger)
        every = self.shards * len(self.teachers)
        return (
            f"FeatureStore({str(self.root)!r}: {counted(len(self), 'row')} in {counted(self.shards, 'shard')}, "
            f"{counted(len(self.teachers), 'teacher')}, {done}/{every} shards extracted)"
        )

    def _repr_html_(self) -> str:
        """HTML for notebooks: a table of the teachers. Reads the ledger only; every text from a file is escaped."""
        rows, shards = counted(len(self), "row"), counted(self.shards, "shard")
        title = f"mmkd store {self.root}: {rows} in {shards} of {self.record.rows_per_shard:,}"
        head = "".join(f'<th scope="col">{name}</th>' for name in _HTML_COLUMNS)
        body = "".join(_teacher_row(self, slug) for slug in self.teachers)
        empty = f'<tr><td colspan="{len(_HTML_COLUMNS)}">no teachers yet</td></tr>'
        caption = f"<caption>{escape(title)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body or empty}</tbody></table>"

    def __getitem__(self, rows: int | Sequence[int] | NDArray[np.integer[Any]]) -> dict[str, Any]:
        """Return features of one row, or of several in one gather: as a `torch.utils.data.DataLoader` needs. Result:
        `row` (int or int64 (n,)), and `SLUG/image`, `SLUG/text` for each teacher: (D,) or (n, D), copies that may be
        written to; NaN where missing. Raises IndexError for a row that the store does not have. `rows`: a grid row,
        negative from the end; or a list or int array (n,) of them."""
        numbers = np.asarray(rows, dtype=np.int64)
        if ((numbers < -len(self)) | (numbers >= len(self))).any():
            raise IndexError(f"row {rows} is outside {self.root}, which has {len(self)} rows")
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        towers = [(slug, tower) for slug in self.teachers for tower in TOWERS]
        picked = {f"{slug}/{tower}": np.array(self.features(slug, tower)[numbers]) for slug, tower in towers}
        return {"row": numbers if np.ndim(numbers) else int(numbers)} | picked

    def __reduce__(self) -> tuple[Callable[[str], FeatureStore], tuple[str]]:
        """Return a store travels to another process by its path, and is opened again there: no feature is copied."""
        return FeatureStore.open, (str(self.root),)

    @cached_property
    def ledger(self) -> dict[tuple[int, str], LedgerEntry]:
        """Entries by (shard, slug), read on first use; reopen to see later ones. Raises NotAStoreError if the store was
        moved or deleted since it was opened; CorruptStoreError if an entry cannot be read, or belongs to a teacher
        without a card."""
        entries = read_ledger(self.root)
        for slug in sorted({slug for _, slug in entries} - self.teachers.keys()):
            if read_card(self.root, slug) is None:  # else it was added since
                raise CorruptStoreError(
                    f"{self.root} has ledger entries of teacher {slug}, but no card: copy teachers/{slug} again, or "
                    "drop the entries with `mmkd store verify --repair`"
                )
        return entries

    def card(self, slug: str) -> TeacherCard:
        """Return the card of one teacher. Raises UserError if it is not in this store; the message lists those that
        are."""
        try:
            return self.teachers[slug]
        except KeyError:
            raise UserError(
                f"{self.root} has no teacher {slug!r}; it has {', '.join(self.teachers) or 'none'}"
            ) from None

    def image(self, slug: str) -> FeatureArray:
        """Image features of one teacher: (N, D), read-only, NaN where missing. float16 and float32 on disk: a mapped
        `numpy.ndarray` in that type. int8, or behind a URL: a `LazyRows` that gives a `numpy.ndarray` when it is
        indexed with rows, for int8 the decoded float32 values."""
        return self.features(slug, "image")

    def text(self, slug: str) -> FeatureArray:
        """Return caption features of one teacher; as `image`."""
        return self.features(slug, "text")

    def features(self, slug: str, tower: Tower) -> FeatureArray:
        """`image` or `text` of one teacher, by the tower's name."""
        card = self.card(slug)
        if (slug, tower) not in self._features:
            values, *scales = (self.array(slug, spec) for spec in tower_arrays(tower, card.encoding, card.dim))
            opened = values.open()
            # Concurrent first threads may open it twice; all use one of the two.
            self._features.setdefault((slug, tower), DecodedRows(opened, scales[0].load()) if scales else opened)
        return self._features[slug, tower]

    def valid(self, slug: str) -> NDArray[np.uint8]:
        """Return soundness bits of one teacher, uint8 (N,): `IMAGE_SOUND` | `TEXT_SOUND`; 0 without a ledger entry."""
        card = self.card(slug)
        return self.array(slug, teacher_arrays(card.encoding, card.dim)[-1]).load()

    def available(self, selection: str | None = None) -> NDArray[np.bool_]:
        """Return where teachers have sound image and text features: bool (N, T), T in the order of `teachers`. With
        `selection`, only pairs that `selections/<selection>` keeps. Raises UserError if there is no selection of this
        name, or one made when the store had other rows; TeacherMismatchError if it judged other features than the store
        holds now."""
        if not self.teachers:
            return np.zeros((len(self), 0), dtype=bool)
        sound = np.stack([self.valid(slug) & PAIR_SOUND == PAIR_SOUND for slug in self.teachers], axis=1)
        if selection is None:
            return sound
        digests = {slug: card.digest for slug, card in self.teachers.items()}
        return apply_selection(read_selection(self, selection), digests, sound)

    @property
    def samples(self) -> pads.Dataset:
        """The sample table, one row per grid row in order: a `pyarrow.dataset.Dataset` over the Parquet parts."""
        return sample_dataset(self)

    def sample_table(self, columns: list[str] | None = None, filter: pads.Expression | None = None) -> pa.Table:  # noqa: A002
        """Return rows of the sample table in grid order, as an Arrow table. Raises UserError for a column that the
        store does not have; the message lists those it has. Raises CorruptStoreError if a part is missing or
        damaged."""
        dataset = self.samples
        known = dataset.schema.names
        for column in columns or ():
            if column not in known:
                raise UserError(f"{self.root} has no sample column {column!r}; it has {', '.join(known)}")
        return read_samples(self.root, dataset, columns=columns, filter=filter).combine_chunks()

    def verify(self, deep: bool = False, sample: int | None = None, seed: int = 0) -> VerifyReport:
        """Compare every byte, or those of `sample` random shards, with the ledger; `deep` looks at the values too."""
        return verify(self.root, deep, sample, seed)

    def summary(self) -> StoreSummary:
        """Return counts, coverage, failures and bytes."""
        return summarize(self, self.teachers, self.ledger)

    def array(self, slug: str, spec: ArraySpec) -> ChunkedArray:
        """Return one of a teacher's arrays as stored in files, chunk by chunk; see
        `mmkd.store.encoding.teacher_arrays`."""
        entries = ((shard, self.ledger.get((shard, slug))) for shard in range(self.shards))
        chunks = tuple((spec.chunk(slug, shard), entry.crc32c(spec)) if entry else None for shard, entry in entries)
        return ChunkedArray(self.root, spec, len(self), self.record.rows_per_shard, chunks, self._fits_in_memory)

    @cached_property
    def _fits_in_memory(self) -> bool:
        """Return True if all features fit in half of the page cache."""
        specs = [spec for card in self.teachers.values() for spec in teacher_arrays(card.encoding, card.dim)]
        return 2 * sum(spec.chunk_bytes(self.record.rows_per_shard) for spec in specs) * self.shards <= free_memory()


def _teacher_row(store: FeatureStore, slug: str) -> str:
    card = store.teachers[slug]
    entries = [entry for (_, teacher), entry in store.ledger.items() if teacher == slug]
    sound = (f"{sum(getattr(entry, f'{tower}_rows') for entry in entries):,}" for tower in TOWERS)
    done = f"{len(entries)} of {store.shards}"
    cells = (str(card.dim), card.encoding, done, *sound, card.source, card.licence)
    return f'<tr><th scope="row">{escape(slug)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
