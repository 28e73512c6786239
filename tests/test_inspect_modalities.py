"""Pairs by modality: who knows which kind of image, in the numbers, on the screen and in a notebook."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from planted_faults import NAN_ROW, ROWS, ZERO_ROW, make_faults
from tiny_store import make_card, make_store

from mmkd.base.text import counted
from mmkd.cli.store.stats import stats
from mmkd.store import FeatureStore
from mmkd.store.inspect.pairs import MOST, modalities, modality_names, pair_cosines, pair_statistics
from mmkd.store.inspect.sampling import unit
from mmkd.store.inspect.statistics import store_statistics
from mmkd.store.inspect.tables import statistics_html


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Even rows are radiology, odd ones pathology; `base` fits all, `noise` none, the others have gaps."""
    return make_faults(tmp_path_factory.mktemp("faults"), ("base", "holed", "noise", "broken"))


def test_rows_are_grouped_by_frequency_and_the_rarest_together() -> None:
    column = pa.chunked_array([["b", "a", None], ["a", "b", None, "a"]])
    for pieces in ([column], [column[:2], column[2:3], column[3:]]):
        found = modalities(pieces)
        assert found.names == ("a", "b", "not stated")
        assert found.codes.tolist() == [1, 0, 2, 0, 1, 2, 0]
    many = modalities([pa.chunked_array([[f"m{i:02}" for i in range(MOST + 3)] + ["m14", "m14"]])])
    assert many.names == ("m14", *(f"m{i:02}" for i in range(MOST - 1)), "all others")
    assert many.codes[[14, 0, 10, 11, 12, 13]].tolist() == [0, 1, 11, 12, 12, 12]
    nothing = modalities([pa.chunked_array([[]], pa.string())])
    assert (nothing.names, len(nothing.codes)) == ((), 0)


def test_a_teacher_that_knows_one_modality_is_told_by_modality(root: Path) -> None:
    store = FeatureStore.open(root)
    text = store.text("base").copy()
    odd = np.arange(1, ROWS, 2)
    text[odd] = text[np.roll(odd, 7)]
    store._features["base", "text"] = text
    groups = modalities([store.sample_table(["modality"])["modality"]])
    found = pair_statistics(store, "base", np.arange(ROWS), 5, groups)
    known = {each.modality: each for each in found.modalities}
    assert set(known) == {"radiology", "pathology"}
    assert known["radiology"].recall["i2t@10"] > 0.99
    assert known["pathology"].recall["i2t@10"] < 0.03
    assert known["radiology"].matched > 0.9
    assert known["pathology"].matched < 0.4
    # The reference: the same pool, one table of cosines, ranks counted one by one.
    pool = np.random.default_rng(5).permutation(ROWS)[:1000]
    cosines = unit(store.image("base")[pool]) @ unit(text[pool]).T
    ranks = (cosines > np.diagonal(cosines)[:, None]).sum(axis=1)
    for parity, name in enumerate(("radiology", "pathology")):
        own = pool % 2 == parity
        assert known[name].pairs == own.sum()
        assert known[name].recall["i2t@1"] == pytest.approx((ranks[own] == 0).mean(), abs=2e-3)
        assert known[name].recall["i2t@10"] == pytest.approx((ranks[own] < 10).mean(), abs=2e-3)
        assert known[name].matched == pytest.approx(np.median(np.diagonal(cosines)[own]), abs=1e-6)
        others = np.concatenate([np.diagonal(np.roll(cosines, -s, axis=1))[own] for s in range(1, 5)])
        assert known[name].unmatched == pytest.approx(np.median(others), abs=1e-6)
    for name, value in found.recall.items():
        parts = sum(each.recall[name] * each.pairs for each in found.modalities)
        assert value == pytest.approx(parts / sum(each.pairs for each in found.modalities))


def test_the_modalities_are_on_the_screen_in_json_and_in_a_notebook(root: Path) -> None:
    said = CliRunner().invoke(stats, [str(root), "--sample", "all"]).stdout.splitlines()
    at = said.index("by modality: i2t@10, in pools of all modalities")
    assert said[at + 1].split() == ["modality", "1", "2", "3", "4"]
    cells = {line.split()[0]: line.split()[1:] for line in said[at + 2 : at + 4]}
    assert set(cells) == {"radiology", "pathology"}
    for base, broken, holed, noise in cells.values():
        assert base == broken
        assert base.startswith(("99", "100"))
        assert holed.startswith(("99", "100"))
        assert float(noise.rstrip("%")) < 3
    assert [line.split()[0] for line in said if line.split()[1:2] == ["noise"]] == ["4"] * 3
    told = json.loads(CliRunner().invoke(stats, [str(root), "--json"]).stdout)
    assert {each["modality"] for each in told["pairs"][0]["modalities"]} == {"radiology", "pathology"}
    html = statistics_html(store_statistics(FeatureStore.open(root)))
    assert "<caption>by modality: i2t@10, in pools of all modalities</caption>" in html
    assert html.count('<th scope="row">radiology</th>') == 2


def test_one_modality_is_told_once(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 300, [make_card("alpha", 8)])
    found = store_statistics(FeatureStore.open(tmp_path / "s"))
    assert [each.pairs for each in found.pairs[0].modalities] == [300]
    assert modality_names(found.pairs) == []
    assert "by modality" not in CliRunner().invoke(stats, [str(tmp_path / "s")]).stdout
    assert "by modality" not in statistics_html(found)


def test_cosines_of_pairs_are_missing_where_a_teacher_lacks_one(root: Path) -> None:
    store = FeatureStore.open(root)
    rows = np.array([3, NAN_ROW, ZERO_ROW, 800, 1099])
    found = pair_cosines(store, ("base", "holed", "broken"), rows)
    image, text = (array("base")[rows].astype(np.float64) for array in (store.image, store.text))
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    assert found[0] == pytest.approx((image * text).sum(axis=1) / norms, abs=1e-6)
    assert np.isnan(found[1:]).tolist() == [[False, False, False, True, False], [False, True, True, False, False]]


def test_one_of_a_thing_has_no_plural() -> None:
    assert [counted(n, "row") for n in (0, 1, 2, 1024)] == ["0 rows", "1 row", "2 rows", "1,024 rows"]
    assert [counted(2, noun) for noun in ("ledger entry", "key")] == ["2 ledger entries", "2 keys"]
