"""The same features in every layout that is measured: how each is written, opened, and read by rows.

A layout is written the way its own documentation says to keep vectors, and read the fastest way that it offers for a batch of
random rows and for all rows in order. `features` is keyed `tT_image` and `tT_text` for teacher T; each is float16 (N, D).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkd.distill.teacher_features import as_tensor
from mmkd.store import FeatureStore, Preprocessing, TeacherCard
from mmkd.store.convert.safetensors_file import export_safetensors
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

Features = Mapping[str, np.ndarray]
Rows = np.ndarray
BATCH = 4096
"""Rows of one step of a scan."""


class Layout:
    """One way to keep features on disk."""

    name: str
    needs: tuple[str, ...] = ()
    """Modules that must be installed."""
    stream_only = False
    """There are no random rows: a batch is the next rows of a shuffled stream."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, features: Features) -> None:
        """Put all rows below `folder`."""
        raise NotImplementedError

    def open(self) -> None:
        """Make ready to read."""

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """These rows of each column, in this order, in memory."""
        raise NotImplementedError

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """All rows in order, a few at a time."""
        raise NotImplementedError


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
        import pyarrow as pa

        corpus = CorpusRecord(kind="benchmark", location="-", root="/", rows=rows, digest="-")
        record = create_store(self.folder, corpus, pa.table(index, schema=sample_schema(())))
        for slug in sorted({name.partition("_")[0] for name in features}):
            card = TeacherCard(
                slug=slug, source="-", weights_sha256="-", tokenizer_sha256="-", context_length=1, dim=dim,
                preprocessing=Preprocessing(image_size=(1, 1), mean=(0.5,), std=(0.5,)),
            )  # fmt: skip
            add_teacher(self.folder, record, card)
            for shard, span in enumerate(iter_shards(record)):
                part = [features[f"{slug}_{tower}"][span.start : span.stop] for tower in ("image", "text")]
                valid = np.full(len(span), 3, dtype=np.uint8)
                write_shard(
                    self.folder, record, card, shard, ShardFeatures(*part, valid), read_part(self.folder, shard)[1]
                )

    def open(self) -> None:
        """Map."""
        store = FeatureStore.open(self.folder)
        self.arrays = {}
        for slug in store.teachers:
            for tower in ("image", "text"):
                self.arrays[f"{slug}_{tower}"] = as_tensor(getattr(store, tower)(slug))

    batch = Memory.batch  # type: ignore[assignment]
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
        for start in range(0, self.arrays[columns[0]].shape[0], BATCH):
            futures = [self.arrays[name][start : start + BATCH].read() for name in columns]
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


def arrow_table(features: Features, rows: slice) -> Any:
    """Fixed-size lists of half floats."""
    import pyarrow as pa

    flat = {name: values[rows] for name, values in features.items()}
    lists = {n: pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), v.shape[1]) for n, v in flat.items()}
    return pa.table(lists)


def matrices(table: Any, columns: Sequence[str]) -> list[np.ndarray]:
    """Columns of fixed-size lists as arrays, without a loop over rows."""
    out = []
    for name in columns:
        column = table[name].combine_chunks()
        out.append(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1))
    return out


class HuggingFace(Layout):
    """`datasets`, saved to disk as Arrow, mapped by it."""

    name, needs = "HF datasets", ("datasets",)

    def write(self, features: Features) -> None:
        """As `Dataset.save_to_disk` does."""
        import datasets

        count = len(next(iter(features.values())))
        tables = [datasets.Dataset(arrow_table(features, slice(s, s + BATCH))) for s in range(0, count, BATCH)]
        datasets.disable_progress_bars()
        datasets.concatenate_datasets(tables).save_to_disk(str(self.folder))

    def open(self) -> None:
        """In Arrow's own format: no conversion to Python or to NumPy row by row."""
        import datasets

        self.data = datasets.load_from_disk(str(self.folder))
        self.views: dict[tuple[str, ...], Any] = {}

    def view(self, columns: Sequence[str]) -> Any:
        """Only these columns."""
        key = tuple(columns)
        if key not in self.views:
            self.views[key] = self.data.select_columns(list(columns)).with_format("arrow")
        return self.views[key]

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """A list of rows, as a batch sampler asks."""
        return matrices(self.view(columns)[rows.tolist()], columns)

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """Its own iterator over batches."""
        for table in self.view(columns).iter(batch_size=BATCH):
            yield [values.copy() for values in matrices(table, columns)]


class Lance(Layout):
    """A Lance data set."""

    name, needs = "Lance", ("lance",)

    def write(self, features: Features) -> None:
        """Batches of rows into one data set."""
        import lance

        count = len(next(iter(features.values())))
        for start in range(0, count, BATCH):
            table = arrow_table(features, slice(start, start + BATCH))
            lance.write_dataset(table, str(self.folder), mode="append" if start else "create")

    def open(self) -> None:
        """The data set."""
        import lance

        self.data = lance.dataset(str(self.folder))

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """`take`, which is what it is made for."""
        return matrices(self.data.take(rows.tolist(), columns=list(columns)), columns)

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """Record batches."""
        import pyarrow as pa

        for batch in self.data.to_batches(columns=list(columns), batch_size=BATCH):
            yield [values.copy() for values in matrices(pa.Table.from_batches([batch]), columns)]


class Safetensors(Layout):
    """Our export: one file for each shard and teacher, mapped by `safe_open`."""

    name, needs = "safetensors, shards held open", ("safetensors",)

    def write_from(self, store: Path) -> None:
        """`mmkd store export --layout safetensors`."""
        export_safetensors(FeatureStore.open(store), self.folder)

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


class Samples(Layout):
    """Base of layouts that keep one record a sample: rows are read one by one and stacked."""

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """One sample."""
        raise NotImplementedError

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """Row after row."""
        samples = [self.row(row, columns) for row in rows.tolist()]
        return [np.stack([np.asarray(sample[name]) for sample in samples]) for name in columns]

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """All in order."""
        for start in range(0, self.rows, BATCH):
            yield self.batch(np.arange(start, min(start + BATCH, self.rows)), columns)

    rows: int


class Original(Samples):
    """One `.pt` a sample with all teachers in float32, as the original release has it."""

    name = "per-sample .pt (the original)"
    DIM_PROJECTED = 512

    def write(self, features: Features) -> None:
        """Both files that the release has for each sample; only the first is read."""
        for row in range(len(next(iter(features.values())))):
            sample = {name: torch.from_numpy(v[row].astype(np.float32)) for name, v in features.items()}
            folder = self.folder / "features" / "f" / str(row)
            folder.mkdir(parents=True)
            torch.save(sample, folder / "clips_output.pt")
            torch.save({n: v[: self.DIM_PROJECTED].clone() for n, v in sample.items()}, folder / "clips_project_output.pt")

    def open(self) -> None:
        """Count."""
        self.rows = sum(1 for _ in (self.folder / "features/f").iterdir())

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The whole file for any of its teachers."""
        loaded: Mapping[str, Any] = torch.load(
            self.folder / "features/f" / str(row) / "clips_output.pt", weights_only=True
        )
        return loaded


class Mosaic(Samples):
    """MosaicML streaming's MDS shards."""

    name, needs = "mosaicml-streaming", ("streaming",)

    def write(self, features: Features) -> None:
        """Arrays of known shape, no compression."""
        from streaming import MDSWriter

        dim = next(iter(features.values())).shape[1]
        kinds = {name: f"ndarray:float16:{dim}" for name in features}
        with MDSWriter(out=str(self.folder), columns=kinds) as out:
            for row in range(len(next(iter(features.values())))):
                out.write({name: values[row] for name, values in features.items()})

    def open(self) -> None:
        """Local shards."""
        from streaming import StreamingDataset

        self.data = StreamingDataset(local=str(self.folder), batch_size=1, shuffle=False)
        self.rows = len(self.data)

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """Random access is its documented `dataset[row]`."""
        found: Mapping[str, Any] = self.data[row]
        return found


class Lit(Samples):
    """LitData's optimised chunks."""

    name, needs = "LitData", ("litdata",)

    def write(self, features: Features) -> None:
        """Its own writer, in this process."""
        from litdata.streaming.writer import BinaryWriter

        self.folder.mkdir(parents=True)
        writer = BinaryWriter(str(self.folder), chunk_bytes="64MB")
        for row in range(len(next(iter(features.values())))):
            writer[row] = {name: values[row] for name, values in features.items()}
        writer.done()
        writer.merge()

    def open(self) -> None:
        """Local chunks."""
        import litdata

        self.data = litdata.StreamingDataset(str(self.folder), shuffle=False)
        self.rows = len(self.data)

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """Random access is its documented `dataset[row]`."""
        found: Mapping[str, Any] = self.data[row]
        return found


class WebDataset(Layout):
    """Tars of one `.npy` a column and sample: a stream, shuffled by shards and in a buffer."""

    name, needs, stream_only = "webdataset (its shuffled stream)", ("webdataset",), True

    def write(self, features: Features) -> None:
        """`ShardWriter`."""
        import webdataset

        self.folder.mkdir(parents=True)
        pattern = str(self.folder / "%05d.tar")
        with webdataset.ShardWriter(pattern, maxcount=2048, verbose=0) as out:
            for row in range(len(next(iter(features.values())))):
                sample: dict[str, Any] = {"__key__": f"{row:08d}"}
                for name, values in features.items():
                    buffer = io.BytesIO()
                    np.save(buffer, values[row])
                    sample[f"{name}.npy"] = buffer.getvalue()
                out.write(sample)

    def open(self) -> None:
        """The list of shards."""
        self.shards = sorted(map(str, self.folder.glob("*.tar")))
        self.streams: dict[tuple[str, ...], Iterator[Any]] = {}

    def stream(self, columns: Sequence[str], shuffle: bool) -> Iterator[Any]:
        """Decoded samples of these columns, for ever when shuffled."""
        import webdataset

        data = webdataset.WebDataset(
            self.shards, shardshuffle=len(self.shards) if shuffle else False, seed=0, select_files=self._wanted(columns)
        )
        data = data.repeat().shuffle(1000) if shuffle else data
        return iter(data.decode().to_tuple(*(f"{name}.npy" for name in columns)))

    @staticmethod
    def _wanted(columns: Sequence[str]) -> Callable[[str], bool]:
        endings = tuple(f".{name}.npy" for name in columns)
        return lambda name: name.endswith(endings)

    def batch(self, rows: Rows, columns: Sequence[str]) -> list[Any]:
        """The next `len(rows)` samples."""
        stream = self.streams.setdefault(tuple(columns), self.stream(columns, shuffle=True))
        samples = [next(stream) for _ in rows]
        return [np.stack(values) for values in zip(*samples, strict=True)]

    def scan(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """In order."""
        waiting: list[Any] = []
        for sample in self.stream(columns, shuffle=False):
            waiting.append(sample)
            if len(waiting) == BATCH:
                yield [np.stack(values) for values in zip(*waiting, strict=True)]
                waiting = []
        if waiting:
            yield [np.stack(values) for values in zip(*waiting, strict=True)]


OVER_THE_STORE = (TensorStore, ZarrPython)
PEERS = (HuggingFace, Lance, *OVER_THE_STORE, Hdf5, Safetensors, WebDataset, Mosaic, Lit, Original)
