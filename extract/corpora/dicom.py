"""A folder of DICOM files: modality from the header, one row per object or per frame, nothing that names a patient."""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydicom.dataset import Dataset

from mmkd.base.errors import UnreachableError
from mmkd.base.images.dicom import middle_frame, parse
from mmkd.base.images.source import ImageError, unreadable
from mmkd.base.images.uri import FRAME, fragment
from mmkd.base.places.reading import Listed, join, read_range
from mmkd.extract.corpora.files import DICOM, FileCorpus
from mmkd.extract.corpora.row import CorpusRow, Ignored, Part

_TAGS = ["Modality", "BodyPartExamined", "NumberOfFrames", "PatientID", "Rows"]
_THREADS = 8
_FILES_A_PART = 4096
# A header that is longer than this without its pixels is not one.
_HEADER_BYTES = 1 << 20
# A loop has hundreds; what claims more would fill the index from one small file.
_MAX_FRAMES = 1 << 16
# What the standard allows in a code string (PS3.5 6.2): free text that strayed into one does not pass.
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")


class DicomCorpus(FileCorpus):
    """Every `.dcm` file, and every file without suffix that begins as DICOM does, below a folder. The modality tag
    becomes the row's modality, the body part its label. No other text of the file leaves it."""

    kind: Literal["dicom"] = "dicom"
    frames: Literal["middle", "first", "all"] = "middle"
    """Frames of a multi-frame object: the middle one, the first, or a row for each."""
    patient_salt: str | None = None
    """With a secret of your own, a label `patient` says which rows are of one patient (HMAC-SHA256 of the patient
    ID) without saying who: what splits by patient need."""

    suffixes = DICOM

    @property
    def labels(self) -> tuple[str, ...]:
        """`body_part`, and `patient` with a salt."""
        return ("body_part", "patient") if self.patient_salt else ("body_part",)

    def settings(self) -> str:
        """All fields but the path; of the salt a hash."""
        salt = None if self.patient_salt is None else hashlib.sha256(self.patient_salt.encode()).hexdigest()
        return self.model_copy(update={"patient_salt": salt}).model_dump_json(exclude={"path"})

    def _takes(self, name: str) -> bool:
        return super()._takes(name) or "." not in name.rpartition("/")[2]

    @functools.cached_property
    def _files(self) -> list[Listed]:
        return self.listed()

    def parts(self) -> Sequence[Part]:
        """Every few thousand files, in order."""
        files = self._files
        groups = [files[start : start + _FILES_A_PART] for start in range(0, len(files), _FILES_A_PART)]
        return [
            Part(group[0].name, sum(file.size for file in group), hashlib.sha256(repr(group).encode()).hexdigest())
            for group in groups
        ]

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """One row per object, or per frame."""
        names = [file.name for file in self._files]
        start = names.index(part.name)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="mmkd-dicom") as pool:
            for rows in pool.map(self._rows, names[start : start + _FILES_A_PART]):
                yield from rows

    def _rows(self, name: str) -> Sequence[CorpusRow | Ignored]:
        suffixed = name.lower().endswith(self.suffixes)
        try:
            header = self._header(name)
        except ImageError as error:
            # A file without suffix is only taken for DICOM if it says so.
            return [CorpusRow(name, None, name, fault=f"row: {error}")] if suffixed else [
                Ignored("file: without suffix and not DICOM", name)]  # fmt: skip
        frames = _number(header, "NumberOfFrames")
        if "Rows" not in header or frames <= 1:
            wanted: Sequence[int | None] = [None]
        elif self.frames == "all":
            wanted = range(min(frames, _MAX_FRAMES))
        else:
            wanted = [0 if self.frames == "first" else middle_frame(frames)]
        labels = {"body_part": _code(header, "BodyPartExamined")}
        if self.patient_salt:
            labels["patient"] = self._pseudonym(header)
        rows: list[CorpusRow | Ignored] = [
            CorpusRow(
                key=name if frame is None or self.frames != "all" else f"{name}#{frame}",
                caption=None,
                uri=name if frame is None else name + fragment(FRAME, frame),
                modality=_code(header, "Modality"),
                labels=labels,
                fault=None if "Rows" in header else "row: DICOM: no pixels",
            )
            for frame in wanted
        ]
        if self.frames == "all" and frames > _MAX_FRAMES:
            rows.append(Ignored(f"frame: after the first {_MAX_FRAMES:,} of its file", name, frames - _MAX_FRAMES))
        return rows

    def _header(self, name: str) -> Dataset:
        try:
            data = read_range(join(self.base, name), 0, _HEADER_BYTES)
        except (OSError, UnreachableError) as error:
            raise unreadable(error) from error
        return parse(data, header_of=_TAGS)

    def _pseudonym(self, header: Dataset) -> str | None:
        patient = str(header.get("PatientID") or "")
        if not patient or not self.patient_salt:
            return None
        return hmac.new(self.patient_salt.encode(), patient.encode(), hashlib.sha256).hexdigest()[:16]


def _code(header: Dataset, name: str) -> str | None:
    value = str(header.get(name) or "").strip()
    return value if _CODE.fullmatch(value) else None


def _number(header: Dataset, name: str) -> int:
    try:
        return int(header.get(name) or 1)
    except (TypeError, ValueError):
        return 1
