"""YAML into frozen pydantic models with one-line errors, and `${name}` roots in descriptions of evaluation sets.

Roots keep a user's folders apart from what a description says. They are read from the YAML file that `$MMKD_ROOTS`
names, or from `roots.yaml` in the working folder; paths are relative to that file:

    data: /mnt/datasets
    stores: ../stores
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from mmkd.base.errors import ConfigError, did_you_mean


class Frozen(BaseModel):
    """Base of everything that is read from YAML: frozen, and a misspelled key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_type(cls, value: object, field: ValidationInfo) -> object:
        """Refuse `true` and `yes` for a number, which pydantic reads as 1, and an empty path, which it reads as `.`."""
        kinds = set(_leaf_types(cls.model_fields[str(field.field_name)].annotation))
        values = list(_leaf_values(value))
        wrong = [one for one in values if isinstance(one, bool)]
        if wrong and kinds & {int, float} and kinds <= {int, float, str, type(None)}:
            wanted = "text (in quotes) or a number" if str in kinds else "a number"
            raise ValueError(f"is {str(wrong[0]).lower()}, expected {wanted}")
        if Path in kinds and "" in values:
            raise ValueError("is empty, expected a path")
        control = [text for text in values if isinstance(text, str) and min(text, default="x") < " "]
        if control and (Path in kinds or any("\0" in text for text in control)):
            raise ValueError(f"is {control[0]!r}, expected text without control characters")
        return value

    def faults(self) -> Iterator[str]:
        """Yield what is wrong between values that are right by themselves. Reading a model raises the first."""
        yield from ()

    @model_validator(mode="after")
    def _has_no_fault(self) -> Self:
        for fault in self.faults():
            raise ValueError(fault)
        return self


def _leaf_types(annotation: object) -> Iterator[object]:
    """Yield the types within an annotation, those of the values of a `Literal` too."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        yield from map(type, inner)
    elif get_origin(annotation) is Annotated:
        yield from _leaf_types(inner[0])
    elif inner:
        for part in inner:
            yield from _leaf_types(part)
    elif annotation is not Ellipsis:
        yield annotation


def _leaf_values(value: object) -> Iterator[object]:
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaf_values(part)
    else:
        yield value


class OneOf(Frozen):
    """Base of models of which exactly one key is set."""

    def faults(self) -> Iterator[str]:
        keys = [field.alias or name for name, field in type(self).model_fields.items()]
        if len(self.model_fields_set) != 1 or self.chosen is None:
            named = ", ".join(sorted(self.model_fields_set)) or "none"
            yield f"has {named}, expected exactly one of {', '.join(keys)}"

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(iter(self.model_fields_set))

    @property
    def chosen(self) -> Any:
        """Value of that field."""
        return getattr(self, self.kind)


def without_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names. Raises ValueError if one is listed twice."""
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise ValueError(f"{repeated[0]} is named twice; name each once")
    return names


Model = TypeVar("Model", bound=BaseModel)

VARIABLE = "MMKD_ROOTS"
FILE = "roots.yaml"
SUITES = Path(__file__).resolve().parents[1] / "suites"
"""Folder of the suites that come with mmkd."""

_NAMED = re.compile(r"\$\{([^}]*)\}")

NAMING_KEYS = ("name", "dataset", "slug")
"""Keys that name an entry of a list: an error says `datasets.lung`, not `datasets.3`."""


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 without octal and base-60 numbers: `012` and `12:30` are text, as in YAML 1.2."""


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[+-]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[+-]?(((0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9][0-9_]*)([eE][+-][0-9]+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping. Raises ConfigError if it cannot be read, or is none."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected a mapping of keys to values")
    return content


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, down into nested mappings."""
    both = dict(below)
    for name, value in above.items():
        under = both.get(name)
        both[name] = merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return both


def validated(model: type[Model], content: object, where: Path | str) -> Model:
    """Make `model` of parsed YAML. Raises ConfigError for the first key that does not fit, with the nearest known."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # Report a misspelled key before the missing one.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        place = _place(content, first["loc"])
        reason = " ".join(first["msg"].removeprefix("Value error, ").split())
        if first["type"] == "extra_forbidden":
            known = _known_keys(model, first["loc"][:-1])
            hint = did_you_mean(str(first["loc"][-1]), known, f"known keys: {', '.join(known)}")
            reason = f"unknown key; {hint}"
        raise ConfigError(": ".join(part for part in (str(where), place, reason) if part)) from error


def _place(content: object, loc: tuple[int | str, ...]) -> str:
    """Return the path of the invalid key, with list entries by name."""
    steps: list[str] = []
    for step in loc:
        if isinstance(content, (str, int, float, list)) and isinstance(step, str):
            break  # the tag of a union
        try:
            content = content[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            content = None  # a key that is missing, or the tag of a union
        named = [content[key] for key in NAMING_KEYS if key in content] if isinstance(content, dict) else []
        steps.append(str(named[0] if named and isinstance(step, int) else step))
    return ".".join(steps)


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the model at `path`: through fields, and through lists and optional values of models."""
    for step in path:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if isinstance(step, str) and step in fields:
            types = _leaf_types(fields[step].annotation)
            inner = next((each for each in types if isinstance(each, type) and issubclass(each, BaseModel)), None)
            if inner is None:
                return []
            model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def user_roots() -> dict[str, str]:
    """Return the roots by name, as absolute folders or URLs; only `suites` without a roots file. Raises ConfigError if
    `$MMKD_ROOTS` names no such file, or a root is not text."""
    roots = {"suites": str(SUITES)}
    named = os.environ.get(VARIABLE)
    path = Path(named or FILE).expanduser()
    if not named and not path.is_file():
        return roots
    for name, value in read_mapping(path).items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{path}: {name} is {value!r}, expected a folder or URL")
        local = "://" not in value
        roots[str(name)] = str((path.parent / Path(value).expanduser()).resolve()) if local else value
    return roots


def filled(content: Any, roots: dict[str, str], where: Path | str) -> Any:
    """Replace every `${name}` in the texts of `content`, parsed YAML. Raises ConfigError for a name that is no root."""
    if isinstance(content, dict):
        return {key: filled(value, roots, where) for key, value in content.items()}
    if isinstance(content, list):
        return [filled(value, roots, where) for value in content]
    if not isinstance(content, str):
        return content

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in roots:
            raise ConfigError(
                f"{where}: ${{{match[1]}}} has no value; write `{match[1]}: FOLDER` into {FILE} in the working folder, "
                f"or into the file that ${VARIABLE} names (it has {', '.join(sorted(roots))})"
            )
        return roots[match[1]]

    return _NAMED.sub(value_of, content)
