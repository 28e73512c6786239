"""Survival: known answers of concordance and likelihoods, and planted cohorts that heads must learn."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from lifelines.datasets import load_gbsg2, load_rossi
from lifelines.utils import concordance_index
from pair_counts import count_pairs
from patient_suite import patients
from planted_store import store_of

from mmkd.evaluate import load_suite, result_table, run_suite
from mmkd.evaluate.heads.coxnet import Cohort, CoxnetSettings, PartialLikelihood, fit_coxnet, fit_path
from mmkd.evaluate.heads.survival_losses import bin_of, cox_loss, hazard_nll, risk_of_hazards, time_bins
from mmkd.evaluate.metrics import concordance
from mmkd.evaluate.predictions import read_predictions
from mmkd.store import UserError
from mmkd.store.writer import ShardFeatures

KIRC = Path(__file__).resolve().parents[2] / "shared" / "data" / "survival" / "porpoise_tcga_kirc_all_clean.csv.zip"


def test_k9_small_cases_with_ties() -> None:
    time = np.array([1, 5, 6, 11, 34, 45, 46, 50.0])
    estimate = np.array([5, 8, 11, 34, 12, 3, 9, 12.0])
    event = np.array([0, 1, 1, 0, 0, 1, 0, 0], dtype=bool)
    assert count_pairs(estimate, time, event).index == pytest.approx(3 / 13)
    assert concordance(estimate, time, event, np.ones((1, 8)))[0] == pytest.approx(0.23076923)


def test_k9_ties_by_hand() -> None:
    # The first outlives nobody and has the highest risk: 3 concordant. The second dies when the third is lost to
    # follow-up, whose risk is higher (discordant), and before the fourth, whose risk is the same (half).
    time, event = np.array([1.0, 2, 2, 3]), np.array([True, True, False, True])
    counts = count_pairs(np.array([4.0, 1, 3, 1]), time, event)
    assert (counts.concordant, counts.discordant, counts.tied_risk, counts.index) == (3, 1, 1, 0.7)
    # Two who die at the same time are not compared.
    assert np.isnan(count_pairs(np.array([1.0, 2]), np.array([2.0, 2]), np.ones(2, bool)).index)


def test_k8_rossi_age_and_lifelines_likelihood() -> None:
    rossi = load_rossi()
    time, event = rossi["week"].to_numpy(float), rossi["arrest"].to_numpy(bool)
    assert count_pairs(-rossi["age"].to_numpy(float), time, event).index == pytest.approx(0.6136395660138086, abs=1e-12)
    fitted = CoxPHFitter().fit(rossi, "week", "arrest")
    x = rossi.drop(columns=["week", "arrest"])
    value, gradient = PartialLikelihood(time, event)(x.to_numpy(float) @ fitted.params_[x.columns].to_numpy())
    assert -value == pytest.approx(-658.7476594, abs=1e-5)
    assert np.abs(x.to_numpy(float).T @ gradient).max() < 1e-2  # lifelines' optimum is ours
    risk = np.asarray(fitted.predict_log_partial_hazard(rossi))
    assert count_pairs(risk, time, event).index == pytest.approx(0.6403292471, abs=1e-9)


def test_k7_k8_against_scikit_survival() -> None:
    datasets = pytest.importorskip("sksurv.datasets", reason="scikit-survival (GPL) is not installed")
    from sksurv.linear_model import CoxnetSurvivalAnalysis

    x, y = datasets.load_veterans_lung_cancer()
    karnofsky = -x["Karnofsky_score"].to_numpy(float)
    counts = count_pairs(karnofsky, y["Survival_in_days"], y["Status"])
    assert (round(counts.index, 5), counts.tied_risk) == (0.70928, 1141)
    x, y = datasets.load_whas500()
    time, event = y["lenfol"].astype(float), y["fstat"]
    age = count_pairs(x["age"].to_numpy(float), time, event)
    assert (age.concordant, age.discordant, age.tied_risk) == (54226, 19472, 1451)
    assert age.index == pytest.approx(0.7312339485555364, abs=1e-12)
    # Without ties of time Breslow's and Efron's likelihoods are one: coefficients must agree.
    time = time + np.random.default_rng(0).uniform(0, 0.4, len(time))
    z = x.astype(float).to_numpy()
    z = (z - z.mean(axis=0)) / z.std(axis=0)
    alphas = np.array([0.2, 0.1, 0.05, 0.02])
    target = np.array(list(zip(event, time, strict=True)), dtype=[("e", "?"), ("t", "<f8")])
    theirs = CoxnetSurvivalAnalysis(alphas=alphas, l1_ratio=0.5, tol=1e-12).fit(z, target).coef_.T
    ours, _ = fit_path(z, PartialLikelihood(time, event), alphas, 0.5)
    assert np.abs(ours - theirs).max() < 2e-4
    assert (ours != 0).sum(axis=1).tolist() == (theirs != 0).sum(axis=1).tolist()


def test_k8_gbsg2_as_scikit_survival_has_it() -> None:
    """Answers of scikit-survival 0.28.0, stored so that they are held where it is not installed."""
    gbsg2, rossi = load_gbsg2(), load_rossi()
    time, event = gbsg2["time"].to_numpy(float), gbsg2["cens"].to_numpy(bool)
    for risk, expected, pairs in (
        (gbsg2["pnodes"], 0.6452446795719611, (78870, 40214, 13988)),
        (gbsg2["age"], 0.48144613442347, (62298, 67236, 3538)),
    ):
        counts = count_pairs(risk.to_numpy(float), time, event)
        assert counts.index == pytest.approx(expected, abs=1e-12)
        assert (counts.concordant, counts.discordant, counts.tied_risk) == pairs
    counts = count_pairs(-rossi["age"].to_numpy(float), rossi["week"].to_numpy(float), rossi["arrest"].to_numpy(bool))
    assert (counts.concordant, counts.discordant, counts.tied_risk) == (24580, 14902, 3100)
    # CoxnetSurvivalAnalysis(alphas=alphas, l1_ratio=0.5, tol=1e-12), whose likelihood is ours where no times are tied.
    time = time + np.random.default_rng(0).uniform(0, 0.4, len(time))
    x = gbsg2[["age", "tsize", "pnodes", "progrec", "estrec"]].to_numpy(float)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    expected = [
        [0.0, 0.0, 0.17040941, -0.0236171, 0.0],
        [0.0, 0.03050575, 0.23959472, -0.1687578, 0.0],
        [0.0, 0.06936835, 0.26105838, -0.29910401, 0.0],
        [-0.00621689, 0.09287764, 0.27174349, -0.41963518, 0.0],
    ]
    ours, _ = fit_path(z, PartialLikelihood(time, event), np.array([0.2, 0.1, 0.05, 0.02]), 0.5)
    np.testing.assert_allclose(ours, expected, atol=5e-5)
    assert ((ours != 0) == (np.array(expected) != 0)).all()


def test_k10_only_the_order_of_risks_counts_and_all_censored_has_no_value() -> None:
    time = np.array([1.0, 2, 3])
    assert concordance(np.array([3e-9, 2e-9, 1e-9]), time, np.ones(3, bool), np.ones((1, 3))) == [1.0]
    assert np.isnan(concordance(np.array([1.0, 2, 3]), time, np.zeros(3, bool), np.ones((1, 3))))


cohorts = st.integers(0, 2**31).map(np.random.default_rng)


@given(cohorts)
@settings(max_examples=50)
def test_concordance_is_lifelines_and_counts_are_repetitions(rng: np.random.Generator) -> None:
    n = int(rng.integers(3, 30))
    risk, time = rng.integers(0, 6, n).astype(float), rng.integers(1, 9, n).astype(float)
    event = rng.random(n) < 0.7
    if not np.isnan(count_pairs(risk, time, event).index):
        assert count_pairs(risk, time, event).index == pytest.approx(concordance_index(time, -risk, event))
    counts = rng.integers(0, 3, n)
    comparable = event[:, None] & ((time[:, None] < time) | ((time[:, None] == time) & ~event))
    points = comparable * ((risk[:, None] > risk) + 0.5 * (risk[:, None] == risk))
    pairs = np.outer(counts, counts)
    expected = (pairs * points).sum() / max((pairs * comparable).sum(), 1e-300)
    got = concordance(risk, time, event, counts[None].astype(float))[0]
    assert (np.isnan(got) and (pairs * comparable).sum() == 0) or got == pytest.approx(expected)


def test_k11_cox_loss() -> None:
    time = torch.tensor([1.0, 2, 3])
    two = cox_loss(torch.zeros(3, 1), time, torch.tensor([True, True, False]))
    assert float(two) == pytest.approx(0.895880, abs=1e-6)
    three = cox_loss(torch.tensor([[1.0], [0], [-1]]), time, torch.ones(3, dtype=torch.bool))
    assert float(three) == pytest.approx(0.240289, abs=1e-6)
    assert PartialLikelihood(time.numpy().astype(float), np.array([True, True, False]))(np.zeros(3))[
        0
    ] == pytest.approx(np.log(6))


def test_likelihood_is_torchsurvs_with_its_gradient() -> None:
    rng = np.random.default_rng(1)
    time, event = rng.integers(1, 8, 40).astype(float), rng.random(40) < 0.6
    log_hazard = torch.tensor(rng.normal(size=40), requires_grad=True)
    theirs = cox_loss(log_hazard[:, None], torch.tensor(time), torch.tensor(event)) * event.sum()
    theirs.backward()
    value, gradient = PartialLikelihood(time, event)(log_hazard.detach().numpy())
    assert value == pytest.approx(float(theirs.detach()), rel=1e-6)
    np.testing.assert_allclose(gradient, log_hazard.grad, atol=1e-6)


def test_k12_hazards() -> None:
    zero = torch.zeros(1, 4)
    cases = {(0, True): 0.693147, (1, True): 1.386294, (0, False): 0.693147, (3, False): 2.772589}
    for (place, event), expected in cases.items():
        assert float(hazard_nll(zero, torch.tensor([place]), torch.tensor([event]))) == pytest.approx(
            expected, abs=1e-6
        )
    assert risk_of_hazards(np.zeros((1, 4))) == pytest.approx([-0.9375])


def test_bins_come_from_events_only_and_an_event_at_an_edge_belongs_to_the_later_bin() -> None:
    time = np.array([1.0, 2, 3, 4, 5, 100, 200])
    edges = time_bins(time, np.array([1, 1, 1, 1, 1, 0, 0], dtype=bool), 4)
    assert edges.tolist() == [2.0, 3.0, 4.0]
    assert bin_of(np.array([0.5, 2.0, 3.5, 300.0]), edges).tolist() == [0, 1, 2, 3]


def test_the_chosen_penalty_finds_the_planted_columns() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 60))
    death, lost = rng.exponential(np.exp(-2 * x[:, 0] + 2 * x[:, 1])), rng.exponential(3, 200)
    group = np.arange(200).astype(str).astype(object)
    cohort = Cohort(x, np.minimum(death, lost), death <= lost, group)
    model = fit_coxnet(cohort, CoxnetSettings(), seed=0)
    assert set(np.argsort(-np.abs(model.coefficients))[:2]) == {0, 1}
    assert model.coefficients[0] > 0 > model.coefficients[1]
    with pytest.raises(UserError, match="all 200 training subjects are censored"):
        fit_coxnet(Cohort(x, cohort.time, np.zeros(200, bool), group), CoxnetSettings(), seed=0)


@pytest.mark.integration
def test_heads_learn_a_planted_risk_and_patients_stay_whole(tmp_path: Path) -> None:
    report = run_suite(load_suite(patients(tmp_path)), tmp_path / "out")
    assert [str(outcome.unit) + outcome.reason for outcome in report.failed] == []
    for head in ("coxnet", "abmil_cox", "abmil_nll"):
        table = result_table(report.out, "survival", head=head)
        assert table.value("alpha", "kidney") > 0.7, head
    files = sorted((tmp_path / "out" / "predictions" / "kidney" / "survival").glob("*coxnet*-0.*.parquet"))
    found = read_predictions(files[0])
    assert len(found) == 90
    assert found.available.sum() == 89  # the patient without features is missing, not wrong
    assert sorted(found.info["fold_sizes"]) == [30, 30, 30]
    assert sum(found.info["fold_events"]) == found.info["events"]
    again = run_suite(load_suite(tmp_path / "suite.yaml"), tmp_path / "again")
    name = files[0].relative_to(tmp_path / "out")
    assert (again.out / name).read_bytes() == files[0].read_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({0: {"months": "-3"}}, "expected a time above zero"),
        ({0: {"months": "soon"}}, "has months='soon', expected a time above zero"),
        ({2: {"months": "7"}}, "rows with months"),
        ({i: {"censorship": "1"} for i in range(135)}, "all 90 patients are censored"),
        (
            {i: {"patient": "one", "months": "2", "censorship": "0"} for i in range(135)},
            "1 patients cannot fill 3 folds",
        ),
    ],
)
def test_bad_follow_up_fails_in_one_line(tmp_path: Path, rows: dict[int, dict[str, str]], message: str) -> None:
    report = run_suite(load_suite(patients(tmp_path, rows=rows)), tmp_path / "out")
    assert len(report.failed) == 3
    assert all(message in outcome.reason and "\n" not in outcome.reason for outcome in report.failed)


@pytest.mark.integration
def test_without_a_signal_heads_are_at_chance(tmp_path: Path) -> None:
    """The mean of six cohorts: one of 90 patients strays by 0.06 on its own."""
    heads = ("coxnet", "abmil_cox")
    values: dict[str, list[float]] = {head: [] for head in heads}
    for seed in range(1000, 1006):
        (folder := tmp_path / str(seed)).mkdir()
        suite = patients(folder, signal=0.0, seed=seed)
        content = yaml.safe_load(suite.read_text())
        content["settings"]["survival"]["heads"] = list(heads)
        suite.write_text(yaml.safe_dump(content))
        report = run_suite(load_suite(suite), folder / "out")
        for head in heads:
            values[head].append(result_table(report.out, "survival", head=head).value("alpha", "kidney"))
    for head in heads:
        assert abs(np.mean(values[head]) - 0.5) < 0.07, (head, values[head])


def coxnet_of(folder: Path, x: np.ndarray, rows: list[dict[str, Any]], **settings: Any) -> float:
    """Concordance of the head `coxnet` in one draw of the folds, each row with its patient, months and event."""
    for i, row in enumerate(rows):
        row |= {"key": f"k{i}", "uri": f"{i}.png", "image_sha256": f"{i:064x}", "split": "test"}
    folder.mkdir()
    features = {"a": ShardFeatures(x, np.zeros_like(x), np.ones(len(x), np.uint8))}
    store_of(folder / "store", rows, ("patient", "months", "event", "split"), features)
    dataset = {
        "dataset": "d", "group": "patient", "rows": {"test": {"split": "test"}}, "tasks": ["survival"],
        "survival": {"time": "months", "event": {"event": "1"}},
        "settings": {"survival": {"heads": ["coxnet"], "seeds": 1} | settings},
    }  # fmt: skip
    suite = {"suite": "s", "store": "store", "bootstrap": {"n": 100}, "datasets": [dataset]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return result_table(run_suite(load_suite(folder / "suite.yaml"), folder / "out").out, "survival").value("a", "d")


@pytest.mark.integration
def test_the_length_of_a_vector_may_carry_the_risk(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    risk = rng.normal(size=120)
    x = (np.exp(0.3 * risk)[:, None] * (np.ones(4) + 0.02 * rng.normal(size=(120, 4)))).astype(np.float32)
    time = np.exp(-2 * risk) * rng.exponential(size=120)
    rows = [{"patient": f"p{i}", "months": f"{one:.6f}", "event": "1"} for i, one in enumerate(time)]
    rows[0]["event"] = "0"
    assert coxnet_of(tmp_path / "stored", x, rows) > 0.75
    assert coxnet_of(tmp_path / "unit", x, rows, normalized=True) < 0.6


@pytest.mark.slow
@pytest.mark.skipif(not KIRC.is_file(), reason="../shared/data is not here")
def test_expression_of_kirc_as_it_is(tmp_path: Path) -> None:
    """1,556 genes of 345 patients: 0.690 over five draws of the folds, 0.670 with vectors of unit length."""
    with zipfile.ZipFile(KIRC) as archive:
        table = list(csv.DictReader(io.StringIO(archive.read(archive.namelist()[0]).decode())))
    genes = [name for name in table[0] if name.endswith("_rnaseq")]
    x = np.array([[float(row[gene]) for gene in genes] for row in table], dtype=np.float32)
    rows = [
        {"patient": row["case_id"], "months": row["survival_months"], "event": str(1 - int(row["censorship"]))}
        for row in table
    ]
    assert coxnet_of(tmp_path / "stored", x, rows) == pytest.approx(0.692, abs=0.01)
    assert coxnet_of(tmp_path / "unit", x, rows, normalized=True) == pytest.approx(0.676, abs=0.01)
