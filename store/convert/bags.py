"""Bags of patch features as CLAM and TRIDENT write them: one HDF5 file a slide, `features` and `coords`."""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import h5py
import numpy as np
import pyarrow as pa

from mmkd.base.errors import CorpusError, faults_as
from mmkd.base.files import list_folder
from mmkd.base.tcga import tcga_patient
from mmkd.store.card import TeacherCard
from mmkd.store.convert.importing import Features, exact_encoding, imported_card, missing_features, part_slices
from mmkd.store.convert.losses import refuse_losses
from mmkd.store.evaluation_rows import KIND, SAMPLE, TEXT_OF
from mmkd.store.layout import Encoding, Tower, check_slug

_DATA = ("features", "coords")


class _Bag(NamedTuple):
    path: Path
    patches: int
    dim: int
    dtype: np.dtype[Any]
    attributes: dict[str, str | None]


class SlideTable(Protocol):
    """A table of slides or patients: diagnoses, follow-up, folds. `match` is the label that is looked up, `slide` or
    `patient`; `labels` are its columns, `values` those of one slide or patient: nulls where the table lacks it."""

    @property
    def match(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def digest(self) -> str: ...

    def values(self, key: str | None) -> dict[str, str | None]: ...


class BagFolder:
    """A folder of `SLIDE.h5` with `features` (n, D) or (1, n, D) and `coords` (n, 2). Every patch is a row: key
    `SLIDE#x,y`, labels `slide`, `patient` (of TCGA names), `x`, `y` (level-0 pixels), the HDF5 attributes, such as
    `coords_patch_size`, and the columns of the table. `allow_loss`: `columns` for data sets that are no features."""

    kind = "h5-bags"
    has_status = False
    towers: tuple[Tower, ...] = ("image",)

    def __init__(
        self, root: Path, slug: str, table: SlideTable | None = None, allow_loss: Collection[str] = ()
    ) -> None:
        self.root = root
        self.slug = check_slug(slug)
        self.table = table
        self._allow_loss = allow_loss

    @property
    def labels(self) -> tuple[str, ...]:
        """Label columns, each once; a table's `patient` overrides that of the slide's name."""
        noted = dict.fromkeys(name for bag in self._bags for name in bag.attributes)
        own = ("slide", "patient", "x", "y", *noted)
        return own if self.table is None else tuple(dict.fromkeys((*own, *self.table.labels, KIND, TEXT_OF)))

    @cached_property
    def _bags(self) -> list[_Bag]:
        bags: list[_Bag] = []
        further: dict[str, Path] = {}
        for path in list_folder(self.root, "*.h5"):
            with _open_bag(path) as file:
                features = _features(file, path)
                shape, coords = features.shape[-2:], file.get("coords")
                if not isinstance(coords, h5py.Dataset) or coords.shape != (shape[0], 2):
                    raise CorpusError(f"{path}: coords do not belong to {shape[0]} features; expected ({shape[0]}, 2)")
                further = {name: path for name in file if name not in _DATA} | further
                bags.append(_Bag(path, shape[0], shape[1], features.dtype, _attributes(file)))
            if bags[0].dim != shape[1]:
                raise CorpusError(f"{path}: features are {shape[1]} wide, those of {bags[0].path.name} {bags[0].dim}")
        if not bags:
            raise CorpusError(f"{self.root} holds no .h5 bag; name the folder with one file a slide")
        losses = [("columns", f"the data set {name} (first in {path.name})") for name, path in sorted(further.items())]
        refuse_losses("the store", losses, self._allow_loss)
        return bags

    def digest(self) -> str:
        facts: list[Any] = [(bag.path.name, (stat := bag.path.stat()).st_size, stat.st_mtime_ns) for bag in self._bags]
        facts += [self.table.digest] if self.table else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row per patch, slide after slide. Raises CorpusError if the table has none of the slides."""
        slides = {bag.path.stem: bag.attributes | self._labels_of(bag.path.stem) for bag in self._bags}
        columns = [name for name in (self.table.labels if self.table else ()) if name not in ("slide", "patient")]
        if self.table is not None and not any(labels[name] for labels in slides.values() for name in columns):
            example = _table_key(self.table, next(iter(slides)))
            raise CorpusError(
                f"{self.root}: the table has no line for any of {len(slides)} slides, matched by {self.table.match} "
                f"(for example {example!r}); compare its keys with the names of the files"
            )
        for bag in self._bags:
            path = bag.path
            slide = {"key": path.stem, "caption": None, "uri": None, "modality": "pathology"} | slides[path.stem]
            if not bag.patches:
                yield slide
                continue
            with _open_bag(path) as file:
                corners = np.asarray(file["coords"]).tolist()
            for corner in corners:
                x, y = (str(int(place) if math.isfinite(place) and int(place) == place else place) for place in corner)
                yield slide | {"key": f"{path.stem}#{x},{y}", "x": x, "y": y}

    def _labels_of(self, slide: str) -> dict[str, str | None]:
        labels: dict[str, str | None] = {"slide": slide, "patient": tcga_patient(slide)}
        if self.table is not None:
            found = self.table.values(_table_key(self.table, slide))
            labels |= {name: value for name, value in found.items() if value or name not in labels}
            labels |= {KIND: SAMPLE, TEXT_OF: None}
        return labels

    def cards(self, encoding: Encoding | None) -> list[TeacherCard]:
        encoding = encoding or exact_encoding(self.root, np.result_type(*(bag.dtype for bag in self._bags)))
        return [imported_card(self.slug, f"{self.kind}:{self.slug}", self._bags[0].dim, encoding, self.towers)]

    def features(self, rows: pa.Table, cards: Sequence[TeacherCard]) -> tuple[Features, list[str | None]]:
        out = missing_features(len(rows), cards)
        reasons: list[str | None] = []
        # An empty bag is a row of its own.
        for number, part, place in part_slices(rows, (max(bag.patches, 1) for bag in self._bags)):
            path = self._bags[number].path
            if not self._bags[number].patches:
                reasons.append("features: bag without patches")
                continue
            with _open_bag(path) as file, np.errstate(over="ignore"):
                stored = _features(file, path)
                found = out[self.slug, "image"][place]
                found[:] = stored[0, part] if stored.ndim == 3 else stored[part]
            reasons += [None if np.isfinite(patch).all() else "features: not finite" for patch in found]
        return out, reasons


def _table_key(table: SlideTable, slide: str) -> str | None:
    return tcga_patient(slide) if table.match == "patient" else slide


def _attributes(file: h5py.File) -> dict[str, str | None]:
    """Return the attributes of the file and of its data sets as text, under the name of what has them."""
    owners = {"file": file, "coords": file["coords"], "features": file["features"]}
    return {f"{owner}_{name}": _text(value) for owner, item in owners.items() for name, value in item.attrs.items()}


def _text(value: Any) -> str | None:
    if isinstance(value, h5py.Empty):
        return None
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(plain, bytes):
        return plain.decode("utf-8", "backslashreplace")
    text = plain if isinstance(plain, str) else json.dumps(plain, default=str)
    return text.encode("utf-8", "backslashreplace").decode()


def _open_bag(path: Path) -> h5py.File:
    advice = "; make it again, or take it out of the folder"
    with faults_as(CorpusError, OSError, f"{path} is not a sound HDF5 file", advice):
        return h5py.File(path, "r")


def _features(file: h5py.File, path: Path) -> h5py.Dataset:
    features = file.get("features")
    whole = isinstance(features, h5py.Dataset) and features.dtype.kind == "f"
    # Links out of the file and data kept in other files would read whatever their maker names.
    if not whole or features.external or features.is_virtual or features.file.filename != file.filename:
        raise CorpusError(f"{path} holds no float data set `features` of its own; is it a bag of CLAM or TRIDENT?")
    if features.ndim not in (2, 3) or (features.ndim == 3 and features.shape[0] != 1):
        raise CorpusError(f"{path}: features are {features.shape}, expected (n, D) or (1, n, D)")
    return features
