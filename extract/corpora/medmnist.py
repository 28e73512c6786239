"""MedMNIST's archives: `{train,val,test}_images` and `{train,val,test}_labels` in one `.npz`."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorpusError
from mmkd.base.images.npz import DAMAGED, array_header
from mmkd.base.images.uri import ARRAY, fragment
from mmkd.base.places.reading import open_file
from mmkd.extract.corpora.files import FileCorpus, unlistable
from mmkd.extract.corpora.row import CorpusRow, Part

_SPLITS = ("train", "val", "test")


class MedMnistCorpus(FileCorpus):
    """One `.npz`. Labels (n,) or (n, 1) are `label`, labels (n, L) are `label_0`, `label_1`, ...; and `split`. Values
    are the archive's numbers, or names where it also holds an array `classes`."""

    kind: Literal["medmnist"] = "medmnist"

    suffixes = (".npz",)

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """The label columns, then `split`."""
        widths = {split: _width(values) for split, values in self._labels.items()}
        if len(set(widths.values())) > 1:
            raise CorpusError(f"{self.path}: the splits have labels of different widths {widths}; expected one width")
        width = next(iter(widths.values()))
        return (*(("label",) if width == 1 else (f"label_{i}" for i in range(width))), "split")

    def parts(self) -> Sequence[Part]:
        """Return one for each split of the archive; all have the file's stamp."""
        files = self.listed()
        if len(files) != 1:
            raise CorpusError(f"{self.path} holds {len(files)} .npz files; name the one that is meant")
        return [Part(split, files[0].size, files[0].stamp) for split in self._labels]

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """Yield one row for every picture of a split."""
        values = self._labels[part.name]
        values = values.reshape(len(values), _width(values))
        name = self.listed()[0].name
        for row, numbers in enumerate(values.tolist()):
            labels: dict[str, str | None] = dict(zip(self.labels, map(self._named, numbers), strict=False))
            yield CorpusRow(
                key=f"{part.name}/{row}",
                caption=None,
                uri=name + fragment(ARRAY, f"{part.name}_images", row),
                labels=labels | {"split": part.name},
            )

    def _named(self, value: int) -> str:
        names = self._arrays.get("classes")
        return str(names[value]) if names is not None and 0 <= value < len(names) else str(value)

    @functools.cached_property
    def _labels(self) -> dict[str, NDArray[Any]]:
        """Labels by split; each has as many rows as the split has pictures. Raises CorpusError if there is no split, a
        split without labels, or labels that are not whole numbers."""
        found = {split: self._arrays[f"{split}_labels"] for split in _SPLITS if f"{split}_labels" in self._arrays}
        for split, values in found.items():
            if values.dtype.kind not in "biu" or values.ndim not in (1, 2):
                raise CorpusError(
                    f"{self.path}: {split}_labels is {values.dtype} {values.shape}, expected integers (n,) or (n, L)"
                )
        return {split: values.astype(np.int64) for split, values in found.items()}

    @functools.cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        """The small arrays: labels and class names. Pictures are looked at by their headers only."""
        try:
            with open_file(self.place) as file, zipfile.ZipFile(file) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                pictured = [split for split in _SPLITS if f"{split}_images" in names]
                arrays = {}
                for name in {"classes", *(f"{split}_labels" for split in pictured)} & set(names):
                    with archive.open(f"{name}.npy") as stream:
                        arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
                for split in pictured:
                    self._check_pictures(split, array_header(archive, f"{split}_images"), arrays)
        except OSError as error:
            raise unlistable(self.place, error) from error
        except DAMAGED as error:
            raise CorpusError(f"{self.path} is not an .npz of plain arrays: {error}; download it again") from error
        if not pictured:
            raise CorpusError(
                f"{self.path} holds {', '.join(names[:10]) or 'nothing'}; expected MedMNIST's arrays, "
                "such as test_images and test_labels"
            )
        return arrays

    def _check_pictures(self, split: str, header: tuple[Any, ...], arrays: dict[str, NDArray[Any]]) -> None:
        _, shape, dtype = header
        if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)):
            raise CorpusError(
                f"{self.path}: {split}_images is {dtype} {shape}, expected uint8 (n, height, width) or (n, height, "
                "width, 3); volumes are not read"
            )
        labels = arrays.get(f"{split}_labels")
        if labels is None or len(labels) != shape[0]:
            got = "no labels" if labels is None else f"{len(labels)} labels"
            raise CorpusError(f"{self.path}: {split} has {shape[0]} images and {got}; expected a label for each")


def _width(values: NDArray[Any]) -> int:
    return 1 if values.ndim == 1 else int(values.shape[1])
