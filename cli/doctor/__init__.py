"""`mmkd doctor`: what this machine has and lacks for each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "fault"]
"""`note`: something optional is missing. `warning`: some work will fail. `fault`: correct it first."""


@dataclass(frozen=True)
class Check:
    """One line of `mmkd doctor`."""

    part: Literal["machine", "packages", "hub", "teachers", "disk"]
    name: str
    status: Status
    found: str
    next_step: str = ""
    """Next step; empty where none is needed."""
