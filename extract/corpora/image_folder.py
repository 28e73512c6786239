"""ImageFolder: the folder that an image lies in is its class."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from mmkd.base.places.reading import Listed
from mmkd.extract.corpora.files import DICOM, PICTURES, FileCorpus
from mmkd.extract.corpora.row import CorpusRow, Part

_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class ImageFolderCorpus(FileCorpus):
    """`CLASS/.../x.png`, or `train/CLASS/.../x.png` where every top folder is named like a split. Rows come in the
    order of their paths; labels are `label` and `split` (null without splits)."""

    kind: Literal["imagefolder"] = "imagefolder"
    split_folders: bool | None = None
    """True when the top folders are splits and classes lie below them; when not given, their names decide."""

    suffixes = (*PICTURES, *DICOM)

    @property
    def labels(self) -> tuple[str, ...]:
        """`label` and `split`."""
        return ("label", "split")

    def parts(self) -> Sequence[Part]:
        """Return one for each top folder."""
        return folder_parts(self._folders)

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """Yield one row per image of this top folder."""
        folders = self._folders
        split = self.split_folders
        if split is None:
            split = all(name.lower() in _SPLITS for name in folders if name)
        for file in folders[part.name]:
            steps = file.name.split("/")[:-1]
            yield CorpusRow(
                key=file.name,
                caption=None,
                uri=file.name,
                labels={
                    "label": (steps[1] if len(steps) > 1 else None) if split else (steps[0] if steps else None),
                    "split": steps[0] if split and steps else None,
                },
            )

    @functools.cached_property
    def _folders(self) -> dict[str, list[Listed]]:
        return by_top_folder(self.listed())


def by_top_folder(files: Iterable[Listed]) -> dict[str, list[Listed]]:
    """Return files by top folder, '' for those beside the folders; both in order."""
    found = defaultdict(list)
    for file in files:
        found[file.name.rpartition("/")[0].split("/")[0]].append(file)
    return dict(sorted(found.items()))


def folder_parts(folders: Mapping[str, Sequence[Listed]]) -> list[Part]:
    """Return a part for each top folder; its stamp is a hash over its files' names, sizes and stamps."""
    return [
        Part(name, sum(file.size for file in files), hashlib.sha256(repr(files).encode()).hexdigest())
        for name, files in folders.items()
    ]
