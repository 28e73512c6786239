"""What users get wrong, typed as they type it: one line each, no traceback, nothing counted as zero."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from patient_suite import patients
from planted_store import CLASSES, LABELS, make_planted, planted_features, planted_rows, store_of
from slide_suite import PATCHES, slides

from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite, run_suite
from mmkd.evaluate.predictions import read_predictions
from mmkd.store.writer import ShardFeatures

LAST_PROMPT = 365
COXNET = {"settings": {"survival": {"heads": ["coxnet"]}}}


def typed(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments])


def values(out: Path) -> list[float | None]:
    return [json.loads(line)["value"] for line in (out / "results.jsonl").read_text().splitlines()]


def suite_with_prompt(folder: Path, **dataset: Any) -> Path:
    """Classes with one prompt that names a fourth."""
    made = make_planted(folder, {"sharp": 0.5, "blurred": 3.0}, changes={LAST_PROMPT: {"label": "sarcoma"}})
    made.edit(ensembles={}, dataset={"tasks": ["zero_shot", "retrieval"]} | dataset)
    return made.suite


def test_a_class_without_samples_is_reported_and_scored_as_absent(tmp_path: Path) -> None:
    suite = suite_with_prompt(tmp_path)
    checked = typed("check", suite)
    assert checked.exit_code == 1
    assert "specimens: class 'sarcoma' has no test rows (1 such classes)" in checked.output
    ran = typed("run", suite, "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    cells = json.loads(typed("table", suite, "--out", tmp_path / "out", "--task", "zero_shot", "--json").output)
    sharp = [cell["value"] for cell in cells["cells"] if cell["model"] == "sharp"]
    assert min(sharp) > 0.9  # a zero for the absent class would leave three quarters at most


@pytest.mark.parametrize(
    ("dataset", "line"),
    [
        (
            {"classes": list(CLASSES)},
            "label of 1 prompt rows is not one of the classes adenoma, benign, carcinoma: 'sarcoma' 1 (first in row",
        ),
        ({"classes": [*CLASSES, "sarcoma", "lymphoma"]}, "class 'lymphoma' has no prompt; there are some for adenoma"),
    ],
)
def test_prompts_and_classes_that_do_not_match_cost_their_task_only(
    tmp_path: Path, dataset: dict[str, Any], line: str
) -> None:
    suite, out = suite_with_prompt(tmp_path, **dataset), tmp_path / "out"
    ran = typed("run", suite, "--out", out)
    assert ran.exit_code == 1
    assert "6 units: 4 run, 0 done before, 2 failed" in ran.output
    failed = [json.loads(one) for one in (out / "results.jsonl").read_text().splitlines() if '"failed"' in one]
    assert len(failed) == 2
    assert all(line in one["reason"] and "\n" not in one["reason"] and one["value"] is None for one in failed)
    assert line in typed("check", suite).output
    assert "| sharp | - |" in typed("table", suite, "--out", out, "--task", "zero_shot").output


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ({i: {"censorship": "1"} for i in range(135)}, "all 90 patients are censored"),
        (
            {i: {"patient": "one", "months": "2", "censorship": "0"} for i in range(135)},
            "1 patients cannot fill 3 folds",
        ),
    ],
)
def test_cohorts_that_cannot_be_scored(tmp_path: Path, rows: dict[int, dict[str, str]], line: str) -> None:
    suite = patients(tmp_path, rows=rows, **COXNET)
    ran = typed("run", suite, "--out", tmp_path / "out")
    assert ran.exit_code == 1
    assert "1 unit: 0 run, 0 done before, 1 failed" in ran.output
    assert values(tmp_path / "out") == [None]
    assert line in (tmp_path / "out" / "results.jsonl").read_text()
    shown = typed("table", suite, "--out", tmp_path / "out")
    assert "| alpha | - |" in shown.output
    assert line in typed("check", suite).output


def test_an_empty_bag_is_missing_and_named_in_the_table(tmp_path: Path) -> None:
    suite = slides(tmp_path, settings={"diagnosis": {"heads": ["mean_pool"]}})
    assert typed("run", suite, "--out", tmp_path / "out").exit_code == 0
    shown = typed("table", suite, "--out", tmp_path / "out").output
    assert "1 of 120 samples without features" in shown
    assert PATCHES > 1


def test_features_missing_for_some_samples_are_counted_in_the_table(tmp_path: Path) -> None:
    made = make_planted(tmp_path, {"sharp": 0.5, "holes": 0.5}, holes={"holes": list(range(240, 270))})
    made.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    assert typed("run", made.suite, "--out", tmp_path / "out").exit_code == 0
    shown = typed("table", made.suite, "--out", tmp_path / "out", "--by", "dataset").output
    assert "holes, specimens: 30 of 120 samples without features" in shown


def test_rows_in_another_order_give_the_same_answer_to_every_key(tmp_path: Path) -> None:
    rows = planted_rows(seed=5)
    image, text = planted_features(rows, 1.0, seed=0)
    valid = np.full(len(rows), 3, dtype=np.uint8)
    suite = make_planted(tmp_path, {"unused": 0.5}).suite
    content = yaml.safe_load(suite.read_text()) | {"ensembles": {}}
    content["datasets"][0]["tasks"] = ["zero_shot", "retrieval"]
    answers = []
    for name, order in (("as-is", np.arange(len(rows))), ("mixed", np.random.default_rng(1).permutation(len(rows)))):
        features = {"alpha": ShardFeatures(image[order], text[order], valid[order])}
        store_of(tmp_path / name, [rows[i] for i in order], LABELS, features)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | {"store": name}))
        out = run_suite(load_suite(path), tmp_path / f"{name}-out").out
        files = {file.name.split(".")[0]: read_predictions(file) for file in sorted(out.rglob("*.parquet"))}
        answers.append({part: dict(zip(found.ids, found.score, strict=True)) for part, found in files.items()})
    one, other = answers
    assert list(one) == list(other)
    for part, by_key in one.items():
        assert set(by_key) == set(other[part])
        assert all(other[part][key] == pytest.approx(score, abs=1e-5) for key, score in by_key.items()), part


@pytest.mark.integration
def test_a_report_set_never_chooses_a_model(tmp_path: Path) -> None:
    """Through the installed entry point: exit status 1, one line, no traceback."""
    suite = make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0}).suite
    command = [sys.executable, "-P", "-c", "from mmkd.cli.main import main; main()", "evaluate", "run", str(suite)]
    done = subprocess.run([*command, "--for-selection"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: suite 'planted' is to choose a model, but 'specimens' has role `report`")
    assert not suite.with_name("suite-results").exists()
