"""The layout of the original MMKD-CLIP release: `meta.jsonl` and one `.pt` of all teachers for each sample.
`features/<folderid>/<id>/clips_output.pt` holds features as the teachers gave them, `clips_project_output.pt` the same
mapped to 512 values; keys are `<Teacher>_img` and `<Teacher>_txt`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.errors import CorpusError
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors, write_atomically
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source, leaves_root
from mmkd.store.card import TeacherCard
from mmkd.store.convert.importing import Features, imported_card, missing_features
from mmkd.store.convert.torch_file import MAX_FILE_BYTES, read_tensors, write_tensors
from mmkd.store.encoding import Encoding
from mmkd.store.layout import PAIR_SOUND, SOUND_BIT, TOWERS, check_slug
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import in_rows
from mmkd.store.writer import iter_shards

KIND = "mmkd-release"
FILES = ("clips_output", "clips_project_output")
ImageMode = Literal["link", "copy", "none"]
SUFFIXES = {"image": "img", "text": "txt"}
_CARRIED = frozenset(("row", "key", "caption", "uri", "metapath", "available_clips", "folderid"))
"""Columns with a place in `meta.jsonl`; its `folderid` comes from the key."""
_TRIES = 100
"""Samples looked at for a teacher's width before it is given up: files may be missing."""


class OriginalRelease:
    """A folder with `meta.jsonl` and `features/`."""

    kind = KIND
    has_status = False
    towers = TOWERS
    labels = ("folderid", "metapath", "available_clips")

    def __init__(self, root: Path, file: str = FILES[0]) -> None:
        self.root = root
        self.file = file
        self._names: dict[str, str] = {}

    def digest(self) -> str:
        with (self.root / "meta.jsonl").open("rb") as lines:
            content = hashlib.file_digest(lines, "sha256")
        content.update(self.file.encode())
        return content.hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row for each line of `meta.jsonl`; the key is `<folderid>/<id>`."""
        for row in self._lines():
            yield {
                "key": f"{row['folderid']}/{row['id']}",
                "caption": row.get("txt"),
                "uri": row.get("imgpath"),
                "folderid": row["folderid"],
                "metapath": row.get("metapath"),
                "available_clips": ",".join(row["available_clips"]),
            }

    def cards(self, encoding: Encoding | None) -> list[TeacherCard]:
        """Return one card for each name in any `available_clips`, as wide as in the first file that has it. Raises
        CorpusError if none of the first hundred files that should hold a teacher does."""
        dims: dict[str, int] = {}
        tries = Counter[str]()
        for row in self._lines():
            unknown = [name for name in row["available_clips"] if name not in dims and tries[name] < _TRIES]
            tries.update(unknown)
            tensors = self._tensors(f"{row['folderid']}/{row['id']}")[0] if unknown else {}
            dims |= {name: tensors[f"{name}_img"].size for name in unknown if f"{name}_img" in tensors}
        if lost := sorted(set(tries) - set(dims)):
            raise CorpusError(
                f"no {self.file}.pt below {self.root} holds {', '.join(lost)}; bring the files and try again"
            )
        self._names = {check_slug(name.lower()): name for name in sorted(dims)}
        if len(self._names) < len(dims):
            raise CorpusError(f"teachers {sorted(dims)} of {self.root} differ only by upper and lower case")
        source = f"{KIND}:{self.file}.pt:"
        return [imported_card(slug, source + name, dims[name], encoding) for slug, name in self._names.items()]

    def features(self, rows: pa.Table, cards: Sequence[TeacherCard]) -> tuple[Features, list[str | None]]:
        out = missing_features(len(rows), cards)
        reasons: list[str | None] = []
        for index, key in enumerate(rows["key"].to_pylist()):
            tensors, reason = self._tensors(key)
            for card in cards:
                for tower, suffix in SUFFIXES.items():
                    values = tensors.get(f"{self._names[card.slug]}_{suffix}")
                    if values is not None and values.size == card.dim:
                        with np.errstate(over="ignore"):
                            out[card.slug, tower][index] = values.reshape(-1).astype(np.float32)
                    elif values is not None:
                        reason = f"features: {card.slug} has {values.size} values, expected {card.dim}"
            reasons.append(reason)
        return out, reasons

    def _lines(self) -> Iterator[dict[str, Any]]:
        path = self.root / "meta.jsonl"
        number = 0
        try:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    number += 1
                    row = json.loads(line)
                    names = row["available_clips"]
                    if not all(isinstance(part, str) for part in (row["folderid"], row["id"], *names)):
                        raise ValueError("folderid, id and available_clips must be strings")
                    if any(part in ("", ".", "..") or "/" in part for part in (row["folderid"], row["id"])):
                        raise ValueError(f"{row['folderid']!r}/{row['id']!r} does not name a folder below features/")
                    yield row
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}; name a folder of the release") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{path}, line {number}: not a row of the release: {error}") from error

    def _tensors(self, key: str) -> tuple[dict[str, Any], str | None]:
        path = self.root / "features" / key / f"{self.file}.pt"
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                return {}, f"features: larger than {MAX_FILE_BYTES >> 20} MB"
            return read_tensors(path.read_bytes()), None
        except FileNotFoundError:
            return {}, "features: file not found"
        except OSError as error:
            return {}, f"features: {error.strerror}"
        except CorpusError as error:
            return {}, f"features: {error}"


@dataclass(frozen=True)
class OriginalReport:
    """Counts of one export in the release's layout."""

    samples: int
    left_out: int
    """Rows without any feature: the release's loader needs a file for each line."""
    images: int
    images_missing: int
    """Samples whose image could not be copied; their `imgpath` names a file that is not there."""
    incomplete: int = 0
    """Samples of which no teacher has both features: their `available_clips` is empty, the release's loader fails."""
    dropped: tuple[str, ...] = ()
    """Columns of the written samples with values that the layout has no place for."""


def export_original(
    store: FeatureStore, out: Path, files: Sequence[str] | None = None, images: ImageMode = "none"
) -> OriginalReport:
    """Write a store in the release's layout, float32, into the new folder `out`. `files`: among `FILES`, by default
    `imported_files`. `images`: `link` makes symbolic links to files and copies members of archives. Raises CorpusError
    for a key that cannot name a folder, or two that would name the same; StoreError if `out` cannot be written."""
    names = {
        slug: card.source.rpartition(":")[2] if card.source.startswith(f"{KIND}:") else slug
        for slug, card in store.teachers.items()
    }
    valid = {slug: store.valid(slug) for slug in names}
    files = files or imported_files(store)
    out.mkdir(parents=True, exist_ok=True)
    lost = {name for name in store.samples.schema.names if name not in _CARRIED}
    dropped: set[str] = set()
    unfinished, counts = out / f".meta.jsonl{TEMPORARY_SUFFIX}", Counter[str]()
    with disk_errors(out), unfinished.open("w", encoding="utf-8") as lines:
        for span in iter_shards(store.record):
            for row in store.sample_table(filter=in_rows(span)).to_pylist():
                tensors, complete = _row_tensors(store, names, valid, row)
                if not tensors:
                    counts["left out"] += 1
                    continue
                folder, _, name = row["key"].rpartition("/")
                folder, name = _folder_name(folder or "mmkd"), _folder_name(name)
                for file in files:
                    path = out / "features" / folder / name / f"{file}.pt"
                    if path.exists():
                        raise CorpusError(f"key {row['key']!r} and another one would both be written to {path.parent}; "
                                          "give the samples other keys")  # fmt: skip
                    write_atomically(path, write_tensors(tensors, file))
                image = row["uri"]
                if image is not None and images != "none":
                    image, copied = _copy_image(store, row, out, f"images/{folder}/{name}", images)
                    counts["images" if copied else "missing"] += 1
                line = {"folderid": folder, "id": name, "imgpath": image, "metapath": row.get("metapath")}
                line |= {"txt": row["caption"], "available_clips": complete}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                dropped |= {name for name in lost if row[name] not in (None, "ok" if name == "status" else None)}
                dropped |= {"folderid"} if row.get("folderid") not in (None, folder) else set()
                counts["samples"] += 1
                counts["incomplete"] += not complete
    unfinished.replace(out / "meta.jsonl")
    return OriginalReport(
        samples=counts["samples"],
        left_out=counts["left out"],
        images=counts["images"],
        images_missing=counts["missing"],
        incomplete=counts["incomplete"],
        dropped=tuple(name for name in store.samples.schema.names if name in dropped),
    )


def imported_files(store: FeatureStore) -> tuple[str, ...]:
    """Return the feature file that the store was imported from; `clips_output` for any other store."""
    sources = (card.source.split(":") for card in store.teachers.values())
    found = {parts[1].removesuffix(".pt") for parts in sources if parts[0] == KIND and len(parts) == 3}
    return tuple(file for file in FILES if file in found) or FILES[:1]


def _copy_image(store: FeatureStore, row: dict[str, Any], out: Path, name: str, images: str) -> tuple[str, bool]:
    """Return the path below `out` of a row's image (a plain relative one is kept), and whether it could be copied."""
    uri, root = row["uri"], store.record.image_root(row["row"])
    plain = not leaves_root(root, uri) and "#" not in uri and row["offset"] is None and ".." not in Path(uri).parts
    path = uri if plain and not Path(uri).is_absolute() else name + PurePosixPath(uri.partition("#")[0]).suffix
    target, source = out / path, Path(root) / uri
    if plain and images == "link" and "://" not in root and source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(source.resolve())
        return path, True
    try:
        write_atomically(target, image_source(root, uri, row["offset"], row["length"]).read())
    except ImageError:
        return path, False
    return path, True


def _row_tensors(
    store: FeatureStore, names: dict[str, str], valid: dict[str, NDArray[np.uint8]], row: dict[str, Any]
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Return one row's features under the release's names, and the teachers that have both, in imported order."""
    order = {name: place for place, name in enumerate((row.get("available_clips") or "").split(","))}
    tensors, complete = {}, []
    for slug, name in sorted(names.items(), key=lambda item: order.get(item[1], len(order))):
        bits = valid[slug][row["row"]]
        for tower, bit in SOUND_BIT.items():
            if bits & bit:
                tensors[f"{name}_{SUFFIXES[tower]}"] = store.features(slug, tower)[row["row"]].astype(np.float32)
        if bits == PAIR_SOUND:
            complete.append(name)
    return tensors, complete


def _folder_name(part: str) -> str:
    name = part.replace("/", "_")
    if not name.strip(".") or "\0" in name:
        raise CorpusError(f"key {part!r} cannot name a folder of the release's layout; give the samples other keys")
    return name
