"""One rank and two: whatever a run file says, the same losses, scores, records, weights and moments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from image_teacher import Seer
from in_process import run
from tiny_run import assert_equal_ends, in_ranks, quiet, write_alignment, write_run
from tiny_teachers import TINY

from mmkd.distill.checkpoint import checkpoints, find_checkpoint, read
from mmkd.distill.config import load_run
from mmkd.store import FeatureStore
from mmkd.store.selection import SelectionRule, select

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "patch_size": None}
WIDE = {"image_size": [32, 48], "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
STUDENTS = {"resnet": RESNET, "wide": WIDE, "tiny-student": TINY["vision_cfg"]}
PAIRS = ["one", "two"]
"""Teachers with both towers."""
CASES: dict[str, dict[str, Any]] = {
    "teachers with missing rows and towers": {},
    "images alone": {"teachers": ["seer"], "loss": {"cross": 0.0}},
    "pairs alone": {"preset": "pretrain"},
    "every term": {
        "loss": {"bank": 1.0, "relational": 1.0, "balance": "learned", "bank_rows": {"size": 100, "refresh": 32}},
        "policy": {"kind": "best", "by": "corpus", "drop": 0.3},
        "heads": {"kind": "mlp"},
        "teachers": PAIRS,
    },
    "one teacher a row": {"loss": {"balance": "equal", "feature_kind": "smooth_l1"}, "policy": {"kind": "one"}},
    "weights of teachers": {"policy": {"kind": "weighted", "weights": {"two": 3.0, "seer": 0.0}, "drop": 0.5}},
    "the released loss": {
        "preset": "mmkd_clip",
        "heads": {"alignment": "alignment.safetensors"},
        "teachers": PAIRS,
        # Biases of keys have no gradient but its rounding, which Adam would scale to steps of the learning rate.
        "optimizer": {"eps": 1e-3},
        "compute": {"gradient_checkpointing": False},
    },
    "a selection": {"selection": "half", "teachers": PAIRS, "batch_size": 30},
    "locks and rates": {
        "student": {"model": "tiny-student.json", "lock": {"image": "all", "text": 1}},
        "optimizer": {"layer_decay": 0.5, "part_rates": {"text": 2.0, "heads": 0.1}, "clip_norm": 1e-3},
    },
    "pieces": {"compute": {"micro_batch": 13, "gradient_checkpointing": True}},
    "judged averages": {
        "where": "site != 's1'",
        "batch_size": 40,
        "optimizer": {"average": 0.9},
        "monitor": {
            "every_steps": 2,
            "metric": "rows/bacc",
            "sets": [
                {"name": "pairs", "where": "site = 's1'", "limit": 41},
                {"name": "rows", "where": "site = 's1'", "limit": 101, "label": "row", "prompts": "site = 's1'"},
            ],
        },
    },
    "batch norms": {"student": {"model": "resnet.json"}},
    "frozen batch norms": {"student": {"model": "resnet.json"}, "compute": {"batch_norm": "frozen"}},
    "images that are not square": {"student": {"model": "wide.json"}},
}


@pytest.fixture(scope="module")
def root(training_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scene with a third teacher of images alone; the second lacks the last 44 rows. A selection, an alignment."""
    root = tmp_path_factory.mktemp("one-and-two")
    (root / "corpus").symlink_to(training_scene / "corpus")
    shutil.copytree(training_scene / "features", root / "features", ignore=shutil.ignore_patterns("selections"))
    rule = SelectionRule.model_validate({"keep": {"cosine": {"quantile": 0.5}}})
    select(FeatureStore.open(root / "features"), "half", rule)
    run(training_scene / "corpus/pairs.csv", root / "features", {"seer": Seer()})
    (root / "features/ledger/00001.two.json").unlink()
    for name, vision in STUDENTS.items():
        student = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT | {"layers": 2}}
        (root / f"{name}.json").write_text(json.dumps(student))
    write_alignment(FeatureStore.open(root / "features"), root / "alignment.safetensors")
    return root


@pytest.mark.integration
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_where_one_does(root: Path, name: str) -> None:
    settings = {"where": "", "epochs": 1, "batch_size": 60} | CASES[name]
    settings["optimizer"] = {"lr": 1e-4, "warmup_steps": 2} | settings.get("optimizer", {})
    paths = [write_run(root, f"{name} {count}", **settings) for count in ("alone", "both")]
    one, both = quiet(paths[0]), in_ranks(2, paths[1])
    assert one.steps >= 4
    assert both.losses == pytest.approx(one.losses, rel=1e-4)
    assert both.scores == one.scores
    assert (both.steps, both.rows, both.best) == (one.steps, one.rows, one.best)
    configs = [load_run(path) for path in paths]
    assert_equal_ends(*configs, norms="resnet" in str(settings))
    state = read(find_checkpoint(configs[1].out))
    variances = [value for key, value in state.part("model").items() if key.endswith("running_var")]
    assert bool(variances) == ("batch norms" in name)
    assert all(torch.equal(value, torch.ones_like(value)) == ("frozen" in name) for value in variances)
    assert len(checkpoints(configs[1].out)) == len(checkpoints(configs[0].out))
