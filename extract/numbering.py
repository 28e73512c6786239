"""Grid rows of listed inputs, and the captions beside the first of an image, which become rows for texts alone."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmkd.base.duplicates import key_hash
from mmkd.extract.corpora import CorpusRow
from mmkd.extract.corpora.row import CAPTION_FAULT, INDEX_FAULTS, NO_CAPTION, NO_IMAGE, ONE_SIDED
from mmkd.extract.listing import BATCH, BY_DESIGN, FURTHER, IF_TAKEN, JOINS, KIND, batches, cells_of
from mmkd.extract.report import Overview
from mmkd.store.samples import FIXED_COLUMNS, sample_schema

CAPTIONS = pa.schema([("row", pa.int64()), ("kind", pa.string()), ("text", pa.large_string())])
"""Further captions of rows."""


def number_rows(
    files: Sequence[Path], duplicates: Mapping[int, int], *, start: int, paired: bool, overview: Overview
) -> Iterator[tuple[Mapping[str, pa.Array], list[dict[str, Any]]]]:
    """Yield the columns of the listed parts, a batch at a time, with grid rows from `start` on and the status known
    before reading, and the further captions of these rows; count them. `duplicates`: inputs whose key occurred before,
    and the first one that had it, both numbered from `start` on as they are listed."""
    numbering = _Numbering(set(duplicates.values()))
    captions: dict[int, set[bytes]] = {}
    for batch in batches(files):
        names = ("key", "uri", "caption", "reason", IF_TAKEN, BY_DESIGN, JOINS)
        keys, uris, texts, faults, if_taken, by_design, joins = (batch.column(name).to_pylist() for name in names)
        numbering.begin(batch)
        for place, listed in enumerate(range(start, start + len(batch))):
            first, caption = duplicates.get(listed), texts[place]
            if first is not None and numbering.joins(place, first):
                continue
            if numbering.replaces(place, first):
                keys[place] = f"{keys[place]}#{if_taken[place]}"
            elif first is not None:
                # Rows that share an image and have no key of their own differ by their captions.
                seen = captions.get(first)
                is_new = seen is not None and bool(caption) and key_hash(caption) not in seen
                if is_new and if_taken[place] is not None and faults[place] is None:
                    keys[place] = f"{keys[place]}#{if_taken[place]}"
                else:
                    faults[place] = f"key: duplicate of row {numbering.row_of(first)}"
            origin = listed if first is None else first
            if origin in numbering.shared and not joins[place]:
                captions.setdefault(origin, set()).add(key_hash(caption or ""))
            if paired and faults[place] is None and not by_design[place]:
                faults[place] = NO_IMAGE if uris[place] is None else NO_CAPTION if caption is None else None
            numbering.keep(place, listed, origin, faults[place])
            image, text = uris[place] is not None, bool(caption)
            overview.add_row(keys[place], image, text, faults[place], is_text=by_design[place] and text and not image)
        start += len(batch)
        kept, columns = numbering.kept, dict(zip(batch.schema.names, batch.columns, strict=True))
        usable = (CAPTION_FAULT, *ONE_SIDED)
        status = ["pending" if fault is None or fault.startswith(usable) else "failed" for fault in faults]
        empty = {field.name: pa.nulls(len(batch), field.type) for field in FIXED_COLUMNS}
        made = {"key": keys, "reason": faults, "status": status}
        columns = (
            empty | columns | {name: pa.array(cells, FIXED_COLUMNS.field(name).type) for name, cells in made.items()}
        )
        if len(kept) < len(batch):
            columns = {name: column.take(pa.array(kept, pa.int64())) for name, column in columns.items()}
        yield columns | {"row": pa.array(numbering.rows, pa.int64())}, numbering.captions


class _Numbering:
    """Grid rows of listed inputs. One that joins the first of its key has none: it is a further caption of that row."""

    def __init__(self, shared: Collection[int]) -> None:
        self.shared = shared
        """Inputs whose key comes again."""
        self._firsts: dict[int, tuple[int, bytes, bytes, bool]] = {}
        """By the first input of a key: the row of its image, hashes of the image's place and of its caption, and
        whether that row is refused."""
        self._joined = 0

    def begin(self, batch: pa.RecordBatch) -> None:
        names = ("uri", "offset", "caption", "reason", JOINS, KIND, FURTHER)
        self._inputs = list(zip(*(batch.column(name).to_pylist() for name in names), strict=True))
        self.kept: list[int] = []
        self.rows: list[int] = []
        self.captions: list[dict[str, Any]] = []

    def row_of(self, listed: int) -> int:
        """Return the grid row of the first input of a key."""
        return self._firsts[listed][0] if listed in self._firsts else listed

    def joins(self, place: int, first: int) -> bool:
        """Take an input of the batch as further captions of the first of its key, if it is one with any."""
        uri, offset, caption, fault, may_join, kind, further = self._inputs[place]
        texts = [{"text": caption, "kind": kind}] * bool(caption) + (further or [])
        usable = fault in (None, NO_IMAGE, f"{CAPTION_FAULT}empty")
        if not may_join or not texts or not usable or first not in self._firsts:
            return False
        row, image, own, refused = self._firsts[first]
        if refused or (uri is not None and _place_hash(uri, offset) != image):
            return False
        self._joined += 1
        self._add(row, own, texts)
        return True

    def replaces(self, place: int, first: int | None) -> bool:
        """Return True if an input of the batch is to have a row of its own since the first of its key is refused (an
        empty caption under `--require pairs`): the image is used, and later captions join this row."""
        uri, offset, caption, fault, may_join, _, _ = self._inputs[place]
        if not may_join or not caption or uri is None or fault is not None or first not in self._firsts:
            return False
        _, image, _, refused = self._firsts[first]
        return refused and _place_hash(uri, offset) == image

    def keep(self, place: int, listed: int, origin: int, fault: str | None) -> None:
        """Give an input of the batch its row. `origin`: the first input of its key."""
        uri, offset, caption, _, _, _, further = self._inputs[place]
        row, own, refused = listed - self._joined, key_hash(caption or ""), (fault or "").startswith(INDEX_FAULTS)
        self.kept.append(place)
        self.rows.append(row)
        if listed in self.shared or self.replaces(place, origin):
            self._firsts[origin] = row, _place_hash(uri, offset), own, refused
        if not refused:
            self._add(row, own, further or [])

    def _add(self, row: int, own: bytes, captions: Iterable[dict[str, Any]]) -> None:
        self.captions += [{"row": row, **one} for one in captions if key_hash(one["text"]) != own]


def _place_hash(uri: str | None, offset: int | None) -> bytes:
    return key_hash(f"{offset} {uri}")


def caption_rows(captions: pa.Table, index: pa.Table, first: int) -> Iterator[pa.RecordBatch]:
    """Yield sample rows from `first` on of the distinct captions of a kind among `captions`, each with the rows of its
    images, in the order in which they came up. A caption has the key of its first image, and a number."""
    found = captions.group_by(["kind", "text"], use_threads=False).aggregate([("row", "distinct")])
    start, numbers, schema = index["row"][0].as_py(), Counter[int](), sample_schema(())
    for batch in found.to_batches(BATCH):
        rows: list[dict[str, Any]] = []
        for caption in batch.to_pylist():
            images = sorted(caption["row_distinct"])
            numbers[images[0]] += 1
            key = f"{index['key'][images[0] - start]}#caption-{numbers[images[0]]}"
            cells = cells_of(CorpusRow(key, caption["text"], None, image_rows=tuple(images)), ())
            status = "failed" if (cells["reason"] or "").startswith(INDEX_FAULTS) else "pending"
            cells |= {"row": first, "status": status, "caption_kind": caption["kind"]}
            rows.append({name: cells.get(name) for name in schema.names})
            first += 1
        yield pa.RecordBatch.from_pylist(rows, schema=schema)
