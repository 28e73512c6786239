"""A further corpus on an existing store: old bytes stay, new rows are as sound as a store of their own."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import sys
from functools import cache
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from in_process import tree_digest
from PIL import Image
from tiny_corpus import picture, write_table_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import CorpusError
from mmkd.base.images.views import Views
from mmkd.cli.store import store as store_command
from mmkd.distill.image_places import ImagePlaces
from mmkd.distill.images import image_batches, row_images
from mmkd.distill.pairs import is_pair, rows_where
from mmkd.extract.cluster_config import ClusterConfig
from mmkd.extract.config import ExtractConfig
from mmkd.extract.corpora import open_corpus
from mmkd.extract.derived import append_pictures
from mmkd.extract.encode import Workbench
from mmkd.extract.index import append_corpus, check_same_corpus, create_indexed_store, restore_parts
from mmkd.extract.plan import plan_tasks
from mmkd.extract.shard import extract_shard
from mmkd.extract.teachers import Teacher, describe_teacher, load_teacher, parse_teachers
from mmkd.store import FeatureStore, UserError
from mmkd.store.convert.clip_retrieval import export_npy
from mmkd.store.convert.exports import export_parquet
from mmkd.store.convert.rows import StoreRows
from mmkd.store.fold import fold
from mmkd.store.inspect.coverage import coverage
from mmkd.store.record import Store
from mmkd.store.samples import read_part
from mmkd.store.writer import add_teacher, move_corpus

OLD, NEW = 20, 270
"""Rows of the two corpora: the first leaves 236 rows of its shard absent, the second takes two shards."""


def write_second(folder: Path) -> Path:
    """Corpus with other keys and another label; the keys of rows 5 and 260 are taken: in the store, and by row 3."""
    write_table_corpus(folder, 3)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "image", "caption", "organ"])
        for i in range(NEW):
            key = {5: "k7", 260: "n3"}.get(i, f"n{i}")
            writer.writerow([key, f"images/{i % 3}.png", f"organ {i % 5} seen", f"o{i % 2}"])
    return folder / "pairs.csv"


def finish(root: Path, teacher: Teacher) -> FeatureStore:
    """Extract the shards that lack the teacher."""
    store = FeatureStore.open(root)
    add_teacher(store, teacher.card)
    for task in plan_tasks(store.record, [teacher.card], store.ledger):
        extract_shard(store, task.shard, {"tiny": teacher}, Workbench())
    return FeatureStore.open(root)


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file that holds rows, features or entries."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "zarr.json"
    }


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one/pairs.csv`, `two/pairs.csv`, the teacher `t`, the store `before` of the first and `s` of both."""
    root = tmp_path_factory.mktemp("append")
    write_table_corpus(root / "one", OLD)
    write_second(root / "two")
    write_tiny_teacher(root / "t", seed=1)
    create_indexed_store(open_corpus(str(root / "one/pairs.csv")), root / "before")
    finish(root / "before", teacher(root))
    shutil.copytree(root / "before", root / "s")
    append_corpus(open_corpus(str(root / "two/pairs.csv")), root / "s")
    finish(root / "s", teacher(root))
    return root


def teacher(scene: Path) -> Teacher:
    """The tiny teacher, loaded."""
    torch.set_num_threads(1)
    (spec,) = parse_teachers(f"tiny=local-dir:{scene / 't'}")
    return load_teacher(spec, describe_teacher(spec), torch.device("cpu"))


def test_old_files_are_untouched_and_old_values_stay(scene: Path) -> None:
    before, after = digests(scene / "before"), digests(scene / "s")
    features = {name for name in before if name.startswith("teachers/")}
    assert len(features) == 3
    assert {name: after[name] for name in features} == {name: before[name] for name in features}
    # The new corpus brings labels, so the old part gets null columns and its entry the new checksum.
    assert before.keys() <= after.keys()
    assert {name for name in before if before[name] != after[name]} == {
        "samples/00000.parquet",
        "ledger/00000.tiny.json",
    }
    old, new = FeatureStore.open(scene / "before"), FeatureStore.open(scene / "s")
    assert len(new) == 256 + NEW
    for tower in ("image", "text"):
        assert np.array_equal(getattr(new, tower)("tiny")[:OLD], getattr(old, tower)("tiny"))
        assert np.isnan(getattr(new, tower)("tiny")[OLD:256]).all()
    assert new.available()[:OLD].all()
    assert not new.available()[OLD:256].any()
    assert new.verify(deep=True).problems == ()
    assert new.verify().orphans == ()


def test_new_rows_are_those_of_a_store_of_their_own(scene: Path, tmp_path: Path) -> None:
    create_indexed_store(open_corpus(str(scene / "two/pairs.csv")), tmp_path / "own")
    own, new = finish(tmp_path / "own", teacher(scene)), FeatureStore.open(scene / "s")
    keep = np.delete(np.arange(NEW), 5)  # its key was taken by the first corpus
    for tower in ("image", "text"):
        expected, found = getattr(own, tower)("tiny")[keep], getattr(new, tower)("tiny")[256:][keep]
        assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(new.valid("tiny")[256:][keep], own.valid("tiny")[keep])


def test_the_sample_table_has_every_grid_row_in_order(scene: Path) -> None:
    table = FeatureStore.open(scene / "s").sample_table()
    assert table["row"].to_pylist() == list(range(256 + NEW))
    rows = table.to_pylist()
    assert [row["status"] for row in rows[OLD:256]] == ["absent"] * (256 - OLD)
    assert (rows[0]["site"], rows[0]["organ"], rows[256]["site"], rows[256]["organ"]) == ("s0", None, None, "o0")
    assert rows[256 + 5]["reason"] == "key: duplicate of row 7"
    assert rows[256 + 260]["reason"] == f"key: duplicate of row {256 + 3}"
    live = [row["key"] for row in rows if row["status"] not in ("absent", "failed")]
    assert len(set(live)) == len(live) == OLD + NEW - 2
    assert FeatureStore.open(scene / "s").summary().status == {"ok": OLD + NEW - 2, "absent": 236, "failed": 2}


def test_other_tools_see_the_longer_store(scene: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(scene / "s")
    shutil.copytree(scene / "s", tmp_path / "s")
    fold(Store.open(tmp_path / "s"))
    array = zarr.open_group(tmp_path / "s", mode="r")["teachers/tiny/image"]
    assert array.shape == (256 + NEW, 24)
    assert np.array_equal(array[:], store.image("tiny"), equal_nan=True)
    found = duckdb.sql(
        f"select count(*), max(row) from read_parquet('{scene}/s/samples/*.parquet', union_by_name=true)"
    )
    assert found.fetchall() == [(OLD + NEW, 256 + NEW - 1)]


def test_the_map_counts_shares_of_inputs_and_not_of_absent_rows(scene: Path) -> None:
    found = coverage(FeatureStore.open(scene / "s"))
    assert found.rows == (OLD, 256, NEW - 256)
    assert found.share["image"].tolist() == [[1, 255 / 256, 13 / 14]]  # each later shard has a key that is taken


def test_a_chain_of_appends(scene: Path, tmp_path: Path) -> None:
    shutil.copytree(scene / "s", tmp_path / "s")
    write_table_corpus(tmp_path / "three", 2)
    third = tmp_path / "three/pairs.csv"
    third.write_text(third.read_text().replace("k0", "z0").replace("k1", "z1"))
    span = append_corpus(open_corpus(str(third)), tmp_path / "s")
    assert (span.rows, span.shards) == (range(768, 770), range(3, 4))
    store = finish(tmp_path / "s", teacher(scene))
    assert store.verify(deep=True).sound
    assert store.available()[768:].all()
    assert digests(scene / "s").items() <= digests(tmp_path / "s").items()


class _Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


_countdown: list[int] = []


def _kill_at_rename(event: str, _: object) -> None:
    if event == "os.rename" and _countdown:
        _countdown[0] -= 1
        if _countdown[0] < 0:
            raise _Killed


@cache
def watch_renames() -> None:
    """Once in a process: hooks stay, and each would count."""
    sys.addaudithook(_kill_at_rename)


def test_views_and_captions_that_are_killed_at_any_write_are_finished_by_the_next(tmp_path: Path) -> None:
    watch_renames()
    write_table_corpus(tmp_path / "c", 3)
    rows = [{"image": f"images/{i}.png", "caption": [f"{i} {k}" for k in range(120)]} for i in range(3)]
    (tmp_path / "c/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c/corpus.yaml").write_text("{kind: table, path: rows.jsonl, captions: further}")
    corpus = open_corpus(str(tmp_path / "c/corpus.yaml"))

    def make(root: Path) -> None:
        if not (root / "zarr.json").exists():
            create_indexed_store(corpus, root)
        append_pictures(Store.open(root), Views(count=100), lambda line: None)

    make(tmp_path / "whole")
    assert [len(span.rows) for span in Store.open(tmp_path / "whole").record.spans()] == [3, 357, 300]
    for survived in range(20):
        root = tmp_path / f"s{survived}"
        _countdown[:] = [survived]
        try:
            make(root)
        except _Killed:
            pass
        else:
            break
        finally:
            _countdown.clear()
        make(root)
        assert tree_digest(root) == tree_digest(tmp_path / "whole")
        assert FeatureStore.open(root).verify().sound
    assert survived == 8  # a part of images, two of captions, the record and a log; two of views, the record


@pytest.mark.integration
def test_views_of_an_extracted_store_that_are_killed_at_any_write_are_finished_by_the_next(
    scene: Path, tmp_path: Path
) -> None:
    watch_renames()
    views = Views(count=2)
    shutil.copytree(scene / "before", tmp_path / "whole")
    append_pictures(Store.open(tmp_path / "whole"), views, lambda line: None)
    for survived in range(20):
        root = tmp_path / f"s{survived}"
        shutil.copytree(scene / "before", root)
        _countdown[:] = [survived]
        try:
            append_pictures(Store.open(root), views, lambda line: None)
        except _Killed:
            pass
        else:
            break
        finally:
            _countdown.clear()
        append_pictures(Store.open(root), views, lambda line: None)
        assert tree_digest(root) == tree_digest(tmp_path / "whole")
    assert survived > 4  # parts, the record, and then the documents of the teacher's arrays


@pytest.mark.integration
def test_an_append_that_is_killed_at_any_write_is_finished_by_the_next(scene: Path, tmp_path: Path) -> None:
    watch_renames()
    corpus = open_corpus(str(scene / "two/pairs.csv"))
    kills = 0
    for survived in range(20):
        root = tmp_path / f"s{survived}"
        shutil.copytree(scene / "before", root)
        _countdown[:] = [survived]
        try:
            append_corpus(corpus, root)
        except _Killed:
            kills += 1
        else:
            break
        finally:
            _countdown.clear()
        # What there was can be read at once, whatever is missing.
        assert FeatureStore.open(root).available()[:OLD].all()
        append_corpus(corpus, root)
        chunks = {item for item in digests(scene / "before").items() if item[0].startswith("teachers/")}
        assert digests(root).items() >= chunks
        assert FeatureStore.open(root).verify().problems == ()
        assert len(FeatureStore.open(root).record.appended) == 1
    assert kills == 8  # two parts, the record, an entry and its part with more labels, three array documents
    assert digests(finish(tmp_path / "s2", teacher(scene)).root) == digests(scene / "s")


def test_extraction_knows_both_corpora_and_names_the_way_for_a_third(scene: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(scene / "s")
    for name in ("one", "two"):
        check_same_corpus(open_corpus(str(scene / name / "pairs.csv")), store)
    third = open_corpus(str(write_table_corpus(tmp_path / "three", 2)))
    with pytest.raises(CorpusError, match=r"one/pairs.csv and .*two/pairs.csv .* add its rows with `mmkd store append"):
        check_same_corpus(third, store)


def test_lost_parts_are_listed_again_from_their_own_corpus(scene: Path, tmp_path: Path) -> None:
    shutil.copytree(scene / "s", tmp_path / "s")
    record = FeatureStore.open(scene / "s").record
    for shard in range(3):
        before = read_part(tmp_path / "s", shard)[0]
        (tmp_path / f"s/samples/{shard:05d}.parquet").unlink()
        corpora = [open_corpus(str(scene / name / "pairs.csv")) for name in ("one", "two")]
        assert [restore_parts(corpus, Store(tmp_path / "s", record)) for corpus in corpora] == [shard == 0, shard > 0]
        after = read_part(tmp_path / "s", shard)[0]
        assert after.select(["row", "key", "caption", "uri"]) == before.select(["row", "key", "caption", "uri"])
        failed = [(row["key"], row["reason"]) for row in after.to_pylist() if row["status"] == "failed"]
        assert failed == [(row["key"], row["reason"]) for row in before.to_pylist() if row["status"] == "failed"]


def test_training_reads_images_of_both_corpora(scene: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(scene / "s")

    table = rows_where(store, "", ["row", "caption", "uri", "offset", "length", "status"])
    places = ImagePlaces.of(table.filter(is_pair(table)))
    assert len(places.rows) == OLD + NEW - 2

    def pixels(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    wanted = np.array([3, 256, 19, 300, 524])
    images = next(image_batches(row_images(store, places, "corpus", 32), pixels, [(0, wanted)], seed=0, workers=1))
    for row, image in zip(wanted.tolist(), images, strict=True):
        seed = row if row < OLD else (row - 256) % 3
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(picture(seed)))


def test_exports_and_subsets_leave_absent_rows_out(scene: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(scene / "s")
    assert export_parquet(store, tmp_path / "p") == 3
    found = duckdb.sql(f"select count(*), count(organ), count(tiny_text) from '{tmp_path}/p/data/*.parquet'").fetchall()
    assert found == [(OLD + NEW, NEW, OLD + NEW - 2)]
    assert export_npy(store, tmp_path / "n") == 3
    assert [len(np.load(path)) for path in sorted((tmp_path / "n/tiny/img_emb").iterdir())] == [OLD, 256, NEW - 256]
    taken = StoreRows([(store, np.array([1, 257]))])
    assert str(taken.root) == str(scene)
    assert [row["uri"] for row in taken.rows()] == ["one/images/1.png", "two/images/1.png"]


def test_commands(scene: Path, tmp_path: Path) -> None:
    shutil.copytree(scene / "before", tmp_path / "s")
    runner = CliRunner()
    done = runner.invoke(store_command, ["append", str(tmp_path / "s"), str(scene / "two/pairs.csv")])
    overview, duplicates, rows = done.output.splitlines()
    assert overview == "corpus: 270 images, 270 captions, 270 pairs"
    assert duplicates.startswith("  2 x key: duplicate of an earlier row, such as k7")
    assert rows.startswith("270 rows of")
    assert "are rows 256 to 525 of" in done.output
    again = runner.invoke(store_command, ["append", str(tmp_path / "s"), str(scene / "two/pairs.csv")])
    assert again.output.splitlines() == [rows]
    done = runner.invoke(store_command, ["relocate", str(tmp_path / "s"), str(tmp_path), "--corpus", "1"])
    assert done.exit_code == 0
    record = FeatureStore.open(tmp_path / "s").record
    assert (record.image_root(0), record.image_root(256)) == (str(scene / "one"), str(tmp_path))
    with pytest.raises(UserError, match="has no corpus 2; it has 2, counted from 0"):
        move_corpus(tmp_path / "s", tmp_path, 2)
    empty = tmp_path / "empty.csv"
    empty.write_text("key,caption\n")
    with pytest.raises(CorpusError):
        append_corpus(open_corpus(str(empty)), tmp_path / "s")
    assert FeatureStore.open(tmp_path / "s").record == record


def test_a_record_whose_corpora_do_not_fill_the_grid_is_refused(scene: Path, tmp_path: Path) -> None:
    from mmkd.base.errors import CorruptStoreError
    from mmkd.store.hierarchy import group_document

    content = json.loads((scene / "s/zarr.json").read_text())["attributes"]["mmkd"]
    for rows in (256 + NEW - 1, OLD):
        (tmp_path / "zarr.json").write_text(json.dumps(group_document(content | {"rows": rows})))
        with pytest.raises(CorruptStoreError, match="the corpora end at row 526"):
            FeatureStore.open(tmp_path)


@pytest.mark.slow
def test_extract_through_the_cluster_after_an_append(scene: Path, tmp_path: Path) -> None:
    from mmkd.extract.run import extract

    shutil.copytree(scene / "before", tmp_path / "s")
    append_corpus(open_corpus(str(scene / "two/pairs.csv")), tmp_path / "s")
    specs = tuple(parse_teachers(f"tiny=local-dir:{scene / 't'}"))
    config = ExtractConfig(
        corpus=str(scene / "two/pairs.csv"), store=tmp_path / "s", teachers=specs, cluster=ClusterConfig(workers=1)
    )
    assert extract(config, say=lambda _: None).shards_done == 2
    shutil.copytree(scene / "s", tmp_path / "whole")
    fold(Store.open(tmp_path / "whole"))  # as a run does at its end
    whole, found = (
        {name: sha for name, sha in digests(tmp_path / store).items() if not name.startswith("runs/")}
        for store in ("whole", "s")
    )
    assert found == whole
