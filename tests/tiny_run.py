"""Training runs of seconds: a store of two tiny teachers over 300 pairs, a tiny student, run.yaml files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from in_process import load, run
from tiny_corpus import write_table_corpus
from tiny_teachers import TINY, write_tiny_teacher

from mmkd.distill.config import RunConfig, load_run
from mmkd.distill.trainer import TrainReport, train


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


def quiet(config: RunConfig | Path) -> TrainReport:
    """Train without a word, to the end.

    A run saves and returns on SIGTERM. One that comes from outside (`timeout`, a batch system) would else be seen as
    a wrong loss: that of the step in which it came.
    """
    report = train(config if isinstance(config, RunConfig) else load_run(config), say=lambda _: None)
    assert not report.stop_signal, f"{report.stopped} from outside ended the run after step {report.steps}"
    return report
