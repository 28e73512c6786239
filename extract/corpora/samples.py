"""Samples made of members that share a key, in a tar (WebDataset, never unpacked) or a folder: `KEY.jpg`, `KEY.txt`,
`KEY.json`."""

import dataclasses
import functools
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, Literal, NamedTuple

from mmkd.base.errors import CorpusError, UnreachableError
from mmkd.base.places.reading import join, read_range
from mmkd.extract.corpora.files import DICOM, PICTURES, TEXTS, FileCorpus, folder_parts, suffix_of
from mmkd.extract.corpora.row import (
    CAPTION_FAULT,
    Captions,
    CorpusRow,
    Ignored,
    Part,
    as_label,
    caption_rows,
    decode_text,
    first_text,
    further_captions,
)

# A sidecar is a caption or a page of metadata; longer ones are not read.
_MAX_SIDECAR_BYTES = 1 << 20
# Sidecars are kept while their tar is listed, so that it is read once and forwards; further ones are read again.
_KEPT_BYTES = 1 << 28
# Headers are 512 bytes, and extended ones carry long names. Without a bound, one that claims to be as long as its
# archive is read into memory whole.
_MAX_HEADER = 1 << 20


class Member(NamedTuple):
    """A file of a folder, or an ordinary file inside a tar, whose name is text: nothing is ever opened by it."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    offset: int


Sample = dict[str, Member]
Read = Callable[[Member], bytes]
"""Reads a sidecar; raises `_SidecarError`."""


class _SidecarError(Exception):
    """Why a sidecar cannot be used."""


class SampleCorpus(FileCorpus):
    """Fields that say which member of a sample is what. A key is the member's path without its last known suffix: that
    of an image or a text, or a name given here."""

    caption_field: str = "caption"
    """Field of the JSON sidecar that holds the caption or a list of them; a text sidecar takes precedence."""
    captions: Captions = "first"
    """`first`: a text sidecar is one caption, and of a list the first counts. `each`: every line of a text and every
    element of a list has its row; CLIP_benchmark's retrieval sets are written so. `further`: the first of these has the
    image's row, the others rows for texts alone."""
    further: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    """Fields of the JSON sidecar with further captions, a text or a list of texts, and the kind of these."""
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
            if (sample := next((sample for sample in same if name not in sample), None)) is None:
                sample = {}
                same.append(sample)
                order.append((stem, sample))
            sample[name] = member
        yield from order

    def image_of(self, sample: Sample) -> Member | None:
        return next((sample[name] for name in self._images if name in sample), None)

    def sample_rows(self, row: CorpusRow, sample: Sample, read: Read) -> Iterator[CorpusRow | Ignored]:
        """Yield rows of one sample, and its members that are not used. `row` has the key and the place of the image."""
        image = self.image_of(sample)
        texts = [name for name in self._texts if name in sample]
        yield from self._unused(sample, image, texts)
        if image is None and not texts:
            return
        sidecars = [name for name in dict.fromkeys([*texts[:1], "json"]) if name.endswith("json") and name in sample]
        yield from (Ignored("member: a further sidecar of its sample", sample[name].name) for name in sidecars[1:])
        has_caption = bool(texts) and texts[0] in sidecars
        content: dict[str, object] = {}
        fault = None
        if sidecars:
            try:
                content = _json_object(sample[sidecars[0]], read)
            except _SidecarError as error:
                fault = f"{CAPTION_FAULT}{error}"
                if not has_caption:
                    yield Ignored(f"member: {error}", sample[sidecars[0]].name)
        fields = [self.modality_field] if self.modality_field else ["modality", "image_secondary_label"]
        read_fields = {*self.label_fields, *self.further, *fields, *([self.caption_field] if has_caption else [])}
        if further := [name for name in content if name not in read_fields]:
            yield Ignored("field: of a JSON sidecar, not among `label_fields`", further[0][:60], len(further))
        labels = {name: as_label(content.get(name)) for name in self.label_fields}
        for name in self.label_members:
            labels[name] = None
            if name in sample:
                try:
                    labels[name] = _text(sample[name], read).strip()
                except _SidecarError as error:
                    yield Ignored(f"member: {error}", sample[name].name)
        modality = next((found for name in fields if (found := first_text(content.get(name)))), row.modality)
        more, nested = further_captions(content, self.further, row.key)
        yield from nested
        row = dataclasses.replace(row, modality=modality, labels=row.labels | labels, further=more)
        if not texts:
            yield row
            return
        caption: object = content.get(self.caption_field)
        if not has_caption:
            fault = None
            try:
                caption = _text(sample[texts[0]], read)
                caption = caption if self.captions == "first" else caption.splitlines()
            except _SidecarError as error:
                fault = f"{CAPTION_FAULT}{error}"
        elif fault is None and self.caption_field not in content:
            fault = f"{CAPTION_FAULT}sidecar has no field {self.caption_field!r}"
        row = dataclasses.replace(row, fault=row.fault or fault)
        yield from caption_rows(row, None if fault else caption, self.captions)

    def read_file(self, member: Member) -> bytes:
        """Read a sidecar of a folder, for `sample_rows`."""
        try:
            return read_range(join(self.base, member.name), 0, member.size)
        except UnreachableError:
            raise _SidecarError("cannot be read (the service did not answer)") from None
        except OSError as error:
            raise _SidecarError(f"cannot be read ({error.strerror or error})") from error

    def _unused(self, sample: Sample, image: Member | None, texts: Sequence[str]) -> Iterator[Ignored]:
        for name, member in sample.items():
            used = name in {*texts[:1], "json", *self.label_members}
            if used and image is None and not texts:
                yield Ignored("member: of a sample without image and caption", member.name)
            elif not used and member is not image:
                kind = "image" if name in self._images else "caption" if name in self._texts else None
                reason = f"a further {kind} of its sample" if kind else "not among `image_members`, `caption_members`"
                yield Ignored(f"member: {reason}", member.name)

    @functools.cached_property
    def _images(self) -> tuple[str, ...]:
        return self.image_members or tuple(suffix[1:] for suffix in (*PICTURES, *DICOM))

    @functools.cached_property
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
        """Yield one row per sample that has an image or a caption; a last failed one where the tar is damaged."""
        with self.open_part(part) as file:
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
                    sidecar = self._parsed(member.name)[1] not in ("", *self._images)
                    if sidecar and member.size <= min(_MAX_SIDECAR_BYTES, room):
                        file.seek(member.offset)  # the listing finds its own place again
                        texts[member.offset] = file.read(member.size)
                        room -= member.size

            def read(member: Member) -> bytes:
                if (data := texts.get(member.offset)) is None:
                    file.seek(member.offset)
                    data = file.read(member.size)
                if len(data) < member.size:
                    raise _SidecarError("archive ends inside this member")
                return data

            before = f"{part.name.removesuffix('.tar')}/" if self.shard_keys else ""
            for sample in self.samples(members):
                if isinstance(sample, Ignored):
                    yield sample
                    continue
                row = CorpusRow(before + sample[0], None, None)
                if (image := self.image_of(sample[1])) is not None:
                    row = dataclasses.replace(row, uri=part.name, offset=image.offset, length=image.size)
                yield from self.sample_rows(row, sample[1], read)
            if damage is not None:
                fault = "archive: ends early or is damaged, what follows is lost"
                yield CorpusRow(f"{part.name}#{damage.offset}", None, None, fault=fault)


class PairsCorpus(SampleCorpus):
    """Every image and every text below a folder; those of one path without suffix are a pair."""

    kind: Literal["pairs"] = "pairs"

    def _takes(self, name: str) -> bool:
        return bool(self._parsed(name)[1])

    def parts(self) -> Sequence[Part]:
        return folder_parts(self.folders)

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        for sample in self.samples(Member(file.name, 0, file.size) for file in self.folders[part.name]):
            if isinstance(sample, Ignored):
                yield sample
            else:
                image = self.image_of(sample[1])
                row = CorpusRow(sample[0], None, None if image is None else image.name)
                yield from self.sample_rows(row, sample[1], self.read_file)


def _text(member: Member, read: Read) -> str:
    if member.size > _MAX_SIDECAR_BYTES:
        raise _SidecarError(f"sidecar larger than {_MAX_SIDECAR_BYTES >> 20} MB")
    return decode_text(read(member))


def _json_object(member: Member, read: Read) -> dict[str, Any]:
    try:
        content = json.loads(_text(member, read))
    except (ValueError, RecursionError):
        raise _SidecarError("sidecar is not JSON") from None
    if not isinstance(content, dict):
        raise _SidecarError("sidecar is not a JSON object")
    return content


class _Bounded:
    """A file that refuses large reads; tarfile needs read, seek and tell."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """As a file's. Raises tarfile.ReadError if more than a header was asked for."""
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError("header too large")
        return self.file.read(size)


def tar_members(file: IO[bytes], name: str) -> Iterator[Member | Ignored | Damage]:
    """Yield members in the order of the archive; a `Damage` last when it does not end as a tar should. Folders are left
    out; links, devices and sparse files are ignored. Raises CorpusError if it is not an uncompressed tar."""
    try:
        archive = tarfile.open(fileobj=_Bounded(file), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
    except (tarfile.ReadError, EOFError) as error:
        raise CorpusError(f"{name} is not an uncompressed tar ({error}); gunzip compressed tars") from error
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, ValueError, OverflowError):
            yield Damage(archive.offset)
            return
        if member is None:
            break
        archive.members.clear()  # else every header stays in memory
        if member.isreg() and not member.issparse():
            yield Member(member.name, member.offset_data, member.size)
        elif not member.isdir():
            yield Ignored("member: a link, a device or a sparse file", member.name)
    # tarfile takes a header that is cut off or overwritten for the end. A sound archive ends in a block of zeros.
    file.seek(archive.offset)
    end = file.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        yield Damage(archive.offset)
