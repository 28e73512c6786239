"""Every field of a run.yaml and an align.yaml under hostile values: taken as what it says, or refused in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from mmkd.base.errors import ConfigError
from mmkd.distill.alignment.config import AlignConfig, load_align
from mmkd.distill.config import RunConfig, load_run

RUN: dict[str, Any] = {"store": "features", "out": "runs/x", "student": {"model": "ViT-B-16"}}
ALIGN: dict[str, Any] = {"out": "a.safetensors", "method": {}}
HOSTILE: list[Any] = [
    "text", "", "5", "a\nb", "a\0b", True, False, math.inf, -math.inf, math.nan, -1, 0, 0.5, 2, 10**30, 1e308,
    [], [1, 0], [0.9, 0.1], [True, True], [None], {}, {"a": 1}, None,
]  # fmt: skip


def fields(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and annotation of every field of a model and of the models within it."""
    for name, field in model.model_fields.items():
        yield (*above, name), field.annotation
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind, (*above, name))


def changed(content: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The content with another value at `path`."""
    content = deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part.setdefault(key, {})
    part[path[-1]] = value
    return content


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else [value]


def loaded(load: Callable[[Path], BaseModel], file: Path) -> BaseModel | str:
    """The configuration, or what is wrong with it."""
    try:
        return load(file)
    except ConfigError as error:
        return str(error)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("model", "load", "content"), [(RunConfig, load_run, RUN), (AlignConfig, load_align, ALIGN)], ids=["run", "align"]
)
def test_a_hostile_value_is_taken_as_it_is_or_refused_in_one_line(
    tmp_path: Path, model: type[BaseModel], load: Callable[[Path], BaseModel], content: dict[str, Any]
) -> None:
    for path, kind in fields(model):
        for value in HOSTILE:
            file = tmp_path / "x.yaml"
            file.write_text(yaml.safe_dump(changed(content, path, value)))
            found: Any = loaded(load, file)
            if isinstance(found, str):
                assert "\n" not in found, (path, value)
                assert found.startswith(f"{file}: "), (path, value)
                continue
            for key in path:
                found = getattr(found, key)
            for leaf in leaves(found.model_dump() if isinstance(found, BaseModel) else found):
                assert not isinstance(leaf, float) or math.isfinite(leaf), (path, value)
            if isinstance(value, bool) and kind is not bool:
                raise AssertionError(f"{path} takes {value} for {found!r}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": True}, "epochs: is true, expected a number"),
        ({"optimizer": {"lr": math.inf}}, "optimizer.lr: Input should be a finite number"),
        ({"optimizer": {"betas": [False, 0.9]}}, "optimizer.betas: is false, expected a number"),
        ({"loss": {"task": math.nan}}, "loss.task: Input should be a finite number"),
        ({"policy": {"weights": {"one": True}}}, "policy.weights: is true, expected"),
        ({"policy": {"kind": "best", "keys": "known"}}, "`keys: known` goes with `by: corpus`, here `by: caption`"),
        ({"student": {"model": "x", "lock": {"image": True}}}, "student.lock.image: is true, expected"),
        ({"seed": 10**30}, "seed: Input should be less than"),
        ({"monitor": {"metric": "x/y"}}, "monitor: metric 'x/y' does not exist: the sets give none"),
        ({"monitor": {"patience": 3}}, "monitor: patience needs monitor.sets"),
        ({"loss": {"bank": 1, "bank_rows": {"size": 9, "refresh": 10**30}}}, "refresh: Input should be less than"),
        ({"where": {"train": True}}, 'where: is a mapping, expected a condition as text: "train = True"'),
        ({"where": ["s1"]}, "run.yaml: where: Input should be a valid string"),
        ({"out": ""}, "out: is empty, expected a path"),
        ({"store": "a\0b"}, "a\\x00b', expected text without control characters"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN | changes))
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 10**30}, "dim: Input should be less than"),
        ({"method": {"autoencoder": {"hidden": 10**30}}}, "method.autoencoder.hidden: Input should be less than"),
        ({"method": {"joint": {"temperature": math.inf}}}, "method.joint.temperature: Input should be a finite number"),
        ({"held_out": True}, "held_out: is true, expected a number"),
    ],
)
def test_what_is_wrong_with_an_alignment_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(ALIGN | {"method": {"pca": {}}} | changes))
    with pytest.raises(ConfigError) as caught:
        load_align(tmp_path / "align.yaml")
    assert message in str(caught.value)
