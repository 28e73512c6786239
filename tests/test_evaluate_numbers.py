"""Numbers of an evaluation: recomputed by other libraries, tied, tiny, missing, and under any name."""

from __future__ import annotations

import csv
import io
import json
import math
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines.utils import concordance_index
from planted_store import Planted, make_planted, store_of
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from mmkd.base.errors import ConfigError
from mmkd.evaluate import load_suite, metrics, result_table, run_suite
from mmkd.evaluate.compare import compare
from mmkd.evaluate.drawing import rendered
from mmkd.evaluate.figures import FIGURES
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.metrics import concordance
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.results import ResultRow, append_results, read_results
from mmkd.evaluate.statistics import Difference, Replicates, averaged, holm, paired_difference, signed_rank_p
from mmkd.evaluate.table import Cell, ResultTable
from mmkd.evaluate.tasks import TASKS
from mmkd.evaluate.vqa import normalized
from mmkd.store import FeatureStore
from mmkd.store.writer import ShardFeatures

RIVAL = [23, 24, 29, 31, 16, 35, 33, 18]
MORE = [1, 1, 1, 1, 1, 1, -1, -1]


def one_hot_suite(folder: Path, right: dict[str, list[int]], n: int, **dataset: Any) -> Path:
    """Two classes, n samples per domain; of domain d each model has the first `right[model][d]` right."""
    e = np.eye(2)
    rows: list[dict[str, Any]] = []
    image: dict[str, list[Any]] = {model: [] for model in right}
    for d in range(len(next(iter(right.values())))):
        for j in range(n):
            rows.append({"key": f"k{d}-{j}", "uri": f"{d}-{j}.png", "image_sha256": f"{d * n + j:064x}"})
            rows[-1] |= {"dx": "ab"[j % 2], "domain": f"d{d}", "split": "test", "caption": None}
            for model, counts in right.items():
                image[model].append(e[j % 2 if j < counts[d] else 1 - j % 2])
    texts = np.zeros((len(rows) + 2, 2))
    texts[-2:] = e
    rows += [{"key": f"p{c}", "caption": c, "dx": c, "domain": "-", "split": "prompt"} for c in "ab"]
    valid = np.array([2 if row["split"] == "prompt" else 1 for row in rows], np.uint8)
    features = {
        model: ShardFeatures(np.array([*found, [0, 0], [0, 0]], np.float16), texts.astype(np.float16), valid)
        for model, found in image.items()
    }
    folder.mkdir(exist_ok=True)
    store_of(folder / "store", rows, ("dx", "domain", "split"), features, weights="w")
    spec = {"dataset": "d", "label": "dx", "domain": "domain", "rows": {"test": {"split": "test"}}}
    spec |= {"prompts": {"rows": {"split": "prompt"}}, "tasks": ["zero_shot"]} | dataset
    suite = {"suite": "counts", "store": "store", "bootstrap": {"n": 200}, "datasets": [spec]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml"


def test_equal_differences_are_tied_whatever_their_floats(tmp_path: Path) -> None:
    """Six columns one sample up and two one down: 0.289 on counts; the last bits of floats alone gave 0.031."""
    floats = [(x + d) / 40 - x / 40 for x, d in zip(RIVAL, MORE, strict=True)]
    assert len(set(np.abs(floats))) > 1
    assert signed_rank_p(floats) == signed_rank_p(MORE) == 0.2890625
    student = [x + d for x, d in zip(RIVAL, MORE, strict=True)]
    out = run_suite(load_suite(one_hot_suite(tmp_path, {"rival": RIVAL, "student": student}, 40)), tmp_path / "r").out
    question = Question("zero_shot", "acc")
    assert compare(ResultFolder(out), "student", question).rivals[0].wilcoxon_p_holm == 0.2890625
    labels = FIGURES["box"](ResultFolder(out), question, "student").axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["rival\np=0.289", "student"]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(-3, 3)), min_size=1, max_size=70))
def test_wilcoxon_on_shares_is_wilcoxon_on_counts(columns: list[tuple[int, int]]) -> None:
    shares = [(x + d) / 40 - x / 40 for x, d in columns]
    assert signed_rank_p(shares) == signed_rank_p([float(d) for _, d in columns])


def test_the_best_are_those_within_the_tolerance() -> None:
    values = {"a": 0.1 + 0.2, "b": 0.3, "c": 0.3 - 1e-8}
    cells = {(row, "x"): Cell(value) for row, value in values.items()}
    table = ResultTable("t", "acc", ("a", "b", "c"), ("x",), cells)
    assert (table.best("x"), table.best("x", besides="a")) == (("a", "b"), ("b",))
    assert table.markdown().count("**30.0**") == 2
    assert replace(table, lower_is_better=True).best("x") == ("c",)


@pytest.mark.parametrize("other", [Cell(0.9, missing=3), Cell(0.9, unlike=True)])
def test_a_value_of_other_samples_is_best_only_among_its_like(other: Cell) -> None:
    cells = {("a", "x"): Cell(0.5), ("b", "x"): other, ("c", "x"): replace(other, value=0.7)}
    table = ResultTable("t", "r@5", ("a", "b", "c"), ("x",), cells)
    assert (table.best("x"), table.best("x", besides="a")) == (("a",), ("b",))
    assert "| a | **50.0** |\n| b | 90.0* |" in table.markdown()
    assert "is of fewer samples, or of another gallery" in table.markdown()


@pytest.mark.parametrize("n", [1, 2, 9])
def test_few_samples_have_no_interval_no_p_and_no_verdict(tmp_path: Path, n: int) -> None:
    suite = load_suite(one_hot_suite(tmp_path, {"good": [n], "bad": [0]}, n))
    out = run_suite(suite, tmp_path / "r").out
    table = result_table(out, "zero_shot", "acc")
    assert table.markdown().count("[") == 0
    found = compare(ResultFolder(out), "good", Question("zero_shot", "acc"))
    difference = found.rivals[0].differences["d0"]
    assert isinstance(difference, Difference)
    assert difference.value == 1
    assert all(map(math.isnan, (difference.low, difference.high, difference.p)))
    assert [found.rivals[0].count(verdict) for verdict in ("win", "tie", "loss")] == [0, 0, 0]
    assert "fewer than 10 groups" in found.markdown()
    title = FIGURES["forest"](ResultFolder(out), Question("zero_shot", "acc"), "good").axes[0].get_title(loc="left")
    assert title.endswith("0 win, 0 tie, 0 loss, 1 without interval")
    assert all(row.ci_low is None for rows in read_results(out).values() for row in rows)


def test_at_zero_and_all_right_the_interval_is_wilsons(tmp_path: Path) -> None:
    out = run_suite(load_suite(one_hot_suite(tmp_path, {"good": [40], "bad": [0]}, 40)), tmp_path / "r").out
    table = result_table(out, "zero_shot", "acc")
    for model, right in (("good", 40), ("bad", 0)):
        cell = table.cell(model, "d0")
        assert (cell.low, cell.high) == pytest.approx(proportion_confint(right, 40, method="wilson"), abs=1e-12)
    assert math.isnan(result_table(out, "zero_shot", "auroc_macro").cell("good", "d0").low)
    against = compare(ResultFolder(out), "good", Question("zero_shot", "acc")).rivals[0]
    difference = against.differences["d0"]
    assert isinstance(difference, Difference)
    low = proportion_confint(40, 40, method="wilson")[0]
    assert (difference.low, difference.high) == pytest.approx((2 * low - 1, 1))
    assert against.verdicts == {"d0": "win"}


def unlike(n: int) -> tuple[float, float]:
    """Newcombe's paired interval (1998, method 10) of two models that are right, or wrong, on the same n samples."""
    low = proportion_confint(n, n, method="wilson")[0]
    return low - 1, 1 - low


def newcombe(both: int, one: int, other: int, neither: int) -> tuple[float, float]:
    """Newcombe's interval of a paired difference from its table of four counts."""
    n = both + one + other + neither
    p, q = (both + one) / n, (both + other) / n
    (low, high), (least, most) = (proportion_confint(round(x * n), n, method="wilson") for x in (p, q))
    margins = (both + one) * (other + neither) * (both + other) * (one + neither)
    phi = (both * neither - one * other) / math.sqrt(margins) if margins else 0.0
    down, up = ((a**2 - 2 * phi * a * b + b**2) ** 0.5 for a, b in ((p - low, most - q), (high - p, q - least)))
    return p - q - down, p - q + up


@pytest.mark.parametrize("right", [0, 40])
def test_two_models_that_are_both_always_right_or_wrong_tie_within_newcombes_interval(
    tmp_path: Path, right: int
) -> None:
    out = run_suite(load_suite(one_hot_suite(tmp_path, {"a": [right], "b": [right]}, 40)), tmp_path / "r").out
    folder, question = ResultFolder(out), Question("zero_shot", "acc")
    found = compare(folder, "a", question)
    difference = found.rivals[0].differences["d0"]
    assert isinstance(difference, Difference)
    assert (difference.value, difference.p) == (0, 1)
    by_hand = newcombe(right, 0, 0, 40 - right)
    assert by_hand == pytest.approx(unlike(40), abs=1e-12)
    assert (difference.low, difference.high) == pytest.approx(by_hand, abs=1e-12)
    assert found.rivals[0].verdicts == {"d0": "tie"}
    assert "+0.0 [-8.8, +8.8]" in found.markdown()
    drawn = [line.get_xdata() for line in FIGURES["forest"](folder, question, "a").axes[0].get_lines()]
    assert drawn[0] == pytest.approx(np.array(by_hand) * 100)
    # An area that is 1 in every resample shows nothing of its spread: no interval, no p, no verdict.
    areas = compare(folder, "a", Question("zero_shot", "auroc_macro")).rivals[0]
    difference = areas.differences["d0"]
    assert isinstance(difference, Difference)
    assert difference.value == 0
    assert all(map(math.isnan, (difference.low, difference.high, difference.p)))
    assert areas.verdicts == {}


def test_equal_answers_are_a_tie_with_an_interval_and_few_groups_are_none(tmp_path: Path) -> None:
    out = run_suite(load_suite(one_hot_suite(tmp_path, {"a": [30, 9], "b": [30, 9]}, 40)), tmp_path / "r").out
    rival = compare(ResultFolder(out), "a", Question("zero_shot", "acc")).rivals[0]
    for difference in (*rival.differences.values(), rival.mean):
        assert isinstance(difference, Difference)
        assert (difference.low, difference.high) == pytest.approx(unlike(40))
    assert rival.verdicts == {"d0": "tie", "d1": "tie"}
    for n in (1, 2, 9):
        one = Replicates(1.0, np.ones(200), n, n, 0, (0.0, 1.0), n)
        found = paired_difference(one, one, 0.95)
        assert all(map(math.isnan, (found.low, found.high, found.p)))
        assert found.verdict() is None


def test_a_mean_of_all_right_and_all_wrong_has_an_interval() -> None:
    best, worst = (Replicates(x, np.full(200, x), 40, 40, 0, (0.0, 1.0), 40) for x in (1.0, 0.0))
    low, high = averaged([best, worst]).interval(0.95)
    width = 1 - proportion_confint(40, 40, method="wilson")[0]
    assert (low, high) == pytest.approx((0.5 - width / 2, 0.5 + width / 2))


def test_names_that_a_spreadsheet_would_run_are_text_and_numbers_are_numbers() -> None:
    names = ("=1+1", "+a", "-b", "@c", "\tx", "d")
    cells = {(row, "=x"): Cell(-0.5, -0.6, -0.4, 20, reason="-") for row in names}
    read = list(csv.DictReader(io.StringIO(ResultTable("t", "acc", names, ("=x",), cells).csv(), newline="")))
    assert [one["model"] for one in read] == ["'=1+1", "'+a", "'-b", "'@c", "'\tx", "d"]
    assert {(one["column"], one["value"], one["low"], one["reason"]) for one in read} == {("'=x", "-0.5", "-0.6", "'-")}
    assert [one["model"] for one in json.loads(ResultTable("t", "acc", names, ("=x",), cells).json())["cells"]] == [
        *names
    ]


def test_a_mean_has_the_groups_of_its_smallest_part() -> None:
    large, small = (Replicates(0.5, np.linspace(0.4, 0.6, 100), n, n, 0, (0.0, 1.0), n) for n in (50, 3))
    assert math.isnan(averaged([large, small]).interval(0.95)[0])
    assert averaged([large, large]).n == 100
    assert averaged([large, large], same_rows=True).n == 50


def test_draws_of_the_labels_count_their_samples_once(tmp_path: Path) -> None:
    planted = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    planted.edit(ensembles={}, dataset={"tasks": ["linear_probe"]})
    out = run_suite(load_suite(planted.suite), tmp_path / "r").out
    question = Question("linear_probe", by="dataset", fraction=0.1)
    difference = compare(ResultFolder(out), "sharp", question).rivals[0].differences["specimens"]
    assert isinstance(difference, Difference)
    assert difference.n == 120


def test_models_with_other_galleries_are_compared_on_the_common_one(tmp_path: Path) -> None:
    """Equal features, a quarter of the rows left of one model: no difference on the gallery that both have."""
    planted = make_planted(tmp_path, {"whole": 1.0, "part": 1.0})
    store = FeatureStore.open(planted.root)
    table = store.sample_table().to_pylist()
    image, text = store.image("whole")[:], store.text("whole")[:]
    valid = np.array([2 if row["split"] == "prompt" else 3 for row in table], np.uint8)
    left = valid.copy()
    left[[row["row"] for row in table if row["split"] == "test" and row["row"] % 4]] = 0
    features = {"whole": ShardFeatures(image, text, valid), "part": ShardFeatures(image, text, left)}
    labels = ("split", "label", "domain", "patient")
    root = store_of(tmp_path / "again", table, labels, features, weights="w")
    planted.edit(store=str(root), ensembles={}, dataset={"tasks": ["retrieval"]})
    out = run_suite(load_suite(planted.suite), tmp_path / "r").out
    alone = result_table(out, "retrieval", by="dataset")
    assert alone.value("part", "specimens") > alone.value("whole", "specimens") + 0.1
    assert "part, specimens: 90 of the 120 gallery items have no features" in alone.markdown()
    found = compare(ResultFolder(out), "whole", Question("retrieval", by="dataset"))
    difference = found.rivals[0].differences["specimens"]
    assert isinstance(difference, Difference)
    assert (difference.value, difference.p, difference.n) == (0, 1, 30)
    assert (difference.low, difference.high) == pytest.approx(unlike(30), abs=1e-12)
    assert "scored again, on the gallery" in found.markdown()
    # Without the store nothing is compared, and the reason stands in the table.
    root.rename(tmp_path / "moved")
    gone = compare(ResultFolder(out), "whole", Question("retrieval", by="dataset"))
    assert "galleries or candidates differ" in str(gone.rivals[0].differences["specimens"])
    assert gone.rivals[0].verdicts == {}


def test_recall_needs_a_gallery_larger_than_k(tmp_path: Path) -> None:
    planted = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    planted.edit(dataset={"tasks": ["retrieval"]}, settings={"retrieval": {"ks": [1, 119, 120]}})
    out = run_suite(load_suite(planted.suite), tmp_path / "r").out
    assert result_table(out, "retrieval", "r@119", by="dataset").value("sharp", "specimens") == 1
    table = result_table(out, "retrieval", "r@120", by="dataset")
    assert "sharp, specimens: has no value: any answer is among the first 120 of a gallery of 120" in table.markdown()
    rows = [row for rows in read_results(out).values() for row in rows if row.metric == "recall@120"]
    assert {row.status for row in rows} == {"undefined"}


def test_a_class_without_training_rows_is_noted(tmp_path: Path) -> None:
    planted = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    rows = {"train": {"split": "train", "label": ["adenoma", "benign"]}, "test": {"split": "test"}}
    planted.edit(dataset={"tasks": ["linear_probe"], "rows": rows}, settings={"linear_probe": {"fractions": [1.0]}})
    table = result_table(run_suite(load_suite(planted.suite), tmp_path / "r").out, "linear_probe")
    assert "sharp, specimens: no training rows of carcinoma" in table.markdown()


SIGNS = st.sampled_from("|$\\&%_#{}^~[]*`<>\n\r\u2028\t -")
LETTERS = st.characters(exclude_categories=["Cs", "Co", "Cn"], max_codepoint=0x2FFF)
NAMES = st.text(LETTERS | SIGNS, min_size=1, max_size=12).filter(lambda name: name == name.strip())


@given(st.lists(NAMES | st.just("mean"), min_size=3, max_size=4, unique=True))
@settings(max_examples=100, deadline=None)
def test_names_survive_every_table_and_figure(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    cells = {("model", name): Cell(0.5, 0.4, 0.6, 20) for name in names}
    mean = "mean 2" if "mean" in names else "mean"
    cells["model", mean] = Cell(0.25)
    table = ResultTable("t", "acc", ("model",), (*names, mean), cells, mean=mean)
    read = list(csv.DictReader(io.StringIO(table.csv(), newline="")))
    columns = [f"'{name}" if name[0] in "=+-@\t\r" else name for name in (*names, mean)]
    assert [(one["column"], float(one["value"])) for one in read] == list(
        zip(columns, [*(0.5 for _ in names), 0.25], strict=True)
    )
    assert [one["column"] for one in json.loads(table.json())["cells"]] == [*names, mean]
    lines = table.markdown().split("\n")
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines[2:5]} == {len(names) + 3}
    assert all(line == "".join(line.splitlines()) for line in lines)
    latex = table.latex().split("\n")
    assert latex[3].count(" & ") >= len(names) + 1
    assert not re.search(r"(?<!\\)[$#%]", latex[3])


@pytest.mark.integration
@pytest.mark.parametrize(
    "extra",
    ["a|b", "x\ny"]
    + [
        pytest.param(extra, marks=pytest.mark.slow)
        for extra in ("$x^2$ \\frac", "mean", "a\u2028b", "<b>&", "100%_#{}~^[", "a\x0bb")
    ],
)
def test_hostile_domains_run_through_the_whole_command(tmp_path: Path, extra: str) -> None:
    changes = {row: {"domain": extra} for row in range(240, 300)}
    planted = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0}, changes=changes)
    planted.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    out = run_suite(load_suite(planted.suite), tmp_path / "r").out
    folder, question = ResultFolder(out), Question("zero_shot", "acc")
    table = result_table(out, "zero_shot", "acc")
    assert set(table.groups) == {extra, "colon", "lung"}
    values = [table.value("sharp", name) for name in table.groups]
    assert table.value("sharp", table.mean) == pytest.approx(np.mean(values))
    found = compare(folder, "sharp", question)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in found.markdown().split("\n")[2:5]} == {9}
    for name in ("heat-map", "forest", "box", "radar"):
        assert rendered(FIGURES[name](folder, question, "sharp"), "svg").startswith(b"<?xml")


def test_a_line_separator_in_a_name_does_not_end_a_result(tmp_path: Path) -> None:
    planted = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    classes = ["adenoma", "benign", "other\u2028(see note)"]
    planted.edit(dataset={"classes": classes, "tasks": ["zero_shot"]})
    out = run_suite(load_suite(planted.suite), tmp_path / "r").out
    (reason,) = {row.reason for rows in read_results(out).values() for row in rows}
    assert "\u2028" in reason or "\\u2028" in reason
    assert result_table(out, "zero_shot").markdown().count("\u2028") == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A", "B"),
        ("ER+", "ER-"),
        ("10-20", "10 20"),
        ("-5", "5"),
        (">2", "<2"),
        ("1.5", "15"),
        ("vitamin A", "vitamin"),
    ],
)
def test_answers_that_differ_stay_different(one: str, other: str) -> None:
    assert "" not in (normalized(one), normalized(other))
    assert normalized(one) != normalized(other)


@pytest.mark.parametrize(
    ("one", "other"), [("The X-ray.", "x ray"), ("a dog", "Dog!"), ("T1-weighted", "t1 weighted"), ("\u22125", "-5")]
)
def test_answers_that_are_the_same_stay_the_same(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


ROW: dict[str, Any] = {
    "suite": "s", "suite_digest": "", "suite_version": 1, "dataset": "d", "dataset_version": 1, "modality": "m",
    "role": "report",
    "task": "zero_shot", "head": "", "protocol": "standard", "model": "m", "fraction": 1.0, "seed": 0, "value": 0.5,
    "ci_low": None, "ci_high": None, "n": 1, "n_missing": 0, "n_groups": 1, "n_boot": 100, "boot_seed": 1,
    "status": "ok", "reason": "", "features_digest": "", "data_digest": "", "config_digest": "", "code_version": "",
    "code_digest": "", "predictions": "p", "seconds": 0.0, "metric": "acc",
}  # fmt: skip


def append_many(out: Path, name: str) -> None:
    for i in range(150):
        append_results(out, [ResultRow(key=f"{name}{i}", **ROW)])


def test_two_writers_lose_no_line(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_results(tmp_path)) == 300


def test_a_folder_shows_each_suite_its_own(tmp_path: Path) -> None:
    planted = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    planted.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    out = tmp_path / "shared"
    for name in ("one/two", "other"):
        planted.edit(suite=name, dataset={"dataset": f"set-{len(name)}"})
        run_suite(load_suite(planted.suite), out)
    for name in ("one/two", "other"):
        table = result_table(out, "zero_shot", by="dataset", suite=name)
        assert table.columns == (f"set-{len(name)}",)
        assert f"suite {name} version" in table.title
    with pytest.raises(ConfigError, match="has results of 2 suites, one/two, other; name one"):
        result_table(out, "zero_shot")
    with pytest.raises(ConfigError, match="no results of suite 'third', only of 'one/two', 'other'"):
        ResultFolder(out, "third")


def test_an_error_in_the_code_of_a_unit_costs_that_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})
    planted.edit(ensembles={}, dataset={"tasks": ["zero_shot", "retrieval"]})

    def broken(*_: object) -> Predictions:
        raise TypeError("unsupported operand\nfor this")

    monkeypatch.setattr(type(TASKS["zero_shot"]), "predict", broken)
    report = run_suite(load_suite(planted.suite), tmp_path / "r")
    assert (report.count("ran"), report.count("failed")) == (4, 2)
    assert re.fullmatch(
        r"TypeError: unsupported operand for this \(test_evaluate_numbers.py, line \d+\); please report this",
        report.failed[0].reason,
    )


@pytest.mark.integration
@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_metric_is_that_of_another_library(seed: int, tied: bool) -> None:
    """Random, tied and tiny data with an absent class and weights of zero."""
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(2, 30)), int(rng.integers(2, 5))
    y = rng.integers(0, classes, n)
    score = rng.integers(0, 3, (n, classes)) / 2 if tied else rng.random((n, classes))
    weights = np.stack([np.ones(n), rng.integers(0, 3, n)]).astype(float)
    for b, counts in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(n), counts)
        if len(rows) == 0:
            continue
        t, s = y[rows], score[rows]
        guess = s.argmax(axis=1)
        assert metrics.accuracy(y, score, weights)[b] == pytest.approx(np.mean(guess == t))
        present = [c for c in np.unique(t) if 0 < np.sum(t == c) < len(t)]
        area = np.mean([roc_auc_score(t == c, s[:, c]) for c in present]) if present else math.nan
        assert metrics.macro_auroc(y, score, weights)[b] == pytest.approx(area, nan_ok=True)
        f1 = f1_score(t, guess, labels=np.unique(t), average="macro", zero_division=0)
        assert metrics.macro_f1(y, score, weights)[b] == pytest.approx(f1)
        recalls = [np.mean(guess[t == c] == c) for c in np.unique(t)]
        assert metrics.balanced_accuracy(y, score, weights)[b] == pytest.approx(np.mean(recalls))
        if len(set(t)) > 1 and set(guess) <= set(t):
            assert balanced_accuracy_score(t, guess) == pytest.approx(np.mean(recalls))
        if (t == 0).any():
            precision = average_precision_score(t == 0, s[:, 0])
            assert metrics.average_precision(y == 0, score[:, 0], weights)[b] == pytest.approx(precision)
    time, event, risk = rng.integers(1, 6, n).astype(float), rng.random(n) < 0.6, score[:, 0]
    ours = concordance(risk, time, event, np.ones((1, n)))[0]
    if not np.isnan(ours):
        assert ours == pytest.approx(concordance_index(time, -risk, event))


@pytest.mark.integration
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p: list[float]) -> None:
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_a_whole_suite_is_recomputed_from_its_files(tmp_path: Path) -> None:
    """Values, intervals and p of stored results, from the stored predictions by rows drawn again one by one."""
    holes = {"blurred": list(range(240, 270))}
    planted: Planted = make_planted(tmp_path, {"sharp": 0.8, "blurred": 2.0}, holes)
    planted.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    out = run_suite(load_suite(planted.suite), tmp_path / "r").out
    folder, question = ResultFolder(out), Question("zero_shot", "acc", by="dataset")
    drawn: dict[str, np.ndarray] = {}
    for model in ("sharp", "blurred"):
        found = folder.answers(question, "specimens", model)[0]
        assert isinstance(found, Predictions)
        right = found.score.argmax(axis=1) == found.labels()
        counts = np.concatenate(list(TASKS["zero_shot"].scoring(folder.plan.suite.datasets[0]).resamples(
            found, folder.plan.suite.bootstrap, "planted/specimens/test")))  # fmt: skip
        by_hand = [np.repeat(right[found.available], c[found.available].astype(int)).mean() for c in counts]
        cell = result_table(out, "zero_shot", "acc", by="dataset").cell(model, "specimens")
        assert cell.value == pytest.approx(right[found.available].mean())
        assert (cell.low, cell.high) == pytest.approx(tuple(np.percentile(by_hand, [2.5, 97.5])))
        common = np.arange(120) >= 30
        drawn[model] = np.array([np.repeat(right[common], c[common].astype(int)).mean() for c in counts])
        drawn[f"{model} itself"] = right[common].mean()
    difference = compare(folder, "sharp", question).rivals[0].differences["specimens"]
    assert isinstance(difference, Difference)
    delta = np.round(drawn["sharp"] - drawn["blurred"], 12)
    assert difference.value == pytest.approx(drawn["sharp itself"] - drawn["blurred itself"])
    assert (difference.low, difference.high) == pytest.approx(tuple(np.percentile(delta, [2.5, 97.5])))
    assert difference.p == pytest.approx(min(1, 2 * (min((delta <= 0).sum(), (delta >= 0).sum()) + 1) / 201))


def test_noise_of_floats_is_no_difference() -> None:
    draws = np.full(200, 0.3)
    one = Replicates(0.1 + 0.2, draws + 5e-17, 50, 50, 0, (0.0, 1.0), 50)
    found = paired_difference(one, Replicates(0.3, draws, 50, 50, 0, (0.0, 1.0), 50), 0.95)
    assert (found.value, found.p, found.verdict()) == (0, 1, "tie")
    assert (found.low, found.high) == pytest.approx(unlike(50), abs=1e-12)
