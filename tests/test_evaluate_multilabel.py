"""Several labels a sample: what is true, the metrics over labels, prompts of presence and absence, the probe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_store import store_of
from sklearn.metrics import average_precision_score, roc_auc_score

from mmkd.base.errors import ConfigError, UserError
from mmkd.evaluate import load_suite, result_table, run_suite
from mmkd.evaluate.check import check_suite
from mmkd.evaluate.dataset import load_dataset
from mmkd.evaluate.metrics import average_precision
from mmkd.evaluate.multilabel import SCORING, truth
from mmkd.evaluate.predictions import Predictions, read_predictions
from mmkd.store import FeatureStore
from mmkd.store.writer import ShardFeatures

FINDINGS = ("effusion", "nodule", "rare")
DIM = 12


def write_set(folder: Path, prompts: bool = True, **changes: Any) -> Path:
    """A suite. Images are sums of the directions of their findings; `a` sees them, `b` sees noise."""
    rng = np.random.default_rng(3)
    *direction, background = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][: len(FINDINGS) + 1]
    rows: list[dict[str, Any]] = []
    vectors = []
    for split, n in (("train", 160), ("val", 40), ("test", 100)):
        for i in range(n):
            has = rng.random(3) < (0.4, 0.3, 0.1)
            cells = dict(zip(FINDINGS, (str(int(one)) for one in has), strict=True))
            listed = "|".join(name for name, one in zip(FINDINGS, has, strict=True) if one) or "No Finding"
            rows.append({"key": f"{split}{i}", "split": split, "listed": listed, "patient": f"{split}{i // 2}"} | cells)
            vectors.append(background + has @ np.stack(direction) + rng.normal(size=DIM) * 0.05)
    for kind, sign in (("prompt", 1), ("negative_prompt", -1)):
        for name, vector in zip(FINDINGS, direction, strict=True):
            rows.append({"key": f"{kind}:{name}:0", "row_kind": kind, "text_of": name, "caption": f"{kind} {name}"})
            vectors.append(sign * vector)
    x = np.stack(vectors)
    valid = np.array([2 if "row_kind" in row else 1 for row in rows], dtype=np.uint8)
    blind = rng.normal(size=x.shape)
    features = {
        name: ShardFeatures(seen.astype(np.float16), seen.astype(np.float16), valid)
        for name, seen in (("a", x), ("b", blind))
    }
    store_of(folder / "store", rows, ("split", "listed", "patient", *FINDINGS, "row_kind", "text_of"), features)
    dataset = {
        "dataset": "chest", "modality": "x-ray", "multilabel": {}, "classes": list(FINDINGS), "group": "patient",
        "rows": {split: {"split": split} for split in ("train", "val", "test")},
        "prompts": {"rows": {"row_kind": "prompt"}, "label": "text_of", "negatives": {"row_kind": "negative_prompt"}},
        "tasks": ["multilabel_zero_shot", "multilabel_probe"],
    } | changes  # fmt: skip
    if not prompts:
        dataset["prompts"] = dataset["prompts"] | {"negatives": None}
    suite = {
        "suite": "several", "store": "store", "datasets": [dataset], "bootstrap": {"n": 100},
        "settings": {"multilabel_probe": {"fractions": [0.1, 1], "seeds": 1, "c_steps": 3, "c_low": 1, "c_high": 1e3}},
    }  # fmt: skip
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


def test_the_planted_findings_are_found_and_noise_is_at_chance(tmp_path: Path) -> None:
    suite = load_suite(write_set(tmp_path))
    assert check_suite(suite).ok
    report = run_suite(suite, tmp_path / "out")
    assert report.failed == ()
    for task in ("multilabel_zero_shot", "multilabel_probe"):
        for metric in ("auroc_mean", "map"):
            table = result_table(report.out, task, metric=metric)
            assert table.value("a", "chest") > 0.97
            assert table.value("b", "chest") < 0.65
    few = result_table(report.out, "multilabel_probe", fraction=0.1)
    assert 0.8 < few.value("a", "chest") <= 1


def test_values_are_scikit_learns_means_over_labels(tmp_path: Path) -> None:
    suite = load_suite(write_set(tmp_path))
    out = run_suite(suite, tmp_path / "out").out
    store = FeatureStore.open(tmp_path / "store")
    data = load_dataset(suite.datasets[0], store)
    known = truth(data, data.split("test"))
    for model in ("a", "b"):
        found = read_predictions(next((out / "predictions/chest/multilabel_zero_shot").glob(f"{model}-*")))
        assert found.columns == (*FINDINGS, *(f"is {name}" for name in FINDINGS))
        unit = [np.asarray(getattr(store, tower)(model)[:], float) for tower in ("image", "text")]
        images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit)
        gap = images[200:300] @ (texts[300:303] - texts[303:306]).T
        assert found.score[:, :3] == pytest.approx(1 / (1 + np.exp(-100 * gap)), abs=1e-4)
        expected = {
            "auroc_mean": np.mean([roc_auc_score(known[:, i], found.score[:, i]) for i in range(3)]),
            "map": np.mean([average_precision_score(known[:, i], found.score[:, i]) for i in range(3)]),
        }
        for metric, value in expected.items():
            table = result_table(out, "multilabel_zero_shot", metric=metric)
            assert table.value(model, "chest") == pytest.approx(value, abs=1e-12)


def test_without_negative_prompts_the_cosine_counts(tmp_path: Path) -> None:
    suite = load_suite(write_set(tmp_path, prompts=False, tasks=["multilabel_zero_shot"]))
    out = run_suite(suite, tmp_path / "out").out
    found = read_predictions(next((out / "predictions/chest/multilabel_zero_shot").glob("a-*")))
    assert found.info["score"] == "bare cosine"
    assert found.score[:, :3].min() < 0  # no probabilities
    assert result_table(out, "multilabel_zero_shot").value("a", "chest") > 0.97


def test_truth_from_columns_lists_and_unknown_values(tmp_path: Path) -> None:
    columns = _truth(tmp_path / "0")
    assert set(np.unique(columns)) == {0, 1}
    listing = {"column": "listed", "separator": "|"}
    listed = _truth(tmp_path / "1", multilabel=listing | {"nothing": ["No Finding"]})
    with pytest.raises(UserError, match="listed lists 'No Finding' 33 among the test rows, which no class has"):
        _truth(tmp_path / "4", multilabel=listing)
    assert np.array_equal(columns, listed)
    # Two columns of one class: either is enough.
    unknown = _truth(tmp_path / "2", multilabel={"positive": ["1"], "negative": ["x"], "unknown": ["0"]})
    assert set(np.unique(unknown)) == {-1, 1}
    either = _truth(tmp_path / "3", classes={"any": ["effusion", "nodule"], "rare": "rare"})
    assert np.array_equal(either[:, 0], columns[:, :2].max(axis=1))


def _truth(folder: Path, **changes: Any) -> np.ndarray[Any, Any]:
    suite = load_suite(write_set(folder, **({"tasks": ["multilabel_probe"]} | changes)))
    data = load_dataset(suite.datasets[0], FeatureStore.open(suite.datasets[0].store))
    return truth(data, data.split("test"))


def test_unknown_values_count_for_no_label() -> None:
    score = np.array([[0.9, 0.2, 1, -1], [0.8, 0.9, 0, 1], [0.1, 0.3, 0, 0], [0.99, 0.1, -1, 0]])
    ids = np.array(list("abcd"), dtype=object)
    found = Predictions(ids, ids, ids, None, score, np.ones(4, bool), ("x", "y", "is x", "is y"))
    weights = np.array([[1.0, 1, 1, 1], [1, 0, 2, 5], [0, 1, 1, 1]])
    # Of `x` the fourth sample is unknown, of `y` the first; in the third weighting `x` has no positive left.
    assert SCORING.metrics["auroc_mean"](found, weights).tolist() == [1.0, 1.0, 1.0]
    score[1, 0] = 0.95
    assert SCORING.metrics["auroc_mean"](found, weights)[0] == pytest.approx((0.5 + 1) / 2)
    assert SCORING.metrics["map"](found, weights)[0] == pytest.approx((0.5 + 1) / 2)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=30))
def test_average_precision_is_scikit_learns_with_counts_and_ties(rows: list[tuple[bool, int, int]]) -> None:
    positive, score, weight = (np.array(column) for column in zip(*rows, strict=True))
    ours = average_precision(positive, score / 4, weight[None].astype(float))[0]
    if not (positive & (weight > 0)).any():
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(average_precision_score(positive, score / 4, sample_weight=weight), abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multilabel": None}, "multilabel_zero_shot needs `multilabel` and `classes`"),
        ({"classes": None}, "multilabel_zero_shot needs `multilabel` and `classes`"),
        ({"label": "listed"}, "`label` is for one label a sample, `multilabel` for several; keep one"),
        ({"prompts": None}, "chest: multilabel_zero_shot needs `prompts`"),
        ({"classes": {"x": "rare", "y": "rare"}}, "value 'rare' means two classes"),
        ({"classes": {True: "rare"}}, "YAML reads a class name as True; put it in quotes"),
        ({"classes": {"x": []}}, "a class has no value"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_set(tmp_path)
    raw = yaml.safe_load(path.read_text())
    raw["datasets"][0] |= changes
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=message):
        load_suite(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["effusion", "nodule", "mass"]}, "no such column|no column|'mass'"),
        ({"multilabel": {"positive": ["7"], "unknown": ["1"]}}, "'effusion' has no positive test rows"),
        ({"multilabel": {"positive": ["7"]}}, r"effusion has '1' \d+ among the test rows; name these values under"),
        ({"multilabel": {"column": "listed"}}, "has the labels '.*', expected a JSON list; say the `separator`"),
        ({"group": "split", "rows": {s: {"split": "test"} for s in ("train", "test")}}, "stand in both train and test"),
    ],
)
def test_check_names_what_is_wrong_with_labels(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    found = check_suite(load_suite(write_set(tmp_path, **changes))).datasets[0]
    assert any(re.search(message, text) for text in found.problems), found.problems
