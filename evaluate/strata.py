"""Subgroups of samples: the values of a column, or the ranges between cuts of a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.base.text import counted
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.statistics import FEWEST_GROUPS


def subgroups_of(data: DatasetRows, column_of: Callable[[str], NDArray[np.object_]]) -> dict[str, NDArray[np.object_]]:
    """Return the subgroup of every sample, str (n,), `""` for none, by the columns of `measures: subgroups`.
    `column_of` gives a column, str or None (n,). Raises UserError for a value that cannot be cut."""
    found = {}
    for name, cuts in data.spec.measures.subgroups.items():
        values = column_of(name)
        found[name] = np.array(
            [_range(data, name, v, cuts) if cuts and v is not None else v or "" for v in values], dtype=object
        )
    return found


def small_subgroups(found: Predictions) -> list[str]:
    """Sentences on subgroups too small for an interval, and on samples that are in none."""
    said = []
    for name, values in found.subgroups.items():
        groups = Counter(value for value, _ in set(zip(values.tolist(), found.group.tolist(), strict=True)))
        blank = int((values == "").sum())
        said += [f"{blank} samples have no {name}: they are in no subgroup"] if blank else []
        said += [
            f"subgroup {name} {value!r} has {counted(n, 'group')}, an interval needs {FEWEST_GROUPS}: it has none, and "
            f"is left out of gap_{name} and worst_{name}"
            for value, n in sorted(groups.items())
            if value and n < FEWEST_GROUPS
        ]
    return said


def _range(data: DatasetRows, name: str, text: str, cuts: tuple[float, ...]) -> str:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{data.spec.dataset}: {name} has {text!r}, not a number to cut at {', '.join(map(str, cuts))}")
    return ranges(cuts)[int(np.searchsorted(cuts, value, side="right"))]


def ranges(cuts: tuple[float, ...]) -> list[str]:
    """Names of the ranges between cuts, ascending."""
    return [f"< {cuts[0]:g}", *(f"{low:g} to < {high:g}" for low, high in pairwise(cuts)), f">= {cuts[-1]:g}"]
