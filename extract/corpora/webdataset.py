"""Corpora in WebDataset tars: `KEY.jpg` beside `KEY.txt` or `KEY.json`.

Tars are never unpacked: the index remembers where in which tar each image lies. A sample's key is
the member's path up to the first dot of its last component, as the webdataset library has it.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mmkd.extract.corpora.row import CorpusRow
from mmkd.store.errors import CorpusError
from mmkd.store.yaml_config import Frozen

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")
# A sidecar is a caption or a page of metadata; what is longer is not read.
_MAX_SIDECAR_BYTES = 2**20


class WebDatasetCorpus(Frozen):
    """A tar, or a folder of tars in alphabetical order."""

    kind: Literal["webdataset"] = "webdataset"
    path: Path
    caption_field: str = "caption"
    """Field of the JSON sidecar that holds the caption; a `.txt` member is used where there is one."""
    modality_field: str = "modality"
    label_fields: tuple[str, ...] = ()
    """Fields of the JSON sidecar that pass into the sample table."""

    @property
    def location(self) -> str:
        """The tar or folder."""
        return str(self.path)

    @property
    def root(self) -> Path:
        """The folder that holds the tars, absolute."""
        return (self.path if self.path.is_dir() else self.path.parent).resolve()

    @property
    def labels(self) -> tuple[str, ...]:
        """The label fields."""
        return self.label_fields

    def tars(self) -> list[Path]:
        """The tars, in order."""
        return sorted(self.path.glob("*.tar")) if self.path.is_dir() else [self.path]

    def digest(self) -> str:
        """SHA-256 over the tars' names, sizes and change times."""
        facts = [(tar.name, (stat := tar.stat()).st_size, stat.st_mtime_ns) for tar in self.tars()]
        return hashlib.sha256(json.dumps([*facts, self.model_dump(mode="json")]).encode()).hexdigest()

    def rows(self) -> Iterator[CorpusRow]:
        """One row per sample that has an image or a caption, tar after tar.

        Raises:
            CorpusError: a file is not an uncompressed tar.
        """
        for tar in self.tars():
            for key, members in _samples(tar):
                row = self._row(tar, key, members)
                if row is not None:
                    yield row

    def _row(self, tar: Path, key: str, members: dict[str, tarfile.TarInfo]) -> CorpusRow | None:
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        sidecar = _json_object(_read(tar, members["json"])) if "json" in members else {}
        caption: str | None = None
        if "txt" in members:
            caption = _read(tar, members["txt"]).decode("utf-8", "replace").strip()
        elif "json" in members:
            found = sidecar.get(self.caption_field, "")
            caption = found.strip() if isinstance(found, str) else ""
        if image is None and caption is None:
            return None
        modality = sidecar.get(self.modality_field)
        return CorpusRow(
            key=key,
            caption=caption,
            uri=None if image is None else tar.name,
            offset=None if image is None else image.offset_data,
            length=None if image is None else image.size,
            modality=modality if isinstance(modality, str) else None,
            labels={name: _text(sidecar.get(name)) for name in self.label_fields},
        )


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Group neighbouring members by key. A tar that is cut off gives what comes before the cut."""
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in _members(tar):
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not member.isfile() or not stem or not suffix:
            continue
        member_key = f"{folder}/{stem}" if folder else stem
        if key is not None and member_key != key:
            yield key, members
            members = {}
        key = member_key
        members[suffix.lower()] = member
    if key is not None:
        yield key, members


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    try:
        archive = tarfile.open(tar, "r:")  # noqa: SIM115 - closed below; a generator must survive a cut tar
    except tarfile.ReadError as error:
        raise CorpusError(
            f"{tar} is not an uncompressed tar ({error}); mmkd reads images in place: gunzip compressed tars first"
        ) from error
    with archive:
        while True:
            try:
                member = archive.next()
            except tarfile.ReadError:
                return  # cut off: the member before it is reported when its bytes are read
            if member is None:
                return
            archive.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
            yield member


def _read(tar: Path, member: tarfile.TarInfo) -> bytes:
    with tar.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(min(member.size, _MAX_SIDECAR_BYTES))


def _json_object(data: bytes) -> dict[str, object]:
    try:
        content = json.loads(data)
    except ValueError:
        return {}  # the caption then counts as empty, which is said of the row
    return content if isinstance(content, dict) else {}


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)
