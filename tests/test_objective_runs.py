"""Whole runs with every kind of objective: exact resume, presets, and what a user can get wrong."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import quiet, write_run

from mmkd.base.errors import ConfigError, MmkdError, TeacherMismatchError, UserError
from mmkd.distill.alignment import Alignment, AlignmentCard, TeacherMap, save
from mmkd.distill.checkpoint import find_checkpoint
from mmkd.distill.config import load_run
from mmkd.distill.trainer import train
from mmkd.store import FeatureStore

STUDENT_DIM = 20


def write_alignment(
    training_scene: Path, path: Path, dim: int = STUDENT_DIM, teachers: tuple[str, ...] = ("one", "two")
) -> str:
    """Random maps of these teachers of the training_scene."""
    store = FeatureStore.open(training_scene / "features")
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


EVERYTHING = {
    "loss": {"bank": 1.0, "relational": 1.0, "balance": "learned", "bank_rows": {"size": 100, "refresh": 32}},
    "policy": {"kind": "best", "best": 1, "drop": 0.3},
    "heads": {"kind": "mlp"},
}


def test_a_run_with_bank_policy_and_balance_resumes_to_the_same_bytes(training_scene: Path) -> None:
    whole = load_run(write_run(training_scene, "rich-whole", epochs=1, **EVERYTHING))
    report = quiet(whole)
    assert set(report.losses) == {"task", "feature", "cross", "bank", "relational", "total"}
    stop = load_run(
        write_run(training_scene, "rich-stopped", epochs=1, checkpoints={"stop_signals": ["SIGUSR1"]}, **EVERYTHING)
    )
    for _ in range(report.steps):
        train(stop, say=lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    assert find_checkpoint(stop.out).read_bytes() == find_checkpoint(whole.out).read_bytes()


def test_mmkd_clip_trains_through_its_preset_and_an_alignment(training_scene: Path, tmp_path: Path) -> None:
    file = write_alignment(training_scene, tmp_path / "a.safetensors")
    report = quiet(
        write_run(
            training_scene, "released", preset="mmkd_clip", epochs=1, heads={"kind": "none", "alignment": file},
            compute={"gradient_checkpointing": False},
        )
    )  # fmt: skip
    assert report.losses["total"] == pytest.approx(
        report.losses["task"] + 50 * report.losses["feature"] + report.losses["cross"], rel=1e-6
    )


def test_another_alignment_in_the_same_file_is_another_run(training_scene: Path, tmp_path: Path) -> None:
    file = write_alignment(training_scene, tmp_path / "a.safetensors")
    run = write_run(training_scene, "realigned", epochs=1, heads={"kind": "linear", "alignment": file})
    quiet(run)
    write_alignment(training_scene, tmp_path / "a.safetensors", dim=7)
    with pytest.raises(UserError, match="configuration"):
        quiet(run)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": {"bank": 1.0}}, ConfigError, "`bank` and `bank_rows.size` go together"),
        ({"loss": {"crossing": 1.0}}, ConfigError, "loss.crossing: unknown key; did you mean 'cross'"),
        ({"loss": {"feature": -1}}, ConfigError, "loss.feature: Input should be greater than or equal to 0"),
        ({"loss": {"mixed_teachers": True, "balance": "equal"}}, ConfigError, "goes without `bank` and `balance`"),
        ({"loss": {"mixed_teachers": True}}, ConfigError, r"wants policy \{kind: one\}.*here \{kind: all\}"),
        (
            {"loss": {"mixed_teachers": True}, "policy": {"kind": "one"}},
            ConfigError,
            "teachers of one width, .* widths 24, 32; name an alignment",
        ),
        ({"policy": {"kind": "weighted"}}, ConfigError, "`weights` and `kind: weighted` go together"),
        (
            {"policy": {"kind": "weighted", "weights": {"three": 1.0}}},
            ConfigError,
            "policy.weights names three; the run's teachers are one, two",
        ),
        ({"policy": {"kind": "weighted", "weights": {"one": -1.0}}}, ConfigError, "weights must not be negative"),
        ({"policy": {"drop": 1.0}}, ConfigError, "policy.drop: Input should be less than 1"),
        ({"heads": {"kind": "none"}}, ConfigError, r"the student's 20 numbers with those of one \(24\), two \(32\)"),
        ({"heads": {"alignment": "gone.safetensors"}}, UserError, "no alignment at .*gone.safetensors; `mmkd align"),
    ],
)
def test_mistakes_in_an_objective(
    training_scene: Path, changes: dict[str, Any], error: type[MmkdError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        quiet(write_run(training_scene, "objective-mistake", **changes))
    assert "\n" not in str(caught.value)


def test_an_alignment_without_a_teacher_or_of_other_features_is_refused(training_scene: Path, tmp_path: Path) -> None:
    only_one = write_alignment(training_scene, tmp_path / "one.safetensors", teachers=("one",))
    with pytest.raises(UserError, match="has no teacher 'two'; it was fitted for one"):
        quiet(write_run(training_scene, "half-aligned", heads={"alignment": only_one}))
    file = write_alignment(training_scene, tmp_path / "both.safetensors")
    store = FeatureStore.open(training_scene / "features")
    changed = store.card("one").model_copy(update={"digest": "f" * 16})
    assert changed.digest != store.card("one").digest
    from mmkd.distill.config import HeadConfig
    from mmkd.distill.heads import fixed_alignment
    from mmkd.distill.teacher_features import TeacherFeatures

    teachers = TeacherFeatures(store, ["one", "two"])
    teachers.cards["one"] = changed
    with pytest.raises(TeacherMismatchError, match="the alignment was fitted on teacher one of digest"):
        fixed_alignment(HeadConfig(alignment=Path(file)), teachers)
