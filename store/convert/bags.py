"""Bags of patch features as CLAM and TRIDENT write them: one HDF5 file a slide, `features` and `coords`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

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


class BagFolder:
    """A folder of `SLIDE.h5` with `features` (n, D) or (1, n, D) and `coords` (n, 2), one model's.

    Every patch is a row: key `SLIDE#x,y`, labels `slide`, `patient` (of TCGA names), `x`, `y` (level-0 pixels).
    """

    kind = KIND
    labels = ("slide", "patient", "x", "y")

    def __init__(self, root: Path, slug: str) -> None:
        self.root = root
        self.slug = check_slug(slug)

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
        """SHA-256 over the bags' names, sizes and change times."""
        facts = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path, _, _ in self._bags]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per patch, slide after slide."""
        for path, _, _ in self._bags:
            patient = _TCGA.match(path.stem)
            with _opened(path) as file:
                corners = np.asarray(file["coords"]).astype(np.int64).tolist()
            for x, y in corners:
                row = {"key": f"{path.stem}#{x},{y}", "caption": None, "uri": None, "modality": "pathology"}
                labels = {"slide": path.stem, "patient": patient.group(1).upper() if patient else None}
                yield row | labels | {"x": str(x), "y": str(y)}

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
        start = 0
        for path, count, _ in self._bags:
            low, high = max(first, start), min(end, start + count)
            if low < high:
                with _opened(path) as file, np.errstate(over="ignore"):
                    stored = _features(file, path)
                    part = slice(low - start, high - start)
                    patches = stored[0, part] if stored.ndim == 3 else stored[part]
                    out[self.slug, "image"][low - first : high - first] = patches
            start += count
        return out, [None if np.isfinite(patch).all() else "features: not finite" for patch in out[self.slug, "image"]]


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
