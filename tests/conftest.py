"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_store import make_card, make_store


@pytest.fixture
def small_store(tmp_path: Path) -> Path:
    """600 rows in three shards of 256, two teachers of widths 8 and 16."""
    root = tmp_path / "store"
    make_store(root, 600, [make_card("alpha", 8), make_card("beta", 16)])
    return root


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train in; see `tiny_run.write_scene`. Shared: do not change what is in it, copy it."""
    from tiny_run import write_scene

    return write_scene(tmp_path_factory.mktemp("scene"))
