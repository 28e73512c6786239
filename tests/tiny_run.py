"""Training runs of seconds: a store of two tiny teachers over 300 pairs, a tiny student, run.yaml files."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from forked import forked_ranks, peaceful
from in_process import load, run
from tiny_corpus import write_table_corpus
from tiny_teachers import TINY, write_tiny_teacher

from mmkd.base.errors import MmkdError
from mmkd.distill.alignment import Alignment, AlignmentCard, TeacherMap, save
from mmkd.distill.checkpoint import find_checkpoint, read
from mmkd.distill.config import RunConfig, load_run
from mmkd.distill.trainer import TrainReport, train
from mmkd.store import FeatureStore


def write_scene(root: Path, rows: int = 300) -> Path:
    """Teachers `one` (24 wide) and `two` (32 wide), corpus, `features`, and `tiny-student.json` (20 wide) in `root`."""
    folders = {
        "one": write_tiny_teacher(root / "one", seed=1),
        "two": write_tiny_teacher(root / "two", seed=2, embed_dim=32, image_size=48),
    }
    run(write_table_corpus(root / "corpus", rows), root / "features", load(folders, *folders))
    (root / "tiny-student.json").write_text(
        json.dumps(TINY | {"embed_dim": 20, "text_cfg": TINY["text_cfg"] | {"width": 16}})
    )
    return root


def write_run(root: Path, name: str, **changes: Any) -> Path:
    """run.yaml with a run folder of its own: eight steps over the hundred rows of one site.

    Mappings in `changes` are laid over those that are there.
    """
    content: dict[str, Any] = {
        "store": "features",
        "out": f"runs/{name}",
        "student": {"model": "tiny-student.json"},
        "epochs": 2,
        "where": "site = 's0'",
        "batch_size": 24,
        "optimizer": {"lr": 1e-3, "warmup": 0.25},
        "data": {"workers": 0},
        "checkpoints": {"every_steps": 100},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    for key, value in changes.items():
        merge = isinstance(value, dict) and key in content and key != "where"
        content[key] = content[key] | value if merge else value
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write_alignment(store: FeatureStore, path: Path, dim: int = 20, teachers: tuple[str, ...] = ("one", "two")) -> str:
    """Random maps of these teachers to the student's width."""
    generator = torch.Generator().manual_seed(0)
    card = AlignmentCard(
        method="test", settings={}, dim=dim, unit_input=True, rows=1, corpus=store.record.corpus.digest,
        teachers={slug: store.card(slug).digest for slug in teachers},
        widths={slug: store.card(slug).dim for slug in teachers},
    )  # fmt: skip
    maps = {
        slug: TeacherMap(torch.randn(dim, width, generator=generator), torch.zeros(dim), torch.zeros(dim))
        for slug, width in card.widths.items()
    }
    save(Alignment(card, maps), path)
    return str(path)


def quiet(config: RunConfig | Path) -> TrainReport:
    """Train without a word, to the end.

    A run saves and returns on SIGTERM. One that comes from outside (`timeout`, a batch system) would else be seen as
    a wrong loss: that of the step in which it came.
    """
    report = train(config if isinstance(config, RunConfig) else load_run(config), say=lambda _: None)
    assert not report.stop_signal, f"{report.stopped} from outside ended the run after step {report.steps}"
    return report


def stopped_at_first_step(path: Path) -> TrainReport:
    """Train one step: the first of the signals to stop at comes before it."""
    config = load_run(path)
    number = signal.Signals[config.checkpoints.stop_signals[0]]
    return train(config, say=lambda _: os.kill(os.getpid(), number))


def assert_equal_ends(one: RunConfig, other: RunConfig, norms: bool = False) -> None:
    """Record, progress, weights, averages and moments of two runs are equal to 2e-6. Behind batch norms a ReLU that
    flips by the last bit moves a moment by a hundredth; statistics have no such excuse."""
    a, b = (read(find_checkpoint(config.out, "last")) for config in (one, other))
    assert (a.record, a.progress) == (b.record, b.progress)
    assert a.tensors.keys() == b.tensors.keys()
    for name, value in a.tensors.items():
        share = 1e-4 if not norms else 1e-3 if "running_" in name else 5e-2
        assert (value - b.tensors[name]).abs().max() <= share * value.abs().max() + 2e-6, name


def in_ranks(ranks: int, path: Path, act: Callable[[Path], TrainReport] = quiet) -> TrainReport:
    """What the first of so many ranks reports of a run; raises what it raised. One rank is this process."""
    if ranks == 1:
        return act(path)
    note = path.with_suffix(".report")
    note.unlink(missing_ok=True)
    peaceful(forked_ranks(ranks, _noted, act, path, note))
    found = pickle.loads(note.read_bytes())
    if isinstance(found, MmkdError):
        raise found
    assert isinstance(found, TrainReport)
    return found


def _noted(act: Callable[[Path], TrainReport], path: Path, note: Path) -> None:
    found: TrainReport | MmkdError
    try:
        found = act(path)
    except MmkdError as error:
        found = error
    if os.environ["RANK"] == "0":
        note.write_bytes(pickle.dumps(found))
