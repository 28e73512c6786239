"""Measures in a whole suite: results, tables, comparisons, subgroups, figures, pages; what is refused, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from measured_suite import MEASURES, measured
from patient_suite import patients

from mmkd.base.errors import ConfigError, UserError
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite, result_table, run_suite
from mmkd.evaluate.calibration import best_temperature
from mmkd.evaluate.compare import compare
from mmkd.evaluate.figures import FIGURES
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.measured import probabilities
from mmkd.evaluate.pages import write_report
from mmkd.evaluate.predictions import Predictions, Validation, encode_predictions, read_predictions
from mmkd.evaluate.statistics import holm, resampled
from mmkd.evaluate.subgroups import subgroup_table

CALIBRATION = ["ece@10", "ece_mass@10", "brier", "reliability@10", "resolution@10", "uncertainty"]
SCALED = ["ece_t@10", "ece_mass_t@10", "brier_t", "reliability_t@10", "resolution_t@10"]
OTHERS = ["kappa", "coverage@0.8", "set_size@0.8", "coverage@0.9", "set_size@0.9"]
OTHERS += ["sensitivity@0.9", "net_benefit@0.2", "net_benefit@0.5", "gap_sex", "worst_sex", "gap_age", "worst_age"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ResultFolder:
    home = tmp_path_factory.mktemp("measured")
    report = run_suite(load_suite(measured(home)), home / "out")
    assert report.failed == ()
    return ResultFolder(home / "out")


def stored(folder: ResultFolder, task: str, model: str = "sharp") -> Predictions:
    (found,) = folder.answers(Question(task), "specimens", model)[:1]
    assert isinstance(found, Predictions)
    return found


@pytest.mark.parametrize("task", ["zero_shot", "linear_probe"])
def test_every_measure_is_in_results_tables_and_comparisons(folder: ResultFolder, task: str) -> None:
    names = folder.metrics(Question(task))
    assert names == ["acc", "bacc", "f1_macro", "auroc_macro", *CALIBRATION, *SCALED, *OTHERS]
    lines = [json.loads(line) for line in (folder.out / "results.jsonl").read_text().splitlines()]
    for name in names:
        table = result_table(folder.out, task, name)
        for model in table.rows:
            cell = table.cell(model, "specimens")
            (line,) = [one for one in lines if (one["task"], one["metric"], one["model"]) == (task, name, model)]
            assert (line["value"], line["ci_low"], line["ci_high"]) == (cell.value, cell.low, cell.high)
            assert cell.low <= cell.value <= cell.high, name
        if name == "uncertainty":  # of the labels: one for all models
            continue
        (rival,) = compare(folder, "sharp", Question(task, name)).rivals
        assert rival.differences["specimens"].low <= rival.differences["specimens"].high, name  # type: ignore[union-attr]
    assert result_table(folder.out, task, "brier").best("specimens") == ("sharp",)
    assert result_table(folder.out, task, "kappa").best("specimens") == ("sharp",)


def test_the_temperature_and_sets_come_from_validation_rows_alone(folder: ResultFolder) -> None:
    for task in ("zero_shot", "linear_probe"):
        found = stored(folder, task)
        assert found.validation is not None
        assert found.validation.score.shape == (40, 3)
        scaled = [
            folder.scored(Question(task, name), folder.datasets(Question(task))[0], found, {"": found.available})
            for name in ("brier", "brier_t")
        ]
        assert scaled[0][""].value != scaled[1][""].value
        assert found.validation.temperature == best_temperature(found.validation.y, found.validation.score)
    # The probe has not seen them: its choice of C comes from a fifth of the training rows.
    assert stored(folder, "linear_probe").info["train_rows"] == 199
    table = result_table(folder.out, "zero_shot", "coverage@0.9")
    assert table.value("sharp", "specimens") == pytest.approx(0.9, abs=0.08)
    sizes = result_table(folder.out, "zero_shot", "set_size@0.9")
    # A set may be empty: where no class is as probable as the threshold.
    assert 0.9 <= sizes.value("sharp", "specimens") < sizes.value("blurred", "specimens") <= 3


def test_predictions_with_subgroups_and_validation_are_read_as_they_were(folder: ResultFolder, tmp_path: Path) -> None:
    found = stored(folder, "linear_probe")
    assert set(found.subgroups["age"].tolist()) == {"< 40", "40 to < 60", ">= 60"}
    assert set(found.subgroups["sex"].tolist()) == {"", "F", "M", "other"}
    (tmp_path / "again.parquet").write_bytes(encode_predictions(found))
    again = read_predictions(tmp_path / "again.parquet")
    assert again.validation is not None
    assert found.validation is not None
    assert (again.validation.score == found.validation.score).all()
    assert {name: values.tolist() for name, values in again.subgroups.items()} == {
        name: values.tolist() for name, values in found.subgroups.items()
    }


def test_subgroups_are_what_their_samples_score_alone_and_small_ones_have_no_interval(folder: ResultFolder) -> None:
    question = Question("zero_shot", "acc")
    table = subgroup_table(folder, question, "sex", ["sharp"])
    found = stored(folder, "zero_shot")
    right = found.score.argmax(axis=1) == found.labels()
    for row in table.rows:
        inside = found.available & (found.subgroups["sex"] == row.name)
        rest = found.available & ~inside & (found.subgroups["sex"] != "")
        assert row.value == pytest.approx(right[inside].mean())
        assert row.gap.value == pytest.approx(right[inside].mean() - right[rest].mean())
        assert (row.n, row.groups) == (inside.sum(), len(set(found.group[inside])))
        assert np.isnan(row.low) == np.isnan(row.gap.p) == (row.name == "other")
    assert [row.p_holm for row in table.rows] == pytest.approx(holm([row.gap.p for row in table.rows]), nan_ok=True)
    text = table.markdown()
    assert "subgroup sex 'other' has 2 groups, an interval needs 10" in text
    assert "2 samples have no sex: they are in no subgroup" in text
    # The largest difference is of those that are large enough.
    values = {row.name: row.value for row in table.rows if row.name != "other"}
    gap = resampled(
        found,
        ["gap_sex"],
        folder.asked(Question("zero_shot", "gap_sex"))[2],
        bootstrap=folder.plan.suite.bootstrap,
        name="x",
        parts={"": found.available},
    )["", "gap_sex"]
    area = subgroup_table(folder, Question("zero_shot", "auroc_macro"), "sex", ["sharp"])
    areas = {row.name: row.value for row in area.rows if row.name in values}
    assert gap.value == pytest.approx(max(areas.values()) - min(areas.values()))
    assert gap.draws.mean() == pytest.approx(gap.value, abs=0.01)
    assert gap.draws.min() >= 0


def test_figures_and_the_page_show_them(folder: ResultFolder, tmp_path: Path) -> None:
    for name, task in (("reliability", "zero_shot"), ("decision-curve", "linear_probe"), ("shots", "few_shot")):
        figure = FIGURES[name](folder, Question(task), "sharp")
        figure.draw_without_rendering()
        assert "specimens" in figure.axes[0].get_title(loc="left")
    (axes,) = FIGURES["decision-curve"](folder, Question("linear_probe"), "sharp").axes
    line = next(line for line in axes.lines if line.get_label() == "sharp")
    assert line.get_ydata()[19] == pytest.approx(
        result_table(folder.out, "linear_probe", "net_benefit@0.2").value("sharp", "specimens")
    )
    for name, message in (("shots", "shots are of task few_shot"), ("kaplan-meier", "are of task survival")):
        with pytest.raises(ConfigError, match=message):
            FIGURES[name](folder, Question("zero_shot"), "sharp")
    with pytest.raises(ConfigError, match="few_shot predicts no probabilities of classes to draw"):
        FIGURES["reliability"](folder, Question("few_shot"), "sharp")
    write_report(folder.out, "sharp", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for text in ("<h3>ece@10</h3>", "<h3>kappa</h3>", "sharp by sex", "reliability of zero_shot", "shots of few_shot"):
        assert text in page, text


def test_two_runs_give_the_same_bytes(folder: ResultFolder, tmp_path: Path) -> None:
    run_suite(load_suite(measured(tmp_path)), tmp_path / "out")
    for one in sorted(folder.out.rglob("*.parquet")):
        assert one.read_bytes() == (tmp_path / "out" / one.relative_to(folder.out)).read_bytes()


def one_line(path: Path, command: str = "check") -> str:
    result = CliRunner().invoke(evaluate, [command, str(path)])
    text = str(result.exception) if result.exception and not isinstance(result.exception, SystemExit) else result.output
    return text.strip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset": {"rows": {"train": {"split": "train"}, "test": {"split": "test"}}}},
            "`val: calibrate` needs `rows: val`",
        ),
        (
            {"dataset": {"rows": {"test": {"split": "test"}}, "tasks": ["zero_shot"]}},
            "chosen on `rows: val`, which it does not have",
        ),
        ({"settings": {}}, "linear_probe is fitted on the `val` rows"),
        ({"dataset": {"tasks": ["diagnosis"]}}, "none of its tasks can choose a temperature"),
        ({"dataset": {"classes": None}}, "kappa needs `classes`"),
        (
            {"measures": {"operating": {"positive": ["cancer"]}}},
            "'cancer' is not one of the `classes` adenoma, benign, carcinoma",
        ),
        ({"measures": {"operating": {"positive": ["adenoma", "benign", "carcinoma"]}}}, "all classes are positive"),
        ({"measures": {"operating": {"positive": ["benign"], "specificity": [1.5]}}}, "less than 1"),
        ({"measures": {"conformal": {"coverage": [0.9, 0.8]}}}, "must ascend"),
        ({"measures": {"survival": {"times": [12]}}}, "at least 2"),
        ({"measures": {"calibratoin": {}}}, "calibratoin"),
        ({"measures": {"subgroups": {"scanner": None}}}, "scanner"),
        ({"measures": {"subgroups": {"patient": [3]}}}, "patient has 'test-p0', not a number to cut at 3"),
        (
            {"settings": {"few_shot": {"shots": [1, 90]}, "linear_probe": {"val": "calibrate"}}},
            "90 shots are more than the",
        ),
        ({"settings": {"few_shot": {"shots": [0]}}}, "shots must be different numbers from 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    text = one_line(measured(tmp_path, **changes))
    assert message in text
    assert "Traceback" not in text


def test_scores_that_are_no_probabilities_are_refused_by_name() -> None:
    names = np.array(["a", "b"], dtype=object)
    for score in ([[0.5, 0.5], [0.7, 0.7]], [[0.5, 0.5], [-0.2, 1.2]]):
        wrong = Predictions(names, names, names, np.array([0, 1]), np.array(score), np.ones(2, bool), ("x", "y"))
        with pytest.raises(UserError, match=r"scores of 1 samples are not probabilities: 'b' has "):
            probabilities(wrong)


def test_survival_at_times(tmp_path: Path) -> None:
    suite = patients(tmp_path, measures={"survival": {"times": [0.1, 0.3, 0.6]}, "subgroups": {"censorship": None}})
    report = run_suite(load_suite(suite), tmp_path / "out")
    assert report.failed == ()
    for head in ("coxnet", "abmil_cox", "abmil_nll"):
        for name in ("auroc@0.1", "auroc@0.3", "auroc@0.6"):
            cell = result_table(tmp_path / "out", "survival", name, head=head).cell("alpha", "kidney")
            assert 0.6 < cell.value <= 1
            assert cell.low <= cell.value <= cell.high
        cell = result_table(tmp_path / "out", "survival", "ibs@0.1-0.6", head=head).cell("alpha", "kidney")
        assert 0 < cell.low < cell.value < cell.high < 0.25  # a coin for everybody scores a quarter
    found = ResultFolder(tmp_path / "out").answers(Question("survival", head="abmil_nll"), "kidney", "alpha")
    assert isinstance(found, list)
    alive = found[0].score[found[0].available][:, 3:]
    assert ((alive >= 0) & (alive <= 1)).all()
    assert (np.diff(alive, axis=1) <= 1e-12).all()


def test_no_score_depends_on_measures_that_are_not_asked_for(tmp_path: Path) -> None:
    """Without measures the metrics of a task are its own, and their values those with measures."""
    for name, measures in (("with", MEASURES), ("without", {})):
        (tmp_path / name).mkdir()
        run_suite(load_suite(measured(tmp_path / name, measures=measures)), tmp_path / name / "out")
    assert ResultFolder(tmp_path / "without" / "out").metrics(Question("zero_shot")) == [
        "acc",
        "bacc",
        "f1_macro",
        "auroc_macro",
    ]
    both = [result_table(tmp_path / name / "out", "linear_probe").csv() for name in ("with", "without")]
    assert both[0] == both[1]


def test_a_validation_that_is_too_small_puts_every_class_into_the_sets() -> None:
    assert Validation(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]])).threshold(0.9) == 0.0
