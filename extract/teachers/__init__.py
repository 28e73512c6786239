"""Teachers: identity, loading, and user-defined ones. Identities are read without torch."""

from typing import TYPE_CHECKING

from mmkd.extract.teachers.published import parse_teachers
from mmkd.extract.teachers.spec import Teacher, TeacherSpec

if TYPE_CHECKING:
    import torch

    from mmkd.store import TeacherCard

__all__ = ["Teacher", "TeacherSpec", "describe_teacher", "load_teacher", "parse_teachers"]


def describe_teacher(spec: TeacherSpec) -> "TeacherCard":
    """Find a teacher's files and hash them; no model is built. Files of a hub repository that are not in the cache are
    downloaded. Hashes are cached between runs. Raises TeacherError with the problem and the fix in one line."""
    from mmkd.extract.teachers.loaders import find_loader  # noqa: PLC0415 - torch

    return find_loader(spec).describe(spec)


def load_teacher(spec: TeacherSpec, card: "TeacherCard", device: "torch.device") -> Teacher:
    """Build the encoder that `card` describes on `device`, every weight accounted for. Raises TeacherError if the files
    are no longer the card's, are damaged, or do not fit the architecture."""
    from mmkd.extract.teachers.loaders import find_loader  # noqa: PLC0415 - torch

    return find_loader(spec).load(spec, card, device)
