"""`mmkd store ...`: importing this package registers its commands."""

from __future__ import annotations

from mmkd.cli.store import convert, inspect, pull, rows
from mmkd.cli.store.group import store

__all__ = ["convert", "inspect", "pull", "rows", "store"]
