"""The example of all six tasks on real data, with small teachers in place of the demo's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_corpus import write_table_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.evaluate import load_suite, run_suite
from mmkd.evaluate.predictions import read_predictions
from mmkd.extract.config import ExtractConfig
from mmkd.extract.run import extract
from mmkd.extract.teachers import parse_teachers

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "six_tasks"
DATA = ROOT.parent / "shared" / "data"
TEACHERS = ("alpha", "beta")
# Test samples of every data set and task; retrieval: distinct images; survival: patients; diagnosis: regions.
SAMPLES = {
    ("brain-mri", "zero_shot"): 253,
    ("breastmnist", "zero_shot"): 156,
    ("breastmnist", "linear_probe"): 156,
    ("medical-mnist", "zero_shot"): 360,
    ("medical-mnist", "linear_probe"): 360,
    ("pmc-pairs", "retrieval"): 70,
    ("vqa-rad", "vqa"): 451,
    ("kidney", "survival"): 345,
    ("slides", "diagnosis"): 37,
}


def run(folder: Path) -> str:
    command = [str(EXAMPLE / "run.sh"), str(DATA), str(folder / "demo"), str(folder / "out")]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def lines(results: Path) -> list[dict[str, Any]]:
    """All result lines, sorted and without the times that they took: processes finish in any order."""
    found = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    found.sort(key=lambda line: (line["key"], line["metric"]))
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
def test_six_tasks_run_on_real_data_and_give_the_same_numbers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(TEACHERS):
        write_tiny_teacher(tmp_path / "demo" / "teachers" / name, seed)
    write_tiny_teacher(tmp_path / "demo" / "student", len(TEACHERS))
    corpus = write_table_corpus(tmp_path / "corpus", 20)
    teachers = [f"{name}=local-dir:{tmp_path}/demo/teachers/{name}" for name in TEACHERS]
    named = tuple(parse_teachers(",".join(teachers)))
    extract(ExtractConfig(corpus=str(corpus), store=tmp_path / "demo" / "features", teachers=named), lambda _: None)

    first = run(tmp_path)
    assert "7 of 7 data sets ready" in first
    assert " 0 done before, 0 failed" in first
    found = lines(tmp_path / "out" / "results")
    assert {line["status"] for line in found} <= {"ok", "undefined"}
    scored: Counter[tuple[str, str]] = Counter()
    for line in found:  # the head that ranks answers the closed questions alone
        scored[line["dataset"], line["task"]] = max(scored[line["dataset"], line["task"]], line["n"])
    assert scored == SAMPLES
    assert {line["model"] for line in found} == {*TEACHERS, "student"}
    assert {line["fraction"] for line in found if line["task"] == "linear_probe"} == {0.01, 0.1, 1.0}
    questions = next(line for line in found if line["task"] == "vqa" and line["head"] == "rank")
    info = read_predictions(tmp_path / "out" / "results" / questions["predictions"]).info
    assert (info["closed"], info["open"], info["test_images_in_train"]) == (272, 179, 203)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Every unit of the suite has a result." in page
    assert all(
        f">{task}" in page for task in ("zero_shot", "linear_probe", "retrieval", "vqa", "survival", "diagnosis")
    )
    leakage = (tmp_path / "out" / "leakage.txt").read_text()
    assert "vqa-rad test in train: 451 exact" in leakage

    assert ", 0 failed" in run(tmp_path)
    assert lines(tmp_path / "out" / "results") == found  # nothing was done twice

    monkeypatch.setenv("MMKD_ROOTS", str(tmp_path / "out" / "roots.yaml"))
    again = run_suite(load_suite(EXAMPLE / "suite.yaml"), tmp_path / "again").out
    assert lines(again) == found
    files = [
        {path.name: path.read_bytes() for path in folder.rglob("*.parquet")}
        for folder in (again, again.parent / "out" / "results")
    ]
    assert files[0] == files[1]
    assert Counter(path.suffix for path in again.rglob("*.parquet"))[".parquet"] > 50
