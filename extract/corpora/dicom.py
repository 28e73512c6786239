"""A folder of DICOM files: modality from the header, captions from texts beside them, one row per object or per frame,
nothing that names a patient."""

import functools
import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydicom.dataset import Dataset

from mmkd.base.errors import UnreachableError
from mmkd.base.images.dicom import parse
from mmkd.base.images.source import ImageError, unreadable
from mmkd.base.images.uri import FRAME, fragment
from mmkd.base.places.reading import join, read_range
from mmkd.extract.corpora.files import DICOM, FileCorpus, folder_parts
from mmkd.extract.corpora.row import CorpusRow, Ignored, Part
from mmkd.extract.corpora.samples import Member, Sample, SampleCorpus

_TAGS = ["Modality", "BodyPartExamined", "NumberOfFrames", "PatientID", "Rows"]
_OBJECTS_PER_PART = 4096
# A header that is longer than this without its pixels is not one.
_HEADER_BYTES = 1 << 20
# A loop has hundreds; what claims more would fill the index from one small file.
_MAX_FRAMES = 1 << 16
# What the standard allows in a code string (PS3.5 6.2): free text that strayed into one does not pass.
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")
# Name of the image among a sample's members, whatever its suffix.
_OBJECT = "dcm"


class DicomCorpus(SampleCorpus):
    """Every `.dcm` file, and every file without suffix that begins as DICOM does, below a folder; a text of the same
    name is its caption. No text of the file leaves it but its modality and its body part, a label."""

    kind: Literal["dicom"] = "dicom"
    frames: Literal["middle", "first", "all"] = "middle"
    """Frames of a multi-frame object: the middle one, the first, or a row for each."""
    patient_salt: str | None = None
    """With a secret of your own, a label `patient` says which rows are of one patient (HMAC-SHA256 of the patient
    ID) without saying who: what splits by patient need."""

    suffixes = DICOM

    def faults(self) -> Iterator[str]:
        if self.image_members:
            yield "image_members: the images of a DICOM corpus are its DICOM files; leave it out"

    @property
    def labels(self) -> tuple[str, ...]:
        return ("body_part", *(["patient"] if self.patient_salt else []), *super().labels)

    def settings(self) -> str:
        """Return all fields but the path; of the salt a hash; those of captions only where they are set, as stores of
        earlier versions do not know them."""
        salt = None if self.patient_salt is None else hashlib.sha256(self.patient_salt.encode()).hexdigest()
        later = SampleCorpus.model_fields.keys() - FileCorpus.model_fields.keys() - self.model_fields_set
        return self.model_copy(update={"patient_salt": salt}).model_dump_json(exclude={"path", *later})

    def ignored(self) -> Iterator[Ignored]:
        """Yield other files below a folder, and texts without a DICOM file."""
        yield from super().ignored()
        for sample in self._samples if self._is_folder else ():
            if _OBJECT not in sample:
                yield from (Ignored("file: no DICOM file has its name", member.name) for member in sample.values())

    def parts(self) -> Sequence[Part]:
        files = {file.name: file for file in self.files()}
        return folder_parts(
            {
                group[0][_OBJECT].name: [files[member.name] for sample in group for member in sample.values()]
                for group in self._groups
            }
        )

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        group = next(group for group in self._groups if group[0][_OBJECT].name == part.name)
        with ThreadPoolExecutor(8, thread_name_prefix="mmkd-dicom") as pool:
            for rows in pool.map(self._rows, group):
                yield from rows

    @functools.cached_property
    def _samples(self) -> list[Sample]:
        members = (Member(file.name, 0, file.size) for file in self.files())
        return [found[1] for found in self.samples(members) if not isinstance(found, Ignored)]

    @functools.cached_property
    def _groups(self) -> list[list[Sample]]:
        objects = [sample for sample in self._samples if _OBJECT in sample]
        return [objects[start : start + _OBJECTS_PER_PART] for start in range(0, len(objects), _OBJECTS_PER_PART)]

    @functools.cached_property
    def _images(self) -> tuple[str, ...]:
        return (_OBJECT,)

    def _takes(self, name: str) -> bool:
        return bool(self._parsed(name)[1])

    def _parsed(self, path: str) -> tuple[str, str]:
        if "." not in path.rpartition("/")[2] or not self._is_folder:
            return path, _OBJECT
        stem, member = super()._parsed(path)
        if f".{member}" in DICOM:
            return stem, _OBJECT
        return (stem, member) if member in (*self._texts, *self.label_members, "json") else ("", "")

    def _rows(self, sample: Sample) -> Sequence[CorpusRow | Ignored]:
        name = sample[_OBJECT].name
        try:
            data = read_range(join(self.base, name), 0, _HEADER_BYTES)
            rows = self._object_rows(name, parse(data, header_of=_TAGS))
        except (ImageError, OSError, UnreachableError) as error:
            if "." not in name.rpartition("/")[2]:
                # A file without suffix is only taken for DICOM if it says so.
                beside = [member.name for member in sample.values() if member.name != name]
                ignored = [Ignored("file: no DICOM file has its name", other) for other in beside]
                return [Ignored("file: without suffix and not DICOM", name), *ignored]
            reason = error if isinstance(error, ImageError) else unreadable(error)
            rows = [CorpusRow(name, None, name, fault=f"row: {reason}")]
        found: list[CorpusRow | Ignored] = []
        for number, row in enumerate(rows):
            made = [row] if isinstance(row, Ignored) else self.sample_rows(row, sample, self.read_file)
            # The frames of an object share its caption, and what is ignored beside it.
            found += [one for one in made if number == 0 or isinstance(one, CorpusRow) or one is row]
        return found

    def _object_rows(self, name: str, header: Dataset) -> list[CorpusRow | Ignored]:
        try:
            frames = int(header.get("NumberOfFrames") or 1)
        except (TypeError, ValueError):
            frames = 1
        wanted: Sequence[int | None] = [None]
        if "Rows" in header and frames > 1:
            chosen = [0 if self.frames == "first" else frames // 2]
            wanted = range(min(frames, _MAX_FRAMES)) if self.frames == "all" else chosen
        labels = {"body_part": _code(header, "BodyPartExamined")}
        if self.patient_salt:
            patient = str(header.get("PatientID") or "").encode()
            digest = hmac.new(self.patient_salt.encode(), patient, hashlib.sha256).hexdigest()
            labels["patient"] = digest[:16] if patient else None
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


def _code(header: Dataset, name: str) -> str | None:
    value = str(header.get(name) or "").strip()
    return value if _CODE.fullmatch(value) else None
