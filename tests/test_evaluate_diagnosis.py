"""Diagnosis from bags: attention that finds one telling patch, patients that stay whole, bags that are empty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from slide_suite import DIM, slides

from mmkd.evaluate import load_suite, result_table, run_suite
from mmkd.evaluate.features import BagFeatures, make_bags
from mmkd.evaluate.heads.abmil import GatedAttention
from mmkd.evaluate.heads.settings import MilSettings
from mmkd.evaluate.plan import make_plan
from mmkd.evaluate.predictions import read_predictions
from mmkd.evaluate.splits import draw_folds
from mmkd.store import UserError


@pytest.fixture(scope="module")
def network() -> GatedAttention:
    torch.default_generator.manual_seed(3)
    return GatedAttention(DIM, 2, MilSettings(hidden=16, attention=8)).eval()


def test_k13_order_repetition_and_single_patches(network: GatedAttention) -> None:
    patches = torch.randn(7, DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = network(patches, [7])
        assert torch.allclose(network(patches[torch.tensor([3, 1, 0, 6, 5, 2, 4])], [7]), whole, atol=1e-6)
        assert torch.allclose(network(patches.repeat(3, 1), [21]), whole, atol=1e-6)
        assert torch.isfinite(network(patches[:1], [1])).all()
        # Bags in one batch do not see each other.
        together = network(torch.cat([patches, patches[:2]]), [7, 2])
        assert torch.allclose(together[0], whole[0], atol=1e-6)
        assert torch.allclose(together[1], network(patches[:2], [2])[0], atol=1e-6)


def test_k13_without_attention_it_is_the_mean(network: GatedAttention) -> None:
    flat = GatedAttention(DIM, 2, MilSettings(hidden=16, attention=8)).eval()
    torch.nn.init.zeros_(flat.score.weight)
    patches = torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(flat(patches, [5])[0], flat.head(flat.embed(patches).mean(dim=0)), atol=1e-6)
        assert not torch.allclose(network(patches, [5])[0], network.head(network.embed(patches).mean(dim=0)), atol=1e-4)


def test_attention_learns_the_planted_patch_and_an_empty_slide_is_missing(tmp_path: Path) -> None:
    report = run_suite(load_suite(slides(tmp_path)), tmp_path / "out")
    assert [outcome.reason for outcome in report.failed] == []
    attention, mean = (result_table(report.out, "diagnosis", head=head) for head in ("abmil", "mean_pool"))
    assert attention.value("alpha", "lymph") > 0.95
    assert attention.value("alpha", "lymph") > mean.value("alpha", "lymph")
    (file,) = (tmp_path / "out" / "predictions" / "lymph" / "diagnosis").glob("*abmil*.parquet")
    found = read_predictions(file)
    assert (len(found), int(found.available.sum())) == (120, 119)
    assert found.fold is not None
    folds = {group: set(found.fold[found.group == group].tolist()) for group in found.group}
    assert {len(numbers) for numbers in folds.values()} == {1}


def test_shuffled_labels_give_chance(tmp_path: Path) -> None:
    suite = slides(tmp_path, shuffled=True, settings={"diagnosis": {"heads": ["mean_pool"]}})
    report = run_suite(load_suite(suite), tmp_path / "out")
    assert abs(result_table(report.out, "diagnosis").value("alpha", "lymph") - 0.5) < 0.12


def test_the_suites_own_splits_are_kept(tmp_path: Path) -> None:
    rows = {"train": {"site": ["site0", "site1"]}, "test": {"site": "site2"}}
    suite = slides(tmp_path, settings={"diagnosis": {"heads": ["mean_pool"]}})
    raw = yaml.safe_load(suite.read_text())
    raw["datasets"][0]["rows"] = rows
    suite.write_text(yaml.safe_dump(raw))
    report = run_suite(load_suite(suite), tmp_path / "out")
    assert [outcome.reason for outcome in report.failed] == []
    (file,) = (tmp_path / "out" / "predictions" / "lymph" / "diagnosis").glob("*.parquet")
    found = read_predictions(file)
    assert len(found) == 40
    assert found.info["trained_on"] == 79


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ({3: {"label": "tumour"}, 4: {"label": "normal"}}, {}, "bag 's0' has rows with label"),
        ({3: {"patient": "other"}}, {}, "bag 's0' has rows with patient"),
        ({}, {"folds": 99}, "60 patients cannot fill 99 folds; set folds to 60 or less"),
    ],
)
def test_bad_bags_fail_in_one_line(
    tmp_path: Path, rows: dict[int, dict[str, str]], settings: dict[str, int], message: str
) -> None:
    suite = slides(tmp_path, rows=rows, settings={"diagnosis": settings})
    report = run_suite(load_suite(suite), tmp_path / "out")
    assert len(report.failed) == 2
    assert all(message in outcome.reason for outcome in report.failed)


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_k20_no_group_in_two_folds_and_classes_spread(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    group = np.array([f"p{g}" for g in rng.integers(0, 12, 60)], dtype=object)
    y = rng.integers(0, 2, 60)
    if len(set(group)) < k:
        with pytest.raises(UserError):
            draw_folds(y, group, k, seed)
        return
    fold = draw_folds(y, group, k, seed)
    assert {len(set(fold[group == one])) for one in set(group)} == {1}
    assert set(fold.tolist()) == set(range(k))


def test_bags_in_memory_are_those_of_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_plan(load_suite(slides(tmp_path)))
    data, model = loaded.rows_of("lymph"), loaded.plan.models[0]
    bags = make_bags(data, data.split("test"), data.spec.bag)
    kept = BagFeatures(bags, loaded.features_of("lymph", model), "image", normalized=True)
    monkeypatch.setattr("mmkd.evaluate.features.IN_MEMORY_BYTES", 0)
    read = BagFeatures(bags, loaded.features_of("lymph", model), "image", normalized=True)
    for bag in range(len(bags)):
        assert np.array_equal(kept.patches(bag), read.patches(bag))
        assert np.array_equal(kept.patches(bag, np.array([0])), read.patches(bag, np.array([0])))
    assert sum(len(kept.patches(bag)) == 0 for bag in range(len(bags))) == 1  # the empty slide
