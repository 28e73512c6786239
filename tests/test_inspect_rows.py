"""Rows, shards and neighbours: known answers, near keys, bad input, and a teacher that encodes a query."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from planted_faults import HOLE, NAN_ROW, ROWS, SCRIPT, TWINS, make_faults
from tiny_corpus import write_table_corpus
from tiny_store import make_card, make_store
from tiny_teachers import write_tiny_teacher

from mmkd.base.text import printable
from mmkd.cli.store.show import neighbors as neighbors_command
from mmkd.cli.store.show import show
from mmkd.cli.store.stats import stats
from mmkd.store import FeatureStore, UserError
from mmkd.store.inspect.neighbors import _nearest, choose, nearest_rows, neighbors
from mmkd.store.inspect.rows import find_row, find_shard, near_keys, sample_rows
from mmkd.store.inspect.show import view_row, view_shard

PLANTED = ("base", "broken", "holed", "noise")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.open(make_faults(tmp_path_factory.mktemp("faults"), PLANTED))


def test_neighbors_are_exact(faults: FeatureStore) -> None:
    wide = faults.image("broken").astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    with np.errstate(invalid="ignore"):
        cosines = np.where(norms > 0, wide @ wide[7] / (norms * norms[7]), np.nan)
    cosines[np.isnan(cosines)] = -np.inf
    expected = np.argsort(-cosines, kind="stable")[:20]
    rows, found = nearest_rows(faults, "broken", "image", faults.image("broken")[7], 20)
    assert rows.tolist() == expected.tolist()
    assert found == pytest.approx(cosines[expected], abs=1e-5)
    among = np.arange(0, ROWS, 3)
    rows, _ = nearest_rows(faults, "broken", "image", faults.image("broken")[7], 5, among)
    assert rows.tolist() == [row for row in np.argsort(-cosines, kind="stable") if row % 3 == 0][:5]


def test_faiss_chooses_and_changes_nothing(faults: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    questions = [(slug, row, k) for slug in PLANTED for row in (7, TWINS[1], 500) for k in (1, 10, 300)]
    plain = [nearest_rows(faults, slug, "image", faults.image(slug)[row], k) for slug, row, k in questions]
    asked = []
    monkeypatch.setattr("mmkd.store.inspect.neighbors.FAISS_ROWS", 1)
    monkeypatch.setattr("mmkd.store.inspect.neighbors.choose", lambda *what: asked.append(choose(*what)) or asked[-1])
    for (slug, row, k), (rows, cosines) in zip(questions, plain, strict=True):
        found, near = nearest_rows(faults, slug, "image", faults.image(slug)[row], k)
        assert found.tolist() == rows.tolist()
        assert near == pytest.approx(cosines, abs=1e-6)
    assert len(asked) == 2 * len(questions) // 3  # for 300 it would have to choose all


def test_a_choice_of_faiss_comes_with_a_true_bound() -> None:
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    rng = np.random.default_rng(5)
    values = rng.normal(size=(2000, 24))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    direction = values[3].astype(np.float32)
    for lengths in (1.0, rng.uniform(0.5, 2.0, (2000, 1))):
        rows = (values * lengths).astype(np.float16)
        rows[17] = np.nan
        positions, bound = choose(rows, direction, 40)
        wide = rows.astype(np.float64)
        cosines = wide @ direction / np.linalg.norm(wide, axis=1)
        others = np.setdiff1d(np.arange(2000), [*positions, 17])
        assert len(positions) == 40
        assert 17 not in positions
        assert cosines[others].max() <= bound + 1e-5
        assert np.argsort(-np.nan_to_num(cosines, nan=-1))[0] in positions
    # Rows of one length: the bound is so near that it proves the ten nearest.
    positions, bound = choose(values.astype(np.float16), direction, 40)
    assert np.sort(values[positions] @ direction)[-10] > bound + 1e-5
    # A row without a length may have any cosine.
    values[9] = 0
    assert choose(values.astype(np.float16), direction, 40)[1] == np.inf


def test_lengths_whose_squares_leave_float32_have_a_direction_too() -> None:
    array = np.array([[0, 1], [1e30, 1e30], [1e30, 0], [0, 0], [np.nan, 1], [1e-30, 0]], dtype=np.float32)
    rows, cosines = _nearest(array, slice(0, 6), np.array([1, 0], dtype=np.float32), 6)
    assert rows.tolist() == [2, 5, 1, 0]
    assert cosines == pytest.approx([1, 1, 0.5**0.5, 0])
    rows, cosines = _nearest(array, np.array([0, 5]), np.array([1, 0], dtype=np.float32), 6)
    assert rows.tolist() == [5, 0]
    assert cosines == pytest.approx([1, 0])


def test_twins_come_first_in_order_of_rows_and_missing_rows_never(faults: FeatureStore) -> None:
    table = neighbors(faults, "holed", "image", faults.image("holed")[0], ROWS)
    assert table.num_rows == ROWS - 256
    assert not set(range(768, 1024)) & set(table["row"].to_pylist())
    assert table["key"][0].as_py() == "k0"
    rows, cosines = nearest_rows(faults, "base", "image", faults.image("base")[TWINS[1]], 2)
    assert rows.tolist() == list(TWINS)
    assert cosines.tolist() == pytest.approx([1, 1], abs=1e-5)


def test_a_row_is_told_from_every_side(faults: FeatureStore) -> None:
    view = view_row(faults, 0)
    assert view.sample["caption"] == SCRIPT
    teachers = {teacher.slug: teacher for teacher in view.teachers}
    base = teachers["base"]
    image, text = (array("base")[0].astype(np.float64) for array in (faults.image, faults.text))
    assert base.cosine == pytest.approx(image @ text / np.linalg.norm(image) / np.linalg.norm(text), abs=1e-4)
    assert base.image_norm == pytest.approx(np.linalg.norm(image), rel=1e-6)
    assert (base.caption_rank, base.image_rank, base.ranked_among) == (1, 1, 1000)
    assert len(base.neighbors) == 5
    assert teachers["noise"].caption_rank > 10
    twin = view_row(faults, TWINS[0], ["base"]).teachers[0].neighbors[0]
    assert (twin.row, twin.caption) == (TWINS[1], f"caption {TWINS[1]}")


def test_a_broken_row_and_a_row_in_a_hole_are_told_as_such(faults: FeatureStore) -> None:
    broken = view_row(faults, NAN_ROW, ["broken"]).teachers[0]
    assert (broken.image_norm, broken.cosine, broken.caption_rank, broken.neighbors) == (None, None, None, ())
    assert broken.text_norm is not None
    hole = view_row(faults, HOLE * 256, ["holed"]).teachers[0]
    assert (hole.extracted, hole.image_norm, hole.neighbors) == (False, None, ())


def test_a_shard_is_told(faults: FeatureStore) -> None:
    view = view_shard(faults, HOLE)
    assert (view.first_row, view.last_row) == (768, 1023)
    assert view.status == {"ok": 251, "partial": 5}
    assert view.reasons == {"image: truncated": 5}
    assert [slug for slug, entry in view.entries.items() if entry is None] == ["holed"]
    assert view.failures[0] == {"row": 799, "key": "k799", "status": "partial", "reason": "image: truncated"}


def test_keys_rows_and_shards_are_found(faults: FeatureStore) -> None:
    assert [find_row(faults, what) for what in ("k17", "17", "row:17")] == [17, 17, 17]
    assert find_shard(faults, "shard:4") == 4
    assert find_shard(faults, "k4") is None
    assert near_keys(faults, "K109") == ["k109", "k1090", "k1091"]
    rows = [1099, 3, 600, 3]
    assert sample_rows(faults, rows)["row"].to_pylist() == rows


def test_many_shards_are_read_as_one_table(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 2500, [make_card("alpha", 8)])
    rows = [2499, 0, *range(100, 2500, 200), 7]
    assert sample_rows(FeatureStore.open(tmp_path / "s"), rows)["key"].to_pylist() == [f"k{row}" for row in rows]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("k11000", "has no key 'k11000'; did you mean"),
        ("zzz", "has no key 'zzz'; give a key, a row number or shard:NUMBER"),
        ("1100", "has no row 1100; its rows are 0 to 1099"),
        ("row:x", "has no key 'row:x'; give a key"),
        ("shard:5", "has no shard '5'; its shards are 0 to 4"),
        ("shard:-1", "has no shard '-1'; its shards are 0 to 4"),
    ],
)
def test_what_is_not_there_is_one_line(faults: FeatureStore, what: str, message: str) -> None:
    error = CliRunner().invoke(show, [str(faults.root), what]).exception
    assert isinstance(error, UserError)
    assert message in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["k1", "--teacher", "nobody"], "has no teacher 'nobody'; it has base, broken, holed, noise"),
        (["--teacher", "base"], "name one thing to look near"),
        (["k1", "--text", "x", "--teacher", "base"], "name one thing to look near"),
        (["k1", "--teacher", "base", "--top", "0"], "the number of neighbors must be 1 to 10,000, got 0"),
        (["row:800", "--teacher", "holed"], "holed has no feature of row 800"),
        (["row:40", "--teacher", "broken"], "the query has no direction"),
        (["--text", "x", "--teacher", "base"], "/nowhere/base"),
    ],
)
def test_bad_neighbour_questions_are_one_line(faults: FeatureStore, arguments: list[str], message: str) -> None:
    error = CliRunner().invoke(neighbors_command, [str(faults.root), *arguments]).exception
    assert isinstance(error, UserError)
    assert message in str(error)
    assert "\n" not in str(error)


def test_a_caption_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[31mred\x07\r\n\u202eb") == "a\ufffd[31mred\ufffd\ufffd\ufffd\ufffdb"


def test_the_commands_print_and_give_json(faults: FeatureStore) -> None:
    text = CliRunner().invoke(show, [str(faults.root), "k0", "--teachers", "base"]).output
    assert "row 0, key k0, shard 0" in text
    assert "1 of 1000" in text
    seen = json.loads(CliRunner().invoke(show, [str(faults.root), "shard:3", "--json"]).output)
    assert seen["entries"]["holed"] is None
    found = CliRunner().invoke(
        neighbors_command, [str(faults.root), "k20", "--teacher", "base", "--top", "2", "--json"]
    )
    assert [row["row"] for row in json.loads(found.output)] == list(TWINS)


def test_the_seed_decides_which_rows_are_looked_at(faults: FeatureStore) -> None:
    def told(command: click.Command, *words: object) -> str:
        done = CliRunner().invoke(command, [str(faults.root), *map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        return done.stdout

    for command, word in ((show, "k0"), (stats, "--sample=200")):
        first, second, again = (told(command, word, "--seed", seed) for seed in (1, 2, 1))
        assert first == again
        assert first != second


def test_a_row_is_told_by_the_teachers_that_are_named(faults: FeatureStore) -> None:
    for words, told in (([], set(PLANTED)), (["--teachers", "noise,base"], {"noise", "base"})):
        done = CliRunner().invoke(show, [str(faults.root), "k0", "--json", *words])
        assert {one["slug"] for one in json.loads(done.stdout)["teachers"]} == told


@pytest.mark.integration
def test_words_and_pictures_are_encoded_by_the_stores_own_teacher(tmp_path: Path) -> None:
    import torch

    from mmkd.extract.corpora import open_corpus
    from mmkd.extract.encode import Workbench
    from mmkd.extract.index import create_indexed_store
    from mmkd.extract.shard import extract_shard
    from mmkd.extract.teachers import describe_teacher, load_teacher, parse_teachers
    from mmkd.store.writer import add_teacher

    table = write_table_corpus(tmp_path / "corpus", 60)
    folder = write_tiny_teacher(tmp_path / "teacher", seed=1)
    (spec,) = parse_teachers(f"tiny=local-dir:{folder}")
    card = describe_teacher(spec)
    store = create_indexed_store(open_corpus(str(table)), tmp_path / "s")
    add_teacher(store, card)
    extract_shard(store, 0, {"tiny": load_teacher(spec, card, torch.device("cpu"))}, Workbench())

    def ask(*arguments: object) -> object:
        command = [str(tmp_path / "s"), "--teacher", "tiny", "--json", *map(str, arguments)]
        result = CliRunner().invoke(neighbors_command, command)
        return json.loads(result.output) if result.exception is None else result.exception

    found = ask("--image", tmp_path / "corpus/images/7.png")
    assert (found[0]["row"], round(found[0]["cosine"], 3)) == (7, 1)
    found = ask("--text", "finding 9 seen in plane 4", "--among", "text")
    assert (found[0]["row"], round(found[0]["cosine"], 3)) == (9, 1)
    assert "file not found; name a picture" in str(ask("--image", tmp_path / "no.png"))
    write_tiny_teacher(tmp_path / "other", seed=2)
    assert "the store was made with" in str(ask("--text", "x", "--teacher", f"tiny=local-dir:{tmp_path / 'other'}"))
