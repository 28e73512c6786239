"""`mmkd demo`: where it writes, and what `--corpus-only` leaves out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from small_sources import SMALL, pytestmark
from tiny_run import write_run, write_scene

from mmkd.base.errors import UserError
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


@pytest.mark.integration
def test_a_student_whose_training_was_stopped_is_not_exported_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scene(tmp_path)
    tiny = yaml.safe_load(write_run(tmp_path, "tiny").read_text())
    monkeypatch.setattr(run, "RUN", {key: value for key, value in tiny.items() if key != "out"})
    monkeypatch.setattr(run, "RUNS", {"student": {}})
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if " pairs, 2 teachers" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(UserError, match=f"SIGTERM stopped student after step 1; continue with: mmkd demo {tmp_path}"):
        run._student(tmp_path, "student", say)
    assert not (tmp_path / "student").exists()
    lines.clear()
    run._student(tmp_path, "student", lines.append)
    assert any(line.startswith("8 steps in") for line in lines)
    assert (tmp_path / "student/open_clip_config.json").is_file()
