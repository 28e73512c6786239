"""Whole runs of `mmkd extract`: equal bytes whatever the workers, a dry run that leaves nothing, a taken folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from extract_scene import MMKD, Scene, ended, entries, kill_session, mmkd, settings, started, wait_for
from in_process import tree_digest
from tiny_corpus import write_table_corpus

from mmkd.base.errors import StoreError
from mmkd.extract.config import ExtractConfig
from mmkd.extract.run import extract
from mmkd.extract.teachers import parse_teachers

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_one_and_four_workers_any_threads_any_batch(scene: Scene, tmp_path: Path) -> None:
    for number, (workers, worker) in enumerate(
        [(1, {"decode_threads": 1, "batch_rows": 96}), (4, {"decode_threads": 5, "read_threads": 1, "batch_rows": 7})]
    ):
        store = tmp_path / f"store{number}"
        done = ended(scene.command(store, "--scheduler", settings(tmp_path, workers=workers, worker=worker)))
        assert done.returncode == 0, done.stderr
        assert scene.same(store)


@pytest.mark.slow
def test_a_dry_run_measures_and_leaves_nothing(scene: Scene, tmp_path: Path) -> None:
    done = ended(scene.command(tmp_path / "store", "--dry-run", "--workers", 4))
    assert done.returncode == 0, done.stderr
    assert "2,048 rows in 8 shards of 256; 8 shards to do" in done.stdout
    written = sum(path.stat().st_size for path in (scene.store / "teachers").rglob("c/**/*") if path.is_file())
    assert f"{written:,} bytes" in done.stdout
    assert re.search(r"\n\d+\.\d s on 4 workers, if each is as fast", done.stdout)
    assert list(tmp_path.iterdir()) == []
    limited = ended(scene.command(tmp_path / "store", "--limit", 300, "--workers", 1))
    assert "300 rows in 2 shards" in limited.stdout
    refused = ended(scene.command(tmp_path / "store", "--workers", 1))
    assert "first 300 rows" in refused.stderr


@pytest.mark.integration
def test_nothing_is_left_of_a_store_that_could_not_be_made(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("mine")
    (teacher,) = parse_teachers(scene.teachers)
    with pytest.raises(StoreError, match=r"is not empty \(found thesis\.tex\)"):
        extract(ExtractConfig(corpus=str(scene.table), store=tmp_path / "store", teachers=(teacher,)), say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    shutil.rmtree(tmp_path / "store")


@pytest.mark.slow
def test_a_store_inside_its_corpus_goes_on_after_a_kill(scene: Scene, tmp_path: Path) -> None:
    corpus = write_table_corpus(tmp_path / "corpus", 600).parent
    options = ("--teachers", scene.teachers, "--workers", 1)
    elsewhere = mmkd("extract", corpus, tmp_path / "elsewhere", *options)
    assert elsewhere.returncode == 0, elsewhere.stderr
    expected = tree_digest(tmp_path / "elsewhere")
    store, log = corpus / "store", tmp_path / "log"
    process = started([*MMKD, "extract", ".", "store", *map(str, options)], log, cwd=corpus)
    wait_for(lambda: entries(store) >= 1, process, log)
    kill_session(process)
    assert entries(store) < 3
    again = mmkd("extract", ".", "store", *options, cwd=corpus)
    assert again.returncode == 0, again.stderr
    assert tree_digest(store) == expected
    # Nor is it part of another one.
    other = mmkd("extract", ".", "other", *options, cwd=corpus)
    assert other.returncode == 0, other.stderr
    assert "of mmkd, never part of a corpus" in other.stdout
    assert tree_digest(corpus / "other") == expected
