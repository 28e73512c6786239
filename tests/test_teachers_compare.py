"""A store is compared with its teacher run again: what agrees, what was tampered with, what cannot be compared."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tiny_corpus import png, write_table_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import CorpusError, TeacherError
from mmkd.cli.teachers import teachers
from mmkd.extract.corpora import open_corpus
from mmkd.extract.encode import Workbench
from mmkd.extract.index import create_indexed_store
from mmkd.extract.reextract import _cosines
from mmkd.extract.shard import extract_shard
from mmkd.extract.teachers import describe_teacher, load_teacher, parse_teachers
from mmkd.store import FeatureStore, StoreError, TeacherCard, UserError
from mmkd.store.chunk import encode_chunk
from mmkd.store.record import Store
from mmkd.store.samples import read_part
from mmkd.store.verify import verify
from mmkd.store.writer import ShardFeatures, add_teacher, write_shard

ROWS = 24


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `c/pairs.csv`, the tiny teacher `t`, another `u`, and the store `s`; nobody writes to it."""
    root = tmp_path_factory.mktemp("against")
    table = write_table_corpus(root / "c", ROWS)
    (root / "c/images/3.png").write_bytes(b"not a picture")
    write_tiny_teacher(root / "t", seed=1)
    write_tiny_teacher(root / "u", seed=2)
    write_tiny_teacher(root / "wide", seed=2, embed_dim=32)
    torch.set_num_threads(1)
    (spec,) = parse_teachers(f"tiny=local-dir:{root / 't'}")
    teacher = load_teacher(spec, describe_teacher(spec), torch.device("cpu"))
    create_indexed_store(open_corpus(str(table)), root / "s")
    record = FeatureStore.open(root / "s").record
    add_teacher(Store(root / "s", record), teacher.card)
    extract_shard(Store(root / "s", record), 0, {"tiny": teacher}, Workbench())
    return root


@pytest.fixture
def copy(extracted: Path, tmp_path: Path) -> Path:
    """A copy of the store that may be harmed; its corpus is the shared one."""
    shutil.copytree(extracted / "s", tmp_path / "s")
    return tmp_path / "s"


def compare(*arguments: object) -> Result:
    """Run `mmkd teachers compare`."""
    return CliRunner().invoke(teachers, ["compare", *map(str, arguments)])


def compared(store: Path, *arguments: object) -> dict[str, object]:
    """The report as JSON."""
    result = compare(store, "tiny", "--json", *arguments)
    content: dict[str, object] = json.loads(result.output)
    assert result.exit_code == (0 if content["sound"] else 1)
    return content


def test_the_teacher_says_the_same_again(extracted: Path) -> None:
    report = compared(extracted / "s", "-n", 10)
    assert report["sound"] is True
    assert report["same_teacher"] is True
    assert report["rows"] == 10
    image, text = report["towers"]["image"], report["towers"]["text"]
    assert (text["compared"], image["below"], text["below"]) == (10, 0, 0)
    assert image["smallest"] > 1 - 1e-6
    assert image["strangers"] < 1 - 0.01  # the tolerance separates equal from other rows
    assert compared(extracted / "s", "-n", 10) == report
    # All rows: the one broken picture has no feature, so its text alone is compared.
    everything = compared(extracted / "s")
    assert (everything["towers"]["image"]["compared"], everything["towers"]["text"]["compared"]) == (ROWS - 1, ROWS)
    assert everything["not_compared"] == {}


def test_words_for_people(extracted: Path) -> None:
    output = compare(extracted / "s", "tiny", "-n", 5).output
    assert "run again on 5 random rows" in output
    assert output.splitlines()[-1] == "sound: 0 of 10 features differ by more than 0.001 (1 - cosine)"


def test_swapped_rows_with_sound_checksums_are_found(copy: Path) -> None:
    store = FeatureStore.open(copy)
    image, text = np.array(store.image("tiny")), np.array(store.text("tiny"))
    image[[5, 6]] = image[[6, 5]]
    sha = read_part(copy, 0)[1]
    write_shard(Store(copy, store.record), store.card("tiny"), 0, ShardFeatures(image, text, store.valid("tiny")), sha)
    assert verify(copy, deep=True).sound  # every byte is as vouched for
    report = compared(copy)
    assert (report["sound"], report["towers"]["image"]["below"], report["towers"]["text"]["below"]) == (False, 2, 0)
    assert compared(copy, "--tolerance", 2)["sound"] is True


def test_another_teacher_is_named_and_compared(extracted: Path) -> None:
    result = compare(extracted / "s", f"tiny=local-dir:{extracted / 'u'}")
    assert result.exit_code == 1
    digest = FeatureStore.open(extracted / "s").card("tiny").digest
    assert f"{digest} when it was stored" in result.output
    assert "NOT sound" in result.output


def test_imported_features_are_judged_by_cosine_alone(extracted: Path, tmp_path: Path) -> None:
    source = FeatureStore.open(extracted / "s")
    facts = source.card("tiny").model_dump(exclude={"digest"})
    card = TeacherCard(**facts | {"loader": "imported", "weights_sha256": "not stated"})
    store = create_indexed_store(open_corpus(str(extracted / "c/pairs.csv")), tmp_path / "s")
    add_teacher(store, card)
    features = ShardFeatures(source.image("tiny"), source.text("tiny"), source.valid("tiny"))
    write_shard(store, card, 0, features, read_part(tmp_path / "s", 0)[1])
    report = compared(tmp_path / "s", "-n", 4)
    assert (report["digest_stored"], report["sound"]) == (None, True)


def test_images_that_are_gone_or_changed_are_counted_not_compared(extracted: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(extracted / "c", moved)
    (moved / "images/7.png").unlink()
    (moved / "images/8.png").write_bytes(png(99))
    for corpus in (moved, moved / "pairs.csv"):
        report = compared(extracted / "s", "--corpus", corpus)
        assert report["not_compared"] == {"image: file not found": 1, "image: not the bytes of then": 1}
        assert (report["towers"]["image"]["compared"], report["sound"]) == (ROWS - 3, True)


def test_nothing_to_compare_is_an_error_not_a_success(extracted: Path, tmp_path: Path) -> None:
    """A corpus without captions whose images are gone."""
    table = tmp_path / "c/pairs.csv"
    (tmp_path / "c").mkdir()
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["key", "image"], ["a", "a.png"]])
    (tmp_path / "c/a.png").write_bytes(png(1))
    store = create_indexed_store(open_corpus(str(table)), tmp_path / "s")
    (spec,) = parse_teachers(f"tiny=local-dir:{extracted / 't'}")
    card = describe_teacher(spec)
    add_teacher(store, card)
    extract_shard(store, 0, {"tiny": load_teacher(spec, card, torch.device("cpu"))}, Workbench())
    (tmp_path / "c/a.png").unlink()
    exception = compare(tmp_path / "s", "tiny").exception
    with pytest.raises(CorpusError, match=r"no input of the 1 rows drawn .* \(image: file not found\); .*--corpus"):
        raise exception


def test_what_cannot_be_run_is_one_line(extracted: Path) -> None:
    for teacher, kind, message in (
        ("nobody", UserError, "has no teacher 'nobody'; it has tiny"),
        (f"nobody=local-dir:{extracted / 't'}", UserError, "has no teacher 'nobody'"),
        (f"tiny=local-dir:{extracted / 'wide'}", TeacherError, "gives 32 values, .* holds 24"),
        (f"tiny=local-dir:{extracted / 'gone'}", TeacherError, "gone"),
        (f"a=local-dir:{extracted / 't'},tiny=local-dir:{extracted / 't'}", TeacherError, "one teacher at a time"),
    ):
        exception = compare(extracted / "s", teacher).exception
        with pytest.raises(kind, match=message):
            raise exception
    assert compare(extracted / "s", "tiny", "--corpus", "/nowhere").exception is not None


def test_a_store_without_features_says_so(extracted: Path, copy: Path) -> None:
    (copy / "ledger/00000.tiny.json").unlink()
    with pytest.raises(UserError, match="holds no sound feature of tiny"):
        raise compare(copy, "tiny").exception


def test_damaged_valid_bits_are_refused(copy: Path) -> None:
    (copy / "teachers/tiny/valid/loose/00000").write_bytes(encode_chunk(np.full(256, 3, np.uint8))[0])
    with pytest.raises(StoreError, match="the ledger vouches for"):
        raise compare(copy, "tiny").exception


def test_a_feature_that_is_not_finite_now_counts_as_different() -> None:
    stored = np.eye(4, dtype=np.float16)
    now = np.eye(4, dtype=np.float16)
    now[2] = np.nan
    now[3] = 0
    now[0, 1] = 0.03  # cosine 0.99955
    found = _cosines(stored, now, 1e-3)
    assert (found.compared, found.below) == (4, 2)
    assert _cosines(stored[:1], now[:1], 1e-4).below == 1
