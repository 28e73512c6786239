"""Attacks on an evaluation: hostile names, two runs at once, few positives, missing parts."""

from __future__ import annotations

import itertools
import math
import threading
import time
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from planted_store import make_planted

from mmkd.base.text import one_line
from mmkd.evaluate import load_suite, result_table, run_suite
from mmkd.evaluate import runner as runner_module
from mmkd.evaluate.compare import compare
from mmkd.evaluate.drawing import rendered, short_names
from mmkd.evaluate.figures import FIGURES, forest
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.results import read_results
from mmkd.evaluate.statistics import Difference, Replicates, dense_ranks, rarer_groups
from mmkd.evaluate.tasks import TASKS


@given(st.lists(st.text("\\nrtxu0a\n\x00\u2028\ufffe", max_size=6), min_size=2, max_size=8, unique=True))
def test_different_texts_are_different_on_one_line(texts: list[str]) -> None:
    lines = [one_line(text) for text in texts]
    assert len(set(lines)) == len(texts)
    assert all(line == "".join(line.splitlines()) for line in lines)


def test_a_short_name_is_short_and_nobody_elses() -> None:
    assert short_names(["lung", "a\nb", "a\\nb"]) == ["lung", "a\\nb", "a\\\\nb"]
    long = [f"{'x' * 300}{i}{'y' * 300}" for i in range(3)]
    assert short_names(long) == [f"{'x' * 32}…{'y' * 15}{suffix}" for suffix in ("", " (2)", " (3)")]


@pytest.mark.integration
@pytest.mark.parametrize("name", ["L" * 300, "words " * 50 + "end", "x\ufffey", "\u202eabc", "日本語"])
def test_every_figure_draws_every_name_within_its_edge(tmp_path: Path, name: str) -> None:
    made = make_planted(
        tmp_path, {"a" * 64: 0.5, "b" * 64: 3.0}, changes={i: {"domain": name} for i in range(240, 300)}
    )
    made.edit(ensembles={}, suite=name, dataset={"tasks": ["zero_shot"]})
    out = run_suite(load_suite(made.suite), tmp_path / "r").out
    assert result_table(out, "zero_shot", suite=name).groups == (name, "colon", "lung")
    for kind in ("heat-map", "forest", "box", "radar"):
        figure = FIGURES[kind](ResultFolder(out), Question("zero_shot", "acc"), "a" * 64)
        ET.fromstring(rendered(figure, "svg"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")
            box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0) > -0.02, kind
        assert max(box.x1 - width, box.y1 - height) < 0.02, kind
        if name == "日本語" and kind != "box":  # one line, not one for each letter
            with pytest.warns(UserWarning, match="lacks letters of a name; .svg figures show them") as caught:
                rendered(figure, "png")
            assert len(caught) == 1


def test_two_suites_with_names_too_long_for_files(tmp_path: Path) -> None:
    made = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    for end in "ab":
        made.edit(ensembles={}, suite="é" * 200 + end, dataset={"tasks": ["zero_shot"]})
        run_suite(load_suite(made.suite), tmp_path / "r")
    for end in "ab":
        assert ("é" * 200 + end) in result_table(tmp_path / "r", "zero_shot", suite="é" * 200 + end).title


def test_columns_that_differ_by_noise_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dense_ranks(np.array([0.3, 0.1 + 0.2, 0.1, 0.3 - 1e-8])).tolist() == [3, 3, 1, 2]
    made = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    made.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    folder = ResultFolder(run_suite(load_suite(made.suite), tmp_path / "r").out)
    noisy = itertools.cycle([24 / 40 - 23 / 40, 2 / 40 - 1 / 40])
    monkeypatch.setattr(
        "mmkd.evaluate.compare.paired_difference", lambda *_: Difference(next(noisy), -1.0, 1.0, 1.0, 40)
    )
    labels = forest(folder, Question("zero_shot", "acc"), "sharp").axes[0].get_yticklabels()
    assert [label.get_text().split(" ")[0] for label in labels] == ["colon", "lung"]


def test_an_interval_that_does_not_hold_its_value_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    made.edit(ensembles={}, dataset={"tasks": ["linear_probe"]})
    folder = ResultFolder(run_suite(load_suite(made.suite), tmp_path / "r").out)
    monkeypatch.setattr(Replicates, "interval", lambda self, _: (self.value + 0.01, self.value + 0.02))
    figure = FIGURES["label-efficiency"](folder, Question("linear_probe", "acc"), "sharp")
    value = figure.axes[0].lines[0].get_ydata()[0]
    assert figure.axes[0].collections[0].get_segments()[0][:, 1].tolist() == pytest.approx([value + 1, value + 2])
    assert isinstance(figure, Figure)
    assert not plt.get_fignums()


def test_a_second_run_of_a_suite_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    made.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    suite, started = load_suite(made.suite), threading.Event()
    run_units = runner_module.run_units

    def slow(*arguments: Any) -> Any:
        started.set()
        time.sleep(0.5)
        yield from run_units(*arguments)

    monkeypatch.setattr(runner_module, "run_units", slow)
    first = threading.Thread(target=run_suite, args=(suite, tmp_path / "r"))
    first.start()
    assert started.wait(30)
    waited: list[str] = []
    report = run_suite(suite, tmp_path / "r", say=waited.append)
    first.join()
    assert waited == [f"waiting for another run of {suite.suite} into {tmp_path / 'r'} to end"]
    assert (report.count("done"), report.count("ran")) == (2, 0)
    assert len((tmp_path / "r" / "results.jsonl").read_bytes().splitlines()) == 2 * 4


def test_facts_that_no_file_can_hold_cost_their_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    made.edit(ensembles={}, dataset={"tasks": ["zero_shot", "retrieval"]})
    predict = type(TASKS["zero_shot"]).predict

    def with_array(*arguments: Any) -> Predictions:
        found: Predictions = predict(*arguments)
        found.info["array"] = np.arange(3)
        return found

    monkeypatch.setattr(type(TASKS["zero_shot"]), "predict", with_array)
    report = run_suite(load_suite(made.suite), tmp_path / "r")
    assert (report.count("ran"), report.count("failed")) == (4, 2)
    assert "ndarray is not JSON serializable" in report.failed[0].reason


def test_two_positives_among_many_groups_have_no_interval(tmp_path: Path) -> None:
    """Resamples of two positives claim 95 % and hold the truth in 55 to 65 % of studies."""
    changes = {i: {"label": "benign" if i < 242 else "adenoma", "patient": f"p{i}"} for i in range(240, 360)}
    made = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0}, changes=changes)
    made.edit(ensembles={}, dataset={"tasks": ["zero_shot"], "domain": None})
    out = run_suite(load_suite(made.suite), tmp_path / "r").out
    table = result_table(out, "zero_shot")
    assert math.isnan(table.cell("sharp", "specimens").low)
    assert "2 groups (of the rarer class where there are classes), an interval needs 10" in table.markdown()
    assert not math.isnan(result_table(out, "zero_shot", "acc").cell("sharp", "specimens").low)
    found = compare(ResultFolder(out), "sharp", Question("zero_shot"))
    assert found.rivals[0].verdicts == {}
    assert "fewer than 10 groups (of the rarer class)" in found.markdown()


def test_the_groups_behind_a_mean_of_contrasts() -> None:
    group = np.array([f"g{i}" for i in range(12)], dtype=object)
    rows = Predictions(group, group, group, None, np.zeros((12, 1)), np.ones(12, bool), ("x",))

    def contrast(*positives: int) -> tuple[np.ndarray, np.ndarray]:
        mask = np.isin(np.arange(12), positives)
        return mask, ~mask

    assert rarer_groups(rows.group, []) is None
    assert rarer_groups(rows.group, [contrast(0, 1)]) == 2
    assert rarer_groups(rows.group, [contrast(*range(10))]) == 2
    # The mean of three areas with 2, 4 and 4 positives varies as one with 9 / (1/2 + 1/4 + 1/4).
    assert rarer_groups(rows.group, [contrast(0, 1), contrast(2, 3, 4, 5), contrast(6, 7, 8, 9)]) == 9


def test_training_rows_and_prompts_that_one_model_lacks_are_noted(tmp_path: Path) -> None:
    holes = {"holey": [*range(0, 100, 2), 360]}
    made = make_planted(tmp_path, {"whole": 0.5, "holey": 0.5}, holes)
    settings = {"linear_probe": {"fractions": [1.0], "c_steps": 3}}
    made.edit(ensembles={}, settings=settings, dataset={"tasks": ["linear_probe", "zero_shot"]})
    out = run_suite(load_suite(made.suite), tmp_path / "r").out
    rows = {(row.model, row.task): row.warnings for rows in read_results(out).values() for row in rows}
    assert rows["holey", "linear_probe"] == ("50 of the 200 train rows have no features",)
    assert rows["holey", "zero_shot"] == ("1 of the 6 prompts have no features",)
    assert rows["whole", "linear_probe"] == rows["whole", "zero_shot"] == ()
    probes = compare(ResultFolder(out), "whole", Question("linear_probe")).markdown()
    assert "holey: 50 of the 200 train rows have no features" in probes
    prompts = compare(ResultFolder(out), "whole", Question("zero_shot")).markdown()
    assert "both scored again, on the gallery or candidates that both have features of" in prompts


def test_equal_risks_have_no_halves(tmp_path: Path) -> None:
    table = Predictions(
        *(np.array([f"p{i}" for i in range(4)], dtype=object),) * 3,
        None, np.array([[risk, 1.0, 1.0] for risk in (0.3, 0.3, 0.1 + 0.2, 0.3)]), np.ones(4, bool),
        ("risk", "time", "event"),
    )  # fmt: skip
    from mmkd.evaluate.curves import high_risk

    assert not high_risk(table).any()
