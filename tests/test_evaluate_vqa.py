"""Questions about images: which answers are the same, what is counted, and heads that learn planted answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from planted_store import store_of

from mmkd.evaluate import load_suite, result_table, run_suite
from mmkd.evaluate.measures import Measures
from mmkd.evaluate.predictions import Predictions, read_predictions
from mmkd.evaluate.tasks import TASKS, TaskSettings
from mmkd.evaluate.vqa import answer_index, normalized, vocabulary
from mmkd.store.writer import ShardFeatures


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("Yes", " yes. "),
        ("the chest X-ray", "chest x ray"),
        ("A left lung", "left  lung"),
        ("T2-weighted", "t2 weighted"),
    ],
)
def test_answers_that_are_the_same(one: str, same: str) -> None:
    assert normalized(one) == normalized(same) != ""


def test_an_article_is_a_word_not_a_letter() -> None:
    assert normalized("an aorta") == "aorta"
    assert normalized("vitamin a") == "vitamin a"
    assert normalized("mass") == "mass"


def test_vocabulary_is_sorted_and_unknown_answers_are_minus_one() -> None:
    words = vocabulary(np.array(["Yes", "no", "yes.", "Left lung"], dtype=object))
    assert words == ("left lung", "no", "yes")
    assert answer_index(np.array(["YES", "the left lung", "right"], dtype=object), words).tolist() == [2, 0, -1]


def test_k17_accuracies_and_coverage() -> None:
    right, closed, covered = [1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]
    ids = np.array([f"q{i}" for i in range(6)], dtype=object)
    found = Predictions(
        ids, ids, ids, None, np.column_stack([np.zeros(6), right, closed, covered]).astype(float), np.ones(6, bool),
        ("answer", "right", "closed", "covered"),
    )  # fmt: skip
    metrics = TASKS["vqa"].scoring(SimpleNamespace(settings=TaskSettings(), measures=Measures())).metrics
    values = {name: metric(found, np.ones((1, 6)))[0] for name, metric in metrics.items()}
    assert values == pytest.approx(
        {"overall_acc": 0.5, "closed_acc": 2 / 3, "open_acc_exact": 1 / 3, "coverage": 5 / 6}
    )
    # A resample of open questions alone has no closed accuracy, and none is invented.
    assert np.isnan(metrics["closed_acc"](found, np.array([[0, 0, 0, 1.0, 1, 1]]))[0])


def questions(folder: Path, **changes: Any) -> Path:
    """Images of three colours, two kinds of question: `which colour` (open) and `is it red` (closed)."""
    rng = np.random.default_rng(2)
    colours, dim = ("red", "green", "blue"), 16
    direction = rng.normal(size=(5, dim))
    rows, image, text = [], [], []
    for i in range(260):
        split = "train" if i < 180 else "test"
        colour, closed = int(rng.integers(3)), bool(i % 2)
        answer = ("yes" if colour == 0 else "no") if closed else colours[colour]
        if i == 259:
            answer = "mauve"  # never seen in training: cannot be right
        caption = f"is it red? ({i})" if closed else f"which colour? ({i})"
        kind = "CLOSED" if closed else "OPEN"
        rows.append(
            {"key": f"q{i}", "caption": caption, "split": split, "answer": answer, "kind": kind, "question": ""}
        )
        rows[-1]["image_sha256"] = f"{i // 2}" * 3
        image.append(direction[colour] + 0.2 * rng.normal(size=dim))
        text.append(direction[3 + closed] + 0.1 * rng.normal(size=dim))
    for i in range(200, 259):
        for choice, colour in enumerate(colours):
            fields = {"split": "candidate", "answer": colour, "kind": "", "question": f"q{i}"}
            rows.append({"key": f"c{i}-{choice}", "caption": f"which colour? {colour}", **fields})
            image.append(np.full(dim, np.nan))
            text.append(direction[choice])
    valid = np.array([2 if row["split"] == "candidate" else 3 for row in rows], dtype=np.uint8)
    valid[0] = valid[200] = 1
    features = {"alpha": ShardFeatures(np.array(image, np.float16), np.array(text, np.float16), valid)}
    folder.mkdir(exist_ok=True)
    store_of(folder / "store", rows, ("split", "answer", "kind", "question"), features)
    content = {
        "suite": "ask", "store": "store", "bootstrap": {"n": 200},
        "settings": {"vqa": {"heads": ["fusion_mlp", "rank"], "seeds": 2, "hidden": 32, "epochs": 30, "batch": 32}},
        "datasets": [{
            "dataset": "colours", "rows": {"train": {"split": "train"}, "test": {"split": "test"}}, "tasks": ["vqa"],
            "vqa": {"answer": "answer", "closed": {"kind": "CLOSED"}, "candidates": {"split": "candidate"}},
        } | changes],
    }  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder / "suite.yaml"


def test_both_heads_answer_planted_questions(tmp_path: Path) -> None:
    report = run_suite(load_suite(questions(tmp_path)), tmp_path / "out")
    assert [outcome.reason for outcome in report.failed] == []
    assert result_table(report.out, "vqa", head="fusion_mlp").value("alpha", "colours") > 0.9
    folder = tmp_path / "out" / "predictions" / "colours" / "vqa"
    ranked = read_predictions(next(iter(folder.glob("*rank*.parquet"))))
    # Only questions with candidates and features are answered; open ones rightly, closed ones cannot be.
    assert ranked.available.sum() == 59
    assert ranked.info["questions_without_candidates"] == 21
    open_ones = ranked.take(ranked.available & (ranked.column("closed") == 0))
    assert open_ones.column("right").mean() > 0.9
    fused = read_predictions(next(iter(folder.glob("*fusion_mlp*.parquet"))))
    assert fused.info["vocabulary"] == ["blue", "green", "no", "red", "yes"]
    assert fused.ids[~fused.available].tolist() == ["q200"]
    last = fused.ids.tolist().index("q259")
    assert (fused.column("right")[last], fused.column("covered")[last]) == (0, 0)
    assert fused.info["test_images_in_train"] == 0
    again = run_suite(load_suite(tmp_path / "suite.yaml"), tmp_path / "again")
    for file in folder.iterdir():
        assert (again.out / file.relative_to(tmp_path / "out")).read_bytes() == file.read_bytes()


def test_candidates_belong_to_the_question_that_their_column_names(tmp_path: Path) -> None:
    vqa = {"answer": "answer", "closed": {"kind": "CLOSED"}, "candidates": {"split": "candidate"}}
    settings = {"vqa": {"heads": ["rank"]}}
    found = []
    for column in ("question", "answer"):  # no question is called `red`
        suite = questions(tmp_path / column, vqa=vqa | {"candidate_of": column}, settings=settings)
        found.append(run_suite(load_suite(suite), tmp_path / column / "out"))
    assert [len(report.failed) for report in found] == [0, 1]
    assert "alpha has features for none of the 80 test samples" in found[1].failed[0].reason


def test_bad_questions_fail_in_one_line(tmp_path: Path) -> None:
    suite = questions(tmp_path, vqa={"answer": "question", "closed": {"kind": "CLOSED"}})
    report = run_suite(load_suite(suite), tmp_path / "out")
    assert len(report.failed) == 3
    assert "question 'q0' has question=None, not an answer" in report.failed[0].reason
    assert "head `rank` needs `vqa: candidates`" in report.failed[2].reason
