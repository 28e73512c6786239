"""List files: `NAME LABEL` a line, images in the folder that is called like the list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from mmkd.base.places.reading import join
from mmkd.extract.corpora.files import DICOM, PICTURES, FileCorpus
from mmkd.extract.corpora.row import CorpusRow, Part


class ListFileCorpus(FileCorpus):
    """`train.txt`, `test.txt` with images in `train/`, `test/`, as the sets released with MMKD-CLIP have it. Where
    there is no folder of the list's name, names are relative to the list. The last word of a line is the label, so that
    file names may hold blanks. Labels are `label` and `split` (the list's name)."""

    kind: Literal["listfile"] = "listfile"

    suffixes = (".txt",)
    named_by_rows = (*PICTURES, *DICOM)

    @property
    def labels(self) -> tuple[str, ...]:
        """`label` and `split`."""
        return ("label", "split")

    def parts(self) -> Sequence[Part]:
        """Return one for each list; its stamp identifies its bytes, so that a copy is the same corpus."""
        return [self.hashed_part(file) for file in self.listed()]

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """Yield one row per line that is not blank; a failed one for a line of a single word."""
        folder, _, name = part.name.rpartition("/")
        split = name.rpartition(".")[0]
        before = "/".join(step for step in (folder, split) if step)
        if not join(self.base, before).is_dir():
            before = folder
        with self.opened(part) as file:
            for number, line in enumerate(file, 1):
                words = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").strip().rsplit(None, 1)
                if not words:
                    continue
                path = f"{before}/{words[0]}" if before else words[0]
                labelled = len(words) == 2
                yield CorpusRow(
                    key=path if labelled else f"{part.name}:{number}",
                    caption=None,
                    uri=path if labelled else None,
                    labels={"label": words[1] if labelled else None, "split": split},
                    fault=None if labelled else "row: expected a file name and a label",
                )
