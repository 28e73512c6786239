"""Shared parameters: a store by folder or URL, and an encoding by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmkd.base.places.remote import StorePath

ENCODINGS = ("float16", "float32", "int8")
"""As `mmkd.store.encoding`, which loads NumPy; a test holds the two together."""


def STORE(place: str) -> StorePath:  # noqa: N802 - a click type: `type=STORE`
    """A folder or a URL, as `mmkd.base.places.remote.as_root` reads it."""
    from mmkd.base.places.remote import as_root

    return as_root(place)
