"""Bags of patch features as CLAM and TRIDENT write them: one HDF5 file a slide, `features` and `coords`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import pyarrow as pa

from mmkd.store.card import TeacherCard
from mmkd.store.convert.importing import Features, imported_card
from mmkd.store.encoding import Encoding
from mmkd.store.errors import CorpusError
from mmkd.store.layout import check_slug

KIND = "h5-bags"
_TCGA = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(?:-|$)", re.IGNORECASE)


_LABELS = ("slide", "patient", "x", "y")


class SlideTable(Protocol):
    """What else is known of slides: diagnosis, follow-up, folds."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its columns."""

    @property
    def digest(self) -> str:
        """Changes with its content."""

    def values(self, key: str | None) -> dict[str, str | None]:
        """The columns of one slide; nulls where it is not in the table."""


class BagFolder:
    """A folder of `SLIDE.h5` with `features` (n, D) or (1, n, D) and `coords` (n, 2), one model's.

    Every patch is a row: key `SLIDE#x,y`, labels `slide`, `patient` (of TCGA names), `x`, `y` (level-0 pixels), then
    those of a table. A slide without patches is one failed row `SLIDE`: it is missing, not gone.
    """

    kind = KIND

    def __init__(self, root: Path, slug: str, table: SlideTable | None = None) -> None:
        self.root = root
        self.slug = check_slug(slug)
        self._table = table

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Label columns, each once; a table's `patient` goes before that of the name."""
        further = () if self._table is None else self._table.labels
        taken = {"slide", "x", "y"} & set(further)
        if taken:
            raise CorpusError(f"column {min(taken)!r} of the table is what a patch's own label is called; rename it")
        return tuple(dict.fromkeys((*_LABELS, *further)))

    @cached_property
    def _bags(self) -> list[tuple[Path, int, int]]:
        """File, patches and width, in the order of names."""
        bags: list[tuple[Path, int, int]] = []
        for path in sorted(self.root.glob("*.h5")):
            with _opened(path) as file:
                shape = _features(file, path).shape[-2:]
                coords = file.get("coords")
                if not isinstance(coords, h5py.Dataset) or coords.shape != (shape[0], 2):
                    raise CorpusError(f"{path}: coords do not belong to {shape[0]} features; expected ({shape[0]}, 2)")
            if bags and bags[0][2] != shape[1]:
                raise CorpusError(f"{path}: features are {shape[1]} wide, those of {bags[0][0].name} {bags[0][2]}")
            bags.append((path, *shape))
        if not bags:
            raise CorpusError(f"{self.root} holds no .h5 bag; name the folder with one file a slide")
        return bags

    def digest(self) -> str:
        """SHA-256 over the bags' names, sizes and change times, and the table."""
        facts = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path, _, _ in self._bags]
        table = [] if self._table is None else [self._table.digest]
        return hashlib.sha256(json.dumps(facts + table).encode()).hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per patch, slide after slide."""
        for path, patches, _ in self._bags:
            patient = _TCGA.match(path.stem)
            labels = {"slide": path.stem, "patient": patient.group(1).upper() if patient else None}
            if self._table is not None:
                labels |= {name: value for name, value in self._table.values(path.stem).items() if value is not None}
            row = {"caption": None, "uri": None, "modality": "pathology"} | labels
            if not patches:
                yield row | {"key": path.stem}
                continue
            with _opened(path) as file:
                corners = np.asarray(file["coords"]).astype(np.int64).tolist()
            for x, y in corners:
                yield row | {"key": f"{path.stem}#{x},{y}", "x": str(x), "y": str(y)}

    def cards(self, encoding: Encoding | None) -> list[TeacherCard]:
        """The one teacher; which encoder made the features is known by the name given."""
        return [imported_card(self.slug, f"{KIND}:{self.slug}", self._bags[0][2], encoding or "float16")]

    def features(self, rows: pa.Table, cards: Iterable[TeacherCard]) -> tuple[Features, list[str | None]]:
        """Gather a range of rows, which may span several slides; there is no text."""
        (card,) = cards
        numbers = rows["row"].to_pylist()
        first, end = numbers[0], numbers[-1] + 1
        out: Features = {
            (self.slug, tower): np.full((len(rows), card.dim), np.nan, dtype=card.encoding)
            for tower in ("image", "text")
        }
        reasons: list[str | None] = []
        start = 0
        for path, patches, _ in self._bags:
            count = max(patches, 1)
            low, high = max(first, start), min(end, start + count)
            if low < high and not patches:
                reasons.append("features: bag without patches")
            elif low < high:
                with _opened(path) as file, np.errstate(over="ignore"):
                    stored = _features(file, path)
                    part = slice(low - start, high - start)
                    values = stored[0, part] if stored.ndim == 3 else stored[part]
                    found = out[self.slug, "image"][low - first : high - first]
                    found[:] = values
                    reasons += [None if np.isfinite(patch).all() else "features: not finite" for patch in found]
            start += count
        return out, reasons


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise CorpusError(f"{path} is not a sound HDF5 file; make it again, or take it out of the folder") from error


def _features(file: h5py.File, path: Path) -> h5py.Dataset:
    features = file.get("features")
    whole = isinstance(features, h5py.Dataset) and features.dtype.kind == "f"
    # Links out of the file and data kept in other files would read whatever their maker names.
    if not whole or features.external or features.is_virtual or features.file.filename != file.filename:
        raise CorpusError(f"{path} holds no float data set `features` of its own; is it a bag of CLAM or TRIDENT?")
    if features.ndim not in (2, 3) or (features.ndim == 3 and features.shape[0] != 1):
        raise CorpusError(f"{path}: features are {features.shape}, expected (n, D) or (1, n, D)")
    return features
