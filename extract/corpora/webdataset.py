"""Corpora in WebDataset tars. Tars are never unpacked: the index remembers where in which tar each image lies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from mmkd.extract.corpora.row import CorpusRow, Ignored, Part
from mmkd.extract.corpora.samples import MAX_SIDECAR_BYTES, SampleCorpus
from mmkd.extract.corpora.tar import Damage, Member, tar_members

# Sidecars are kept while their tar is listed, so that it is read once and forwards; further ones are read again.
_KEPT_BYTES = 1 << 28


class WebDatasetCorpus(SampleCorpus):
    """A tar, or all tars of a folder and the folders below it, in the order of their paths."""

    kind: Literal["webdataset"] = "webdataset"
    shard_keys: bool = False
    """Keys are `TAR/KEY`, for tars that number their samples alike."""

    suffixes = (".tar",)

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """One row per sample that has an image or a caption; a last failed one where the tar is damaged.

        Raises:
            CorpusError: the file is not an uncompressed tar.
        """
        with self.opened(part) as file:
            members: list[Member] = []
            texts: dict[int, bytes] = {}
            room, damage = _KEPT_BYTES, None
            for member in tar_members(file, part.name):
                if isinstance(member, Ignored):
                    yield member
                elif isinstance(member, Damage):
                    damage = member
                else:
                    members.append(member)
                    if self.is_sidecar(member.name) and member.size <= min(MAX_SIDECAR_BYTES, room):
                        file.seek(member.offset)  # the listing finds its own place again
                        texts[member.offset] = file.read(member.size)
                        room -= member.size

            def read(member: Member) -> bytes | str:
                data = texts.get(member.offset)
                if data is None:
                    file.seek(member.offset)
                    data = file.read(member.size)
                return data if len(data) == member.size else "archive ends inside this member"

            before = f"{part.name.removesuffix('.tar')}/" if self.shard_keys else ""
            for sample in self.samples(members):
                if isinstance(sample, Ignored):
                    yield sample
                    continue
                row = CorpusRow(before + sample[0], None, None)
                yield from self.sample_rows(
                    row, sample[1], read, lambda image: {"uri": part.name, "offset": image.offset, "length": image.size}
                )
            if damage is not None:
                fault = "archive: ends early or is damaged, what follows is lost"
                yield CorpusRow(f"{part.name}#{damage.offset}", None, None, fault=fault)
