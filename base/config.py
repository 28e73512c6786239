"""YAML into frozen pydantic models, with complaints that fit on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mmkd.base.errors import ConfigError


class Frozen(BaseModel):
    """Base of everything that is read from YAML: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OneOf(Frozen):
    """Base of models of which exactly one key is set."""

    @model_validator(mode="after")
    def _exactly_one(self) -> OneOf:
        keys = [field.alias or name for name, field in type(self).model_fields.items()]
        if len(self.model_fields_set) != 1 or self.chosen is None:
            named = ", ".join(sorted(self.model_fields_set)) or "none"
            raise ValueError(f"has {named}, expected exactly one of {', '.join(keys)}")
        return self

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(iter(self.model_fields_set))

    @property
    def chosen(self) -> Any:
        """Its value."""
        return getattr(self, self.kind)


def without_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names as they are.

    Raises:
        ValueError: one of them stands twice.
    """
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise ValueError(f"{repeated[0]} is named twice; name each once")
    return names


Model = TypeVar("Model", bound=BaseModel)

NAMING_KEYS = ("name", "dataset", "slug")
"""Keys that name an entry of a list: a complaint says `datasets.lung`, not `datasets.3`."""


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: it cannot be read, is not YAML, or is something else than a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected a mapping of keys to values")
    return content


def validated(model: type[Model], content: object, where: Path | str) -> Model:
    """Make `model` of parsed YAML.

    Raises:
        ConfigError: the first key that does not fit, with the nearest known key when it is misspelt.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # A key that is misspelt before the one that is missing for it.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        place = _place(content, first["loc"])
        reason = " ".join(first["msg"].removeprefix("Value error, ").split())
        if first["type"] == "extra_forbidden":
            known = _known_keys(model, first["loc"][:-1])
            nearest = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
            reason = f"unknown key; {hint}"
        raise ConfigError(": ".join(part for part in (str(where), place, reason) if part)) from error


def _place(content: object, loc: tuple[int | str, ...]) -> str:
    """Where the complaint is, entries of lists by their name."""
    steps: list[str] = []
    for step in loc:
        try:
            content = content[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            content = None  # a key that is missing, or a step that pydantic put in, such as the tag of a union
        named = [content[key] for key in NAMING_KEYS if key in content] if isinstance(content, dict) else []
        steps.append(str(named[0] if named and isinstance(step, int) else step))
    return ".".join(steps)


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the model at `path`: through fields, and through lists and optional values of models."""
    for step in path:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if isinstance(step, str) and step in fields:
            inner = list(_models(fields[step].annotation))
            if not inner:
                return []
            model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """Models in an annotation such as `tuple[Rule, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
