"""What a benchmark hands over: rows of figures, and the command line that every script here has (README.md)."""

from __future__ import annotations

import argparse
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, model_validator

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
GOAL = re.compile(r"(<=|>=|<|>) (\d+(?:\.\d+)?)$")


class Row(BaseModel):
    """One line of a table: a value, and where there is something to compare it with, the ratio within the same run.

    `ratio` is value / reference unless the script gives it (a median of ratios of pairs, say). `goal` is about the
    ratio if there is one and about the value if there is none.

    Raises:
        ValueError: Neither value nor ratio, a goal that is no comparison with a number, a key that is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    what: str  # "random batches of 4,096 rows x 512 float16"
    against: str = ""  # "the same gather from RAM"
    value: float | None = None
    reference: float | None = None
    unit: str = ""  # of value and reference: "GB/s", "s", "MB"
    ratio: float | None = None
    goal: str = ""  # "<= 1.05"
    note: str = ""
    device: Literal["cpu", "gpu"] = "cpu"

    @model_validator(mode="before")
    @classmethod
    def _divide(cls, given: dict[str, object]) -> dict[str, object]:
        value, reference = given.get("value"), given.get("reference")
        if given.get("ratio") is None and isinstance(value, int | float) and isinstance(reference, int | float):
            return given | {"ratio": value / reference}
        return given

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.value is None and self.ratio is None:
            raise ValueError(f"row {self.what!r} has neither a value nor a ratio")
        if self.goal and not GOAL.match(self.goal):
            raise ValueError(f"goal {self.goal!r} of {self.what!r}: write it as '<= 1.05', with one of <= >= < >")
        return self

    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        found = GOAL.match(self.goal)
        figure = self.value if self.ratio is None else self.ratio
        if found is None or figure is None:
            return None
        return bool(COMPARISONS[found[1]](figure, float(found[2])))

    def __str__(self) -> str:
        figures = [f"{figure:.4g} {self.unit}" for figure in (self.value, self.reference) if figure is not None]
        told = f"{self.what}: {' against '.join(figures)}"
        told += f" ({self.against})" if self.against else ""
        told += "" if self.ratio is None else f", ratio {self.ratio:.3g}"
        return told + (f", goal {self.goal} {'met' if self.met() else 'MISSED'}" if self.goal else "")


ROWS = TypeAdapter(list[Row])


def main(measure: Callable[..., list[Row]], **sizes: int) -> None:
    """Measure, print, and write the rows as JSON where `--out` asks for it. `sizes`: further options, their defaults,
    handed to `measure` by name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="at the size of a real machine instead of two cores")
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    given = parser.parse_args()
    rows = measure(given.full, **{name: getattr(given, name) for name in sizes})
    for row in rows:
        print(row, flush=True)
    if given.out:
        given.out.write_bytes(ROWS.dump_json(rows, indent=1, exclude_defaults=True))
