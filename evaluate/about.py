"""Where a public data set comes from, and what it should hold."""

from __future__ import annotations

from pydantic import Field

from mmkd.base.config import Frozen


class About(Frozen):
    """Where a public data set comes from. Nothing of it enters a score."""

    homepage: str | None = None
    licence: str | None = None
    """As its owners state it; read their terms before you use the data."""
    access: str | None = None
    """What it takes to get it beyond a download: registration, a data use agreement."""
    expected: dict[str, int | None] = Field(default_factory=dict)
    """Samples of each split as published; null where we do not know."""
