"""Results of two labs in one folder, the leaderboard, and claims."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from planted_store import Planted, make_planted

from mmkd.base.errors import MmkdError
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite, run_suite
from mmkd.evaluate.compare import compare, judge
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.merge import merge_results
from mmkd.evaluate.results import read_results
from mmkd.evaluate.statistics import resampled
from mmkd.evaluate.table import build_table


def lab(folder: Path, models: dict[str, float], **changes: Any) -> tuple[Planted, Path]:
    """A store and suite of the lab's own, and its results without the ensemble. `changes` are of the data set."""
    planted = make_planted(folder, models)
    planted.edit(ensembles={}, dataset={"tasks": ["zero_shot", "retrieval"]} | changes)
    run_suite(load_suite(planted.suite), folder / "suite-results")
    return planted, folder / "suite-results"


def assert_one_line(found: Result, expected: str) -> None:
    assert isinstance(found.exception, MmkdError), found.output
    assert expected in str(found.exception)
    assert "\n" not in str(found.exception)


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Planted, Path]]:
    folder = tmp_path_factory.mktemp("labs")
    # Features depend on the position of the encoder, so that `middle` stands at the same one in both.
    both = {"berlin": {"middle": 1.5, "sharp": 0.3}, "lyon": {"middle": 1.5, "blunt": 6.0}}
    return {name: lab(folder / name, models) for name, models in both.items()}


@pytest.fixture(scope="module")
def merged(labs: dict[str, tuple[Planted, Path]], tmp_path_factory: pytest.TempPathFactory) -> ResultFolder:
    out = tmp_path_factory.mktemp("merged") / "all"
    found = merge_results(out, [out for _, out in labs.values()])
    assert found.models == ("middle", "sharp", "blunt")
    return ResultFolder(out)


def test_merged_results_are_those_of_the_labs(labs: dict[str, tuple[Planted, Path]], merged: ResultFolder) -> None:
    for question in merged.questions(None, None, by="dataset"):
        table = build_table(merged, question)
        for _, out in labs.values():
            own = build_table(ResultFolder(out), question)
            assert {key: table.cells[key] for key in own.cells} == own.cells
    keys = {unit.key for unit in merged.plan.units}
    assert len(keys) == len(merged.plan.units) == len(read_results(merged.out)) == 9
    assert compare(merged, "sharp", Question("zero_shot"), ("blunt",)).rivals[0].count("win") > 0


def test_lines_have_a_version_and_the_digests(labs: dict[str, tuple[Planted, Path]], merged: ResultFolder) -> None:
    digests = {load_suite(planted.suite).digest for planted, _ in labs.values()}
    for line in (merged.out / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["version"] == 1
        assert {row["suite_digest"]} == digests
        assert all(
            re.fullmatch("[0-9a-f]{16}", row[f"{name}_digest"]) for name in ("features", "data", "config", "code")
        )


def relabel(folder: Path) -> tuple[Planted, Path]:
    planted = make_planted(folder, {"middle": 1.5}, changes={300: {"label": "benign"}, 301: {"label": "adenoma"}})
    planted.edit(ensembles={}, dataset={"tasks": ["zero_shot", "retrieval"]})
    run_suite(load_suite(planted.suite), folder / "suite-results")
    return planted, folder / "suite-results"


def with_bootstrap(folder: Path) -> tuple[Planted, Path]:
    planted = make_planted(folder, {"other": 1.0})
    planted.edit(ensembles={}, bootstrap={"n": 300}, dataset={"tasks": ["zero_shot", "retrieval"]})
    run_suite(load_suite(planted.suite), folder / "suite-results")
    return planted, folder / "suite-results"


UNLIKE: dict[str, tuple[Callable[[Path], tuple[Planted, Path]], str]] = {
    "settings": (lambda path: lab(path, {"other": 1.0}, domain=None), "domain of specimens"),
    "bootstrap": (with_bootstrap, "bootstrap {'n': 200"),
    "labels": (relabel, "specimens has other rows or labels in"),
    "features": (lambda path: lab(path, {"middle": 1.7}), "middle has other features of specimens in"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_results_are_refused_with_what_differs(
    name: str, labs: dict[str, tuple[Planted, Path]], tmp_path: Path
) -> None:
    make, expected = UNLIKE[name]
    _, other = make(tmp_path / "other")
    found = CliRunner().invoke(evaluate, ["merge", str(tmp_path / "out"), str(labs["berlin"][1]), str(other)])
    assert_one_line(found, expected)
    assert not (tmp_path / "out").exists()


def test_merge_needs_two_folders_and_a_new_one(labs: dict[str, tuple[Planted, Path]], tmp_path: Path) -> None:
    one = str(labs["berlin"][1])
    for arguments, expected in (
        ([str(tmp_path / "out"), one], "two or more folders of results to merge, got 1"),
        ([str(tmp_path), one, one], "exists; name a new folder"),
        ([str(tmp_path / "out"), one, str(tmp_path)], "has no results"),
    ):
        found = CliRunner().invoke(evaluate, ["merge", *arguments])
        assert_one_line(found, expected)


def test_the_answer_of_one_lab_stands_for_a_failure_of_the_other(
    labs: dict[str, tuple[Planted, Path]], tmp_path: Path
) -> None:
    failed = Path(shutil.copytree(labs["lyon"][1], tmp_path / "failed"))
    lines = [json.loads(line) for line in (failed / "results.jsonl").read_text().splitlines()]
    rows = [line | {"status": "failed", "reason": "no memory", "value": None} for line in lines if not line["reason"]]
    (failed / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, folders in enumerate(([failed, labs["lyon"][1]], [labs["lyon"][1], failed])):
        merge_results(tmp_path / str(number), folders)
        merged, own = ResultFolder(tmp_path / str(number)), ResultFolder(labs["lyon"][1])
        assert build_table(merged, Question("zero_shot")).cells == build_table(own, Question("zero_shot")).cells


def trust_file(models: list[str], k: int = 5) -> str:
    cell = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "groups": 9, "reason": ""}
    measures = {"robustness_index": cell, "knn_confounder": cell | {"value": None}}
    content = {
        "schema": "mmkd.trust", "version": 1, "dataset": "specimens", "k": k, "biology": "label",
        "confounder": "domain",
        "chance_index": 0.5, "remarks": [],
        "models": [{"model": one, "measures": measures} for one in models],
    }  # fmt: skip
    return json.dumps(content)


def test_leaderboard_has_intervals_wins_and_trust(labs: dict[str, tuple[Planted, Path]], tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(out, tmp_path / name)) for name, (_, out) in labs.items()]
    for folder, models in zip(folders, (["middle", "sharp"], ["middle", "blunt"]), strict=True):
        (folder / "trust").mkdir()
        (folder / "trust/specimens.json").write_text(trust_file(models))
    out, suite = tmp_path / "all", str(labs["berlin"][0].suite)
    merge_results(out, folders)
    found = CliRunner().invoke(evaluate, ["leaderboard", suite, str(tmp_path / "page.html"), "--out", str(out)])
    assert found.exit_code == 0, found.output
    page = (tmp_path / "page.html").read_text()
    first = page.index('<th scope="row">sharp')
    assert first < page.index('<th scope="row">middle') < page.index('<th scope="row">blunt')
    assert page.count("0.500 [0.400, 0.600]") == 6
    assert not re.search(r"(src|href)=[\"']?(http|//)", page)
    wins = re.search(r"sharp</th><td>(\d+) / (\d+) / (\d+)</td><td>(\d+)</td>", page)
    assert wins is not None
    assert sum(map(int, wins.groups())) == 3 * 2  # three tasks and heads, two rivals
    (folders[1] / "trust/specimens.json").write_text(trust_file(["blunt"], k=7))
    found = CliRunner().invoke(evaluate, ["merge", str(tmp_path / "two"), *map(str, folders)])
    assert_one_line(found, "has k 7, another folder 5; measure both alike with --k")


def test_a_model_is_scored_once_for_all_its_rivals(merged: ResultFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("mmkd.evaluate.folder.resampled", lambda *a, **b: asked.append(1) or resampled(*a, **b))
    folder = ResultFolder(merged.out)
    for model in folder.plan.models:
        assert len(compare(folder, model, Question("zero_shot")).rivals) == 2
    assert len(asked) == len(folder.plan.models) == 3


def test_claims_are_answered_with_their_numbers(merged: ResultFolder) -> None:
    yes = judge(merged, "sharp beats blunt on zero_shot")
    assert (yes.answer, yes.comparisons, yes.level) == ("yes", 1, 0.95)
    (part,) = yes.parts
    expected = compare(merged, "sharp", Question("zero_shot", by="dataset"), ("blunt",)).rivals[0]
    assert part.difference == expected.differences["specimens"]
    assert str(yes).startswith("yes: sharp beats blunt on zero_shot (by auroc_macro, paired; 1 comparison")
    assert f"n = {part.difference.n} in 1 data set" in str(yes)
    assert judge(merged, "blunt beats sharp on zero_shot").answer == "no"
    assert judge(merged, "sharp beats sharp2 on zero_shot".replace("sharp2", "all")).comparisons == 2
    both = judge(merged, "sharp beats blunt on retrieval")
    assert [one.head for one in both.parts] == ["i2t", "t2i"]
    assert both.level == pytest.approx(0.975)
    assert judge(merged, "sharp beats blunt on retrieval/t2i").comparisons == 1


def test_a_claim_that_resamples_cannot_settle_is_not_settled(merged: ResultFolder) -> None:
    found = judge(merged, "sharp beats blunt on zero_shot", comparisons=40)
    assert found.answer == "cannot tell"
    assert "200 resamples are too few for 40 comparisons; raise bootstrap n" in str(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sharp is best", "'sharp is best' is no claim; write `MODEL beats MODEL on TASK`"),
        ("sharp beats nobody on zero_shot", "has no model 'nobody'"),
        ("nobody beats sharp on zero_shot", "has no model 'nobody'"),
        ("sharp beats sharp on zero_shot", "name a model other than 'sharp'"),
        ("sharp beats blunt on dancing", "has no task 'dancing'"),
        ("sharp beats blunt on retrieval/up", "has no head 'up'"),
    ],
)
def test_wrong_claims_are_one_line(text: str, expected: str, merged: ResultFolder, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        yaml.safe_dump(
            {
                "suite": "planted",
                "datasets": [{"dataset": "x", "store": "s", "rows": {"test": {}}, "tasks": ["retrieval"]}],
            }
        )
    )
    found = CliRunner().invoke(evaluate, ["claim", str(suite), text, "--out", str(merged.out)])
    assert_one_line(found, expected)
