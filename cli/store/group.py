"""The group `mmkd store` and the type of its arguments; its commands stand in the modules beside this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mmkd.store.remote import StorePath

ENCODINGS = ("float16", "float32", "int8")
"""As `mmkd.store.encoding`, which loads NumPy; a test holds the two together."""


def STORE(place: str) -> StorePath:  # noqa: N802 - a click type: `type=STORE`
    """A folder or a URL, as `mmkd.store.remote.as_root` reads it."""
    from mmkd.store.remote import as_root

    return as_root(place)


@click.group()
def store() -> None:
    """Look at a store, check it, bring features in and out. STORE is a folder or a URL such as s3://bucket/store."""
