"""The layout of the original MMKD-CLIP release: `meta.jsonl` and one `.pt` of all teachers for each sample.
`features/<folderid>/<id>/clips_output.pt` holds features as the teachers gave them, `clips_project_output.pt` the same
mapped to 512 values; keys are `<Teacher>_img` and `<Teacher>_txt`."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmkd.base.errors import CorpusError
from mmkd.store.card import TeacherCard
from mmkd.store.convert.importing import Features, exact_encoding, imported_card, missing_features
from mmkd.store.convert.torch_file import MAX_FILE_BYTES, read_tensors
from mmkd.store.layout import TOWERS, Encoding, check_slug
from mmkd.store.record import FIXED_NAMES

KIND = "mmkd-release"
FILES = ("clips_output", "clips_project_output")
SUFFIXES = {"image": "img", "text": "txt"}
_LABELS = ("folderid", "metapath", "available_clips")
LINE = frozenset((*_LABELS, "id", "imgpath", "txt"))
"""What the release itself has in a line of `meta.jsonl`; `folderid` and `id` come from the key."""
_TRIES = 100
"""Samples looked at for a teacher's width before it is given up: files may be missing."""


class OriginalRelease:
    """A folder with `meta.jsonl` and `features/`."""

    kind = KIND
    has_status = False
    towers = TOWERS

    def __init__(self, root: Path, file: str = FILES[0]) -> None:
        self.root = root
        self.file = file
        self._names: dict[str, str] = {}

    @cached_property
    def _further(self) -> dict[str, str]:
        """Further entries of the lines, and the column of each. Raises CorpusError if two would have one name."""
        names = dict.fromkeys(name for row in self._lines() for name in row if name not in LINE)
        columns = {name: f"metadata_{name}" if name in FIXED_NAMES - {"modality"} else name for name in names}
        if len(set(columns.values())) < len(columns):
            raise CorpusError(f"{self.root / 'meta.jsonl'}: entries {sorted(names)} would share a column; rename one")
        return columns

    @property
    def labels(self) -> tuple[str, ...]:
        """Columns of the lines that have no fixed place."""
        return *_LABELS, *(column for column in self._further.values() if column not in FIXED_NAMES)

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
                **{column: _as_text(row.get(name)) for name, column in self._further.items()},
            }

    def cards(self, encoding: Encoding | None) -> list[TeacherCard]:
        """Return one card for each name in any `available_clips`, as wide as in the first file that has it. Raises
        CorpusError if none of the first hundred files that should hold a teacher does."""
        dims: dict[str, int] = {}
        widest = np.dtype(np.float32)
        tries = Counter[str]()
        for row in self._lines():
            unknown = [name for name in row["available_clips"] if name not in dims and tries[name] < _TRIES]
            tries.update(unknown)
            tensors = self._tensors(f"{row['folderid']}/{row['id']}")[0] if unknown else {}
            dims |= {name: tensors[f"{name}_img"].size for name in unknown if f"{name}_img" in tensors}
            widest = np.result_type(widest, *(tensors[f"{name}_img"] for name in unknown if name in dims))
        if lost := sorted(set(tries) - set(dims)):
            raise CorpusError(f"no {self.file}.pt below {self.root} holds {', '.join(lost)}; bring the files")
        self._names = {check_slug(name.lower()): name for name in sorted(dims)}
        if len(self._names) < len(dims):
            raise CorpusError(f"teachers {sorted(dims)} of {self.root} differ only by upper and lower case")
        source = f"{KIND}:{self.file}.pt:"
        encoding = encoding or exact_encoding(self.root, widest)
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


def _as_text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
