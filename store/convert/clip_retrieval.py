"""clip-retrieval's folders: `img_emb/img_emb_0.npy`, `text_emb/text_emb_0.npy`, `metadata/metadata_0.parquet`. Rows of
equal position in files of equal number belong together; embedding-reader reads the same layout."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmkd.base.errors import CorpusError
from mmkd.base.files import write_atomically
from mmkd.base.places.remote import StorePath, as_root
from mmkd.store.array import consecutive
from mmkd.store.card import TeacherCard
from mmkd.store.convert.importing import Features, imported_card, part_slices
from mmkd.store.convert.rows import StoreRows
from mmkd.store.encoding import Encoding, value_type
from mmkd.store.layout import Tower, check_slug
from mmkd.store.reader import FeatureStore
from mmkd.store.record import FIXED_NAMES
from mmkd.store.samples import sample_schema
from mmkd.store.writer import iter_shards

KIND = "clip-retrieval"
EXPORT = b"mmkd"
"""Key of the Parquet schema metadata for notes that the layout has no place for."""
PREFIXES: dict[Tower, str] = {"image": "img_emb", "text": "text_emb"}


class ClipRetrievalFolder:
    """A folder with `metadata/` and at least one of `img_emb/` and `text_emb/`: one model's features."""

    kind = KIND

    def __init__(self, root: Path, slug: str) -> None:
        self.folder = root
        self.slug = check_slug(slug)

    @property
    def root(self) -> StorePath:
        """Image folder: the folder itself, or what an export noted."""
        return self.folder if self._export is None else as_root(self._export["root"])

    @cached_property
    def _parts(self) -> list[tuple[int, Path, pq.FileMetaData]]:
        parts = []
        for path in (self.folder / "metadata").glob("metadata_*.parquet"):
            number = re.fullmatch(r"metadata_(\d+)", path.stem)
            if number is not None:
                try:
                    parts.append((int(number[1]), path, pq.read_metadata(path)))
                except (OSError, pa.ArrowException) as error:
                    raise CorpusError(f"{path} cannot be read: {error}") from error
        if not parts:
            raise CorpusError(f"{self.folder} holds no metadata/metadata_0.parquet; name a folder of clip-retrieval")
        return sorted(parts, key=lambda part: part[0])

    @property
    def labels(self) -> tuple[str, ...]:
        """Columns of any part that have no place among the fixed ones, as text; `_label` gives their names. Raises
        CorpusError if two columns would have one name."""
        own: dict[str, str] = {}
        for _, path, metadata in self._parts:
            names = metadata.schema.to_arrow_schema().names
            for name in names:
                label = self._label(name)
                if names.count(name) > 1 or (label is not None and own.setdefault(label, name) != name):
                    raise CorpusError(f"{path}: two columns would become {label or name!r}; rename one of them")
        return tuple(own)

    @property
    def has_status(self) -> bool:
        """True for what `export_npy` wrote."""
        return self._export is not None

    @cached_property
    def _export(self) -> dict[str, Any] | None:
        """Note of `export_npy` in the first part; None for a folder of clip-retrieval itself."""
        noted = (self._parts[0][2].metadata or {}).get(EXPORT)
        if noted is None:
            return None
        try:
            note = json.loads(noted)
            return {name: note[name] for name in ("root", "labels", "card")}
        except (ValueError, KeyError, TypeError) as error:
            path = self._parts[0][1]
            raise CorpusError(f"{path}: what `mmkd store export` noted cannot be read; export again") from error

    def _label(self, name: str) -> str | None:
        """Return the label that a metadata column becomes: under its own name unless a store uses that for something
        else."""
        if self._export is not None:
            return name if name in self._export["labels"] else None
        if name in ("key", "caption", "modality", "uri", "image_path", "offset", "length", "row"):
            return None
        if name in FIXED_NAMES:
            return f"metadata_{name}"
        return name

    def digest(self) -> str:
        """Return the SHA-256 over names and bytes of the metadata parts."""
        content = hashlib.sha256()
        for _, path, _ in self._parts:
            content.update(path.name.encode() + path.read_bytes())
        return content.hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row for each metadata row; the key is the column `key`, else `<part>/<position>`."""
        for number, file, _ in self._parts:
            table = pq.ParquetFile(file).read(use_threads=False)
            for index, name in enumerate(table.column_names):
                if name in ("key", "caption", "modality", "uri", "image_path"):
                    table = table.set_column(index, name, pa.array(_as_text(table[name]), pa.string()))
            texts = {label: _as_text(table[name]) for name in table.column_names if (label := self._label(name))}
            for position, row in enumerate(table.to_pylist()):
                key = row.get("key")
                content: dict[str, Any] = {"key": str(key) if key is not None else f"{number}/{position}"}
                path = None if self.has_status else row.get("image_path")
                content |= {"caption": row.get("caption"), "uri": row.get("uri") or path}
                content |= {name: row.get(name) for name in ("modality", "offset", "length")}
                if self.has_status:
                    content |= {name: row.get(name) for name in ("status", "reason", "width", "height", "image_sha256")}
                yield content | {label: values[position] for label, values in texts.items()}

    def cards(self, encoding: Encoding | None) -> list[TeacherCard]:
        """Return the one teacher. Its width is that of the first `.npy`, and both towers' must agree."""
        dims = {array.shape[1] for tower in PREFIXES if (array := self._array(self._parts[0][0], tower)) is not None}
        if len(dims) != 1:
            raise CorpusError(f"{self.root}: image and text features are {sorted(dims)} wide, expected one width")
        if self._export is not None:
            card = TeacherCard.model_validate({k: v for k, v in self._export["card"].items() if k != "digest"})
            return [card.with_encoding(encoding or card.encoding)]
        return [imported_card(self.slug, f"{KIND}:{self.slug}", dims.pop(), encoding)]

    def features(self, rows: pa.Table, cards: Iterable[TeacherCard]) -> tuple[Features, list[str | None]]:
        """Gather a range of rows, which may span several files."""
        (card,) = cards
        out: Features = {
            (card.slug, tower): np.full((len(rows), card.dim), np.nan, dtype=value_type(card.encoding))
            for tower in PREFIXES
        }
        for index, part, place in part_slices(rows, (metadata.num_rows for _, _, metadata in self._parts)):
            number, path, metadata = self._parts[index]
            for tower, prefix in PREFIXES.items():
                array = self._array(number, tower)
                if array is not None:
                    if array.shape != (metadata.num_rows, card.dim):
                        raise CorpusError(
                            f"{prefix}_{path.stem[9:]}.npy is {array.shape}, expected {(metadata.num_rows, card.dim)}"
                        )
                    with np.errstate(over="ignore"):
                        out[card.slug, tower][place] = array[part]
        return out, [None] * len(rows)

    def _array(self, number: int, tower: Tower) -> NDArray[np.floating[Any]] | None:
        prefix = PREFIXES[tower]
        for path in (self.folder / prefix).glob(f"{prefix}_*.npy"):
            if re.fullmatch(rf"{prefix}_0*{number}", path.stem):
                try:
                    array = np.load(path, mmap_mode="r", allow_pickle=False)
                except (OSError, ValueError, EOFError) as error:
                    raise CorpusError(f"{path} cannot be read: {error}") from error
                if array.ndim != 2 or array.dtype.kind != "f":
                    raise CorpusError(f"{path} holds {array.dtype} {array.shape}, expected float rows")
                floats: NDArray[np.floating[Any]] = array
                return floats
        return None


def _as_text(column: pa.ChunkedArray) -> list[str | None]:
    """Return values of any type as a label has them: NaN is null, numbers as Arrow prints them, lists and structures as
    JSON."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        texts: list[str | None] = column.cast(pa.string()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
    return texts


def export_npy(store: FeatureStore, out: Path) -> int:
    """Write `OUT/<slug>/` for each teacher in this layout, one part for each shard; returns the parts written. Every
    row of an input is there, so positions agree between teachers; a missing feature is NaN. The metadata hold all
    columns of the sample table, and note in the Parquet schema the teacher's card and the folder of the images."""
    width = len(str(store.shards))
    parts = 0
    inputs = np.concatenate([np.arange(span.start, span.stop) for span in iter_shards(store.record)])
    rows = StoreRows([(store, inputs)], incomplete=True)
    schema = sample_schema(rows.labels)
    for slug, card in store.teachers.items():
        note = {"root": str(rows.root), "labels": rows.labels, "card": card.model_dump(mode="json")}
        noted, samples = {EXPORT: json.dumps(note).encode()}, rows.rows()
        for shard, span in enumerate(iter_shards(store.record)):
            suffix = f"{shard:0{width}d}"
            for tower, prefix in PREFIXES.items():
                buffer = io.BytesIO()
                np.save(buffer, consecutive(store.features(slug, tower), slice(span.start, span.stop)))
                write_atomically(out / slug / prefix / f"{prefix}_{suffix}.npy", buffer.getbuffer())
            numbered = ({**row, "row": number} for number, row in zip(span, samples, strict=False))
            table = pa.Table.from_pylist(list(islice(numbered, len(span))), schema=schema)
            buffer = io.BytesIO()
            if "image_path" not in table.column_names:  # else a label of this name keeps it
                table = table.append_column("image_path", table["uri"])
            pq.write_table(table.replace_schema_metadata(noted), buffer)
            write_atomically(out / slug / "metadata" / f"metadata_{suffix}.parquet", buffer.getbuffer())
            parts += 1
    return parts
