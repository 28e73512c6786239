"""`mmkd evaluate` as typed, and suite files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from mmkd.base.errors import ConfigError, MmkdError
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import TASKS, load_suite
from mmkd.evaluate.tasks import TaskSettings

DATASET: dict[str, Any] = {
    "dataset": "sites",
    "label": "site",
    "rows": {"test": {"key": [f"k{i}" for i in range(100)]}, "train": {"key": [f"k{i}" for i in range(100, 160)]}},
    "prompts": {"rows": {"key": ["k597", "k598", "k599"]}},
    "tasks": ["zero_shot", "linear_probe"],
}
SUITE: dict[str, Any] = {
    "suite": "small",
    "store": "store",
    "bootstrap": {"n": 100},
    "settings": {"linear_probe": {"fractions": [1], "c_low": "1e-1", "c_steps": 2}},
    "datasets": [DATASET],
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITE | changes))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments])


@pytest.fixture
def ran(small_store: Path) -> Path:
    """A suite that was run."""
    suite = write(small_store.parent)
    result = invoke("run", suite)
    assert result.exit_code == 0, result.output
    assert result.output == f"4 units: 4 run, 0 done before, 0 failed; results in {suite.parent / 'suite-results'}\n"
    return suite


def test_run_table_and_compare(ran: Path) -> None:
    assert "4 done before" in invoke("run", ran).output
    assert "4 run, 0 done" in invoke("run", ran, "--force").output
    both = invoke("table", ran).output
    assert both.count("| model | sites (n=100) |") == 2
    cells = json.loads(invoke("table", ran, "--task", "zero_shot", "--metric", "acc", "--json").output)["cells"]
    assert [one["model"] for one in cells] == ["alpha", "beta"]
    assert all(0.1 < one["low"] < one["value"] < one["high"] < 0.6 for one in cells)  # noise: chance is a third
    assert invoke("table", ran, "--task", "zero_shot", "--format", "csv").output.startswith("model,column,value")
    compared = invoke("compare", ran, "alpha", "--task", "linear_probe", "--by", "dataset").output
    assert "| beta | " in compared
    found = json.loads(invoke("compare", ran, "alpha", "--task", "zero_shot", "--against", "beta", "--json").output)
    assert [one["rival"] for one in found["rivals"]] == ["beta"]
    assert found["rivals"][0]["wilcoxon_p"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table", "--task", "retrieval"), "has no task 'retrieval'; it has linear_probe, zero_shot"),
        (("table", "--task", "zero_shot", "--metric", "mAP"), "zero_shot has no metric 'mAP'; it has acc, bacc"),
        (("table", "--task", "linear_probe", "--fraction", "0.5"), "at 0.5 of the labels; heads: one; shares: 1"),
        (("compare", "gamma"), "has no model 'gamma'; it has alpha, beta"),
        (("compare", "alpha", "--against", "alpha"), "name a model other than 'alpha'"),
        (("table", "--out", "elsewhere"), "elsewhere has no results; `mmkd evaluate run SUITE --out elsewhere`"),
    ],
)
def test_questions_without_an_answer(ran: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke(arguments[0], ran, *arguments[1:])
    assert isinstance(result.exception, MmkdError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_check_reports_counts_and_exits_by_what_it_found(small_store: Path) -> None:
    good = invoke("check", write(small_store.parent))
    assert good.exit_code == 0
    assert good.output == (
        "suite small: 1 of 1 data sets ready, models alpha, beta\n"
        "sites [report, unspecified: zero_shot, linear_probe]: train 60 (60 groups), test 100 (100 groups)\n"
        "  train rows by class: s0 20, s1 20, s2 20\n"
        "  test rows by class: s0 34, s1 33, s2 33\n"
    )
    bad = DATASET | {"rows": {"test": {}, "train": {"site": "s1"}}}
    result = invoke("check", write(small_store.parent, models=["alpha", "zeta"], datasets=[bad]), "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found["ok"] is False
    problems = " / ".join(found["datasets"][0]["problems"])
    assert "class 's0' has no train rows (2 such classes)" in problems
    assert "200 values of key stand in both train and test, for example 'k1'" in problems
    assert "has no teacher 'zeta'" in problems
    missing = invoke("check", write(small_store.parent, store="nowhere"))
    assert missing.exit_code == 1
    assert "nowhere is not an mmkd store: it does not exist" in missing.output


def test_report_sets_choose_no_model(small_store: Path) -> None:
    result = invoke("run", write(small_store.parent), "--for-selection")
    assert "'sites' has role `report`" in str(result.exception)
    monitor = write(small_store.parent, datasets=[DATASET | {"role": "monitor"}])
    assert invoke("run", monitor, "--for-selection").exit_code == 0


def test_a_failed_unit_shows_in_the_exit_status(small_store: Path) -> None:
    result = invoke("run", write(small_store.parent, models=["alpha", "zeta"]))
    assert result.exit_code == 1
    assert "2 run, 0 done before, 2 failed" in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweet": 1}, "sweet: unknown key; known keys: suite, version"),
        ({"datasets": [DATASET | {"lable": "x"}]}, "datasets.sites.lable: unknown key; did you mean 'label'?"),
        ({"datasets": []}, "datasets: Tuple should have at least 1 item"),
        ({"datasets": [DATASET, DATASET]}, "data set 'sites' stands twice"),
        ({"datasets": [DATASET | {"tasks": ["segment"]}]}, "no task 'segment'; the tasks are zero_shot, linear_probe"),
        ({"datasets": [DATASET | {"prompts": None}]}, "sites: zero_shot needs `prompts`"),
        ({"datasets": [DATASET | {"classes": [True, False]}]}, "YAML reads [True, False] as true or false; put"),
        ({"datasets": [DATASET | {"dataset": "../x"}]}, "'../x' must be up to 64 lower-case letters"),
        ({"datasets": ["sets/*.yaml"]}, "no data set file matches 'sets/*.yaml'"),
        ({"settings": {"zero_shot": {"protocol": "mmkd_official"}}}, "mmkd_official needs `classes`"),
        ({"settings": {"linear_probe": {"fractions": [2]}}}, "fractions must be within (0, 1], got [2.0]"),
        ({"settings": {"linear_probe": {"c_low": 10, "c_high": 1}}}, "c_low 10 is above c_high 1"),
        ({"settings": {"retrieval": {"ks": [0]}}}, "ks must be one or more ranks from 1 on, got [0]"),
        ({"ensembles": {"one": ["alpha"]}}, "ensemble one needs two or more different members, got ['alpha']"),
        ({"models": ["one"], "ensembles": {"one": ["a", "b"]}}, "'one' is both a model and an ensemble"),
        ({"bootstrap": {"n": 3}}, "bootstrap.n: Input should be greater than or equal to 100"),
    ],
)
def test_suite_files_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_suite(write(tmp_path, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("a: [", "is not YAML"), ("- a", "holds list"), ("suite: x", "datasets: Field required")],
)
def test_files_that_are_no_suite(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "suite.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_suite(path)


def test_data_sets_in_files_of_their_own_inherit_from_the_suite(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "a.yaml").write_text(yaml.safe_dump(DATASET | {"dataset": "a", "store": "../other"}))
    changed = DATASET | {"dataset": "b", "settings": {"linear_probe": {"c_steps": 9}}}
    (tmp_path / "sets" / "b.yaml").write_text(yaml.safe_dump(changed))
    suite = load_suite(write(tmp_path, datasets=[DATASET, "sets/*.yaml"]))
    assert [spec.dataset for spec in suite.datasets] == ["sites", "a", "b"]
    assert [Path(spec.store).name for spec in suite.datasets] == ["store", "other", "store"]
    assert all(Path(spec.store).parent == tmp_path for spec in suite.datasets)
    assert [spec.settings.linear_probe.c_steps for spec in suite.datasets] == [2, 2, 9]
    assert suite.dataset("b").settings.linear_probe.c_low == 0.1


def test_every_task_has_settings_and_every_setting_a_task() -> None:
    assert tuple(TASKS) == tuple(TaskSettings.model_fields)
