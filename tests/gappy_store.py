"""A store with gaps of every kind, and the store commands as functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_store import make_card, make_store

from mmkd.cli.store import store as store_command
from mmkd.store import FeatureStore
from mmkd.store.samples import read_part
from mmkd.store.writer import ShardFeatures, write_shard

ANY = ("--allow-loss", "all")


@pytest.fixture
def gappy(tmp_path: Path) -> FeatureStore:
    """300 rows; shard 0 of alpha has rows without image, without text and without both; beta lacks shard 1."""
    cards = [make_card("alpha", 8), make_card("beta", 5).model_copy(update={"encoding": "float32"})]
    store, written = make_store(tmp_path / "s", 300, cards)
    valid = np.full(256, 3, dtype=np.uint8)
    valid[[3, 4, 5]] = [1, 2, 0]
    image, text = (written[f"alpha/{tower}"][:256] for tower in ("image", "text"))
    write_shard(store, cards[0], 0, ShardFeatures(image, text, valid), read_part(tmp_path / "s", 0)[1])
    (tmp_path / "s/ledger/00001.beta.json").unlink()
    return FeatureStore.open(tmp_path / "s")


def mmkd(*arguments: object) -> Result:
    """Run `mmkd store ...`; errors of ours stand in `exception`."""
    return CliRunner().invoke(store_command, [str(argument) for argument in arguments])
