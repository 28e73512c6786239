"""Pairs side by side in a folder, as img2dataset's `files` format: `x.jpg` beside `x.txt`, `x.caption` or `x.json`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Literal

from mmkd.base.errors import UnreachableError
from mmkd.base.places.reading import Listed, join, read_range
from mmkd.extract.corpora.image_folder import by_top_folder, folder_parts
from mmkd.extract.corpora.row import CorpusRow, Ignored, Part
from mmkd.extract.corpora.samples import SampleCorpus
from mmkd.extract.corpora.tar import Member


class PairsCorpus(SampleCorpus):
    """Every image and every text below a folder; those of one path without suffix are a pair."""

    kind: Literal["pairs"] = "pairs"

    def _takes(self, name: str) -> bool:
        return bool(self._parsed(name)[1])

    def parts(self) -> Sequence[Part]:
        """One for each top folder."""
        return folder_parts(self._folders)

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """One row per image or text, or pair of them."""
        for sample in self.samples(Member(file.name, 0, file.size) for file in self._folders[part.name]):
            if isinstance(sample, Ignored):
                yield sample
            else:
                yield from self.sample_rows(
                    CorpusRow(sample[0], None, None), sample[1], self._read, lambda image: {"uri": image.name}
                )

    def _read(self, member: Member) -> bytes | str:
        try:
            return read_range(join(self.base, member.name), 0, member.size)
        except UnreachableError:
            return "cannot be read (the service did not answer)"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"

    @functools.cached_property
    def _folders(self) -> dict[str, list[Listed]]:
        return by_top_folder(self.listed())
