"""Corpora in WebDataset tars: `KEY.jpg` beside `KEY.txt` or `KEY.json`.

Tars are never unpacked: the index remembers where in which tar each image lies. A sample's key is
the member's path up to the first dot of its last component, as the webdataset library has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import IO, Literal

from mmkd.extract.corpora.captions import Captions, caption_list, caption_rows
from mmkd.extract.corpora.files import FileCorpus
from mmkd.extract.corpora.row import CAPTION_FAULT, CorpusRow, Part, as_label, first_text
from mmkd.extract.corpora.suffixes import PICTURES
from mmkd.extract.corpora.tar import Damage, Member, tar_members

_IMAGES = tuple(suffix[1:] for suffix in (*PICTURES, ".dcm"))
# A sidecar is a caption or a page of metadata; what is longer is not read.
_MAX_SIDECAR_BYTES = 1 << 20


class WebDatasetCorpus(FileCorpus):
    """A tar, or all tars of a folder and the folders below it, in the order of their paths."""

    kind: Literal["webdataset"] = "webdataset"
    caption_field: str = "caption"
    """Field of the JSON sidecar that holds the caption or a list of them; a `.txt` member goes before it."""
    captions: Captions = "first"
    """`first`: a `.txt` is one caption, and of a list the first counts. `each`: every line of a `.txt` and every
    element of a list has its row; CLIP_benchmark's retrieval sets are written so."""
    modality_field: str | None = None
    """Field of the JSON sidecar; `modality`, else `image_secondary_label` (BIOMEDICA), when not given."""
    label_fields: tuple[str, ...] = ()
    """Fields of the JSON sidecar that pass into the sample table."""
    label_members: tuple[str, ...] = ()
    """Suffixes of members that pass into it as text, such as `cls`."""

    suffixes = (".tar",)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label fields, then the label members."""
        return (*self.label_fields, *self.label_members)

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """One row per sample that has an image or a caption; a last failed one where the tar is damaged.

        Raises:
            CorpusError: the file is not an uncompressed tar.
        """
        with self.opened(part) as file:
            for key, members in _samples(tar_members(file, part.name)):
                if isinstance(members, Damage):
                    yield CorpusRow(
                        key=f"{part.name}#{members.offset}",
                        caption=None,
                        uri=None,
                        fault="archive: ends early or is damaged, what follows is lost",
                    )
                else:
                    yield from self._rows(file, part.name, key, members)

    def _rows(self, file: IO[bytes], tar: str, key: str, members: Mapping[str, Member]) -> Iterator[CorpusRow]:
        image = next((members[suffix] for suffix in _IMAGES if suffix in members), None)
        # Sidecars are read while the archive is listed; the listing finds its own place again.
        sidecar, fault = _sidecar(file, members.get("json"))
        texts = {suffix: _read(file, members.get(suffix)) for suffix in ("txt", *self.label_members)}
        captions: list[str] | None = None
        if "txt" in members:
            text, fault = texts["txt"]
            whole = text.decode("utf-8", "replace")
            captions = caption_list(whole.splitlines() if self.captions == "each" else whole)
        elif "json" in members:
            captions = caption_list(sidecar.get(self.caption_field))
        if image is None and captions is None:
            return
        fields = [self.modality_field] if self.modality_field else ["modality", "image_secondary_label"]
        row = CorpusRow(
            key=key,
            caption=None,
            uri=None if image is None else tar,
            offset=None if image is None else image.offset,
            length=None if image is None else image.size,
            modality=next((found for name in fields if (found := first_text(sidecar.get(name)))), None),
            labels={name: as_label(sidecar.get(name)) for name in self.label_fields}
            | {
                name: texts[name][0].decode("utf-8", "replace").strip() if name in members else None
                for name in self.label_members
            },
            fault=None if captions is None else fault,
        )
        if captions is None:
            yield row
        else:
            yield from caption_rows(row, captions if fault is None else [], self.captions)


def _samples(members: Iterator[Member | Damage]) -> Iterator[tuple[str, dict[str, Member] | Damage]]:
    """Group neighbouring members by key. A tar that is cut off gives what comes before the cut, then the damage."""
    key: str | None = None
    group: dict[str, Member] = {}
    for member in members:
        if isinstance(member, Damage):
            if key is not None:
                yield key, group
            yield "", member
            return
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not stem or not suffix:
            continue
        member_key = f"{folder}/{stem}" if folder else stem
        if key is not None and member_key != key:
            yield key, group
            group = {}
        key = member_key
        group[suffix.lower()] = member
    if key is not None:
        yield key, group


def _read(file: IO[bytes], member: Member | None) -> tuple[bytes, str | None]:
    if member is None:
        return b"", None
    if member.size > _MAX_SIDECAR_BYTES:
        return b"", f"{CAPTION_FAULT}sidecar larger than {_MAX_SIDECAR_BYTES >> 20} MB"
    file.seek(member.offset)
    data = file.read(member.size)
    return (data, None) if len(data) == member.size else (b"", f"{CAPTION_FAULT}archive ends inside this member")


def _sidecar(file: IO[bytes], member: Member | None) -> tuple[dict[str, object], str | None]:
    data, fault = _read(file, member)
    if member is None or fault is not None:
        return {}, fault
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}, f"{CAPTION_FAULT}sidecar is not JSON"
    return (content, None) if isinstance(content, dict) else ({}, f"{CAPTION_FAULT}sidecar is not a JSON object")
