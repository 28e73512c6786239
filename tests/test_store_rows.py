"""Subsets and merges hold the rows they should, with everything that is known of them."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pytest
from gappy_store import ANY, mmkd
from tiny_store import make_card, make_selection, make_store

from mmkd.base.places.remote import as_root
from mmkd.cli.store.rows import read_keys
from mmkd.store import FeatureStore, UserError
from mmkd.store.convert.rows import chosen_rows
from mmkd.store.samples import read_part, with_columns, write_part
from mmkd.store.writer import ShardFeatures, move_corpus, write_shard


def test_a_subset_by_keys_keeps_their_order_and_all_that_is_known(gappy: FeatureStore, tmp_path: Path) -> None:
    rows = [299, 3, 256, 5, 0]
    (tmp_path / "keys").write_text("".join(f"k{row}\n" for row in rows))
    assert mmkd("subset", gappy.root, tmp_path / "out", *ANY, "--keys", tmp_path / "keys").output.startswith("5 rows")
    part = FeatureStore.open(tmp_path / "out")
    for slug in gappy.teachers:
        assert part.teachers[slug] == gappy.teachers[slug]
        assert np.array_equal(part.valid(slug), gappy.valid(slug)[rows])
        for tower in ("image", "text"):
            assert np.array_equal(getattr(part, tower)(slug), getattr(gappy, tower)(slug)[rows], equal_nan=True)
    expected = [row | {"row": i} for i, row in enumerate(gappy.sample_table().take(rows).to_pylist())]
    assert part.sample_table().to_pylist() == expected
    assert part.verify(deep=True).sound


def test_a_subset_by_value_and_teacher(gappy: FeatureStore, tmp_path: Path) -> None:
    arguments = ("--where", "site = 's1' and status = 'ok'", "--teachers", "beta")
    assert mmkd("subset", gappy.root, tmp_path / "out", *ANY, *arguments).output.startswith("100 rows")
    part = FeatureStore.open(tmp_path / "out")
    assert list(part.teachers) == ["beta"]
    assert np.array_equal(part.image("beta"), gappy.image("beta")[1::3], equal_nan=True)


@pytest.mark.parametrize(
    "condition",
    [
        "row between 3 and 200 and site <> 's2'",
        "site in ('s0', 's1') and not key like 'k1%'",
        "not (row < 250 or caption = 'caption 299') and modality is null",
        "width > 3 or site = 'it''s'",
    ],
)
def test_a_filter_means_what_duckdb_says_it_means(gappy: FeatureStore, condition: str) -> None:
    expected = duckdb.sql(f"select row from '{gappy.root}/samples/*.parquet' where {condition} order by row").fetchall()
    if expected:
        found = chosen_rows(gappy, where=condition)
        assert found.tolist() == [row for (row,) in expected]
    else:
        with pytest.raises(UserError, match=r"no row of .* fits"):
            chosen_rows(gappy, where=condition)


def test_a_subset_by_filter_and_selection(gappy: FeatureStore, tmp_path: Path) -> None:
    kept = np.zeros((300, 2), bool)
    kept[[2, 5, 290], [0, 1, 1]] = True
    make_selection(gappy, "some", kept, list(gappy.teachers.values()))
    assert mmkd("subset", gappy.root, tmp_path / "a", *ANY, "--selection", "some").output.startswith("3 rows")
    part = FeatureStore.open(tmp_path / "a")
    assert part.sample_table()["key"].to_pylist() == ["k2", "k5", "k290"]
    arguments = ("--selection", "some", "--where", "row > 3 and site = 's2'")
    assert mmkd("subset", gappy.root, tmp_path / "b", *ANY, *arguments).output.startswith("2 rows")
    assert np.array_equal(
        FeatureStore.open(tmp_path / "b").text("alpha"), gappy.text("alpha")[[5, 290]], equal_nan=True
    )


def test_what_is_not_there_is_one_line(gappy: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("k1\nnobody\n")
    for arguments, message in (
        (("--keys", tmp_path / "keys"), "has no key 'nobody' \\(1 of 2"),
        (("--where", "site = 's9'"), "no row of .* fits"),
        (("--where", "organ = 'lung'"), "no sample column 'organ'"),
        (("--where", "site"), "it ends where a comparison"),
        (("--teachers", "gamma"), "no teacher 'gamma'"),
        (("--selection", "best"), "no selection 'best'; it has none"),
        (("--where", "widht > 3"), "no sample column 'widht'; did you mean 'width'"),
        (("--where", "__import__('os')"), "no sample column '__import__'"),
        (("--where", "row > 1; drop table x"), "cannot read '; drop table x'"),
        (("--where", "row = 'x'"), "compare it with a number"),
        (("--where", "row >"), "it ends where"),
    ):
        exception = mmkd("subset", gappy.root, tmp_path / "out", *arguments).exception
        assert exception is not None, arguments
        with pytest.raises(type(exception), match=message):
            raise exception
        assert not (tmp_path / "out").exists()


def test_a_split_store_merges_back_to_the_same(gappy: FeatureStore, tmp_path: Path) -> None:
    for name, rows in (("a", range(130)), ("b", range(130, 300))):
        (tmp_path / f"{name}.txt").write_text("".join(f"k{row}\n" for row in rows))
        mmkd("subset", gappy.root, tmp_path / name, *ANY, "--keys", tmp_path / f"{name}.txt")
    assert mmkd("merge", tmp_path / "a", tmp_path / "b", tmp_path / "out").output.startswith("300 rows")
    whole = FeatureStore.open(tmp_path / "out")
    assert whole.sample_table() == gappy.sample_table()
    for slug in gappy.teachers:
        assert np.array_equal(whole.valid(slug), gappy.valid(slug))
        assert np.array_equal(whole.text(slug), gappy.text(slug), equal_nan=True)
    assert "names rows 0 and 130" in str(mmkd("merge", tmp_path / "a", tmp_path / "a", tmp_path / "twice").exception)


@pytest.mark.parametrize("command", [("subset", "s"), ("merge", "s"), ("merge", "s", "b")])
def test_a_store_is_no_target_of_its_own_rows(command: tuple[str, ...], tmp_path: Path) -> None:
    for name in "sb":
        make_store(tmp_path / name, 8, [make_card("alpha")])
    (tmp_path / "alias").symlink_to(tmp_path / "s")
    before = (tmp_path / "s" / "zarr.json").read_bytes()
    name, *sources = command
    message = str(mmkd(name, *(tmp_path / source for source in sources), tmp_path / "alias").exception)
    assert (
        message
        == f"{tmp_path}/alias is a store that rows are taken from; name a new folder, a store is not cut in place"
    )
    assert (tmp_path / "s" / "zarr.json").read_bytes() == before


def test_other_teachers_are_not_merged(gappy: FeatureStore, tmp_path: Path) -> None:
    make_store(tmp_path / "other", 10, [make_card("alpha", 8, weights="ff"), make_card("beta", 5)])
    message = str(mmkd("merge", gappy.root, tmp_path / "other", tmp_path / "out").exception)
    assert message.startswith("alpha has digest")
    assert not (tmp_path / "out").exists()


def test_images_behind_urls_stay_where_they_are(tmp_path: Path) -> None:
    def store(name: str, root: str, seed: int) -> Path:
        """Ten rows with images below `root`."""
        store, _ = make_store(tmp_path / name, 10, [make_card("alpha", 4)], seed=seed)
        table, _ = read_part(tmp_path / name, 0)
        uris = [f"{name}{row}.png#frame=1" for row in range(10)]
        keys = [f"{name}{row}" for row in range(10)]
        sha = write_part(tmp_path / name, 0, with_columns(table, {"uri": uris, "key": keys}))
        part = ShardFeatures(*[np.full((10, 4), seed, np.float16)] * 2, np.full(10, 3, np.uint8))
        write_shard(store, make_card("alpha", 4), 0, part, sha)
        move_corpus(tmp_path / name, as_root(root))
        return tmp_path / name

    a, b, c = store("a", "s3://bucket/x/y", 1), store("b", "s3://bucket/z", 2), store("c", "/disk", 3)
    assert mmkd("subset", a, tmp_path / "part", "--where", "row in (3, 5)").exit_code == 0
    part = FeatureStore.open(tmp_path / "part")
    assert part.record.corpus.root == "s3://bucket/x/y"
    assert part.sample_table(["uri"])["uri"].to_pylist() == ["a3.png#frame=1", "a5.png#frame=1"]
    assert mmkd("merge", a, b, tmp_path / "both").exit_code == 0
    both = FeatureStore.open(tmp_path / "both")
    assert both.record.corpus.root == "s3://bucket"
    assert both.sample_table(["uri"])["uri"].to_pylist()[9:11] == ["x/y/a9.png#frame=1", "z/b0.png#frame=1"]
    assert both.image("alpha")[:, 0].tolist() == [1.0] * 10 + [2.0] * 10
    near = store("d", "s3://bucket/x/w", 4)
    assert mmkd("merge", a, near, tmp_path / "near").exit_code == 0
    assert FeatureStore.open(tmp_path / "near").record.corpus.root == "s3://bucket/x"
    uris = FeatureStore.open(tmp_path / "near").sample_table(["uri"])["uri"].to_pylist()
    assert uris[9:11] == ["y/a9.png#frame=1", "w/d0.png#frame=1"]
    done = mmkd("merge", a, c, tmp_path / "none")
    assert "images lie below / and s3://bucket, a store has one place for them" in str(done.exception)
    assert not (tmp_path / "none").exists()


def test_any_order_of_keys_over_shards(tmp_path: Path) -> None:
    _, written = make_store(tmp_path / "s", 700, [make_card("alpha", 4)])
    rows = np.random.default_rng(0).permutation(700)[:300].tolist()
    (tmp_path / "keys").write_text("".join(f"k{row}\n" for row in rows))
    assert mmkd("subset", tmp_path / "s", tmp_path / "out", "--keys", tmp_path / "keys").exit_code == 0
    out = FeatureStore.open(tmp_path / "out")
    assert out.sample_table(["key"])["key"].to_pylist() == [f"k{row}" for row in rows]
    assert np.array_equal(out.text("alpha"), written["alpha/text"][rows])


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfk1\nk2\n", b"k1\r\nk2\r\n", b"\nk1\n\n\nk2", b"k1\nk2"],
    ids=["byte order mark", "CRLF", "empty lines", "no newline at the end"],
)
def test_files_of_keys_from_several_editors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys.txt").write_bytes(content)
    assert read_keys(tmp_path / "keys.txt") == ["k1", "k2"]


def test_a_key_may_hold_any_separator_but_a_line_feed(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("a\u2028b\nc\x0cd\n e \n\x85\n", encoding="utf-8")
    assert read_keys(tmp_path / "keys.txt") == ["a\u2028b", "c\x0cd", " e ", "\x85"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"k1\nk\xe42\n", "line 2: not UTF-8"), (b"", "holds no key"), (b"\n\r\n", "holds no key")],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "keys.txt").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        read_keys(tmp_path / "keys.txt")
