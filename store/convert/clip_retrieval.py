"""clip-retrieval's folders: `img_emb/img_emb_0.npy`, `text_emb/text_emb_0.npy`, `metadata/metadata_0.parquet`. Rows of
equal position in files of equal number belong together; embedding-reader reads the same layout."""

import hashlib
import io
import json
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmkd.base.errors import CorpusError, UserError, faults_as
from mmkd.base.files import list_folder, write_atomically
from mmkd.base.places.remote import StorePath, as_root
from mmkd.store.array import consecutive
from mmkd.store.card import TeacherCard
from mmkd.store.convert.importing import Features, exact_encoding, imported_card, missing_features, part_slices
from mmkd.store.convert.losses import every_row
from mmkd.store.convert.rows import StoreRows
from mmkd.store.layout import Encoding, Tower, check_slug
from mmkd.store.reader import FeatureStore
from mmkd.store.record import FIXED_NAMES
from mmkd.store.samples import sample_schema
from mmkd.store.writer import iter_shards

EXPORT = b"mmkd"
"""Key of the Parquet schema metadata for notes that the layout has no place for."""
_TEXT_COLUMNS = ("key", "caption", "modality", "uri", "image_path")
PREFIXES: dict[Tower, str] = {"image": "img_emb", "text": "text_emb"}


class ClipRetrievalFolder:
    """A folder with `metadata/` and at least one of `img_emb/` and `text_emb/`: one model's features."""

    kind = "clip-retrieval"

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
        for number, path in self._numbered("metadata", ".parquet").items():
            with faults_as(CorpusError, (OSError, pa.ArrowException), f"{path} cannot be read"):
                parts.append((number, path, pq.read_metadata(path)))
        if not parts:
            raise CorpusError(f"{self.folder} holds no metadata/metadata_0.parquet; name a folder of clip-retrieval")
        return parts

    def _numbered(self, prefix: str, suffix: str) -> dict[int, Path]:
        found: dict[int, Path] = {}
        for path in list_folder(self.folder / prefix, f"{prefix}_*{suffix}"):
            number = re.fullmatch(rf"{prefix}_(\d+){re.escape(suffix)}", path.name)
            if number and (other := found.setdefault(int(number[1]), path)) is not path:
                raise CorpusError(f"{other} and {path.name} have the same number; rename one of them")
        return dict(sorted(found.items()))

    @cached_property
    def _files(self) -> dict[Tower, dict[int, Path]]:
        """Features by tower and number. Raises CorpusError for a file without a metadata part."""
        numbers = {number for number, _, _ in self._parts}
        files = {tower: self._numbered(prefix, ".npy") for tower, prefix in PREFIXES.items()}
        for path in (path for found in files.values() for number, path in found.items() if number not in numbers):
            raise CorpusError(f"{path} has no metadata part of its number; bring the part, or take the file away")
        return files

    @property
    def towers(self) -> tuple[Tower, ...]:
        return tuple(tower for tower, files in self._files.items() if files)

    @property
    def labels(self) -> tuple[str, ...]:
        """Columns of any part that have no fixed place. Raises CorpusError if two would have one name."""
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

    @cached_property
    def _placed(self) -> frozenset[str]:
        """Columns that have a fixed place; beside `uri`, `image_path` has none."""
        has_uri = any("uri" in metadata.schema.to_arrow_schema().names for _, _, metadata in self._parts)
        return frozenset(_TEXT_COLUMNS) - ({"image_path"} if has_uri else set())

    def _label(self, name: str) -> str | None:
        if self._export is not None:
            return name if name in self._export["labels"] else None
        return None if name in self._placed else f"metadata_{name}" if name in FIXED_NAMES else name

    def digest(self) -> str:
        content = hashlib.sha256()
        for _, path, _ in self._parts:
            content.update(path.name.encode() + path.read_bytes())
        return content.hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row for each metadata row; the key is the column `key`, else `<part>/<position>`."""
        for number, file, _ in self._parts:
            table = pq.ParquetFile(file).read(use_threads=False)
            for index, name in enumerate(table.column_names):
                if name in _TEXT_COLUMNS:
                    table = table.set_column(index, name, _as_text(table[name]))
            names = {self._label(name): name for name in table.column_names}
            texts = {label: _as_text(table[name]).to_pylist() for label, name in names.items() if label is not None}
            for position, row in enumerate(table.to_pylist()):
                key = row.get("key")
                content: dict[str, Any] = {"key": str(key) if key is not None else f"{number}/{position}"}
                content |= {name: row.get(name) for name in ("caption", "modality", "uri")}
                if self.has_status:
                    content |= {name: row.get(name) for name in FIXED_NAMES - {"row", "key"}}
                else:
                    content["uri"] = row.get("uri") or row.get("image_path")
                yield content | {label: values[position] for label, values in texts.items()}

    def cards(self, encoding: Encoding | None) -> list[TeacherCard]:
        """Return the one teacher. Its width is that of the first `.npy`, and both towers' must agree."""
        dims = {self._array(next(iter(files.values()))).shape[1] for files in self._files.values() if files}
        if len(dims) != 1:
            raise CorpusError(f"{self.root}: image and text features are {sorted(dims)} wide, expected one width")
        if self._export is not None:
            card = TeacherCard.model_validate({k: v for k, v in self._export["card"].items() if k != "digest"})
            return [card.with_encoding(encoding or card.encoding)]
        types = (self._array(path).dtype for files in self._files.values() for path in files.values())
        encoding = encoding or exact_encoding(self.folder, np.result_type(*types))
        return [imported_card(self.slug, f"{self.kind}:{self.slug}", dims.pop(), encoding, self.towers)]

    def features(self, rows: pa.Table, cards: Sequence[TeacherCard]) -> tuple[Features, list[str | None]]:
        (card,) = cards
        out = missing_features(len(rows), cards)
        reasons: list[str | None] = [None] * len(rows)
        for index, part, place in part_slices(rows, (metadata.num_rows for _, _, metadata in self._parts)):
            number, _, metadata = self._parts[index]
            for tower in self.towers:
                file = self._files[tower].get(number)
                if file is None:
                    lost = f"{tower}: {PREFIXES[tower]}_{number}.npy is missing"
                    reasons[place] = [f"{reason}; {lost}" if reason else lost for reason in reasons[place]]
                    continue
                array = self._array(file)
                if array.shape != (metadata.num_rows, card.dim):
                    raise CorpusError(f"{file.name} is {array.shape}, expected {(metadata.num_rows, card.dim)}")
                with np.errstate(over="ignore"):
                    out[card.slug, tower][place] = array[part]
        return out, reasons

    def _array(self, path: Path) -> NDArray[np.floating[Any]]:
        with faults_as(CorpusError, (OSError, ValueError, EOFError), f"{path} cannot be read"):
            array: NDArray[np.floating[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or array.dtype.kind != "f":
            raise CorpusError(f"{path} holds {array.dtype} {array.shape}, expected float rows")
        return array


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return NaN as null, numbers as Arrow prints them, lists and structures as JSON, other bytes in hex."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)

    def plain(value: object) -> str:
        return value.hex() if isinstance(value, bytes) else str(value)

    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        texts = [
            None if value is None else plain(value) if isinstance(value, bytes) else json.dumps(value, default=plain)
            for value in column.to_pylist()
        ]
        return pa.chunked_array([texts], pa.string())


def export_npy(store: FeatureStore, out: Path, allow_loss: Collection[str] = ()) -> int:
    """Write `OUT/<slug>/` for each teacher, one part for each shard; return the parts written. A missing feature is
    NaN. The metadata hold all sample columns, the Parquet schema notes the card and the folder of the images. Raises
    UserError for a loss that is not allowed."""
    width = len(str(store.shards))
    if not store.teachers:
        raise UserError(f"{store.root} has no teacher, and npy holds rows beside features; export it as parquet")
    rows = StoreRows([(store, every_row(store))], allow_loss=allow_loss)
    schema = sample_schema(rows.labels)
    for slug, card in store.teachers.items():
        note = {"root": str(rows.root), "labels": rows.labels, "card": card.model_dump(mode="json")}
        noted, samples = {EXPORT: json.dumps(note).encode()}, rows.rows()
        for shard, span in enumerate(iter_shards(store.record)):
            suffix = f"{shard:0{width}d}"
            for tower in card.towers:
                buffer, prefix = io.BytesIO(), PREFIXES[tower]
                np.save(buffer, consecutive(store.features(slug, tower), slice(span.start, span.stop)))
                write_atomically(out / slug / prefix / f"{prefix}_{suffix}.npy", buffer.getbuffer())
            numbered = ({**row, "row": number} for number, row in zip(span, samples, strict=False))
            table = pa.Table.from_pylist(list(islice(numbered, len(span))), schema=schema)
            buffer = io.BytesIO()
            if "image_path" not in table.column_names:  # else a label of this name keeps it
                table = table.append_column("image_path", table["uri"])
            pq.write_table(table.replace_schema_metadata(noted), buffer)
            write_atomically(out / slug / "metadata" / f"metadata_{suffix}.parquet", buffer.getbuffer())
    return store.shards * len(store.teachers)
