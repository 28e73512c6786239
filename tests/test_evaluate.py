"""Suites end to end on a store with a planted signal: the three tasks, resuming, failures, tables."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from planted_store import CLASSES, Planted, make_planted
from sklearn.metrics import roc_auc_score

from mmkd.evaluate import load_suite, result_table, run_suite, runner
from mmkd.evaluate.check import check_suite
from mmkd.evaluate.compare import compare
from mmkd.evaluate.dataset import Samples
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.predictions import Predictions, read_predictions
from mmkd.evaluate.retrieval import find_pairs
from mmkd.store import FeatureStore


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    """A good and a bad encoder."""
    return make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All result lines, without the times that they took."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def stored(out: Path, task: str, model: str, head: str = "") -> Predictions:
    """The predictions of one unit at all labels."""
    rows = [r for r in rows_of(out) if (r["task"], r["model"], r["head"], r["fraction"]) == (task, model, head, 1.0)]
    return read_predictions(out / rows[-1]["predictions"])


@pytest.mark.integration
def test_three_tasks_find_the_planted_signal(planted: Planted, tmp_path: Path) -> None:
    report = run_suite(load_suite(planted.suite), tmp_path / "out")
    assert report.failed == ()
    assert len(report.outcomes) == 3 * (1 + 3 + 2)
    for task in ("zero_shot", "linear_probe", "retrieval"):
        table = result_table(tmp_path / "out", task)
        assert table.rows == ("blurred", "sharp", "both")
        assert table.columns == ("colon", "lung", "mean")
        assert table.value("sharp", "mean") > table.value("blurred", "mean") + 0.1


def test_scores_equal_an_independent_computation(planted: Planted, tmp_path: Path) -> None:
    planted.edit(dataset={"tasks": ["zero_shot", "retrieval"]})
    run_suite(load_suite(planted.suite), out := tmp_path / "out")
    store = FeatureStore.open(planted.root)
    samples = store.sample_table().to_pydict()
    test = [i for i, split in enumerate(samples["split"]) if split == "test"]
    y = np.array([CLASSES.index(samples["label"][i]) for i in test])
    probabilities, cosines = [], []
    for slug in ("blurred", "sharp"):
        image, text = (tower(slug).astype(np.float64) for tower in (store.image, store.text))
        image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
        prompts = [[i for i, k in enumerate(samples["key"]) if k.startswith(f"prompt-{c}")] for c in CLASSES]
        means = np.stack([text[rows].mean(axis=0) for rows in prompts])
        logits = 100 * image[test] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities.append(shifted / shifted.sum(axis=1, keepdims=True))
        cosines.append(image[test] @ text[test].T)
    for name, expected in (("blurred", probabilities[0]), ("both", (probabilities[0] + probabilities[1]) / 2)):
        found = stored(out, "zero_shot", name)
        assert found.ids.tolist() == [samples["key"][i] for i in test]
        assert found.score == pytest.approx(expected, abs=2e-5)
        by_domain = result_table(out, "zero_shot", "auroc_macro")
        lung = np.array([samples["domain"][i] == "lung" for i in test])
        areas = [roc_auc_score(y[lung] == c, found.score[lung, c]) for c in range(3)]
        assert by_domain.value(name, "lung") == pytest.approx(np.mean(areas), abs=1e-12)
    for name, score in (("sharp", cosines[1]), ("both", (cosines[0] + cosines[1]) / 2)):
        # Captions are all different here, so the diagonal is right.
        rank = (score >= np.diag(score)[:, None]).sum(axis=1) - 1
        assert stored(out, "retrieval", name, "i2t").column("rank").tolist() == rank.tolist()
        rank = (score >= np.diag(score)[None]).sum(axis=0) - 1
        assert stored(out, "retrieval", name, "t2i").column("rank").tolist() == rank.tolist()


@pytest.mark.integration
def test_running_again_does_only_what_is_missing(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = run_suite(load_suite(planted.suite), out)
    before = (out / "results.jsonl").read_bytes()
    again = run_suite(load_suite(planted.suite), out)
    assert again.count("done") == len(first.outcomes)
    assert (out / "results.jsonl").read_bytes() == before
    assert "another version of the code" not in str(again)
    monkeypatch.setattr("mmkd.evaluate.runner.code_digest", lambda: "0" * 16)
    hint = (
        f"; {len(first.outcomes)} of those done before come from another version of the code, --force runs them again"
    )
    assert str(run_suite(load_suite(planted.suite), out)).endswith(hint)
    monkeypatch.undo()
    next((out / "predictions").rglob("sharp*.parquet")).unlink()
    assert run_suite(load_suite(planted.suite), out).count("ran") == 1
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"key": "cut off by a ki')
    planted.edit(settings={"zero_shot": {"temperature": 50}, "linear_probe": {"fractions": [1.0], "c_steps": 3}})
    third = run_suite(load_suite(planted.suite), out)
    assert {o.unit.task for o in third.outcomes if o.status == "ran"} == {"zero_shot", "linear_probe"}
    assert (out / "results.jsonl").read_bytes().startswith(before)
    assert len(result_table(out, "zero_shot").rows) == 3


def test_every_line_tells_which_sources_made_it(planted: Planted, tmp_path: Path) -> None:
    """The digest of the sources is that of another program: sha256sum."""
    folder = Path(runner.__file__).parent
    drawn = ("curves", "drawing", "figures", "pages")
    pages = {folder / f"{name}.py" for name in drawn}
    names = sorted({*folder.glob("*.py"), *folder.glob("heads/*.py")} - pages)
    listing = "".join(f"{name.relative_to(folder)} {hashlib.sha256(name.read_bytes()).hexdigest()}\n" for name in names)
    planted.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    out = run_suite(load_suite(planted.suite), tmp_path / "out").out
    lines = (out / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["code_digest"] for line in lines} == {hashlib.sha256(listing.encode()).hexdigest()[:16]}
    assert "heads/abmil.py" in listing


@pytest.mark.integration
def test_two_runs_agree_to_the_last_digit(planted: Planted, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        run_suite(load_suite(planted.suite), out)
    assert rows_of(outs[0]) == rows_of(outs[1])
    files = [sorted(path.relative_to(out) for path in out.rglob("*.parquet")) for out in outs]
    assert files[0] == files[1]
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in files[0])
    assert result_table(outs[0], "retrieval").csv() == result_table(outs[1], "retrieval").csv()


def test_new_features_are_scored_anew_and_only_they(tmp_path: Path) -> None:
    models = {"sharp": 0.5, "student": 2.0}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = make_planted(tmp_path / "a", models), make_planted(tmp_path / "b", models | {"student": 0.4})
    for planted in (one, two):
        planted.edit(ensembles={}, dataset={"tasks": ["zero_shot"]})
    run_suite(load_suite(one.suite), tmp_path / "out")
    report = run_suite(load_suite(two.suite), tmp_path / "out")
    assert {o.unit.model: o.status for o in report.outcomes} == {"sharp": "done", "student": "ran"}
    alone = run_suite(load_suite(two.suite), tmp_path / "fresh")
    assert result_table(tmp_path / "out", "zero_shot").csv() == result_table(alone.out, "zero_shot").csv()


def test_rows_without_features_are_missing_and_not_zero(tmp_path: Path) -> None:
    test_rows = range(240, 360)
    planted = make_planted(tmp_path, {"sharp": 0.5, "holes": 0.5}, holes={"holes": list(test_rows)[:30]})
    planted.edit(dataset={"tasks": ["zero_shot", "retrieval"]})
    run_suite(load_suite(planted.suite), out := tmp_path / "out")
    table = result_table(out, "zero_shot", by="dataset")
    assert (table.cell("holes", "specimens").n, table.cell("holes", "specimens").missing) == (90, 30)
    assert table.value("holes", "specimens") > 0.9
    assert "holes, specimens: 30 of 120 samples without features" in table.markdown()
    found = stored(out, "zero_shot", "both")
    assert (~found.available).sum() == 30
    assert np.isnan(found.score[~found.available]).all()
    assert stored(out, "retrieval", "holes", "i2t").info["gallery_missing"] == 30
    paired = compare(ResultFolder(out), "sharp", Question("zero_shot", by="dataset"), ("holes",)).rivals[0]
    difference = paired.differences["specimens"]
    assert not isinstance(difference, str)
    assert difference.n == 90


def test_a_failing_unit_stops_nothing_and_is_tried_again(planted: Planted, tmp_path: Path) -> None:
    planted.edit(models=["sharp", "absent"], ensembles={}, dataset={"tasks": ["zero_shot", "linear_probe"]})
    out = tmp_path / "out"
    report = run_suite(load_suite(planted.suite), out)
    assert {o.unit.model for o in report.failed} == {"absent"}
    assert report.count("ran") == 4
    assert "no teacher 'absent'" in report.failed[0].reason
    table = result_table(out, "zero_shot")
    assert np.isnan(table.value("absent", "mean"))
    assert "| absent | - | - | - |" in table.markdown()
    assert table.cell("absent", "lung").reason == report.failed[0].reason
    assert run_suite(load_suite(planted.suite), out).count("done") == 4


def test_a_patient_in_two_splits_fails_the_probe(planted: Planted, tmp_path: Path) -> None:
    planted.edit(dataset={"group": "label", "tasks": ["linear_probe", "zero_shot"]})
    report = run_suite(load_suite(planted.suite), tmp_path / "out")
    assert {o.unit.task for o in report.failed} == {"linear_probe"}
    assert "3 values of label stand in both train and val" in report.failed[0].reason


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        ({"classes": ["adenoma", "benign", "carcinoma", "sarcoma"]}, "class 'sarcoma' has no prompt"),
        ({"classes": ["adenoma", "benign"]}, "not one of the classes adenoma, benign"),
        ({"rows": {"test": {"split": "tset"}}}, "has no test rows"),
        ({"group": "patent"}, "no sample column 'patent'"),
    ],
)
def test_what_does_not_fit_fails_with_its_reason(
    planted: Planted, tmp_path: Path, dataset: dict[str, Any], reason: str
) -> None:
    planted.edit(dataset=dataset | {"tasks": ["zero_shot"]})
    report = run_suite(load_suite(planted.suite), tmp_path / "out")
    assert len(report.failed) == 3
    assert reason in report.failed[0].reason
    assert any(reason in problem for problem in check_suite(load_suite(planted.suite)).datasets[0].problems)


def test_a_check_says_once_what_is_wrong_and_in_the_words_of_the_suite(planted: Planted) -> None:
    planted.edit(dataset={"rows": {"test": {"split": ["tset", "tes"]}}, "tasks": ["zero_shot", "retrieval"]})
    problem = f"specimens has no test rows: {{split: tset or tes}} matches nothing in {planted.root}"
    assert check_suite(load_suite(planted.suite)).datasets[0].problems == [problem]
    planted.edit(dataset={"label": "klass"})
    report = check_suite(load_suite(planted.suite))
    assert "specimens [report, histopathology: zero_shot, retrieval]: not readable\n  problem: " in report.text()


def test_a_table_says_the_same_in_every_format(planted: Planted, tmp_path: Path) -> None:
    planted.edit(dataset={"tasks": ["linear_probe"]})
    run_suite(load_suite(planted.suite), tmp_path / "out")
    table = result_table(tmp_path / "out", "linear_probe", "acc", by="modality", fraction=0.1)
    assert table.columns == ("histopathology",)
    cell = table.cell("sharp", "histopathology")
    shown = f"{100 * cell.value:.1f} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    assert shown in table.markdown()
    assert shown in table.latex()
    assert f"sharp,histopathology,{cell.value},{cell.low},{cell.high},120,0,{cell.seed_sd},,False\n" in table.csv()
    record = next(one for one in json.loads(table.json())["cells"] if one["model"] == "sharp")
    assert (record["value"], record["seed_sd"]) == (cell.value, cell.seed_sd)
    assert cell.seed_sd >= 0


def test_the_student_is_compared_with_each_rival(planted: Planted, tmp_path: Path) -> None:
    planted.edit(dataset={"tasks": ["zero_shot"]})
    run_suite(load_suite(planted.suite), out := tmp_path / "out")
    found = compare(ResultFolder(out), "sharp", Question("zero_shot"))
    blurred = next(one for one in found.rivals if one.rival == "blurred")
    assert [blurred.count(verdict) for verdict in ("win", "tie", "loss")] == [2, 0, 0]
    assert blurred.wilcoxon_p == 0.5  # two columns cannot say more
    table = result_table(out, "zero_shot")
    assert blurred.mean is not None
    assert blurred.mean.value == pytest.approx(table.value("sharp", "mean") - table.value("blurred", "mean"), abs=1e-12)


@pytest.mark.parametrize(
    ("rule", "to_text", "to_image"),
    [
        ("pair", [[0], [1], [2]], [[0], [1], [2]]),
        ("image", [[0], [1, 2]], [[0], [1], [1]]),
        ("image+caption", [[0], [0, 1]], [[0, 1], [1]]),
    ],
)
def test_what_counts_as_found(rule: str, to_text: list[list[int]], to_image: list[list[int]]) -> None:
    """Rows 0 and 1 share a caption, rows 1 and 2 an image; row 3 has no caption, row 4 no image."""
    rows = {
        "key": list("abcde"),
        "caption": ["A cat.", "a  cat", "a dog", None, "a prompt"],
        "uri": ["a.png", "b.png", "b.png", "d.png", None],
        "image_sha256": ["x", "y", "y", "z", None],
        "status": ["ok", "ok", "ok", "partial", "ok"],
    }
    pairs = find_pairs(Samples("test", pa.table(rows)), rule)
    everything = np.ones(3, dtype=bool)
    assert [one.tolist() for one in pairs.positives(True, everything[: len(pairs.captions)])] == to_text
    assert [one.tolist() for one in pairs.positives(False, everything[: len(pairs.images)])] == to_image
    # Without the first caption the others move up, and nothing points at it.
    lacking = np.arange(len(pairs.captions)) > 0
    assert [one.tolist() for one in pairs.positives(True, lacking)] == [
        [place - 1 for place in right if place > 0] for right in to_text
    ]


def test_copies_are_found(tmp_path: Path) -> None:
    train0 = hashlib.sha256(b"train0").hexdigest()
    (tmp_path / "image").mkdir()
    planted = make_planted(tmp_path / "image", {"one": 0.5, "two": 0.5}, changes={245: {"image_sha256": train0}})
    found = check_suite(load_suite(planted.suite))
    assert found.ok
    assert found.datasets[0].warnings == ["1 test images are byte for byte also train images"]
    planted = make_planted(tmp_path, {"one": 0.5, "two": 0.5}, changes={245: {"key": "test0"}})
    found = check_suite(load_suite(planted.suite))
    assert found.datasets[0].problems == ["specimens: key 'test0' stands twice among the test rows"]
