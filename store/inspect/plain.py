"""Dataclasses' and charts' contents as values that JSON knows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def plain_values(value: Any) -> Any:
    """Arrays and tuples as lists, NumPy's numbers as Python's, keys as strings, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain_values(value.tolist())
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
