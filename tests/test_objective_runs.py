"""Whole runs with every kind of objective: exact resume, presets, and what a user can get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import in_ranks, quiet, stopped_at_first_step, write_alignment, write_run

from mmkd.base.errors import ConfigError, MmkdError, TeacherMismatchError, UserError
from mmkd.distill.checkpoint import find_checkpoint
from mmkd.distill.config import load_run
from mmkd.store import FeatureStore

EVERYTHING = {
    "loss": {"bank": 1.0, "relational": 1.0, "balance": "learned", "bank_rows": {"size": 100, "refresh": 32}},
    "policy": {"kind": "best", "best": 1, "drop": 0.3},
    "heads": {"kind": "mlp"},
}


def test_a_run_with_bank_policy_and_balance_resumes_to_the_same_bytes(training_scene: Path, ranks: int) -> None:
    whole, stop = (write_run(training_scene, f"rich-{name}-{ranks}", epochs=1, **EVERYTHING) for name in ("a", "b"))
    report = in_ranks(ranks, whole)
    assert set(report.losses) == {"task", "feature", "cross", "bank", "relational", "total"}
    for _ in range(report.steps if ranks == 1 else 1):
        in_ranks(ranks, stop, stopped_at_first_step)
    in_ranks(ranks, stop)
    ends = [find_checkpoint(load_run(path).out).read_bytes() for path in (whole, stop)]
    assert ends[0] == ends[1]


def test_mmkd_clip_trains_through_its_preset_and_an_alignment(training_scene: Path, tmp_path: Path, ranks: int) -> None:
    file = write_alignment(FeatureStore.open(training_scene / "features"), tmp_path / "a.safetensors")
    heads, compute = {"kind": "none", "alignment": file}, {"gradient_checkpointing": False}
    path = write_run(training_scene, f"released-{ranks}", preset="mmkd_clip", epochs=1, heads=heads, compute=compute)
    report = in_ranks(ranks, path)
    assert report.losses["total"] == pytest.approx(
        report.losses["task"] + 50 * report.losses["feature"] + report.losses["cross"], rel=1e-6
    )


def test_another_alignment_in_the_same_file_is_another_run(training_scene: Path, tmp_path: Path) -> None:
    file = write_alignment(FeatureStore.open(training_scene / "features"), tmp_path / "a.safetensors")
    run = write_run(training_scene, "realigned", epochs=1, heads={"kind": "linear", "alignment": file})
    quiet(run)
    write_alignment(FeatureStore.open(training_scene / "features"), tmp_path / "a.safetensors", dim=7)
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
        (
            {"policy": {"kind": "best", "by": "corpus", "keys": "known"}, "loss": {"relational": 0, "feature": 1}},
            ConfigError,
            "policy.keys known changes the term relational, whose weight is 0; set loss.relational",
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
    only_one = write_alignment(
        FeatureStore.open(training_scene / "features"), tmp_path / "one.safetensors", teachers=("one",)
    )
    with pytest.raises(UserError, match="has no teacher 'two'; it was fitted for one"):
        quiet(write_run(training_scene, "half-aligned", heads={"alignment": only_one}))
    file = write_alignment(FeatureStore.open(training_scene / "features"), tmp_path / "both.safetensors")
    store = FeatureStore.open(training_scene / "features")
    changed = store.card("one").model_copy(update={"digest": "f" * 16})
    assert changed.digest != store.card("one").digest
    from mmkd.distill.config import HeadConfig
    from mmkd.distill.teacher_features import TeacherFeatures
    from mmkd.distill.teacher_side import fixed_alignment

    teachers = TeacherFeatures(store, ["one", "two"])
    teachers.cards["one"] = changed
    with pytest.raises(TeacherMismatchError, match="the alignment was fitted on teacher one of digest"):
        fixed_alignment(HeadConfig(alignment=Path(file)), teachers)


@pytest.mark.integration
def test_policy_one_reads_a_teacher_of_a_row_where_no_other_row_is_compared(
    training_scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmkd.distill import prepare as module
    from mmkd.distill.prepare import prepare
    from mmkd.distill.world import World

    cpu = World(torch.device("cpu"))

    losses = {"feature": 1.0, "cross": 0.0}
    reads = write_run(training_scene, "reads-one", policy={"kind": "one"}, loss=losses, epochs=1)
    assert prepare(load_run(reads), cpu).batches.choose is not None
    found = quiet(reads).losses
    monkeypatch.setattr(module, "_reads_one", lambda config: False)
    assert quiet(write_run(training_scene, "reads-all", policy={"kind": "one"}, loss=losses, epochs=1)).losses == found
    monkeypatch.undo()
    keys = write_run(training_scene, "reads-keys", policy={"kind": "one"}, loss={"cross": 1.0})
    assert prepare(load_run(keys), cpu).batches.choose is None
