"""One rule for blank, null, unlisted and numeric text, and heads that converge or say so."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from planted_store import store_of
from set_scene import described, rows_of
from sklearn.metrics import roc_auc_score

from mmkd.base.config import read_mapping
from mmkd.base.errors import ConfigError
from mmkd.base.text import cell_text
from mmkd.evaluate import load_suite, official, run_suite
from mmkd.evaluate.check import DatasetCheck, check_suite
from mmkd.evaluate.heads.settings import MilSettings, Trained, budget_warnings
from mmkd.evaluate.linear_probe import Labeled, LinearProbeSettings, choose_c, fit
from mmkd.evaluate.plan import make_plan
from mmkd.evaluate.predictions import Predictions, read_predictions
from mmkd.evaluate.vqa import normalized
from mmkd.extract.corpora.row import as_label
from mmkd.store.writer import ShardFeatures


def write(folder: Path, samples: list[dict[str, Any]], **spec: Any) -> Path:
    """A suite over a store of one encoder `a` whose features follow the column `y`."""
    rng = np.random.default_rng(0)
    labels = tuple(dict.fromkeys(name for row in samples for name in row if name != "key"))
    x = rng.normal(size=(len(samples), 8)).astype(np.float32)
    x[:, 0] += [3 * (row.get("y") in ("pos", "Dead")) for row in samples]
    features = {"a": ShardFeatures(x, x, np.ones(len(samples), dtype=np.uint8))}
    folder.mkdir(exist_ok=True)
    store_of(folder / "store", samples, labels, features)
    path = folder / "suite.yaml"
    dataset = {"dataset": "d", "tasks": ["linear_probe"], "label": "y"} | spec
    dataset = {key: value for key, value in dataset.items() if value is not None}
    path.write_text(yaml.safe_dump({"suite": "s", "store": "store", "bootstrap": {"n": 100}, "datasets": [dataset]}))
    return path


def checked(path: Path) -> DatasetCheck:
    return check_suite(load_suite(path)).datasets[0]


def sites(n: int = 40, **changes: Any) -> list[dict[str, Any]]:
    names = ("01", "02", "08", "10")
    return [
        {"key": f"k{i}", "y": ("neg", "pos")[i // 4 % 2], "site": names[i % 4], "patient": f"p{i}"} | changes
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("12", "12"), ("12.0", "12"), ("12.", "12"), (12, "12"), (12.0, "12"), ("1.50", "1.5"), ("-0.0", "0"),
        ("012", "012"), ("01.0", "01.0"), ("1e5", "1e5"), (" Dead ", "Dead"), ("dead", "dead"),
        ("", None), (" \t", None), (None, None), (float("nan"), None),
    ],
)  # fmt: skip
def test_the_rule_of_cells(value: object, text: str | None) -> None:
    assert cell_text(value) == text


def test_blank_cells_of_a_corpus_are_null() -> None:
    assert [as_label(value) for value in ("", "  ", None, "x", 12.0)] == [None, None, None, "x", "12.0"]


def test_zeros_at_the_beginning_and_times_stay_text_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: [01, 08, 10, 0, -3, 12:30, 01.5, 1.5, 0x1F, 1:30.5]")
    assert read_mapping(path)["a"] == ["01", "08", 10, 0, -3, "12:30", "01.5", 1.5, 31, "1:30.5"]


def test_unquoted_sites_are_all_found_and_a_site_that_no_row_has_stops(tmp_path: Path) -> None:
    path = write(tmp_path, sites(), rows={"train": {"site": [10]}, "test": {"site": "SITES"}})
    text = path.read_text()
    path.write_text(text.replace("SITES", "[01, 02, 08]"))
    assert checked(path).rows == {"train": 10, "test": 30}
    path.write_text(text.replace("SITES", "[1, 02]"))
    (problem,) = checked(path).problems
    assert "test rows ask for site '1', which no row has; it has '01' 10, '02' 10, '08' 10, '10' 10" in problem
    report = run_suite(load_suite(path), tmp_path / "out")
    assert "which no row has" in report.failed[0].reason


def test_a_label_that_is_no_class_stops_with_counts(tmp_path: Path) -> None:
    rows = sites()
    for i, value in ((0, ""), (1, None), (4, "Pos"), (10, "pos ")):
        rows[i]["y"] = value
    path = write(tmp_path, rows, classes=["neg", "pos"], rows={"train": {"site": "10"}, "test": {"site": ["01", "02"]}})
    found = checked(path)
    assert (
        "y of 3 test rows is not one of the classes neg, pos: blank 2, 'Pos' 1 (first in row 'k0')" in found.problems[0]
    )
    assert found.counts["test rows by class"] == {"neg": 8, "pos": 9, "blank (no class)": 2, "'Pos' (no class)": 1}


def test_a_patient_who_is_a_number_here_and_a_decimal_there_is_one(tmp_path: Path) -> None:
    rows = [row | {"patient": f"{i // 2}" + ".0" * (i % 2)} for i, row in enumerate(sites())]
    splits = {"train": {"site": ["02", "10"]}, "test": {"site": ["01", "08"]}}
    (problem,) = checked(write(tmp_path, rows, group="patient", rows=splits)).problems
    assert "20 values of patient stand in both train and test, for example '0'" in problem


def test_patients_that_look_alike_are_a_warning_and_blank_ones_are_counted(tmp_path: Path) -> None:
    rows = [
        row | {"patient": ("P007", "p7")[i % 2] if i < 2 else ("", None, f"q{i}")[i % 3]}
        for i, row in enumerate(sites())
    ]
    splits = {"train": {"site": ["02", "10"]}, "test": {"site": ["01", "08"]}}
    found = checked(write(tmp_path, rows, group="patient", rows=splits))
    assert found.problems == []
    assert "1 values of patient may be one group in two splits: 'p7' in train and 'P007' in test" in found.warnings[-1]
    assert found.warnings[0].endswith("train rows have no patient; each is a group of its own")
    assert found.groups == {"train": 20, "test": 20}


SPLITS = {"train": {"site": ["02", "10"]}, "test": {"site": ["01", "08"]}}


def test_a_blank_among_the_values_of_a_class_is_null(tmp_path: Path) -> None:
    rows = [row | {"y": ("pos", None, " ", "neg")[i // 4 % 4]} for i, row in enumerate(sites())]
    found = checked(write(tmp_path, rows, classes={"none": ["neg", ""], "some": "pos"}, rows=SPLITS))
    assert found.problems == []
    assert found.counts["test rows by class"] == {"none": 14, "some": 6}


def test_a_row_without_a_patient_is_in_no_other_rows_group(tmp_path: Path) -> None:
    """Patients are often numbered as the rows are."""
    rows = [row | {"patient": None if i < 10 else f"k{i - 10}" if i < 20 else f"p{i}"} for i, row in enumerate(sites())]
    found = checked(write(tmp_path, rows, group="patient", rows=SPLITS))
    assert found.problems == []
    assert found.groups == {"train": 20, "test": 20}


def test_words_for_no_value_and_blank_domains_are_warnings(tmp_path: Path) -> None:
    rows = [
        row | {"patient": ("nan", "N/A", f"p{i}")[i % 4 // 2 + i % 8 // 7], "view": ("PA", None)[i % 8 // 7]}
        for i, row in enumerate(sites())
    ]
    found = checked(
        write(tmp_path, rows, group="patient", domain="view", rows={"train": {"site": "10"}, "test": {"site": "01"}})
    )
    assert found.warnings[:3] == [
        "5 train rows have no view; they count under 'd'",
        "patient of the train rows is 'N/A' 5, a value like any other; leave the cell blank where there is none",
        "patient of the test rows is 'nan' 10, a value like any other; leave the cell blank where there is none",
    ]


def test_spellings_of_a_filter_and_of_a_patient_are_warnings(tmp_path: Path) -> None:
    names = ("Jos\u00e9", "jose\u0301"), ("TCGA-A1", "TCGA\u200b_A1"), ("012.0", "12"), ("1.05", "1.5")
    rows = [row | {"part": ("train", "test", "Test", " test ", None)[i % 5]} for i, row in enumerate(sites())]
    for number, pair in enumerate(names):
        for i, name in enumerate(pair):
            rows[5 * number + i]["patient"] = name
    found = checked(write(tmp_path, rows, group="patient", rows={"train": {"part": "train"}, "test": {"part": "test"}}))
    assert found.problems == []
    assert found.rows == {"train": 8, "test": 16}
    groups, filters = found.warnings
    assert "3 values of patient may be one group in two splits: 'Jos\u00e9' in train and 'jose\u0301' in test" in groups
    assert filters == "rows with part 'Test' 8 are in no split; `rows` names 'test'"


def test_a_value_of_prompts_that_no_row_has_stops(tmp_path: Path) -> None:
    rows = [row | {"kind": "image"} for row in sites()]
    rows += [{"key": name, "y": name, "kind": "prompt"} for name in ("neg", "pos")]
    prompts = {"rows": {"kind": ["prompt", "promtp"]}}
    path = write(tmp_path, rows, tasks=["zero_shot"], prompts=prompts, rows={"test": {"kind": "image"}})
    (problem,) = checked(path).problems
    assert problem == "d: prompt rows ask for kind 'promtp', which no row has; it has 'image' 40, 'prompt' 2"
    assert run_suite(load_suite(path), tmp_path / "out").failed[0].reason == problem


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("site: X", "site: 2020-01-02", "rows.test.site: YAML reads 2020-01-02 as a date, expected text; put"),
        ("site: X", "site: [yes, off]", "YAML reads [True, False] as true or false; put the value in quotes"),
        ("site: X", "site: [[a]]", "YAML reads ['a'] as a list, expected text"),
        ("site: X", "on: X", "YAML reads the name of a column (`on`, `yes`, `no`) as true or false; put it in quotes"),
        ("neg: a", "~: a", "YAML reads a class name as null or blank; put a name in quotes"),
        ("neg: a", ".nan: a", "YAML reads a class name as null or blank; put a name in quotes"),
        ("neg: a", "'pos ': a", "pos is named twice; name each once"),
    ],
)  # fmt: skip
def test_values_that_yaml_reads_as_something_else(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = write(tmp_path, sites(4), rows={"test": {"site": "X"}}, classes={"neg": "a", "pos": "b"})
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(ConfigError) as caught:
        load_suite(path)
    assert message in str(caught.value)


def test_a_class_that_is_listed_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classes: a is named twice; name each once"):
        load_suite(write(tmp_path, sites(4), rows={"test": {}}, classes=["a", "b", "a "]))


def test_columns_of_every_type_from_a_parquet_file_to_scores(tmp_path: Path) -> None:
    """A description, its corpus, a store of its labels, `check` and `run`: one text for a value in every type."""
    rng = np.random.default_rng(0)
    sites_, days = ("01", "2", "08"), (dt.date(2020, 1, 2), dt.date(2021, 3, 4), None)
    columns = {
        "image": pa.array([f"{i}.png" for i in range(36)]),
        "y": pa.array([("neg", "pos ", "pos")[i % 3] for i in range(36)]).dictionary_encode(),
        "patient": pa.array([f" p{i} " for i in range(36)], pa.large_string()),
        "site": pa.array([sites_[i // 12] for i in range(36)], pa.string_view()),
        "day": pa.array([days[i // 12] for i in range(36)]),
        "dose": pa.array([(0.1, 12.0, float("nan"))[i // 12] for i in range(36)], pa.float32()),
        "price": pa.array([(Decimal("0.10"), Decimal("12.00"), None)[i // 12] for i in range(36)]),
        "seen": pa.array([(True, False, None)[i // 12] for i in range(36)]),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    corpus = rows_of(described(tmp_path, {"kind": "parquet", "path": "rows.parquet"}))
    names = tuple(name for name in columns if name != "image")
    x = rng.normal(size=(36, 4)).astype(np.float32)
    samples = [row.labels | {"key": row.key} for row in corpus]
    store_of(tmp_path / "store", samples, names, {"a": ShardFeatures(x, x, np.ones(36, dtype=np.uint8))})
    for column, (first, second, third) in {
        "site": ("01", "2.0", "08"),
        "day": ("'2020-01-02'", "'2021-03-04'", "''"),
        "dose": ("0.1", "12", "''"),
        "price": ("0.1", "12.0", "''"),
        "seen": ("'true'", "'false'", "''"),
    }.items():
        path = tmp_path / f"{column}.yaml"
        path.write_text(
            f"{{suite: s, store: store, bootstrap: {{n: 100}}, settings: {{linear_probe: {{fractions: [1.0]}}}}, "
            "datasets: [{dataset: d, label: y, classes: [neg, pos], group: patient, tasks: [linear_probe], "
            f"rows: {{train: {{{column}: [{first}, {second}]}}, test: {{{column}: {third}}}}}}}]}}"
        )
        found = checked(path)
        assert (found.problems, found.warnings, found.rows) == ([], [], {"train": 24, "test": 12})
        assert found.counts["test rows by class"] == {"neg": 4, "pos": 8}
        assert run_suite(load_suite(path), tmp_path / column).count("ran") == 1


def vitals() -> list[dict[str, Any]]:
    return [
        {"key": f"k{i}", "y": ("Dead", "Alive")[i % 2], "months": f"{20 - i % 2 * 5 + i / 10}", "patient": f"p{i}"}
        for i in range(60)
    ]


def test_an_event_that_the_description_does_not_name_stops_with_counts(tmp_path: Path) -> None:
    survival = {"time": "months", "event": {"y": "Dead"}}
    own = {"tasks": ["survival"], "label": None, "group": "patient", "rows": {"test": {}}}
    found = checked(write(tmp_path / "clean", vitals(), survival=survival, **own))
    assert found.problems == []
    assert found.counts["test patients"] == {"event": 30, "censored": 30}
    assert found.counts["test patients by y"] == {"Dead": 30, "Alive": 30}
    rows = vitals()
    for i, value in ((0, "dead"), (2, None), (4, ""), (6, "Not Reported")):
        rows[i]["y"] = value
    (problem,) = checked(write(tmp_path / "mixed", rows, survival=survival, **own)).problems
    assert "y has 'Alive' 30, blank 2, 'dead' 1, 'Not Reported' 1 among the test rows beside 'Dead'" in problem
    assert "`survival: censored: {y: [...]}`" in problem
    named = {"event": {"y": ["Dead", "dead"]}, "censored": {"y": ["Alive", "Not Reported", ""]}}
    found = checked(write(tmp_path / "named", rows, survival=survival | named, **own))
    assert (found.problems, found.counts["test patients"]) == ([], {"event": 27, "censored": 33})
    others = {"event": {"y": ["Dead", "dead", ""]}, "censored": {"y": "*"}}
    found = checked(write(tmp_path / "others", rows, survival=survival | others, **own))
    assert (found.problems, found.counts["test patients"]) == ([], {"event": 29, "censored": 31})
    for name, nothing in (("none", {}), ("empty", {"y": []})):
        with pytest.raises(ConfigError, match="survival: `event` names no value"):
            load_suite(write(tmp_path / name, rows, survival={"time": "months", "event": nothing}, **own))
    with pytest.raises(ConfigError, match="'Dead' is both event and censored"):
        load_suite(write(tmp_path / "both", rows, survival=survival | {"censored": {"y": ["Dead"]}}, **own))


def test_blank_and_null_are_one_value_of_several_labels(tmp_path: Path) -> None:
    rows = [
        row | {"a": ("0.0", "1.0", "-1.0", None)[i % 4], "b": ("0", "1", "-1", "")[i % 4]}
        for i, row in enumerate(sites())
    ]
    own = {"tasks": ["multilabel_probe"], "label": None, "classes": ["a", "b"], "rows": {"train": {}, "test": {}}}
    found = checked(write(tmp_path / "1", rows, multilabel={"negative": ["0.0", ""]}, **own))
    assert found.counts["test a"] == found.counts["test b"] == {"positive": 10, "negative": 20, "unknown": 10}
    found = checked(write(tmp_path / "2", rows, multilabel={}, **own))
    assert found.counts["test a"] == found.counts["test b"] == {"positive": 10, "negative": 10, "unknown": 20}
    with pytest.raises(ConfigError, match="value '1' stands in two of the lists"):
        load_suite(write(tmp_path / "3", rows, multilabel={"negative": ["0", "1"]}, **own))


def test_answers_keep_their_signs_and_a_lone_article() -> None:
    assert [normalized(text) for text in ("ER+", "er-", "A", "the liver.", "X-ray", "-5", "ER+/PR-")] == [
        "er+", "er-", "a", "liver", "xray", "-5", "er+ pr-",
    ]  # fmt: skip


def test_a_plan_is_read_back_equal(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, sites(), rows={"train": {"site": "10"}, "test": {"site": "01"}}))
    plan = make_plan(suite).plan
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan


def separable() -> Labeled:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 30))
    y = (x[:, 0] + 0.8 * rng.normal(size=80) > 0).astype(np.int64)
    return Labeled(x / np.linalg.norm(x, axis=1, keepdims=True), y, np.arange(80).astype(str).astype(object))


def test_c_is_chosen_among_fits_that_converged() -> None:
    data = separable()
    c, facts = choose_c(data, None, LinearProbeSettings(), seed=0)
    assert facts["c_converged"] > 10
    few = LinearProbeSettings(max_iter=8)
    short, late = choose_c(data, None, few, seed=0)
    assert late["c_converged"] < facts["c_converged"]
    assert fit(data, short, few)[1] or late["c_converged"] == 0
    none, facts = choose_c(data, None, LinearProbeSettings(max_iter=1, c_low=1e3), seed=0)
    assert (none, facts["c_converged"]) == (10.0, 0)
    model, converged = fit(data, c, LinearProbeSettings())
    exact, _ = fit(data, c, LinearProbeSettings(tolerance=1e-10, max_iter=100_000))
    assert converged
    assert np.abs(model.coef_ - exact.coef_).max() < 1e-2 * np.abs(exact.coef_).max()


def test_budgets_count_steps_and_a_best_last_epoch_is_a_warning() -> None:
    assert MilSettings().limits(62) == (500, 100)
    assert MilSettings().limits(640) == (50, 10)
    assert MilSettings().limits(100_000) == (10, 5)
    assert MilSettings(epochs=7, patience=2).limits(62) == (7, 2)
    assert budget_warnings([Trained(3, 9), Trained(8, 9)]) == []
    assert budget_warnings([Trained(9, 9), Trained(8, 9)]) == [
        "the last epoch was the best in 1 of 2 trainings; raise `steps`"
    ]


def test_a_class_without_training_rows_is_a_warning(tmp_path: Path) -> None:
    rows = [row | {"y": "rare"} if i % 20 == 0 else row for i, row in enumerate(sites())]
    path = write(
        tmp_path,
        rows,
        settings={"linear_probe": {"fractions": [1.0]}},
        rows={"train": {"site": ["02", "10"]}, "test": {"site": ["01", "08"]}},
    )
    report = run_suite(load_suite(path), tmp_path / "out")
    found = read_predictions(next(report.out.glob("predictions/d/linear_probe/*.parquet")))
    assert "no training rows of rare: score 0 everywhere" in found.info["warnings"][-1]
    assert "warning (1 unit): no training rows of rare" in str(report)


def test_released_auroc_of_cosines_that_nearly_agree() -> None:
    rng = np.random.default_rng(0)
    cosines = (0.3 + 1e-8 * rng.integers(0, 40, size=(60, 3))).astype(np.float32)
    y = rng.integers(0, 3, 60)
    shifted = np.exp(cosines - cosines.max(axis=1, keepdims=True))
    score = (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
    ids = np.arange(60).astype(str).astype(object)
    found = Predictions(ids, ids, ids, y, score.astype(np.float64), np.ones(60, bool), ("a", "b", "c"))
    ours = official.auroc(found, np.ones((1, 60)))[0]
    one_of = [roc_auc_score(y == label, score[:, label]) for label in range(3)]
    assert ours == pytest.approx(np.mean(one_of), abs=1e-12)
