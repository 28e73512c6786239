"""Maps of rows, odd rows, and handing rows to another tool."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from planted_faults import NAN_ROW, ROWS, ZERO_ROW, make_faults
from sklearn.decomposition import PCA

from mmkd.cli.store.report import atlas
from mmkd.store import FeatureStore, UserError
from mmkd.store.inspect.agreement import mutual_neighbors, nearest
from mmkd.store.inspect.outliers import outliers
from mmkd.store.inspect.projection import atlas_table, principal_axes, project
from mmkd.store.inspect.sampling import unit


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.open(make_faults(tmp_path_factory.mktemp("faults"), ("base", "broken", "noise")))


def test_the_plane_is_that_of_another_pca(faults: FeatureStore) -> None:
    values = unit(faults.image("base"))
    points, explained = principal_axes(values)
    reference = PCA(2, svd_solver="full").fit(values.astype(np.float64))
    expected = reference.transform(values.astype(np.float64))
    expected *= np.sign((expected * points).sum(axis=0))
    assert np.abs(points - expected).max() < 1e-4
    assert explained == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-4)
    assert principal_axes(values[:1])[0].tolist() == [[0, 0]]
    assert principal_axes(np.ones((3, 1), dtype=np.float32))[0].shape == (3, 2)


def test_broken_rows_are_not_on_the_map(faults: FeatureStore) -> None:
    found = project(faults, "broken", "image", np.arange(ROWS))
    assert set(range(ROWS)) - set(found.rows.tolist()) == {NAN_ROW, ZERO_ROW}
    assert np.isfinite(found.points).all()


def test_umap_needs_its_package(faults: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match="UMAP needs the package"):
        project(faults, "base", "image", np.arange(50), "umap")


@pytest.mark.slow
def test_umap_keeps_neighbourhoods(faults: FeatureStore) -> None:
    pytest.importorskip("umap", reason="the extra umap is not installed")
    found = project(faults, "base", "image", np.arange(200), "umap")
    assert (found.points.shape, found.explained) == ((200, 2), None)
    apart = -np.linalg.norm(found.points[:, None] - found.points[None], axis=2)
    np.fill_diagonal(apart, -np.inf)
    near = np.argsort(-apart, axis=1)[:, :10]
    assert mutual_neighbors(nearest(unit(faults.image("base")[:200]), 10), near) > 0.25  # by chance 0.05
    again = project(faults, "base", "image", np.arange(200), "umap")
    assert np.array_equal(found.points, again.points)


def test_a_caption_that_does_not_fit_and_a_norm_are_odd(tmp_path: Path) -> None:
    from planted_store import make_planted

    store = FeatureStore.open(make_planted(tmp_path, {"a": 0.1, "b": 0.1}).root)
    rows = np.arange(360)
    before = {found.row for found in outliers(store, ("a", "b"), rows) if found.kind == "caption fits least"}
    for slug in ("a", "b"):
        text = store.text(slug).copy()
        text[77] = -text[77]
        image = store.image(slug).copy()
        image[123] *= np.float16(40)
        store._features[slug, "text"], store._features[slug, "image"] = text, image
    found = outliers(store, ("a", "b"), rows)
    assert 77 not in before
    assert (found[0].row, found[0].kind, found[0].teachers) == (77, "caption fits least", 2)
    assert found[0].score < -10
    assert next(odd.row for odd in found if odd.kind == "image norm") == 123
    assert outliers(store, ("a",), rows[:10]) == ()


def test_rows_are_written_for_other_tools(faults: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "not there yet" / "rows.parquet"
    result = CliRunner().invoke(atlas, [str(faults.root), "--teacher", "base", "--sample", "50", "--out", str(out)])
    assert "50 rows" in result.output
    table = pq.read_table(out)
    assert table.equals(atlas_table(faults, "base", "image", 50))
    assert {"key", "caption", "site", "projection_x", "projection_y"} <= set(table.column_names)


def test_the_seed_decides_the_rows_that_are_written(faults: FeatureStore, tmp_path: Path) -> None:
    tables = []
    for seed in (0, 3):
        out = tmp_path / f"{seed}.parquet"
        words = ["--teacher", "base", "--sample", "50", "--seed", str(seed), "--projection", "pca", "--out", str(out)]
        assert CliRunner().invoke(atlas, [str(faults.root), *words]).exit_code == 0
        tables.append(pq.read_table(out))
    assert tables[1].equals(atlas_table(faults, "base", "image", 50, 3, "pca"))
    assert tables[0]["key"] != tables[1]["key"]


def test_the_atlas_is_started_with_the_rows(
    faults: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = [str(faults.root), "--teacher", "base", "--sample", "20"]
    assert "embedding-atlas is not installed" in str(CliRunner().invoke(atlas, arguments).exception)
    program = tmp_path / "embedding-atlas"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said; test -s "$1" && exit 7\n')
    program.chmod(0o755)
    assert os.access(program, os.X_OK)
    assert CliRunner().invoke(atlas, arguments).exit_code == 7
    assert "--x projection_x --y projection_y --text caption --host localhost" in (tmp_path / "said").read_text()
