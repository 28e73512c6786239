"""Figures and the report page: numbers as in the tables, equal bytes for equal numbers, nothing from outside."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from lifelines import KaplanMeierFitter
from matplotlib.figure import Figure
from patient_suite import patients
from PIL import Image
from planted_store import Planted, make_planted
from scipy.stats import CensoredData, logrank

from mmkd.base.errors import ConfigError
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite, result_table, run_suite
from mmkd.evaluate.compare import compare
from mmkd.evaluate.curves import band, high_risk
from mmkd.evaluate.drawing import line_style, rendered, save
from mmkd.evaluate.figures import FIGURES
from mmkd.evaluate.folder import By, Question, ResultFolder
from mmkd.evaluate.pages import write_report
from mmkd.evaluate.table import Cell, ResultTable

OF_TABLES = set(FIGURES) - {"kaplan-meier", "reliability", "decision-curve", "shots"}
"""Figures that every task has."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    made = make_planted(
        tmp_path_factory.mktemp("figures"), {"student": 0.8, "alpha": 1.5, "beta": 3.0}, {"beta": list(range(240, 250))}
    )
    made.edit(dataset={"notes": "<script>alert(1)</script>"})
    run_suite(load_suite(made.suite), made.root.parent / "out")
    return made


@pytest.fixture(scope="module")
def folder(planted: Planted) -> ResultFolder:
    return ResultFolder(planted.root.parent / "out")


def test_the_heat_map_shows_the_tables_numbers_and_marks_certain_differences(folder: ResultFolder) -> None:
    figure = FIGURES["heat-map"](folder, Question("zero_shot"), "student")
    shown = [text.get_text() for text in figure.axes[0].texts]
    table = result_table(folder.out, "zero_shot")
    expected = [f"{table.value(row, column) * 100:.1f}" for row in table.rows for column in ("colon", "lung")]
    assert [text.removesuffix(" ●") for text in shown] == expected
    best = max(("alpha", "beta", "both"), key=lambda row: table.value(row, "colon"))
    (against,) = compare(folder, best, Question("zero_shot"), ("beta",)).rivals
    assert shown[table.rows.index("beta") * 2].endswith("●") == (against.verdicts["colon"] != "tie")
    assert any(text.endswith("●") for text in shown)


@pytest.mark.parametrize("by", ["dataset", "domain"])
@pytest.mark.parametrize("name", sorted(OF_TABLES - {"radar"}))
def test_nothing_is_written_past_the_edge(folder: ResultFolder, name: str, by: By) -> None:
    figure = FIGURES[name](folder, Question("linear_probe", by=by), "student")
    assert inside(figure)


def inside(figure: Figure) -> bool:
    """Whether all that is drawn lies on the canvas."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return bool(min(box.x0, box.y0) > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02)


def test_one_column_of_equal_models_has_its_title_and_no_colour(tmp_path: Path) -> None:
    made = make_planted(tmp_path, {"student": 0.01, "specialist-of-histology": 0.01})
    made.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    run_suite(load_suite(made.suite), tmp_path / "out")
    figure = FIGURES["heat-map"](ResultFolder(tmp_path / "out"), Question("zero_shot", by="dataset"), "student")
    assert [text.get_text() for text in figure.axes[0].texts] == ["100.0", "100.0"]
    assert figure.axes[0].images[0].get_clim() == (-0.1, 0.1)
    assert inside(figure)


@pytest.mark.parametrize("name", sorted(OF_TABLES))
def test_what_has_no_values_is_not_drawn(tmp_path: Path, name: str) -> None:
    """A column of the suite that the store does not have: all units fail."""
    made = make_planted(tmp_path, {"student": 0.5, "alpha": 0.5})
    made.edit(ensembles={}, dataset={"tasks": ["linear_probe"], "group": "patent"})
    out = run_suite(load_suite(made.suite), tmp_path / "out").out
    with pytest.raises(ConfigError, match=r"no model has a value|no column in common"):
        FIGURES[name](ResultFolder(out), Question("linear_probe"), "student")
    write_report(out, "student", tmp_path / "page.html")
    assert "<svg" not in (tmp_path / "page.html").read_text()


def test_the_forest_is_the_comparison_with_the_best_rival(folder: ResultFolder) -> None:
    axes = FIGURES["forest"](folder, Question("zero_shot"), "beta").axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    values = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    for label, value in zip(labels, values, strict=True):
        column, rival = re.fullmatch(r"(\w+) \(n=\d+\) against (\w+)", label).groups()  # type: ignore[union-attr]
        (against,) = compare(folder, "beta", Question("zero_shot"), (rival,)).rivals
        assert value == pytest.approx(against.differences[column].value * 100)
    assert values == sorted(values)
    assert re.search(r"\d win, \d tie, \d loss", axes.get_title(loc="left"))


def test_curves_of_label_shares_pass_through_the_tables(folder: ResultFolder) -> None:
    axes = FIGURES["label-efficiency"](folder, Question("linear_probe"), "student").axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    for model in ("student", "alpha"):
        expected = [result_table(folder.out, "linear_probe", fraction=f).value(model, "mean") * 100 for f in (0.1, 1.0)]
        assert lines[model].tolist() == pytest.approx(expected)


def test_kaplan_meier_halves_by_fold(tmp_path: Path) -> None:
    suite = patients(tmp_path, settings={"survival": {"heads": ["coxnet"]}})
    run_suite(load_suite(suite), tmp_path / "out")
    results = ResultFolder(tmp_path / "out")
    found = results.answers(Question("survival"), "kidney", "alpha")[0]
    found = found.take(found.available)
    high = high_risk(found)
    for fold in np.unique(found.fold):
        assert abs(int(high[found.fold == fold].sum()) - int((~high)[found.fold == fold].sum())) <= 1
    axes = FIGURES["kaplan-meier"](results, Question("survival"), "alpha").axes[0]
    time, event = found.column("time"), found.column("event") > 0
    sides = [CensoredData(uncensored=time[m & event], right=time[m & ~event]) for m in (high, ~high)]
    assert f"p={logrank(*sides).pvalue:.3g}" in axes.get_title(loc="left")
    assert logrank(*sides).pvalue < 1e-4


def test_the_band_of_a_survival_curve_is_that_of_lifelines() -> None:
    rng = np.random.default_rng(4)
    time, event = rng.integers(1, 12, 60).astype(float), rng.random(60) < 0.7
    low, high = band(CensoredData(uncensored=time[event], right=time[~event]))
    theirs = KaplanMeierFitter().fit(time, event).confidence_interval_survival_function_.loc[np.unique(time)]
    inside = (low > 0) & np.isfinite(low)
    assert inside.sum() > 5
    np.testing.assert_allclose(np.column_stack([low, high])[inside], theirs.to_numpy()[inside], atol=1e-10)


def test_names_around_a_radar_stand_outside(tmp_path: Path) -> None:
    sites = ("breast", "colon", "lung", "skin")
    changes = {240 + i: {"domain": sites[i // 2 % 4]} for i in range(120)}
    made = make_planted(tmp_path, {"student": 0.8, "alpha": 1.5}, changes=changes)
    made.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    run_suite(load_suite(made.suite), tmp_path / "out")
    axes = FIGURES["radar"](ResultFolder(tmp_path / "out"), Question("zero_shot"), "student").axes[0]
    sides = {text.get_text().split("\n")[0]: text.get_horizontalalignment() for text in axes.texts}
    assert sides == {"breast": "left", "colon": "center", "lung": "right", "skin": "center"}
    assert all(re.search(r"\nn=30$", text.get_text()) for text in axes.texts)
    assert [line.get_label() for line in axes.lines] == ["alpha", "student"]


def test_nothing_of_a_radar_is_cut_or_lies_under_the_legend(tmp_path: Path) -> None:
    sites = ("histology of the colon", "fundus", "radiograph", "body", "a long name of a domain", "brain", "nuclear")
    changes = {240 + i: {"domain": sites[i // 2 % 7]} for i in range(120)}
    made = make_planted(tmp_path, {"student": 0.8, "a-specialist-with-a-long-name": 1.5}, changes=changes)
    made.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    run_suite(load_suite(made.suite), tmp_path / "out")
    figure = FIGURES["radar"](ResultFolder(tmp_path / "out"), Question("zero_shot"), "student")
    figure.draw_without_rendering()
    (legend,) = (one.get_window_extent() for one in figure.legends)
    for text in figure.axes[0].texts:
        assert not legend.overlaps(text.get_window_extent()), text.get_text()
    ink = Image.open(io.BytesIO(rendered(figure, "png"))).convert("L").point(lambda grey: 255 * (grey < 128))
    left, upper, right, lower = ink.getbbox() or (0, 0, 0, 0)
    assert left > 4
    assert upper > 4
    assert right < ink.width - 4
    assert lower < ink.height - 4


def test_two_dozen_lines_are_all_different() -> None:
    assert len({tuple(line_style(place).values()) for place in range(24)}) == 24
    # In black and white, too.
    assert len({(style["marker"], style["linestyle"]) for style in map(line_style, range(24))}) == 24


def test_equal_numbers_give_equal_files(folder: ResultFolder, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        save(FIGURES["box"](folder, Question("zero_shot"), "student"), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with pytest.raises(ConfigError, match=r"is no kind of picture; end it with \.pdf, \.png, \.svg"):
        save(FIGURES["box"](folder, Question("zero_shot"), "student"), tmp_path / "c.gif")


@pytest.mark.parametrize(
    ("kind", "question", "message"),
    [
        ("radar", Question("zero_shot"), "a radar needs 3 to 10 columns, domain gives 2"),
        ("label-efficiency", Question("zero_shot"), "was run at 1 share of the labels"),
        ("kaplan-meier", Question("zero_shot"), "are of task survival, not 'zero_shot'"),
        ("forest", Question("segment"), "has no task 'segment'"),
    ],
)
def test_figures_that_cannot_be(folder: ResultFolder, kind: str, question: Question, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FIGURES[kind](folder, question, "student")


@pytest.mark.integration
def test_the_page_stands_alone_and_text_stays_text(folder: ResultFolder, tmp_path: Path) -> None:
    write_report(folder.out, "student", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert re.findall(r'(?:src|href)="(?!#|data:image/png)[^"]*"', page) == []
    table = result_table(folder.out, "zero_shot")
    for row in table.rows:
        assert f"{table.value(row, 'mean') * 100:.1f}" in page
    assert page.count('<figure role="img" aria-label=') >= 6
    assert "Every unit of the suite has a result." in page
    write_report(folder.out, "student", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


@pytest.mark.integration
def test_the_page_has_every_metric_and_every_share_of_labels(folder: ResultFolder, tmp_path: Path) -> None:
    write_report(folder.out, "student", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    sections = page.split("<section ")[1:]
    names = [re.findall(r"<h2[^>]*>(.*?)</h2>", section)[0] for section in sections]
    share = "linear_probe with 10% of the labels"
    assert names[:5] == ["zero_shot", "linear_probe", share, "retrieval i2t", "retrieval t2i"]
    for section, (head, metric) in ((2, (None, "bacc")), (3, ("i2t", "medr"))):
        fraction = 0.1 if section == 2 else 1.0
        task = "linear_probe" if section == 2 else "retrieval"
        table = result_table(folder.out, task, metric, head=head, fraction=fraction)
        part = sections[section].partition(f"<h3>{metric}</h3>")[2]
        for row in table.rows:
            assert table.shown(row, "mean")[0] in part


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_the_page_in_chromium(browser: Any, folder: ResultFolder, tmp_path: Path, scheme: str, width: int) -> None:
    """It asks for nothing, nothing in it fails, the page itself never scrolls sideways, and details open."""
    write_report(folder.out, "student", tmp_path / "page.html")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: said.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    assert said == [(tmp_path / "page.html").as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    other = page.get_by_text("Other metrics: acc, bacc, f1_macro").first
    other.click()
    assert page.get_by_role("heading", name="f1_macro").first.is_visible()
    page.close()


def test_names_with_marks_stay_themselves_in_latex_and_markdown() -> None:
    cell = Cell(value=0.5, low=0.4, high=0.6, n=3, missing=0, seed_sd=math.nan, reason="")
    table = ResultTable("t", "acc", ("a",), ("x|y_{1}~^\\",), {("a", "x|y_{1}~^\\"): cell})
    assert r"x\textbar{}y\_\{1\}\textasciitilde{}\textasciicircum{}\textbackslash{} (n=3)" in table.latex()
    assert table.markdown().splitlines()[2] == r"| model | x\|y\_{1}\~^\\ (n=3) |"


@pytest.mark.integration
def test_a_failed_unit_is_on_the_page_with_its_reason(tmp_path: Path) -> None:
    made = make_planted(tmp_path, {"student": 0.8, "alpha": 1.5}, {"alpha": list(range(366))})
    run_suite(load_suite(made.suite), tmp_path / "out")
    write_report(tmp_path / "out", "student", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "specimens / zero_shot / alpha</strong>: " in page
    assert "None of them counts as zero anywhere" in page


def test_commands(planted: Planted, tmp_path: Path) -> None:
    out = str(planted.root.parent / "out")
    base = ["figure", str(planted.suite)]
    done = CliRunner().invoke(
        evaluate, [*base, "heat-map", str(tmp_path / "x.svg"), "--model", "student", "--out", out]
    )
    assert done.exit_code == 2
    assert "a figure shows one task and head; choose from zero_shot, linear_probe, retrieval i2t" in done.output
    task = ["--task", "retrieval", "--head", "i2t"]
    done = CliRunner().invoke(
        evaluate, [*base, "heat-map", str(tmp_path / "x.svg"), "--model", "student", "--out", out, *task]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
    page = ["report", str(planted.suite), str(tmp_path / "p.html"), "--out", out, "--model", "nobody"]
    done = CliRunner().invoke(evaluate, page)
    assert "has no model 'nobody'; it has alpha, beta, student, both" in str(done.exception)
    assert yaml.safe_load(planted.suite.read_text())["suite"] == "planted"
