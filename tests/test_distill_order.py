"""What is trained on at which step is one function of seed, epoch and position: ranks and workers have no say."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import forked_ranks, peaceful
from in_process import load, run
from rank_order import joined, look
from tiny_corpus import png
from tiny_run import write_run
from tiny_teachers import write_tiny_teacher

from mmkd.distill.config import load_run
from mmkd.distill.order import epoch_places
from mmkd.distill.prepare import prepare
from mmkd.distill.world import World

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def lengths_scene(training_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pairs whose captions have 3 to 14 tokens, and a teacher."""
    root = tmp_path_factory.mktemp("lengths")
    (root / "corpus/images").mkdir(parents=True)
    with (root / "corpus/pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["key", "image", "caption", "site"])
        for i in range(64):
            (root / f"corpus/images/{i}.png").write_bytes(png(i))
            table.writerow([f"k{i}", f"images/{i}.png", "lung " * (i % 12 + 1), "s0"])
    run(root / "corpus/pairs.csv", root / "features", load({"one": write_tiny_teacher(root / "one", seed=1)}, "one"))
    (root / "tiny-student.json").write_bytes((training_scene / "tiny-student.json").read_bytes())
    return root


SETTINGS = {"batch_size": 8, "data": {"workers": 0}}


@pytest.fixture(scope="module")
def alone(lengths_scene: Path) -> list[dict[str, Any]]:
    """Sixteen steps in two epochs as one process without workers sees them."""
    look(write_run(lengths_scene, "alone", **SETTINGS), 0, lengths_scene)
    steps = joined(lengths_scene, 1)
    assert [step["epoch"] for step in steps] == [0] * 8 + [1] * 8
    return steps


def test_a_batch_is_a_random_draw_whatever_its_captions(alone: list[dict[str, Any]]) -> None:
    """Captions of 3 to 14 tokens need eight or sixteen columns; long and short ones meet in every batch."""
    for epoch in (0, 1):
        steps = alone[8 * epoch : 8 * epoch + 8]
        rows = [row for step in steps for row, *_ in step["samples"]]
        assert rows == epoch_places(np.arange(64), 64, 0, epoch).tolist()
        assert len({tuple(rows), tuple(range(64))}) == 2
    for step in alone:
        found = {row: columns for row, columns, *_ in step["samples"]}
        assert found == {row: 8 if row % 12 + 3 <= 8 else 16 for row in found}
        assert set(found.values()) == {8, 16}


@pytest.mark.integration
@pytest.mark.parametrize(("ranks", "first", "workers"), [(2, 0, 0), (4, 0, 0), (4, 5, 0), (1, 11, 2)])
def test_ranks_workers_and_resumes_see_the_same_samples(
    lengths_scene: Path, tmp_path: Path, alone: list[dict[str, Any]], ranks: int, first: int, workers: int
) -> None:
    changes = SETTINGS | {"data": {"workers": workers}}
    path = write_run(lengths_scene, f"order-{ranks}-{first}-{workers}", **changes)
    peaceful(forked_ranks(ranks, look, path, first, tmp_path))
    assert joined(tmp_path, ranks) == alone[first:]


@pytest.mark.slow
def test_four_ranks_under_torchrun_see_the_same_samples(
    lengths_scene: Path, tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    path = write_run(lengths_scene, "order-torchrun", **SETTINGS)
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*launcher, str(HERE / "rank_order.py"), str(path), "3", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert joined(tmp_path, 4) == alone[3:]


def test_rows_of_equal_tokens_or_of_one_image_are_grouped(lengths_scene: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus/images").mkdir(parents=True)
    long = "the heart is normal and the lungs are clear " * 4
    captions = ["Chest X-ray", "chest x-ray ", "brain", f"{long} one", f"{long} two", "knee"]
    with (tmp_path / "corpus/pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["key", "image", "caption"])
        for i, caption in enumerate(captions):
            (tmp_path / f"corpus/images/{i}.png").write_bytes(png(0 if i in (2, 5) else i + 1))
            table.writerow([f"k{i}", f"images/{i}.png", caption])
    run(
        tmp_path / "corpus/pairs.csv",
        tmp_path / "features",
        load({"one": write_tiny_teacher(tmp_path / "one", seed=1)}, "one"),
    )
    (tmp_path / "tiny-student.json").write_bytes((lengths_scene / "tiny-student.json").read_bytes())
    config = load_run(write_run(tmp_path, "groups", batch_size=6, where=""))
    batch = next(prepare(config, World(torch.device("cpu"))).batches.from_step(0))
    tokens, images = (dict(zip(batch.rows.tolist(), column.tolist(), strict=True)) for column in batch.groups.T)
    assert [[a for a in range(6) if tokens[a] == tokens[b]] for b in range(6)] == [
        [0, 1],
        [0, 1],
        [2],
        [3, 4],
        [3, 4],
        [5],
    ]
    assert [[a for a in range(6) if images[a] == images[b]] for b in range(6)] == [[0], [1], [2, 5], [3], [4], [2, 5]]
