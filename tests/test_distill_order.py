"""What is trained on at which step is one function of seed, epoch and position: ranks and workers have no say."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import forked_ranks, peaceful
from in_process import load, run
from rank_order import joined, look
from tiny_corpus import png
from tiny_run import write_run
from tiny_teachers import write_tiny_teacher

from mmkd.distill.order import bucketed, epoch_order

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


def test_batches_of_like_length_have_random_places() -> None:
    rows, size, window = np.arange(96), 4, 8
    lengths = np.random.default_rng(0).integers(3, 30, 96)
    first: set[int] = set()
    for epoch in range(20):
        order = epoch_order(rows, 5, epoch)
        found = bucketed(order, lengths[order], size, window, (5, epoch))
        assert sorted(found) == list(rows)
        for start in range(0, 96, size * window):
            own = lengths[found[start : start + size * window].reshape(window, size)]
            places = np.lexsort((own.max(axis=1), own.min(axis=1)))
            assert (own[places].min(axis=1)[1:] >= own[places].max(axis=1)[:-1]).all()  # cut from the sorted window
            first.add(int(places[0]))
    assert len(first) == window  # the shortest batch has stood everywhere
    assert np.array_equal(bucketed(rows, lengths, size, 0, (5, 0)), rows)


BUCKETED = {"batch_size": 8, "data": {"workers": 0, "bucket_batches": 4}}


@pytest.fixture(scope="module")
def alone(lengths_scene: Path) -> list[dict[str, object]]:
    """Sixteen steps in two epochs as one process without workers sees them."""
    look(write_run(lengths_scene, "alone", **BUCKETED), 0, lengths_scene)
    steps = joined(lengths_scene, 1)
    assert [step["epoch"] for step in steps] == [0] * 8 + [1] * 8
    return steps


def test_a_batch_is_as_long_as_its_longest_caption(alone: list[dict[str, object]]) -> None:
    """Begin, end and i % 12 + 1 words: up to eight tokens in eight columns."""
    for step in alone:
        samples = step["samples"]
        assert isinstance(samples, list)
        longest = max(row % 12 + 3 for row, *_ in samples)
        assert step["columns"] == (8 if longest <= 8 else 16)
    columns = [step["columns"] for step in alone]
    assert 4 <= columns.count(8) <= 8  # half of the captions are short, so nearly half of the batches are
    for epoch in (alone[:8], alone[8:]):
        assert sorted(row for step in epoch for row, *_ in step["samples"]) == list(range(64))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("ranks", "first", "workers"), [(2, 0, 0), (4, 0, 0), (4, 5, 0), (1, 11, 2)])
def test_ranks_workers_and_resumes_see_the_same_samples(
    lengths_scene: Path, tmp_path: Path, alone: list[dict[str, object]], ranks: int, first: int, workers: int
) -> None:
    changes = BUCKETED | {"data": {"workers": workers, "bucket_batches": 4}}
    path = write_run(lengths_scene, f"order-{ranks}-{first}-{workers}", **changes)
    peaceful(forked_ranks(ranks, look, path, first, tmp_path))
    assert joined(tmp_path, ranks) == alone[first:]


@pytest.mark.slow
def test_four_ranks_under_torchrun_see_the_same_samples(
    lengths_scene: Path, tmp_path: Path, alone: list[dict[str, object]]
) -> None:
    path = write_run(lengths_scene, "order-torchrun", **BUCKETED)
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*launcher, str(HERE / "rank_order.py"), str(path), "3", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert joined(tmp_path, 4) == alone[3:]
