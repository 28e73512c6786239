"""Bytes, seconds, numbers and shares as people read them."""

from __future__ import annotations

import math


def bytes_text(count: int) -> str:
    """`count` bytes in the largest binary unit that keeps it above one: `1.5 GB`."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TB"


def seconds_text(seconds: float) -> str:
    """A time span in one or two units: `12.3 s`, `4 min 10 s`, `5 h 2 min`, `3 d 1 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, size, unit in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        if whole < size * (60 if large == "min" else 24) or large == "d":
            return f"{whole // size} {large} {whole % size // unit} {small}"
    raise AssertionError("days have no end")


def number(value: float, digits: int = 3) -> str:
    """A number with a fixed count of decimals; `-` where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def percent(value: float) -> str:
    """A share with one decimal; `-` where there is none."""
    return f"{value:.1%}" if math.isfinite(value) else "-"
