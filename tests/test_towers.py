"""Teachers with one tower: extracted, checked, shown, learned from; what needs the other tower says so in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import objective_scene as scene
import pytest
from click.testing import CliRunner
from image_teacher import Seer
from in_process import run
from tiny_corpus import write_table_corpus
from tiny_run import in_ranks, quiet, write_run, write_scene
from tiny_store import make_card, make_store

from mmkd.base.errors import ConfigError, UserError
from mmkd.cli.main import cli
from mmkd.distill.alignment.config import AlignConfig
from mmkd.distill.alignment.fit import align
from mmkd.evaluate.features import Features
from mmkd.extract.encode import Workbench
from mmkd.extract.report import Overview
from mmkd.extract.shard import retry_shard
from mmkd.store import FeatureStore
from mmkd.store.inspect.statistics import store_statistics
from mmkd.store.ledger import read_ledger
from mmkd.store.selection import SelectionRule, select


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scene of tiny runs with the teachers `one`, `two`, and `seer`."""
    root = write_scene(tmp_path_factory.mktemp("scene"))
    run(root / "corpus/pairs.csv", root / "features", {"seer": Seer()})
    return root


def command(*arguments: object) -> str:
    """Run the command line; its output."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    return result.output


def test_an_image_tower_is_extracted_checked_and_shown(trained: Path) -> None:
    store = FeatureStore.open(trained / "features")
    assert sorted(path.name for path in (trained / "features/teachers/seer").iterdir()) == [
        "image",
        "valid",
        "zarr.json",
    ]
    assert store.verify(deep=True).sound
    assert (store.valid("seer") == 1).all()
    assert set(store[5]) == {
        "row",
        "seer/image",
        *(f"{slug}/{tower}" for slug in ("one", "two") for tower in ("image", "text")),
    }
    entry = read_ledger(store.root)[0, "seer"]
    assert (entry.image_rows, entry.text_rows, entry.text_crc32c) == (256, None, None)
    info = command("store", "info", store.root)
    assert "seer  2/2 shards  300 images  24 x float16" in info
    assert "one   2/2 shards  300 images  300 texts" in info
    assert "seer: 256 images, crc32c " + entry.image_crc32c in command("store", "show", store.root, "shard:0")
    row = command("store", "show", store.root, "row:7")
    assert "seer image" in row
    assert "seer text" not in row
    found = store_statistics(store)
    assert [(one.slug, one.tower) for one in found.towers if one.slug == "seer"] == [("seer", "image")]
    assert [pair.slug for pair in found.pairs] == ["one", "two"]
    assert [matrix.teachers for matrix in found.agreement] == [("one", "seer", "two"), ("one", "two")]


def test_a_teacher_that_finds_nothing_to_encode_is_named() -> None:
    captions = Overview(rows=3, captions=3)
    assert list(captions.lines([Seer.card])) == [
        "corpus: 0 images, 3 captions, 0 pairs",
        "  no features by seer: it encodes images only, there are none",
    ]
    assert len(list(Overview(rows=3, images=1, captions=3).lines([Seer.card]))) == 1


def test_one_tower_costs_its_bytes_and_no_more(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 8 * 2048, [make_card("seer", 512, towers=("image",))])
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file() and path.parent.name != "samples"]
    assert sum(path.stat().st_size for path in files) <= 1.01 * 8 * 2048 * 512 * 2


def test_what_needs_the_other_tower_ends_in_one_line(trained: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(trained / "features")
    line = "teacher seer has no text tower (its card lists image only); name teachers with a text tower"
    failing = [
        lambda: store.text("seer"),
        lambda: Features(store, "seer").texts(np.arange(3)),
        lambda: select(store, "any", SelectionRule.model_validate({"keep": {"cosine": {"at_least": 0.0}}})),
        lambda: align(store, AlignConfig(out=tmp_path / "a.safetensors", method={"pca": {}}, dim=8)),
    ]
    for call in failing:
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == line
    arguments = ["store", "neighbors", str(store.root), "7", "--teacher", "seer"]
    assert str(CliRunner().invoke(cli, [*arguments, "--among", "text"]).exception) == line
    assert "seer" in command("store", "neighbors", store.root, "7", "--teacher", "seer")


def test_a_retry_of_failed_images_leaves_a_text_tower_as_it_is(tmp_path: Path) -> None:
    table = write_table_corpus(tmp_path / "corpus", 300)
    whole = run(table, tmp_path / "whole", {"seer": Seer()})
    hidden = tmp_path / "corpus/images/9.png"
    data = hidden.read_bytes()
    hidden.unlink()
    store = run(table, tmp_path / "s", {"seer": Seer()})
    assert store.valid("seer")[9] == 0
    hidden.write_bytes(data)
    retry_shard(store, 0, {"seer": Seer()}, Workbench())
    again = FeatureStore.open(tmp_path / "s")
    assert np.array_equal(again.image("seer"), whole.image("seer"))
    assert again.verify(deep=True).sound


@pytest.mark.integration
def test_a_student_learns_from_images_alone_and_beside_pairs(trained: Path, ranks: int) -> None:
    alone = write_run(trained, f"alone-{ranks}", teachers=["seer"], loss={"feature": 1.0, "cross": 0.0}, where="")
    assert "feature" in in_ranks(ranks, alone).losses
    both = write_run(trained, f"both-{ranks}", teachers=["one", "seer"], where="")
    assert {"feature", "cross"} <= set(in_ranks(ranks, both).losses)
    for name, changes, message in (
        ("cross", {"teachers": ["seer"]}, "loss.cross compares images with texts and teacher seer has no text tower"),
        (
            "best",
            {"teachers": ["seer"], "loss": {"cross": 0.0}, "policy": {"kind": "best"}},
            "policy.kind best judges teachers by images and texts, and teacher seer has no text tower",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            quiet(write_run(trained, name, where="", **changes))


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def _contrast(queries: np.ndarray, keys: np.ndarray, there: np.ndarray, group: np.ndarray) -> np.ndarray:
    """CLIP's loss in one direction over the keys that are there, with CLIP's first temperature."""
    logits = np.where(there, queries @ keys.T / 0.07, -np.inf)
    same = (group[:, None] == group) & there
    matched = np.where(same, np.where(np.isfinite(logits), logits, 0), 0).sum(1) / np.maximum(same.sum(1), 1)
    return np.log(np.exp(logits).sum(1)) - matched


@pytest.mark.integration
def test_terms_are_those_of_the_towers_that_are_there(tmp_path: Path, ranks: int) -> None:
    """Against loops over NumPy: teacher `b` has an image tower only."""
    values, rows = scene.arrays(), np.arange(scene.ROWS)
    heads, towers = scene.objective("one tower").heads, scene.RECIPES["one tower"]["towers"]
    found = scene.results(ranks, "one tower", tmp_path / "found.pt")
    shares = scene.PRESENT / np.maximum(scene.PRESENT.sum(1, keepdims=True), 1)
    feature, cross, weight = 0.0, 0.0, 0.0
    for t, slug in enumerate(scene.SLUGS):
        head = heads.maps[t].weight.detach().numpy().astype(np.float64)
        mine = {tower: _unit(values[tower] @ head.T) for tower in ("image", "text")}
        theirs = {tower: _unit(values[f"{slug}/{tower}"][rows].astype(np.float64)) for tower in mine}
        here = scene.PRESENT[:, t]
        feature += sum(shares[here, t] @ (1 - (mine[tower] * theirs[tower]).sum(1))[here] for tower in towers[t])
        if len(towers[t]) == 2:
            group = np.array(scene.GROUPS)
            ways = (("image", "text"), ("text", "image"))
            value = sum(_contrast(mine[a], theirs[b], here, group) for a, b in ways) / 2
            cross, weight = cross + shares[here, t] @ value[here], weight + shares[here, t].sum()
    assert found["feature"].item() == pytest.approx(feature / shares.sum(), rel=1e-5)
    assert found["cross"].item() == pytest.approx(cross / weight, rel=1e-5)
