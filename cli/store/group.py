"""The group `mmkd store`; its commands are in the modules beside this one."""

from __future__ import annotations

import click


@click.group()
def store() -> None:
    """Look at a store, check it, bring features in and out. STORE is a folder or a URL such as s3://bucket/store."""
