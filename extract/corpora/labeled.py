"""Images with a class each: ImageFolder, where the folder of an image is its class, and list files of `NAME LABEL`."""

from collections.abc import Iterator, Sequence
from typing import Literal

from mmkd.base.places.reading import join
from mmkd.extract.corpora.files import DICOM, PICTURES, FileCorpus, folder_parts
from mmkd.extract.corpora.row import CorpusRow, Part

_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class LabeledCorpus(FileCorpus):
    """Images with the labels `label` and `split`."""

    @property
    def labels(self) -> tuple[str, ...]:
        return ("label", "split")


class ImageFolderCorpus(LabeledCorpus):
    """`CLASS/.../x.png`, or `train/CLASS/.../x.png` where every top folder is named like a split, in the order of their
    paths. `split` is null without splits."""

    kind: Literal["imagefolder"] = "imagefolder"
    split_folders: bool | None = None
    """True when the top folders are splits and classes lie below them; when not given, their names decide."""

    suffixes = (*PICTURES, *DICOM)

    def parts(self) -> Sequence[Part]:
        return folder_parts(self.folders)

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        if (split := self.split_folders) is None:
            split = all(name.lower() in _SPLITS for name in self.folders if name)
        for file in self.folders[part.name]:
            steps = [*file.name.split("/")[:-1], None, None]
            labels = {"label": steps[1 if split else 0], "split": steps[0] if split else None}
            yield CorpusRow(key=file.name, caption=None, uri=file.name, labels=labels)


class ListFileCorpus(LabeledCorpus):
    """`train.txt`, `test.txt` with images in `train/`, `test/`, as the sets released with MMKD-CLIP have it. Where
    there is no folder of the list's name, names are relative to the list. The last word of a line is the label, so that
    file names may hold blanks. `split` is the list's name."""

    kind: Literal["listfile"] = "listfile"

    suffixes = (".txt",)
    named_by_rows = (*PICTURES, *DICOM)
    by_content = True

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """Yield one row per line that is not blank; a failed one for a line of a single word."""
        folder, _, name = part.name.rpartition("/")
        split = name.rpartition(".")[0]
        before = "/".join(step for step in (folder, split) if step)
        if not join(self.base, before).is_dir():
            before = folder
        with self.open_part(part) as file:
            for number, line in enumerate(file, 1):
                words = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").strip().rsplit(None, 1)
                if len(words) == 2:
                    path = f"{before}/{words[0]}" if before else words[0]
                    yield CorpusRow(path, None, path, labels={"label": words[1], "split": split})
                elif words:
                    fault = "row: expected a file name and a label"
                    labels = {"label": None, "split": split}
                    yield CorpusRow(f"{part.name}:{number}", None, None, labels=labels, fault=fault)
