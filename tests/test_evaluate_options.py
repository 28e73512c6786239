"""Options of `mmkd evaluate` that the functions behind it get: which figures are shown, and how a suite is run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mmkd.base.errors import UserError
from mmkd.base.process import usable_cores
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate.folder import ResultFolder
from mmkd.evaluate.runner import RunReport

SUITE: dict[str, Any] = {
    "suite": "s", "store": "store",
    "datasets": [{"dataset": "d", "tasks": ["retrieval"], "rows": {"test": {"key": ["k"]}}}],
}  # fmt: skip


@pytest.fixture
def suite(tmp_path: Path) -> str:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    return str(tmp_path / "suite.yaml")


@pytest.mark.parametrize(
    "command", [["table"], ["compare", "one"], ["figure", "forest", "x.svg", "--model", "one"]], ids=lambda c: c[0]
)
def test_a_question_is_asked_as_typed(suite: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def questions(self: object, **options: Any) -> None:
        asked.append(options)
        raise UserError("asked")

    monkeypatch.setattr(ResultFolder, "__init__", lambda self, out, suite: asked.append((out, suite)))
    monkeypatch.setattr(ResultFolder, "questions", questions)
    words = [command[0], suite, *command[1:]]
    typed = [
        "--task",
        "retrieval",
        "--metric",
        "r1",
        "--by",
        "dataset",
        "--head",
        "i2t",
        "--fraction",
        "0.1",
        "--out",
        "results",
    ]
    assert str(CliRunner().invoke(evaluate, [*words, *typed]).exception) == "asked"
    assert asked[0] == (Path("results"), "s")
    assert asked[1] == {"task": "retrieval", "metric": "r1", "by": "dataset", "head": "i2t", "fraction": 0.1}
    assert str(CliRunner().invoke(evaluate, words).exception) == "asked"
    assert asked[2] == (Path(suite).with_name("suite-results"), "s")
    assert asked[3] == {"task": None, "metric": None, "by": "domain", "head": None, "fraction": 1.0}


def test_as_many_units_at_once_as_are_typed(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def run(loaded: object, out: Path, **options: Any) -> RunReport:
        asked.append(options | {"out": out})
        raise UserError("asked")

    monkeypatch.setattr("mmkd.evaluate.runner.run_suite", run)
    for words in ([], ["--jobs", "3", "--force", "--for-selection", "--out", "o"]):
        assert str(CliRunner().invoke(evaluate, ["run", suite, *words]).exception) == "asked"
    found = [(one["jobs"], one["force"], one["selection"], one["out"].name) for one in asked]
    assert found == [(usable_cores(), False, False, "suite-results"), (3, True, True, "o")]


def test_a_page_has_the_columns_that_are_typed(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("mmkd.evaluate.pages.write_report", lambda *given: asked.append(given))
    plan = SimpleNamespace(suite=SimpleNamespace(suite="s"))
    monkeypatch.setattr(
        ResultFolder, "__init__", lambda self, out, suite: vars(self).update(out=out, plan=plan, asked=suite)
    )
    words = ["report", suite, "p.html", "--model", "one", "--out", "o"]
    assert CliRunner().invoke(evaluate, [*words, "--by", "modality"]).exit_code == 0
    assert CliRunner().invoke(evaluate, words).output == "wrote p.html\n"
    assert asked == [(Path("o"), "one", Path("p.html"), by, "s") for by in ("modality", "domain")]
