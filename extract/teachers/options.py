"""A loader's own switches: checked by name, so that a misspelt one is an error and not a default."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.spec import TeacherSpec

Options = TypeVar("Options", bound=BaseModel)


def read_options(spec: TeacherSpec, model: type[Options]) -> Options:
    """`spec.options` as the loader's model.

    Raises:
        TeacherError: an option that the loader does not have, or a value that does not fit.
    """
    try:
        return model.model_validate(spec.options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(model.model_fields) or "none"
        raise TeacherError(
            f"teacher {spec.slug!r}: option {name!r}: {first['msg']}; this loader has: {known}"
        ) from error
