"""Where the images of a run lie: names and bytes of files, mapped from the run's folder or held for a few rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.distill.mapped import map_arrays


@dataclass(frozen=True)
class ImagePlaces:
    """Where the images of n rows lie. rows: int64 (n,) grid rows, ascending. uri: uint8, the names one after another;
    uri_starts: int64 (n + 1,). offset, length: int64 (n,), bytes into the file, -1 when the image is the whole file.
    folder: where they are mapped from, if they are."""

    rows: NDArray[np.int64]
    uri: NDArray[np.uint8]
    uri_starts: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    folder: Path | None = None

    @classmethod
    def of(cls, table: pa.Table) -> "ImagePlaces":
        """Take them from sample rows."""
        names = [(name or "").encode() for name in table["uri"].to_pylist()]
        starts = np.array([0, *map(len, names)], dtype=np.int64).cumsum()
        offset, length = (table[name].fill_null(-1).to_numpy() for name in ("offset", "length"))
        return cls(table["row"].to_numpy(), np.frombuffer(b"".join(names), np.uint8), starts, offset, length)

    @classmethod
    def map(cls, folder: Path) -> "ImagePlaces":
        """Map those of a run."""
        found, _ = map_arrays(folder)
        rows, uri, starts, offset, length = map(found.get, ("rows", "uri", "uri_starts", "offset", "length"))
        return cls(rows, uri, starts, offset, length, folder)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        """Send what is mapped by its folder: worker processes map it themselves."""
        if self.folder is not None:
            return ImagePlaces.map, (self.folder,)
        return ImagePlaces, (self.rows, self.uri, self.uri_starts, self.offset, self.length)

    def __getitem__(self, row: int) -> tuple[str, int | None, int | None]:
        """Return uri, offset and length of a grid row."""
        at = int(np.searchsorted(self.rows, row))
        name = self.uri[self.uri_starts[at] : self.uri_starts[at + 1]].tobytes().decode()
        offset, length = (int(column[at]) if column[at] >= 0 else None for column in (self.offset, self.length))
        return name, offset, length
