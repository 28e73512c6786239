"""Few-shot classification and multiple-choice questions, against loops and scikit-learn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from measured_suite import measured
from planted_store import store_of
from sklearn.neighbors import KNeighborsClassifier

from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite, result_table, run_suite
from mmkd.evaluate.compare import compare
from mmkd.evaluate.features import Block
from mmkd.evaluate.few_shot import draw_shots, nearest_means, nearest_neighbors, shares_right
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.store.writer import ShardFeatures


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def scene(seed: int = 0) -> tuple[Block, np.ndarray, np.ndarray, np.ndarray]:
    """Training features and classes, test features and classes."""
    rng = np.random.default_rng(seed)
    labels, y = np.repeat([0, 1, 2], [9, 12, 20]), rng.integers(0, 3, 50)
    center = rng.normal(size=(3, 6))
    train, test = (unit(center[c] + rng.normal(size=(len(c), 6))) for c in (labels, y))
    return Block(train, np.ones(len(train), bool)), labels, test, y


def test_draws_have_so_many_of_each_class_once_and_depend_on_nothing_else() -> None:
    _, labels, _, _ = scene()
    draws = draw_shots(labels, 4, 200, seed=1)
    assert draws.shape == (200, 3, 4)
    assert (labels[draws] == np.arange(3)[None, :, None]).all()
    assert all(len(set(draw.ravel().tolist())) == 12 for draw in draws)
    assert (draws == draw_shots(labels, 4, 200, seed=1)).all()
    assert np.unique(draws[:, 0]).tolist() == list(range(9))  # every sample comes up
    assert len({draw.tobytes() for draw in draws}) == 200


@pytest.mark.parametrize("shots", [1, 5])
def test_shares_are_those_of_scikit_learns_classifiers(shots: int) -> None:
    train, labels, test, y = scene()
    draws = draw_shots(labels, shots, 30, seed=3)
    for head in ("ncm", "knn"):
        right = []
        for draw in draws:
            x, t = train.values[draw].reshape(-1, 6), labels[draw].ravel()
            if head == "ncm":  # of the unit means, by cosine: the nearest of unit vectors
                model = KNeighborsClassifier(1).fit(unit(train.values[draw].mean(axis=1)), np.arange(3))
            else:
                model = KNeighborsClassifier(1).fit(x, t)
            right.append(model.predict(test) == y)
        vote = nearest_means if head == "ncm" else partial(nearest_neighbors, k=1)
        share, spread = shares_right(train, draws, test, y, vote)
        assert share == pytest.approx(np.mean(right, axis=0), abs=1e-12)
        assert spread == pytest.approx(np.std(np.mean(right, axis=1), ddof=1))


def test_votes_of_several_neighbors_are_those_of_a_loop() -> None:
    train, labels, test, y = scene(2)
    draws = draw_shots(labels, 6, 20, seed=5)
    share, _ = shares_right(train, draws, test, y, partial(nearest_neighbors, k=5))
    expected = np.zeros(len(y))
    for draw in draws:
        for i, x in enumerate(test):
            found = sorted(((float(train.values[row] @ x), c) for c in range(3) for row in draw[c]), reverse=True)[:5]
            classes = [c for _, c in found]
            # Most votes; of equal ones the class that comes first.
            expected[i] += max(classes, key=lambda c: (classes.count(c), -classes.index(c))) == y[i]
    assert share == pytest.approx(expected / 20, abs=1e-12)


def test_ties_are_wrong_and_missing_samples_and_classes_have_no_say() -> None:
    train, labels, test, y = scene()
    draws = draw_shots(labels, 2, 10, seed=1)
    alike = Block(np.ones_like(train.values), train.available)
    for vote in (nearest_means, partial(nearest_neighbors, k=2)):
        assert shares_right(alike, draws, np.ones_like(test), y, vote)[0].tolist() == [0.0] * len(y)
        holes = np.ones(len(labels), bool)
        holes[labels == 2] = False
        values = np.where(holes[:, None], train.values, np.nan)
        share, _ = shares_right(Block(values, holes), draws, test, y, vote)
        assert (share[y == 2] == 0).all()
        assert share[y != 2].mean() > 0.5
    # A sample without features counts for nothing: the mean of two of which one is missing is the other.
    one = np.ones(len(labels), bool)
    pair = np.array([[[0, 1], [9, 10], [21, 22]]])
    one[[1, 10, 22]] = False
    left = shares_right(Block(np.where(one[:, None], train.values, np.nan), one), pair, test, y, nearest_means)
    assert left[0].tolist() == shares_right(train, pair[:, :, :1], test, y, nearest_means)[0].tolist()


def test_models_share_their_draws_and_more_shots_help(tmp_path: Path) -> None:
    run_suite(load_suite(measured(tmp_path, measures={})), out := tmp_path / "out")
    folder = ResultFolder(out)
    for head in ("ncm", "knn"):
        found = folder.answers(Question("few_shot", head=head), "specimens", "sharp")
        assert not isinstance(found, str)
        (one,) = found
        assert one.columns == ("right@1", "right@4")
        assert "1 of the 200 train rows have no features" in one.info["warnings"]
        assert set(one.info["sd_of_draws"]) == {"1", "4"}
        values = [result_table(out, "few_shot", f"bacc@{k}", head=head).value("sharp", "specimens") for k in (1, 4)]
        assert values[1] > values[0] > 1 / 3
        right, y = one.column("right@4")[one.available], one.labels()[one.available]
        assert values[1] == pytest.approx(np.mean([right[y == c].mean() for c in range(3)]))
        (rival,) = compare(folder, "sharp", Question("few_shot", head=head)).rivals
        assert rival.verdicts == {"specimens": "win"}


def questions(folder: Path, changes: dict[str, Any] | None = None, holes: tuple[int, ...] = ()) -> Path:
    """40 questions of two to five options, of which the first is right; two models, one of which is blind."""
    rng, rows, image, text = np.random.default_rng(0), [], [], []
    for i in range(40):
        subject = rng.normal(size=8)
        rows.append({"key": f"q{i}", "caption": f"what is shown? {i}", "kind": "test", "answer": "Right."})
        image.append(subject + 0.3 * rng.normal(size=8))
        text.append(np.zeros(8))
        for k in range(2 + i % 4):
            answer = "right" if k == i % 2 else f"wrong {k}"
            rows.append(
                {"key": f"q{i}o{k}", "caption": answer, "kind": "option", "answer": answer, "question": f"q{i}"}
            )
            image.append(np.zeros(8))
            text.append(subject + rng.normal(size=8) * (0.5 if answer == "right" else 3))
    for row, values in (changes or {}).items():
        rows[int(row)] |= values
    images, texts = np.array(image, np.float16), np.array(text, np.float16)
    valid = np.array([1 if row["kind"] == "test" else 2 for row in rows], np.uint8)
    lost = valid.copy()
    lost[list(holes)] = 0
    made = {"sharp": ShardFeatures(images, texts, valid), "blind": ShardFeatures(images, np.ones_like(texts), lost)}
    store_of(folder / "store", rows, ("kind", "answer", "question"), made)
    content = {
        "suite": "choices", "store": "store", "bootstrap": {"n": 200},
        "datasets": [{
            "dataset": "quiz", "rows": {"test": {"kind": "test"}}, "tasks": ["multiple_choice"],
            "multiple_choice": {"answer": "answer", "options": {"kind": "option"}},
        }],
    }  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder / "suite.yaml"


def test_the_nearest_option_is_chosen_among_unequal_numbers(tmp_path: Path) -> None:
    suite = questions(tmp_path, holes=(1,))
    result = CliRunner().invoke(evaluate, ["check", str(suite)])
    assert "test questions by options: 2 10, 3 10, 4 10, 5 10" in result.output
    out = tmp_path / "out"
    assert run_suite(load_suite(suite), out).failed == ()
    folder = ResultFolder(out)
    tables = {name: result_table(out, "multiple_choice", name) for name in folder.metrics(Question("multiple_choice"))}
    chance = (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4
    assert tables["chance"].value("sharp", "quiz") == pytest.approx(chance)
    accuracy = tables["acc"].value("sharp", "quiz")
    assert 0.6 < accuracy < 1
    assert tables["acc_over_chance"].value("sharp", "quiz") == pytest.approx((accuracy - chance) / (1 - chance))
    assert tables["acc"].value("blind", "quiz") == 0  # all options alike: a tie is wrong
    assert tables["acc"].cell("blind", "quiz").missing == 1  # an option of the first question has no features
    found = folder.answers(Question("multiple_choice"), "quiz", "sharp")
    assert not isinstance(found, str)
    store, score = folder._loaded.rows_of("quiz").store, found[0].score
    samples = store.sample_table().to_pydict()
    image, text = (np.asarray(tower("sharp"), np.float64) for tower in (store.image, store.text))
    for i in range(40):
        mine = [row for row, of in enumerate(samples["question"]) if of == f"q{i}"]
        cosines = [text[row] @ image[samples["key"].index(f"q{i}")] / np.linalg.norm(text[row]) for row in mine]
        best = int(np.argmax(cosines))
        assert score[i].tolist() == [samples["answer"][mine[best]] == "right", best, len(mine)]
    (rival,) = compare(folder, "sharp", Question("multiple_choice")).rivals
    assert rival.differences["quiz"].n == 39  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: {"answer": "other"}}, "test question 'q0' has 2 options, 0 of them with its answer 'other'"),
        ({2: {"answer": "right"}}, "'q0' has 2 options, 2 of them with its answer 'Right.'"),
        ({2: {"question": "q1"}}, "'q0' has 1 options, 1 of them"),
    ],
)
def test_questions_without_one_right_option_are_refused(tmp_path: Path, changes: dict[Any, Any], message: str) -> None:
    result = CliRunner().invoke(evaluate, ["check", str(questions(tmp_path, changes))])
    assert message in result.output
    assert "expected two or more options and one right one" in result.output
