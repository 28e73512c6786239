"""Inspection against planted stores: every known fault is found at its place, and nothing else is."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_faults import CONSTANT, DEAD, DIM, HOLE, NAN_ROW, ROWS, TEACHERS, TWINS, ZERO_ROW, make_faults
from tiny_store import make_card, make_index, make_store

from mmkd.base.errors import CorruptStoreError, UserError
from mmkd.base.text import bytes_text, seconds_text
from mmkd.cli.store.info import info_lines
from mmkd.cli.store.stats import stats
from mmkd.store import FeatureStore
from mmkd.store.inspect import agreement as agreement_module
from mmkd.store.inspect.agreement import cka_of, mutual_neighbors, nearest
from mmkd.store.inspect.coverage import Coverage, shard_ranges
from mmkd.store.inspect.findings import statistics_findings, store_findings
from mmkd.store.inspect.info import StoreInfo, activity, store_info
from mmkd.store.inspect.pairs import hit_chance
from mmkd.store.inspect.sampling import distribution, draw_rows, unit
from mmkd.store.inspect.statistics import StoreStatistics, store_statistics
from mmkd.store.inspect.tables import statistics_html
from mmkd.store.inspect.towers import tower_statistics
from mmkd.store.record import CorpusRecord
from mmkd.store.writer import add_teacher, create_store


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.open(make_faults(tmp_path_factory.mktemp("faults")))


@pytest.fixture(scope="module")
def info(faults: FeatureStore) -> StoreInfo:
    return store_info(faults)


@pytest.fixture(scope="module")
def statistics(faults: FeatureStore) -> StoreStatistics:
    return store_statistics(faults, sample=None)


def test_the_hole_is_in_the_map_and_in_the_words(info: StoreInfo) -> None:
    assert info.coverage.holes("holed") == [(HOLE, HOLE)]
    assert info.coverage.line("holed") == "███·█"
    assert info.coverage.line("base", ascii_only=True) == "#####"
    screen = "\n".join(info_lines(info))
    assert "███·█  lacks 3" in screen
    assert "22 x image: truncated" in screen
    assert info.as_json()["coverage"]["holed"]["holes"] == [(3, 3)]


def test_a_single_hole_shows_when_shards_share_a_character() -> None:
    done = np.ones((1, 1000), dtype=bool)
    done[0, 613] = False
    share = np.where(done, 1.0, 0.0)
    share[0, :3] = 0.6, 0.2, 1.0
    line = Coverage(("alpha",), (16384,) * 1000, done, {"image": share, "text": share}).line("alpha", columns=50)
    assert line == "░" + "█" * 29 + "·" + "█" * 19


def test_ranges_read_as_users_write_them() -> None:
    assert shard_ranges([(3, 3), (7, 9)]) == "3, 7-9"
    assert shard_ranges([(i, i) for i in range(0, 20, 2)], most=2) == "0, 2, and 8 more ranges"


def test_a_nan_row_and_a_zero_row_are_named(statistics: StoreStatistics) -> None:
    tower = {(t.slug, t.tower): t for t in statistics.towers}["broken", "image"]
    assert (tower.rows, tower.not_finite, tower.zero) == (ROWS, 1, 1)
    assert tower.broken_rows == (NAN_ROW, ZERO_ROW)
    assert all(t.not_finite + t.zero == 0 for t in statistics.towers if t.slug != "broken")


def test_dead_and_constant_dimensions_are_named(statistics: StoreStatistics) -> None:
    found = {(t.slug, t.tower): (t.dead_dimensions, t.constant_dimensions) for t in statistics.towers}
    assert found.pop(("dead", "image")) == ((DEAD,), (CONSTANT,))
    assert set(found.values()) == {((), ())}


def test_a_repeated_row_is_named(statistics: StoreStatistics) -> None:
    found = {t.slug: (t.repeated_rows, t.repeats) for t in statistics.towers if t.tower == "image"}
    assert found["base"] == (1, (TWINS,))
    assert found["noise"] == (0, ())


def test_equal_and_rotated_teachers_have_cka_one_and_noise_none(statistics: StoreStatistics) -> None:
    for matrix in statistics.agreement:
        index = {slug: i for i, slug in enumerate(matrix.teachers)}
        assert matrix.cka[index["base"], index["same"]] == pytest.approx(1, abs=1e-12)
        assert matrix.mutual[index["base"], index["same"]] == 1
        assert matrix.cka[index["base"], index["rotated"]] == pytest.approx(1, abs=1e-5)
        assert abs(matrix.cka[index["base"], index["noise"]]) < 0.02
        assert matrix.mutual[index["base"], index["noise"]] < 0.03
        assert matrix.rows[index["base"], index["holed"]] == ROWS - 256


def test_a_shifted_caption_column_is_told_with_its_shift(statistics: StoreStatistics) -> None:
    found = {pair.slug: pair for pair in statistics.pairs}
    assert {slug: pair.best_shift for slug, pair in found.items()} == {**dict.fromkeys(TEACHERS, 0), "shifted": 1}
    assert found["shifted"].recall["i2t@10"] < 0.03
    assert found["base"].recall["i2t@1"] > 0.99
    assert found["base"].matched.median > 0.9
    assert found["base"].unmatched.median < 0.5


def test_findings_are_the_planted_faults_and_nothing_else(info: StoreInfo, statistics: StoreStatistics) -> None:
    texts = [finding.text for finding in (*store_findings(info), *statistics_findings(statistics))]
    expected = [
        "holed lacks 1 of 5 shards (3)",
        "22 rows (2.0%) failed",
        "broken image: 1 row not finite and 1 zero although called sound (row 40, 41)",
        "dead image: 1 dead dimension of 32 (5)",
        "dead image: 1 constant dimension of 32 (7)",
        "base, broken, dead, rotated, same, shifted: 1 row with an earlier row's image feature (files not hashed)",
        "noise: captions do not fit images",
        "shifted: captions are shifted by +1: images have a mean cosine of 0.930 with that row's caption, 0.187",
    ]
    for start in expected:
        assert sum(text.startswith(start) for text in texts) == 1, start
    # Equal teachers are told once for each tower: their images, and the captions of all but noise and shifted.
    for alike in (
        "base and broken and rotated and same and shifted see images alike (CKA 1.0000",
        "base and broken and dead and holed and rotated and same see captions alike (CKA 1.0000",
    ):
        assert sum(text.startswith(alike) for text in texts) == 1, alike
    assert len(texts) == len(expected) + 2


def test_a_sample_is_stated_and_repeats_itself(faults: FeatureStore) -> None:
    first, again, other = (store_statistics(faults, ["base"], 300, seed) for seed in (4, 4, 5))
    assert (first.sampled, first.rows, first.seed) == (300, ROWS, 4)
    assert first.as_json() == again.as_json()
    assert first.as_json() != other.as_json()
    json.dumps(first.as_json(), allow_nan=False)


def test_isotropy_of_known_directions(tmp_path: Path) -> None:
    made, _ = make_store(tmp_path / "s", 2000, [make_card("alpha", 16)])
    store = FeatureStore.open(tmp_path / "s")
    tower = tower_statistics(store, "alpha", "image", np.arange(2000))
    assert tower.mean_cosine == pytest.approx(0, abs=0.01)
    assert 15.8 < tower.effective_rank <= 16
    cosines = unit(store.image("alpha")) @ unit(store.image("alpha")).T
    expected = (cosines.sum(dtype=np.float64) - 2000) / (2000 * 1999)
    assert tower.mean_cosine == pytest.approx(expected, abs=1e-6)
    values = np.linalg.svd(unit(store.image("alpha")) - unit(store.image("alpha")).mean(0), compute_uv=False)
    share = values / values.sum()
    assert tower.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert made.record.rows == 2000


def test_cka_is_the_definition_with_gram_matrices() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 5)) + 3, rng.normal(size=(30, 7))
    y[:, :3] += x[:, :3]

    def hsic(first: np.ndarray, second: np.ndarray) -> float:
        k, m = first @ first.T, second @ second.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        one, n = np.ones(30), 30
        return (
            np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
        ) / (n * (n - 3))

    def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
        pairs = ((first, second), (first, first), (second, second))
        return cka_of(*(agreement_module.hsic(*pair) for pair in pairs))

    assert linear_cka(x, y) == pytest.approx(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)), rel=1e-9)
    assert linear_cka(x, 5 * x @ np.linalg.qr(rng.normal(size=(5, 5)))[0] + 2) == pytest.approx(1)
    assert np.isnan(linear_cka(x, np.ones((30, 2))))


def test_mutual_neighbors_against_sets() -> None:
    rng = np.random.default_rng(2)
    a, b = (unit(rng.normal(size=(40, 6))) for _ in range(2))
    near_a, near_b = nearest(a, 5), nearest(b, 5)
    for i in range(40):
        order = [j for j in np.argsort(-(a @ a[i])) if j != i][:5]
        assert set(near_a[i]) == set(order)
    expected = np.mean([len(set(p) & set(q)) / 5 for p, q in zip(near_a, near_b, strict=True)])
    assert mutual_neighbors(near_a, near_b) == pytest.approx(expected)


def test_ties_are_broken_by_lot() -> None:
    table = np.array([[0.5, 0.5, 0.5], [0.9, 0.2, 0.1], [0.1, 0.2, 0.3]], dtype=np.float32)
    assert hit_chance(table, 1).tolist() == [pytest.approx(1 / 3), 0, 1]
    assert hit_chance(table, 2).tolist() == [pytest.approx(2 / 3), 1, 1]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 9))
@settings(max_examples=40)
def test_drawn_rows_are_distinct_sorted_and_inside(size: int, count: int, seed: int) -> None:
    rows = draw_rows(size, count, seed)
    assert len(rows) == min(size, count)
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < size
    assert np.array_equal(rows, draw_rows(size, count, seed))


def test_distributions_of_nothing_of_one_value_and_outside_the_span() -> None:
    assert distribution(np.array([np.nan])).count == 0
    same = distribution(np.ones(5, dtype=np.float16))
    assert (same.median, sum(same.counts), same.edges[0]) == (1, 5, 0.5)
    assert sum(distribution(np.array([-2.0, 0, 3]), (-1, 1)).counts) == 3


def test_units() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1536, 5 << 40)] == ["0 B", "1023 B", "1.5 KB", "5.0 TB"]
    assert [seconds_text(s) for s in (0.04, 59, 60, 3725, 90000)] == [
        "0.0 s", "59.0 s", "1 min 0 s", "1 h 2 min", "1 d 1 h"
    ]  # fmt: skip


def test_seconds_come_from_the_logs_and_a_cut_line_does_no_harm(small_store: Path) -> None:
    runs = small_store / "runs"
    runs.mkdir()
    line = {"shard": 0, "seconds": {"read": 1.0, "image alpha": 2.0, "text alpha": 0.5}}
    (runs / "20260101T000000Z-1.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line) + "\n")
    assert store_info(FeatureStore.open(small_store)).activity.unreadable_lines == 0
    with (runs / "20260101T000000Z-1.jsonl").open("a") as log:
        log.write('{"shard": 1, "sec')
    found = store_info(FeatureStore.open(small_store))
    assert found.activity.seconds == {"image alpha": 4.0, "read": 2.0, "text alpha": 1.0}
    assert found.activity.by_teacher() == {"alpha": {"image": 4.0, "text": 1.0}}
    assert found.activity.unreadable_lines == 1
    assert "  alpha: image 4.0 s, text 1.0 s" in list(info_lines(found))


def test_a_store_still_being_written_says_so_and_an_old_one_does_not(small_store: Path) -> None:
    assert not activity(small_store, complete=True).running
    assert activity(small_store, complete=False).running
    for path in small_store.rglob("*.json"):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert not activity(small_store, complete=False).running
    fresh = small_store / "teachers" / f".x{'.mmkd-tmp'}"
    fresh.write_bytes(b"")
    assert activity(small_store, complete=False).running


def test_a_store_without_features_has_info_and_stats(tmp_path: Path) -> None:
    corpus = CorpusRecord(kind="test", location="here", root="/nowhere", rows=10, labels=("site",), digest="d")
    made = create_store(tmp_path / "s", corpus, make_index(10))
    store = FeatureStore.open(tmp_path / "s")
    assert "teachers  0" in list(info_lines(store_info(store)))
    assert [f.severity for f in store_findings(store_info(store))] == ["fault"]
    assert store_statistics(store).towers == ()
    add_teacher(made, make_card("alpha", DIM))
    store = FeatureStore.open(tmp_path / "s")
    found = store_statistics(store)
    assert found.towers[0].rows == 0
    assert "lacks 1 of 1 shards (0)" in next(store_findings(store_info(store))).text
    json.dumps(found.as_json(), allow_nan=False)


def test_bad_input_is_one_line(faults: FeatureStore, small_store: Path) -> None:
    with pytest.raises(UserError, match="has no teacher 'nobody'; it has base, broken"):
        store_statistics(faults, ["nobody"])
    with pytest.raises(UserError, match="a sample of 0 rows"):
        store_statistics(faults, sample=0)
    result = CliRunner().invoke(stats, [str(small_store), "--sample", "many"])
    assert str(result.exception) == "--sample 'many' is neither a number of rows from 1 nor `all`"
    (small_store / "samples/00001.parquet").unlink()
    with pytest.raises(CorruptStoreError, match=r"sample table of .* cannot be read"):
        store_info(FeatureStore.open(small_store))


def test_the_command_prints_what_the_functions_return(faults: FeatureStore) -> None:
    text = CliRunner().invoke(stats, [str(faults.root), "--sample", "all"]).output
    assert f"{faults.root}: every row" in text
    assert "broken image" in text
    assert "shifted: captions are shifted" in text
    found = json.loads(CliRunner().invoke(stats, [str(faults.root), "--teachers", "dead", "--json"]).output)
    assert found["towers"][0]["dead_dimensions"] == [DEAD]
    assert any("dead dimension" in finding["text"] for finding in found["findings"])


def test_statistics_render_in_a_notebook_with_every_text_escaped(statistics: StoreStatistics) -> None:
    html = statistics_html(replace(statistics, root="<script>alert(1)</script>"))
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count("<table>") == html.count("</table>") == 7
    assert "captions are shifted" in html
    assert "<caption>by modality: i2t@10, in pools of all modalities</caption>" in html
    assert "<caption>labels of the whole store</caption>" in html
    root = ElementTree.fromstring(f"<div>{html}</div>")
    assert root.find(".//th[@scope='row']").text == "base image"
