"""The linear probe's choices: C, label shares, held-out groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from mmkd.evaluate.linear_probe import Labeled, LinearProbeSettings, choose_c
from mmkd.evaluate.splits import draw_share, hold_out, shared_groups


def digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return x / np.linalg.norm(x, axis=1, keepdims=True), y.astype(np.int64)


def labeled(x: np.ndarray, y: np.ndarray) -> Labeled:
    return Labeled(x, y, np.array([str(i) for i in range(len(y))], dtype=object))


def test_a_fixed_c_is_wrong_on_unit_features_and_the_sweep_finds_a_better_one() -> None:
    x, y = digits()
    correct = [
        int((LogisticRegression(C=c, max_iter=1000).fit(x[:898], y[:898]).predict(x[898:]) == y[898:]).sum())
        for c in (0.1, 0.316, 1, 10, 100)
    ]
    assert correct == pytest.approx([762, 799, 815, 839, 846], abs=2)
    grid = LinearProbeSettings(c_low=1e-2, c_high=1e4, c_steps=7)
    c, info = choose_c(labeled(x[:898], y[:898]), None, grid, seed=0)
    assert c >= 10
    assert info["c_at_edge"] is False
    assert info["c_chosen_on"] == pytest.approx(180, abs=10)


def test_c_is_the_best_of_the_grid_on_the_validation_rows() -> None:
    x, y = digits()
    train, val = labeled(x[:300], y[:300]), labeled(x[300:500], y[300:500])
    grid = LinearProbeSettings(c_low=1e-2, c_high=1e6, c_steps=9)
    losses = []
    for c in grid.grid():
        proba = LogisticRegression(C=c, max_iter=2000).fit(train.x, train.y).predict_proba(val.x)
        losses.append(-np.log(proba[np.arange(200), val.y]).mean())
    assert choose_c(train, val, grid, seed=0)[0] == pytest.approx(grid.grid()[int(np.argmin(losses))])


def test_without_anything_to_hold_out_c_falls_back() -> None:
    x, y = digits()
    first = [int(np.flatnonzero(y == label)[0]) for label in range(10)]
    one_each = labeled(x[first], y[first])
    assert choose_c(one_each, None, LinearProbeSettings(fallback_c=3.0), 0) == (3.0, {"c": 3.0, "c_chosen_on": 0})


labels_and_groups = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 15)), min_size=1, max_size=80)


@given(labels_and_groups, st.integers(0, 2**31))
def test_held_out_groups_are_whole_and_every_class_stays_in_training(pairs: list[tuple[int, int]], seed: int) -> None:
    y = np.array([label for label, _ in pairs])
    group = np.array([f"p{g}" for _, g in pairs], dtype=object)
    out = hold_out(y, group, seed)
    assert shared_groups(group[out], group[~out]) == []
    assert set(y[~out]) == set(y)


@given(st.integers(0, 2**31))
def test_about_a_fifth_of_every_class_is_held_out(seed: int) -> None:
    y = np.repeat([0, 1, 2], [100, 30, 10])
    out = hold_out(y, np.arange(140).astype(str).astype(object), seed)
    assert np.bincount(y[out]).tolist() == [20, 6, 2]
    # The same sizes as scikit-learn's stratified fifth.
    _, test = next(StratifiedKFold(5).split(np.zeros(140), y))
    assert np.bincount(y[test]).tolist() == [20, 6, 2]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=50), st.floats(0.001, 1), st.integers(0, 2**31))
def test_a_share_keeps_every_class(values: list[int], share: float, seed: int) -> None:
    y = np.array(values)
    drawn = draw_share(y, share, seed)
    assert np.array_equal(drawn, np.unique(drawn))
    for label in np.unique(y):
        total = int((y == label).sum())
        assert int((y[drawn] == label).sum()) == max(1, round(share * total))


def test_a_share_depends_on_the_seed_alone() -> None:
    y = np.arange(1000) % 4
    assert np.array_equal(draw_share(y, 0.1, 7), draw_share(y, 0.1, 7))
    assert not np.array_equal(draw_share(y, 0.1, 7), draw_share(y, 0.1, 8))
    assert np.array_equal(draw_share(y, 1.0, 7), np.arange(1000))
