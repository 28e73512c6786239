"""Settings of a suite that bound what is read and tried: rows of a probe, patches of a bag, penalties, folds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mmkd.evaluate import survival
from mmkd.evaluate.heads import coxnet
from mmkd.evaluate.heads.abmil import MilTask, classify_task, fit_predict
from mmkd.evaluate.heads.coxnet import Cohort, CoxnetSettings, fit_coxnet, penalties
from mmkd.evaluate.heads.settings import MilSettings, Trained
from mmkd.evaluate.linear_probe import Labeled, LinearProbeSettings, draw_rows
from mmkd.evaluate.splits import Round
from mmkd.evaluate.survival import SurvivalSettings
from mmkd.evaluate.task import Variant


def cohort(n: int = 60) -> Cohort:
    """Subjects of their own groups, times by the first of three features."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, 3))
    time = np.exp(-x[:, 0]) * rng.exponential(size=n)
    return Cohort(x, time, rng.random(n) < 0.8, np.arange(n).astype(str).astype(object))


def test_penalties_fall_to_the_share_of_the_largest_that_is_set() -> None:
    made = cohort()
    for share in (0.5, 0.01):
        found = penalties(made.x, made, CoxnetSettings(smallest_alpha=share))
        assert found[-1] / found[0] == pytest.approx(share)


def test_the_penalty_is_chosen_on_as_many_folds_as_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = []
    drawn = coxnet.draw_folds

    def noted(y: np.ndarray, group: np.ndarray, count: int, seed: int) -> np.ndarray:
        folds.append(drawn(y, group, count, seed))
        return folds[-1]

    monkeypatch.setattr(coxnet, "draw_folds", noted)
    fits = []
    fitted = coxnet.fit_path
    monkeypatch.setattr(coxnet, "fit_path", lambda *given: fits.append(len(given[0])) or fitted(*given))
    fit_coxnet(cohort(), CoxnetSettings(inner_folds=3, alphas=3), seed=0)
    assert sorted(set(folds[0].tolist())) == [0, 1, 2]
    assert len(fits) == 4  # one without each fold, and the last on all
    assert fits[-1] == 60


def test_a_probe_learns_from_no_more_rows_than_are_allowed() -> None:
    y = np.arange(40) % 2
    data = Labeled(np.eye(40), y, np.arange(40).astype(str).astype(object))
    everything = Variant(fraction=1.0, seed=0)
    assert len(draw_rows(data, everything, LinearProbeSettings()).y) == 40
    assert np.bincount(draw_rows(data, everything, LinearProbeSettings(max_train=10)).y).tolist() == [5, 5]
    part = Labeled(data.x, np.stack([y, 1 - y], axis=1), data.group)
    assert len(draw_rows(part, everything, LinearProbeSettings()).x) == 40
    assert len(draw_rows(part, everything, LinearProbeSettings(max_train=10)).x) == 10


def test_a_step_sees_no_more_patches_of_a_bag_than_are_allowed() -> None:
    drawn = []

    def patches(bag: int, positions: np.ndarray | None = None) -> np.ndarray:
        drawn.append(20 if positions is None else len(positions))
        return np.full((drawn[-1], 4), bag % 2, dtype=np.float32)

    bags = SimpleNamespace(bags=SimpleNamespace(members=[np.arange(20)] * 6), patches=patches)
    one = Round(0, np.arange(3), np.arange(3, 5), np.arange(5, 6))
    for most, seen in ((4096, {20}), (7, {7, 20})):
        drawn.clear()
        settings = MilSettings(hidden=4, attention=4, epochs=1, max_patches=most)
        answers, _ = fit_predict(bags, classify_task(np.arange(6) % 2, 2), one, settings=settings, seed=0)
        assert answers.shape == (1, 2)
        assert set(drawn[4:]) == seen  # four looks tell width and scale; bags to stop by and to answer for are whole


def test_hazards_have_as_many_bins_as_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def fitted(bags: object, task: MilTask, *_: object, **__: object) -> tuple[np.ndarray, Trained]:
        found.append(task.outputs)
        return np.zeros((2, task.outputs)), Trained(1, 2)

    monkeypatch.setattr("mmkd.evaluate.heads.abmil.fit_predict", fitted)
    everyone = np.arange(60)
    some = SimpleNamespace(seen=everyone, train=everyone, val=everyone, test=everyone[:2])
    for bins in (2, 5):
        settings, variant = SurvivalSettings(bins=bins), Variant(head="abmil_nll")
        risk, alive, _ = survival._network(
            None, cohort(), some, settings=settings, variant=variant, times=(0.1, 0.2, 0.3)
        )
        assert (risk.shape, alive.shape) == ((2,), (2, 3))
    assert found == [2, 5]
