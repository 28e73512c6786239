"""Every inspection function over stores that are appended, gapped, of one row, or of fifty teachers."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from random_store import random_store

from mmkd.cli.main import cli
from mmkd.store import FeatureStore
from mmkd.store.inspect.info import store_info
from mmkd.store.inspect.neighbors import neighbors
from mmkd.store.inspect.outliers import outliers
from mmkd.store.inspect.projection import atlas_table
from mmkd.store.inspect.rows import sample_rows
from mmkd.store.inspect.sampling import draw_inputs
from mmkd.store.inspect.show import view_row, view_shard
from mmkd.store.inspect.statistics import STATISTICS, store_statistics
from mmkd.store.inspect.table import StatisticTable
from mmkd.store.inspect.tables import statistics_html
from mmkd.store.report.content import Options
from mmkd.store.report.page import write_report

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=["one corpus", "three corpora", "half extracted", "one row", "fifty teachers"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    root = tmp_path_factory.mktemp("stores") / "st"
    if request.param == "one corpus":
        return random_store(root, 1, complete=True)
    if request.param == "three corpora":
        return random_store(root, 2, corpora=3, complete=True)
    if request.param == "half extracted":
        return random_store(root, 5, corpora=3)
    if request.param == "one row":
        return random_store(root, next(s for s in range(2000) if np.random.default_rng(s).integers(1, 600) == 1))
    return random_store(root, 4, corpora=2, teachers=50, complete=True)


def gaps(store: FeatureStore) -> set[int]:
    """Absent grid rows."""
    inputs = {row for span in store.record.spans() for row in span.rows}
    return set(range(len(store))) - inputs


def test_rows_are_those_asked_for(store: FeatureStore) -> None:
    whole = store.sample_table()
    assert whole["row"].to_pylist() == list(range(len(store)))
    rows = np.random.default_rng(0).integers(0, len(store), 40)
    for some in (rows, rows[:1], rows[:3], np.array([0, len(store) - 1])):
        assert sample_rows(store, some).to_pylist() == whole.take(some).to_pylist()


def test_absent_rows_are_not_drawn(store: FeatureStore) -> None:
    every = set(draw_inputs(store, None, 0).tolist())
    assert every == set(range(len(store))) - gaps(store)
    assert set(draw_inputs(store, 7, 3).tolist()) <= every


def test_rows_and_shards_are_shown(store: FeatureStore) -> None:
    for row in {0, len(store) - 1, *sorted(gaps(store))[:1]}:
        view = view_row(store, row)
        assert view.sample["row"] == row
        assert all(near.row not in gaps(store) for each in view.teachers for near in each.neighbors)
    for shard in range(store.shards):
        view_shard(store, shard)


@pytest.mark.integration
def test_neighbors_statistics_atlas_and_report(store: FeatureStore, tmp_path: Path) -> None:
    assert store_info(store).summary.rows == len(store)
    slug = next(iter(store.teachers))
    sound = np.flatnonzero(store.valid(slug) & 1)
    if len(sound):
        found = neighbors(store, slug, "image", store.image(slug)[sound[0]], 5)
        assert found["row"][0].as_py() == sound[0]
    assert set(atlas_table(store, slug, "image", None)["row"].to_pylist()).isdisjoint(gaps(store))
    slugs = tuple(store.teachers)[:3]
    assert store_statistics(store, slugs).drawn == "every row"
    outliers(store, slugs, draw_inputs(store, None, 0))
    content = write_report(store, tmp_path / "page.html", Options(teachers=slugs))
    assert set(content.samples).isdisjoint(gaps(store))


def test_other_readers_take_all_parts_together(store: FeatureStore) -> None:
    parts = f"{store.root}/samples/*.parquet"
    inputs = len(store) - len(gaps(store))
    labels = ", ".join(f'count("{label}")' for label in store.record.labels)
    assert duckdb.sql(f"SELECT count(*) FROM '{parts}'").fetchall() == [(inputs,)]
    expected = store.sample_table(list(store.record.labels))
    counts = tuple(len(expected) - expected[label].null_count for label in store.record.labels)
    assert duckdb.sql(f"SELECT {labels} FROM '{parts}'").fetchall() == [counts]
    assert pl.read_parquet(parts).height == inputs
    assert store.verify(deep=True).sound


def test_a_statistic_is_one_function_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = random_store(tmp_path / "st", 7, complete=True)

    def even_rows(store: FeatureStore, slugs: tuple[str, ...], rows: np.ndarray) -> StatisticTable:
        counts = [(slug, int(np.count_nonzero(rows % 2 == 0)), 0.5, None, "a<b") for slug in slugs]
        return StatisticTable("even & odd", ("teacher", "even", "share", "none", "text"), counts)

    monkeypatch.setitem(STATISTICS, "even", even_rows)
    found = store_statistics(store)
    cells = ["t0", f"{(len(store) + 1) // 2:,}", "0.500", "-", "a<b"]
    assert list(found.tables["even"].text_rows()[0]) == cells
    assert found.as_json()["tables"]["even"]["rows"][0][2:] == [0.5, None, "a<b"]
    printed = CliRunner().invoke(cli, ["store", "stats", str(store.root)]).output
    assert "even & odd" in printed
    assert any(line.split() == cells for line in printed.splitlines())
    write_report(store, tmp_path / "page.html", Options())
    for page in (statistics_html(found), (tmp_path / "page.html").read_text("utf-8")):
        assert "ven &amp; odd" in page
        assert "a&lt;b" in page


def test_counts_of_the_whole_store_are_the_same_in_pieces(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkd.store.reader._ROWS_AT_ONCE", store.record.rows_per_shard)
    parts = list(store.sample_tables(["row"]))
    assert len(parts) == store.shards
    assert [row for part in parts for row in part["row"].to_pylist()] == list(range(len(store)))
    table = store.sample_table(["image_sha256", "caption", "status", *store.record.labels])
    found = store_statistics(store, tuple(store.teachers)[:1])
    for name, repeated in (("image_sha256", found.repeated_images), ("caption", found.repeated_captions)):
        there = [value for value in table[name].to_pylist() if value is not None]
        assert repeated == len(there) - len(set(there))
    inputs = [row for row in table.to_pylist() if row["status"] != "absent"]
    for label, values, null, empty, distinct in found.tables["labels"].rows if store.record.labels else ():
        there = [row[label] for row in inputs if row[label] is not None]
        assert (values, null, distinct) == (len(there), len(inputs) - len(there), len(set(there)))
        assert empty == sum(not value.strip() for value in there)


def test_labels_are_counted(tmp_path: Path) -> None:
    store = random_store(tmp_path / "st", 2, corpora=3, complete=True)
    table = store.sample_table(["site", "status"]).to_pylist()
    values = [row["site"] for row in table if row["status"] != "absent"]
    there = [value for value in values if value is not None]
    expected = ("site", len(there), len(values) - len(there), sum(not v.strip() for v in there), len(set(there)))
    assert store_statistics(store).tables["labels"].rows[0] == expected
