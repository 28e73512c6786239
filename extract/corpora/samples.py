"""Samples made of members that share a key, in a tar or in a folder: `KEY.jpg` beside `KEY.txt` or `KEY.json`."""

from __future__ import annotations

import dataclasses
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping

from mmkd.extract.corpora.files import DICOM, PICTURES, TEXTS, FileCorpus, suffix_of
from mmkd.extract.corpora.row import (
    CAPTION_FAULT,
    Choice,
    CorpusRow,
    Ignored,
    as_label,
    caption_rows,
    decode_text,
    first_text,
)
from mmkd.extract.corpora.tar import Member

MAX_SIDECAR_BYTES = 1 << 20
"""A sidecar is a caption or a page of metadata; longer ones are not read."""

Sample = dict[str, Member]
Read = Callable[[Member], bytes | str]
"""Bytes of a sidecar, or why they cannot be read."""


class SampleCorpus(FileCorpus):
    """Fields that say which member of a sample is what.

    A key is the member's path without its last known suffix: that of an image or a text, or a name given here.
    """

    caption_field: str = "caption"
    """Field of the JSON sidecar that holds the caption or a list of them; a text sidecar goes before it."""
    captions: Choice = "first"
    """`first`: a text sidecar is one caption, and of a list the first counts. `each`: every line of a text and every
    element of a list has its row; CLIP_benchmark's retrieval sets are written so."""
    image_members: tuple[str, ...] = ()
    """Members that are the image, such as `left.jpg`: the first that is there; known suffixes when not given."""
    caption_members: tuple[str, ...] = ()
    """Members that are the caption, such as `output.txt` or `report.json`; known suffixes when not given."""
    modality_field: str | None = None
    """Field of the JSON sidecar; `modality`, else `image_secondary_label` (BIOMEDICA), when not given."""
    label_fields: tuple[str, ...] = ()
    """Fields of the JSON sidecar that pass into the sample table."""
    label_members: tuple[str, ...] = ()
    """Members that pass into it as text, such as `cls`."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The label fields, then the label members."""
        return (*self.label_fields, *self.label_members)

    def samples(self, members: Iterable[Member]) -> Iterator[tuple[str, Sample] | Ignored]:
        """Members by key, in the order of the keys' first members; those that belong to no sample are ignored.

        A member that its sample has already begins a further sample of the same key.
        """
        found: dict[str, list[Sample]] = {}
        order: list[tuple[str, Sample]] = []
        for member in members:
            stem, name = self._parsed(member.name)
            if not name:
                hidden = member.name.rpartition("/")[2].startswith(".")
                reason = "hidden" if hidden else f"{suffix_of(member.name)} is not read"
                yield Ignored(f"member: {reason}", member.name)
                continue
            same = found.setdefault(stem, [])
            sample = next((sample for sample in same if name not in sample), None)
            if sample is None:
                sample = {}
                same.append(sample)
                order.append((stem, sample))
            sample[name] = member
        yield from order

    def sample_rows(
        self, row: CorpusRow, sample: Sample, read: Read, located: Callable[[Member], Mapping[str, object]]
    ) -> Iterator[CorpusRow | Ignored]:
        """Rows of one sample, and its members that are not used.

        Args:
            row: with the key.
            sample: its members.
            read: reads a sidecar.
            located: `uri`, `offset` and `length` of an image.
        """
        image = next((name for name in self._images if name in sample), None)
        texts = [name for name in self._texts if name in sample]
        used = {image, *texts[:1], "json", *self.label_members}
        for name in (name for name in sample if name not in used):
            kind = "image" if name in self._images else "caption" if name in self._texts else None
            reason = f"a further {kind} of its sample" if kind else "not among `image_members`, `caption_members`"
            yield Ignored(f"member: {reason}", sample[name].name)
        sidecars = [name for name in dict.fromkeys([*texts[:1], "json"]) if name.endswith("json") and name in sample]
        if image is None and not texts:
            reason = "member: of a sample without image and caption"
            yield from (Ignored(reason, sample[name].name) for name in sample if name in used)
            return
        content, fault = _sidecar(sample[sidecars[0]], read) if sidecars else ({}, None)
        fields = [self.modality_field] if self.modality_field else ["modality", "image_secondary_label"]
        if fault is not None and sidecars != texts[:1]:
            yield Ignored(fault.replace(CAPTION_FAULT, "member: "), sample["json"].name)
        read_fields = {*self.label_fields, *fields, *([self.caption_field] if texts[0:1] == sidecars else [])}
        further = [name for name in content if name not in read_fields]
        if further:
            yield Ignored("field: of a JSON sidecar, not among `label_fields`", further[0][:60], len(further))
        labels = {name: as_label(content.get(name)) for name in self.label_fields}
        for name in self.label_members:
            labels[name] = decode_text(_bytes(sample[name], read)[0]).strip() if name in sample else None
        place = {} if image is None else located(sample[image])
        modality = next((found for name in fields if (found := first_text(content.get(name)))), None)
        row = dataclasses.replace(row, modality=modality, labels=labels, **place)  # type: ignore[arg-type]
        if not texts:
            yield row
            return
        caption: object
        if texts[0].endswith("json"):
            caption = content.get(self.caption_field)
            if fault is None and self.caption_field not in content:
                fault = f"{CAPTION_FAULT}sidecar has no field {self.caption_field!r}"
        else:
            data, fault = _bytes(sample[texts[0]], read)
            caption = decode_text(data)
            caption = caption.splitlines() if self.captions == "each" else caption
        yield from caption_rows(dataclasses.replace(row, fault=fault), None if fault else caption, self.captions)

    def is_sidecar(self, path: str) -> bool:
        """True for a member that is read while the corpus is listed."""
        member = self._parsed(path)[1]
        return bool(member) and member not in self._images

    @property
    def _images(self) -> tuple[str, ...]:
        return self.image_members or tuple(suffix[1:] for suffix in (*PICTURES, *DICOM))

    @property
    def _texts(self) -> tuple[str, ...]:
        return self.caption_members or tuple(suffix[1:] for suffix in TEXTS)

    def _parsed(self, path: str) -> tuple[str, str]:
        """Key and member of a path; no member where its suffix is not known."""
        folder, slash, name = path.rpartition("/")
        lower = name.lower()
        known = (*self.image_members, *self.caption_members, *self.label_members)
        member = max((one for one in known if lower.endswith(f".{one.lower()}")), key=len, default="")
        if not member and f".{lower.rpartition('.')[2]}" in (*PICTURES, *DICOM, *TEXTS):
            member = lower.rpartition(".")[2]
        stem = name[: -len(member) - 1]
        known = bool(member and stem) and not name.startswith(".")
        return (posixpath.normpath(f"{folder}{slash}{stem}"), member) if known else ("", "")


def _bytes(member: Member, read: Read) -> tuple[bytes, str | None]:
    if member.size > MAX_SIDECAR_BYTES:
        return b"", f"{CAPTION_FAULT}sidecar larger than {MAX_SIDECAR_BYTES >> 20} MB"
    data = read(member)
    return (b"", f"{CAPTION_FAULT}{data}") if isinstance(data, str) else (data, None)


def _sidecar(member: Member, read: Read) -> tuple[dict[str, object], str | None]:
    data, fault = _bytes(member, read)
    if fault is not None:
        return {}, fault
    try:
        content = json.loads(decode_text(data))
    except (ValueError, RecursionError):
        return {}, f"{CAPTION_FAULT}sidecar is not JSON"
    return (content, None) if isinstance(content, dict) else ({}, f"{CAPTION_FAULT}sidecar is not a JSON object")
