"""The same features in every layout that is measured: the ways in which a layout is written, opened and read by rows.

A layout is written the way its own documentation says to keep vectors, and read the fastest way that it offers for a
batch of random rows and for all rows in order. `features` is keyed `tT_image` and `tT_text` for teacher T; each is
float16 (N, D). Here: memory, the store, and what holds arrays; `loaders` has what holds tables and samples.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmkd.distill.teacher_features import as_tensor, ask_for
from mmkd.store import FeatureStore, Preprocessing, TeacherCard
from mmkd.store.convert.exports import export_safetensors
from mmkd.store.fold import fold
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

Features = Mapping[str, np.ndarray]
Rows = np.ndarray
BATCH = 4096
"""Rows of one step of a scan."""


class Layout(ABC):
    """One way to keep features on disk."""

    name: str
    needs: tuple[str, ...] = ()
    """Modules that must be installed."""
    row_by_row = False
    """A row costs the same in any batch."""
    stream_only = False
    """There are no random rows: a batch is the next rows of a shuffled stream."""
    most_rows = sys.maxsize
    """Rows that are written at most, where more would take too long; batches are drawn from these."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, features: Features) -> None:  # noqa: B027 - not every layout has files of its own
        """Put all rows below `folder`; those that read the store's files, or a copy made from it, write none."""

    def open(self) -> None:  # noqa: B027 - some open what they read with every batch
        """Make ready to read."""

    @abstractmethod
    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """These rows of each column, in this order, in memory."""

    @abstractmethod
    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """All rows in order, a few at a time."""


class Memory(Layout):
    """Arrays in memory: what nothing on a disk can beat."""

    name = "arrays in memory"

    def __init__(self, folder: Path, features: Features) -> None:
        super().__init__(folder)
        self.arrays = {name: torch.from_numpy(values) for name, values in features.items()}

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """One `torch.index_select` a column."""
        picked = torch.from_numpy(rows)
        return [self.arrays[name].index_select(0, picked) for name in columns]

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """Copies of slices."""
        for start in range(0, len(self.arrays[columns[0]]), BATCH):
            yield [self.arrays[name][start : start + BATCH].clone() for name in columns]


class Mmkd(Layout):
    """A store, mapped."""

    name = "mmkd"

    def write(self, features: Features) -> None:
        """With the real writer."""
        rows, dim = next(iter(features.values())).shape
        index = sample_schema(()).empty_table().to_pydict()
        index = {name: [None] * rows for name in index}
        index |= {"row": list(range(rows)), "key": list(map(str, range(rows))), "status": ["ok"] * rows}
        corpus = CorpusRecord(kind="benchmark", location="-", root="/", rows=rows, digest="-")
        store = create_store(self.folder, corpus, pa.table(index, schema=sample_schema(())))
        for slug in sorted({name.partition("_")[0] for name in features}):
            card = TeacherCard(
                slug=slug, source="-", weights_sha256="-", tokenizer_sha256="-", context_length=1, dim=dim,
                preprocessing=Preprocessing(image_size=(1, 1), mean=(0.5,), std=(0.5,)),
            )  # fmt: skip
            add_teacher(store, card)
            for shard, span in enumerate(iter_shards(store.record)):
                part = [features[f"{slug}_{tower}"][span.start : span.stop] for tower in ("image", "text")]
                valid = np.full(len(span), 3, dtype=np.uint8)
                write_shard(
                    store,
                    card,
                    shard,
                    ShardFeatures(*part, valid),
                    read_part(self.folder, shard)[1],
                )
        fold(store)

    def open(self) -> None:
        """Map."""
        store = FeatureStore.open(self.folder)
        self.arrays = {}
        for slug in store.teachers:
            for tower in ("image", "text"):
                self.arrays[f"{slug}_{tower}"] = as_tensor(store.features(slug, tower))

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """As training gathers."""
        for column in columns:
            ask_for(self.arrays[column], torch.from_numpy(rows), look=True)
        return [self.arrays[name].index_select(0, torch.from_numpy(rows)) for name in columns]

    scan = Memory.scan  # type: ignore[assignment]


class TensorStore(Layout):
    """tensorstore over the files of the mmkd store, which are Zarr v3."""

    name, needs = "tensorstore (the store's own files)", ("tensorstore",)

    def open(self) -> None:
        """Every array."""
        import tensorstore

        self.arrays = {}
        for path in sorted((self.folder / "teachers").glob("*/*/zarr.json")):
            tower = path.parent.name
            if tower != "valid":
                files = {"driver": "file", "path": str(path.parent)}
                opened = tensorstore.open({"driver": "zarr3", "kvstore": files}, read=True).result()
                self.arrays[f"{path.parent.parent.name}_{tower}"] = opened

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """All columns under way together."""
        futures = [self.arrays[name][rows].read() for name in columns]
        return [future.result() for future in futures]

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """Slices."""
        rows = self.arrays[columns[0]].shape[0]
        for start in range(0, rows, BATCH):
            futures = [self.arrays[name][start : min(start + BATCH, rows)].read() for name in columns]
            yield [future.result() for future in futures]


class ZarrPython(Layout):
    """zarr-python over the files of the mmkd store."""

    name, needs = "zarr-python (the store's own files)", ("zarr",)

    def open(self) -> None:
        """The group."""
        import zarr

        group = zarr.open_group(self.folder, mode="r")["teachers"]
        self.arrays = {
            f"{slug}_{tower}": group[f"{slug}/{tower}"] for slug in group.group_keys() for tower in ("image", "text")
        }

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """Orthogonal indexing."""
        return [self.arrays[name].oindex[rows] for name in columns]

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """Slices."""
        for start in range(0, self.arrays[columns[0]].shape[0], BATCH):
            yield [self.arrays[name][start : start + BATCH] for name in columns]


class Hdf5(Layout):
    """One HDF5 file, a contiguous data set a column."""

    name, needs = "h5py", ("h5py",)

    def write(self, features: Features) -> None:
        """Contiguous: chunks would be read whole for each row."""
        import h5py

        self.folder.mkdir(parents=True)
        with h5py.File(self.folder / "features.h5", "w") as file:
            for name, values in features.items():
                file.create_dataset(name, data=values)

    def open(self) -> None:
        """The file."""
        import h5py

        self.file = h5py.File(self.folder / "features.h5", "r")

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """h5py takes increasing rows only."""
        wanted, back = np.unique(rows, return_inverse=True)
        return [self.file[name][wanted][back] for name in columns]

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """Slices."""
        for start in range(0, len(self.file[columns[0]]), BATCH):
            yield [self.file[name][start : start + BATCH] for name in columns]


class Safetensors(Layout):
    """Our export: one file for each shard and teacher, mapped by `safe_open`."""

    name, needs = "safetensors, shards held open", ("safetensors",)

    def write(self, features: Features) -> None:
        """`mmkd store export --layout safetensors` of the store that lies beside."""
        export_safetensors(FeatureStore.open(place_of(Mmkd, self.folder.parent)), self.folder)

    def open(self) -> None:
        """All shards; on a CPU, torch's tensors lie over the mapped file."""
        from safetensors import safe_open

        self.parts: dict[str, list[torch.Tensor]] = {}
        for path in sorted(self.folder.glob("*/*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for tower in ("image", "text"):
                    self.parts.setdefault(f"{path.parent.name}_{tower}", []).append(file.get_tensor(tower))

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """A gather from each shard, put in order."""
        per = len(next(iter(self.parts.values()))[0])
        picked = torch.from_numpy(rows)
        shards = picked // per
        places = [(shard, (shards == shard).nonzero().flatten()) for shard in shards.unique().tolist()]
        out = []
        for name in columns:
            parts = self.parts[name]
            values = torch.empty((len(rows), parts[0].shape[1]), dtype=parts[0].dtype)
            for shard, here in places:
                values[here] = parts[shard].index_select(0, picked[here] - shard * per)
            out.append(values)
        return out

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """Shard by shard."""
        for shard in range(len(self.parts[columns[0]])):
            yield [self.parts[name][shard].clone() for name in columns]


OVER_THE_STORE = (TensorStore, ZarrPython)


def place_of(kind: type[Layout], folder: Path) -> Path:
    """Where a layout lies."""
    return folder / ("Mmkd" if kind in OVER_THE_STORE else kind.__name__)
