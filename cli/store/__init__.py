"""`mmkd store ...`: importing this package registers its commands."""

from __future__ import annotations

from mmkd.cli.store import atlas, convert, inspect, pull, report, rows, show, stats
from mmkd.cli.store.group import store

__all__ = ["atlas", "convert", "inspect", "pull", "report", "rows", "show", "stats", "store"]
