"""The table in docs/inspect.md that says which function gives what a command prints."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "inspect.md"
ROWS = re.findall(r"^\| (.+?) \| `(mmkd\.[\w.]+)` \| `(\w+)`s? \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_command_of_inspection_is_in_the_table() -> None:
    told = " ".join(command for command, _, _ in ROWS)
    for command in ("info", "show", "stats", "neighbors", "report", "atlas", "verify"):
        assert f"store {command}" in told


@pytest.mark.parametrize(("path", "returned"), [row[1:] for row in ROWS], ids=[row[1] for row in ROWS])
def test_a_function_is_documented_and_returns_a_dataclass_or_an_arrow_table(path: str, returned: str) -> None:
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    assert len(function.__doc__) > 40
    namespace = vars(importlib.import_module("mmkd.store.reader")) | function.__globals__
    found = typing.get_type_hints(function, namespace)["return"]
    if typing.get_origin(found) is Iterator:
        (found,) = typing.get_args(found)
    assert found.__name__ == returned
    assert found is pa.Table or dataclasses.is_dataclass(found)
