"""`mmkd demo`: where it writes, and what `--corpus-only` leaves out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from small_sources import SMALL, pytestmark

from mmkd.cli.main import cli
from mmkd.demo import corpus, run

__all__ = ["pytestmark"]
ROOT = Path(__file__).resolve().parents[1]


def test_the_corpus_alone_is_cut_where_the_suite_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = corpus.build_corpus

    def two_domains(out: Path, **shares: float) -> Any:
        assert shares == {"vague": 0, "wrong": 0}
        return whole(out, train_per_class=3, test_per_class=2, sources=SMALL, **shares)

    monkeypatch.setattr(corpus, "build_corpus", two_domains)
    monkeypatch.setattr(run, "run_demo", lambda *given, **named: pytest.fail("the whole demo was run"))
    done = CliRunner().invoke(cli, ["demo", str(tmp_path / "quick"), "--corpus-only"])
    counts = f"{3 * len(SMALL)} training pairs and {2 * len(SMALL)} held-out images"
    assert done.output == f"{counts} in {tmp_path / 'quick' / 'corpus'}\n"
    assert [path.name for path in (tmp_path / "quick").iterdir()] == ["corpus"]
    suite = yaml.safe_load((ROOT / "suites" / "quick" / "specimens.yaml").read_text())
    folder = Path(suite["source"]["path"].replace("${quick}", str(tmp_path / "quick")))
    lines = [(folder / table).read_text().count("\n") for table in suite["source"]["only"]]
    assert lines == [1 + 3 * len(SMALL), 1 + 2 * len(SMALL) + 4 * len(SMALL)]


def test_without_the_option_the_whole_path_is_run_in_the_folder_named(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(run, "run_demo", lambda folder, say: folders.append(folder))
    assert CliRunner().invoke(cli, ["demo"]).exit_code == 0
    assert CliRunner().invoke(cli, ["demo", "elsewhere"]).exit_code == 0
    assert folders == [Path("mmkd-demo"), Path("elsewhere")]


def test_a_student_whose_training_was_stopped_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = SimpleNamespace(stopped="SIGTERM", stop_signal=15, steps=55, seconds=1.0, losses={})
    monkeypatch.setattr(run, "train", lambda config, say: stopped)
    monkeypatch.setattr(run, "export", lambda *given: pytest.fail("a student of 55 of 96 steps was exported"))
    monkeypatch.setattr(run, "_corpus_and_teachers", lambda folder, say: ["one"])
    monkeypatch.setattr(run, "_extract", lambda *given: None)
    lines: list[str] = []
    with pytest.raises(SystemExit) as ended:
        run.run_demo(tmp_path, lines.append)
    assert ended.value.code == 128 + 15
    assert lines[-1] == "stopped by SIGTERM with the state saved; the same command continues"
