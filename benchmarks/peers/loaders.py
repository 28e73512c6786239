"""Layouts of tables and of samples: HF datasets, Lance, webdataset, MosaicML streaming, LitData, per-sample `.pt`."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmkd.benchmarks.peers.layouts import BATCH, Features, Layout, Rows


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


class Samples(Layout):
    """Base of layouts that keep one record a sample: rows are read one by one and stacked."""

    row_by_row = True

    @abstractmethod
    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """One sample."""

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
    most_rows = 4096
    DIM_PROJECTED = 512

    def write(self, features: Features) -> None:
        """Both files that the release has for each sample; only the first is read."""
        for row in range(len(next(iter(features.values())))):
            sample = {name: torch.from_numpy(v[row].astype(np.float32)) for name, v in features.items()}
            folder = self.folder / "features" / "f" / str(row)
            folder.mkdir(parents=True)
            torch.save(sample, folder / "clips_output.pt")
            torch.save(
                {n: v[: self.DIM_PROJECTED].clone() for n, v in sample.items()}, folder / "clips_project_output.pt"
            )

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
        kinds = dict.fromkeys(features, f"ndarray:float16:{dim}")
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

    name, needs = "webdataset (its shuffled stream)", ("webdataset",)
    row_by_row = stream_only = True

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


LOADERS = (HuggingFace, Lance, WebDataset, Mosaic, Lit, Original)
