"""MedMNIST's archives: `{train,val,test}_images` and `{train,val,test}_labels` in one `.npz`."""

import functools
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorpusError
from mmkd.base.images.cells import DAMAGED_NPZ, array_header
from mmkd.base.images.uri import ARRAY, fragment
from mmkd.extract.corpora.files import FileCorpus, corpus_errors
from mmkd.extract.corpora.row import CorpusRow, Ignored, Part


class MedMnistCorpus(FileCorpus):
    """One `.npz`. Labels (n,) or (n, 1) are `label`, labels (n, L) are `label_0`, `label_1`, ...; and `split`. Values
    are the archive's numbers, or names where it also holds an array `classes`."""

    kind: Literal["medmnist"] = "medmnist"

    suffixes = (".npz",)

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        widths = {split: values.shape[1] for split, values in self._labels.items()}
        if len(set(widths.values())) > 1:
            raise CorpusError(f"{self.path}: the splits have labels of different widths {widths}; expected one width")
        width = next(iter(widths.values()))
        return (*(("label",) if width == 1 else (f"label_{i}" for i in range(width))), "split")

    def parts(self) -> Sequence[Part]:
        """Return one for each split of the archive; all have the file's stamp."""
        return [Part(split, self._file.size, self._file.stamp) for split in self._labels]

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        names = self._content[1].get("classes", ())
        for row, numbers in enumerate(self._labels[part.name].tolist()):
            texts = [str(names[value]) if 0 <= value < len(names) else str(value) for value in numbers]
            yield CorpusRow(
                key=f"{part.name}/{row}",
                caption=None,
                uri=self._file.name + fragment(ARRAY, f"{part.name}_images", row),
                labels=dict(zip(self.labels, [*texts, part.name], strict=True)),
            )

    def ignored(self) -> Iterator[Ignored]:
        yield from super().ignored()
        members, arrays = self._content
        read = {*arrays, *(f"{split}_images" for split in self._labels)}
        for name in members:
            if name.removesuffix(".npy") not in read:
                yield Ignored("array: neither the images nor the labels of a split", name)

    @functools.cached_property
    def _file(self) -> Part:
        files = super().parts()
        if len(files) != 1:
            raise CorpusError(f"{self.path} holds {len(files)} .npz files; name the one that is meant")
        return files[0]

    @functools.cached_property
    def _labels(self) -> dict[str, NDArray[np.int64]]:
        """Labels (n, L) by split; each has as many rows as the split has pictures."""
        found = {name.removesuffix("_labels"): values for name, values in self._content[1].items() if name != "classes"}
        for split, values in found.items():
            if values.dtype.kind not in "biu" or values.ndim not in (1, 2):
                raise CorpusError(
                    f"{self.path}: {split}_labels is {values.dtype} {values.shape}, expected integers (n,) or (n, L)"
                )
        return {name: np.atleast_2d(values.astype(np.int64).T).T for name, values in found.items()}

    @functools.cached_property
    def _content(self) -> tuple[list[str], dict[str, NDArray[Any]]]:
        """Members of the archive, and its small arrays: labels and class names. Of pictures only headers are read."""
        arrays: dict[str, NDArray[Any]] = {}
        try:
            with corpus_errors(self.place), self.open_part(self._file) as file, zipfile.ZipFile(file) as archive:
                members = archive.namelist()
                pictured = [split for split in ("train", "val", "test") if f"{split}_images.npy" in members]
                for name in ("classes", *(f"{split}_labels" for split in pictured)):
                    if f"{name}.npy" in members:
                        with archive.open(f"{name}.npy") as stream:
                            arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
                headers = {split: array_header(archive, f"{split}_images") for split in pictured}
        except DAMAGED_NPZ as error:
            raise CorpusError(f"{self.path} is not an .npz of plain arrays: {error}; download it again") from error
        if not pictured:
            found = ", ".join(name.removesuffix(".npy") for name in members[:10]) or "nothing"
            raise CorpusError(
                f"{self.path} holds {found}; expected MedMNIST's arrays, such as test_images and test_labels"
            )
        for split, (_, shape, dtype) in headers.items():
            if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)):
                raise CorpusError(
                    f"{self.path}: {split}_images is {dtype} {shape}, expected uint8 (n, height, width) or (n, height, "
                    "width, 3); volumes are not read"
                )
            if (labels := arrays.get(f"{split}_labels")) is None or len(labels) != shape[0]:
                got = "no labels" if labels is None else f"{len(labels)} labels"
                raise CorpusError(f"{self.path}: {split} has {shape[0]} images and {got}; expected a label for each")
        return members, arrays
