"""The published teachers by name."""

from __future__ import annotations

import difflib
from typing import Literal, overload

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.nine import THE_NINE, PublishedTeacher
from mmkd.extract.teachers.variants import VARIANTS

__all__ = ["THE_NINE", "VARIANTS", "PublishedTeacher", "find_published"]


@overload
def find_published(name: str) -> PublishedTeacher: ...
@overload
def find_published(name: str, *, missing_ok: Literal[True]) -> PublishedTeacher | None: ...
def find_published(name: str, *, missing_ok: bool = False) -> PublishedTeacher | None:
    """The published teacher of this slug or of a spelling used elsewhere (capitals do not matter).

    Raises:
        TeacherError: there is none, and `missing_ok` is false; the nearest name is suggested.
    """
    names = {
        called.lower(): teacher
        for teacher in (*THE_NINE, *VARIANTS)
        for called in (teacher.slug, teacher.name, *teacher.also_called)
    }
    if name.lower() in names:
        return names[name.lower()]
    if missing_ok:
        return None
    near = difflib.get_close_matches(name.lower(), names, 1)
    hint = f"did you mean {near[0]!r}?" if near else "see `mmkd teachers list`;"
    raise TeacherError(f"no teacher is called {name!r}: {hint} For one of your own write {name}=local-dir:/path")
