"""Samples made of members that share a key, in a tar (WebDataset) or a folder: `KEY.jpg`, `KEY.txt`, `KEY.json`."""

from __future__ import annotations

import dataclasses
import functools
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from mmkd.base.errors import UnreachableError
from mmkd.base.places.reading import Listed, join, read_range
from mmkd.extract.corpora.files import DICOM, PICTURES, TEXTS, FileCorpus, suffix_of
from mmkd.extract.corpora.image_folder import by_top_folder, folder_parts
from mmkd.extract.corpora.row import (
    CAPTION_FAULT,
    Choice,
    CorpusRow,
    Ignored,
    Part,
    as_label,
    caption_rows,
    decode_text,
    first_text,
)
from mmkd.extract.corpora.tar import Damage, Member, tar_members

# A sidecar is a caption or a page of metadata; longer ones are not read.
_MAX_SIDECAR_BYTES = 1 << 20
# Sidecars are kept while their tar is listed, so that it is read once and forwards; further ones are read again.
_KEPT_BYTES = 1 << 28

Sample = dict[str, Member]
Read = Callable[[Member], bytes | str]
"""Bytes of a sidecar, or why they cannot be read."""


class SampleCorpus(FileCorpus):
    """Fields that say which member of a sample is what. A key is the member's path without its last known suffix: that
    of an image or a text, or a name given here."""

    caption_field: str = "caption"
    """Field of the JSON sidecar that holds the caption or a list of them; a text sidecar takes precedence."""
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
        """Yield members by key, in the order of the keys' first members; those that belong to no sample are ignored. A
        member that its sample has already begins a further sample of the same key."""
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
        """Yield rows of one sample, and its members that are not used.

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
        if image is None and not texts:
            reason = "member: of a sample without image and caption"
            yield from (Ignored(reason, sample[name].name) for name in sample if name in used)
            return
        sidecars = [name for name in dict.fromkeys([*texts[:1], "json"]) if name.endswith("json") and name in sample]
        yield from (Ignored("member: a further sidecar of its sample", sample[name].name) for name in sidecars[1:])
        content, fault = _sidecar(sample[sidecars[0]], read) if sidecars else ({}, None)
        has_caption = bool(texts) and texts[0] in sidecars
        if fault is not None and not has_caption:
            yield Ignored(fault.replace(CAPTION_FAULT, "member: "), sample[sidecars[0]].name)
        fields = [self.modality_field] if self.modality_field else ["modality", "image_secondary_label"]
        read_fields = {*self.label_fields, *fields, *([self.caption_field] if has_caption else [])}
        further = [name for name in content if name not in read_fields]
        if further:
            yield Ignored("field: of a JSON sidecar, not among `label_fields`", further[0][:60], len(further))
        labels = {name: as_label(content.get(name)) for name in self.label_fields}
        for name in self.label_members:
            data, problem = _bytes(sample[name], read) if name in sample else (b"", None)
            labels[name] = decode_text(data).strip() if name in sample and problem is None else None
            if problem is not None:
                yield Ignored(problem.replace(CAPTION_FAULT, "member: "), sample[name].name)
        place = {} if image is None else located(sample[image])
        modality = next((found for name in fields if (found := first_text(content.get(name)))), None)
        row = dataclasses.replace(row, modality=modality, labels=labels, **place)  # type: ignore[arg-type]
        if not texts:
            yield row
            return
        caption: object
        if has_caption:
            caption = content.get(self.caption_field)
            if fault is None and self.caption_field not in content:
                fault = f"{CAPTION_FAULT}sidecar has no field {self.caption_field!r}"
        else:
            data, fault = _bytes(sample[texts[0]], read)
            caption = decode_text(data)
            caption = caption.splitlines() if self.captions == "each" else caption
        yield from caption_rows(dataclasses.replace(row, fault=fault), None if fault else caption, self.captions)

    @property
    def _images(self) -> tuple[str, ...]:
        return self.image_members or tuple(suffix[1:] for suffix in (*PICTURES, *DICOM))

    @property
    def _texts(self) -> tuple[str, ...]:
        return self.caption_members or tuple(suffix[1:] for suffix in TEXTS)

    def _parsed(self, path: str) -> tuple[str, str]:
        """Return key and member of a path; no member where its suffix is not known."""
        folder, slash, name = path.rpartition("/")
        lower = name.lower()
        known = (*self.image_members, *self.caption_members, *self.label_members)
        member = max((one for one in known if lower.endswith(f".{one.lower()}")), key=len, default="")
        if not member and f".{lower.rpartition('.')[2]}" in (*PICTURES, *DICOM, *TEXTS):
            member = lower.rpartition(".")[2]
        stem = name[: -len(member) - 1]
        if not member or not stem or name.startswith("."):
            return "", ""
        return posixpath.normpath(f"{folder}{slash}{stem}"), member


class WebDatasetCorpus(SampleCorpus):
    """A tar, or all tars of a folder and the folders below it, in the order of their paths."""

    kind: Literal["webdataset"] = "webdataset"
    shard_keys: bool = False
    """Keys are `TAR/KEY`, for tars that number their samples alike."""

    suffixes = (".tar",)

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """Yield one row per sample that has an image or a caption; a last failed one where the tar is damaged. Raises
        CorpusError if the file is not an uncompressed tar."""
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
                    if self._parsed(member.name)[1] not in ("", *self._images) and member.size <= min(
                        _MAX_SIDECAR_BYTES, room
                    ):
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


class PairsCorpus(SampleCorpus):
    """Every image and every text below a folder; those of one path without suffix are a pair."""

    kind: Literal["pairs"] = "pairs"

    def _takes(self, name: str) -> bool:
        return bool(self._parsed(name)[1])

    def parts(self) -> Sequence[Part]:
        """Return one for each top folder."""
        return folder_parts(self._folders)

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """Yield one row per image or text, or pair of them."""
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


def _bytes(member: Member, read: Read) -> tuple[bytes, str | None]:
    if member.size > _MAX_SIDECAR_BYTES:
        return b"", f"{CAPTION_FAULT}sidecar larger than {_MAX_SIDECAR_BYTES >> 20} MB"
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
