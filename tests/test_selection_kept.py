"""What a selection holds on disk, how `verify` judges it, and selections and alignments of int8 and remote stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from planted_store import make_planted

from mmkd.base.errors import UserError
from mmkd.base.files import write_atomically
from mmkd.base.places.remote import as_root
from mmkd.distill.alignment import load
from mmkd.distill.alignment.config import AlignConfig
from mmkd.distill.alignment.fit import align
from mmkd.store import FeatureStore
from mmkd.store.convert.importing import import_features
from mmkd.store.convert.rows import StoreRows, chosen_rows
from mmkd.store.hierarchy import SEAL, seal_of
from mmkd.store.selection import SelectionRule, select
from mmkd.store.selection.compute import examples
from mmkd.store.selection.verdict import Line
from mmkd.store.verify import repair

MODELS = {"far": 2.0, "near": 0.3}
HOLES = {"near": [3, 7, 200]}
RANKED = SelectionRule.model_validate({"keep": {"rank": {"at_most": 3, "among": 64}}})


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.open(make_planted(tmp_path / "float16", MODELS, HOLES).root)


@pytest.fixture
def int8(store: FeatureStore, tmp_path: Path) -> FeatureStore:
    """The same rows in int8."""
    rows = StoreRows([(store, chosen_rows(store))])
    import_features(rows, tmp_path / "int8", "int8", lambda done, every: None)
    return FeatureStore.open(tmp_path / "int8")


@pytest.fixture
def copied(store: FeatureStore, bucket: str) -> FeatureStore:
    """The same store, with its selection `ranked`, on an S3 server."""
    select(store, "ranked", RANKED)
    root = as_root(f"{bucket}/store")
    for path in Path(str(store.root)).rglob("*"):
        if path.is_file():
            write_atomically(root / path.relative_to(str(store.root)).as_posix(), path.read_bytes())
    return FeatureStore.open(f"{bucket}/store")


def attributes(store: FeatureStore, name: str) -> dict[str, Any]:
    return dict(zarr.open_group(store.root, mode="r")[f"selections/{name}"].attrs["mmkd"])


def test_thresholds_and_examples_are_kept_with_the_selection(store: FeatureStore) -> None:
    rule = SelectionRule.model_validate({"keep": {"cosine": {"quantile": 0.25}}})
    report = select(store, "upper", rule)
    (line,) = report.examples
    held = attributes(store, "upper")
    assert held["thresholds"] == report.thresholds
    assert held["examples"] == {line: [one.model_dump() for one in report.examples[line]]}
    for t, slug in enumerate(store.teachers):
        image, text = (np.array(tower(slug), dtype=np.float64) for tower in (store.image, store.text))
        cosine = (image * text).sum(axis=1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
        there = store.available()[:, t]
        assert held["thresholds"][line][slug] == pytest.approx(np.sort(cosine[there])[int(0.25 * there.sum())])
        for one in held["examples"][line]:
            if one["teacher"] == slug:
                assert one["score"] == pytest.approx(cosine[one["row"]], abs=1e-6)
                assert one["kept"] == bool(store.available("upper")[one["row"], t])
    assert [one["kept"] for one in held["examples"][line]] == [True] * 3 + [False] * 3
    samples = store.sample_table(["key", "caption"]).to_pylist()
    assert all(samples[one["row"]] == {n: one[n] for n in ("key", "caption")} for one in held["examples"][line])


def test_a_rank_without_end_is_no_number_in_json(store: FeatureStore, tmp_path: Path) -> None:
    prompts = chosen_rows(store, where="split = 'prompt' and label != 'benign'")
    import_features(StoreRows([(store, prompts)]), tmp_path / "prompts", "float16", lambda done, every: None)
    by = {"zero_shot": {"prompts": str(tmp_path / "prompts"), "label": "label"}}
    share = {"pairs": {"share": 0.9, "by": by, "scale": "raw"}}
    report = select(store, "most", SelectionRule.model_validate({"keep": share}))
    document = (Path(str(store.root)) / "selections/most/zarr.json").read_text()
    assert json.loads(document, parse_constant=pytest.fail)
    (threshold,) = report.thresholds.values()
    assert threshold == {"far": None, "near": None}
    score = np.full((len(store), 2), np.nan, dtype=np.float32)
    score[[5, 6, 9], 0] = 1, 4, np.inf
    found = examples(store, ("far", "near"), Line("", score, np.ones(2), higher=False), 3)
    assert [(one.row, one.score, one.kept) for one in found] == [(5, 1, True), (6, 4, False), (9, None, False)]
    assert report.counts.pairs.kept == round(0.9 * report.counts.pairs.available)


def rewrite(store: FeatureStore, name: str, **changes: Any) -> None:
    """Change a selection's attributes and seal them, as a faulty writer would."""
    path = Path(str(store.root)) / "selections" / name / "zarr.json"
    document = json.loads(path.read_text())
    content = {key: value for key, value in document["attributes"]["mmkd"].items() if key != SEAL} | changes
    document["attributes"]["mmkd"] = content | {SEAL: seal_of(content)}
    path.write_text(json.dumps(document))


def test_verify_judges_every_selection(store: FeatureStore) -> None:
    for name in ("a", "b", "c", "d", "e"):
        select(store, name, RANKED)
    assert store.verify().sound
    folder = Path(str(store.root)) / "selections"
    chunk = folder / "b" / "c" / "0" / "0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    counts = attributes(store, "c")["counts"]
    counts["teachers"]["near"]["kept"] += 1
    rewrite(store, "c", counts=counts)
    rewrite(store, "d", teachers=attributes(store, "d")["teachers"] | {"far": "0" * 16})
    rewrite(store, "e", rows=5)
    report = store.verify()
    problems = {finding.file.split("/")[1]: finding.what for finding in report.findings}
    kept = int(store.available("a")[:, 1].sum())
    assert sorted(problems) == ["b", "c", "d", "e"]
    assert "checksum" in problems["b"] or "crc32c" in problems["b"].lower()
    assert f"keeps {kept} pairs of teacher near, its counts say {kept + 1}; delete selections/c" in problems["c"]
    assert f"judged teacher far of digest {'0' * 16}, the store's has {store.card('far').digest}" in problems["d"]
    assert "is of 5 rows" in problems["e"]
    # A selection is a user's judgement: repair leaves it, and says nothing was done.
    assert repair(store.root, report) == ()
    assert chunk.is_file()


def test_a_selection_of_an_int8_store_judges_the_values_that_its_readers_see(int8: FeatureStore) -> None:
    least = {"far": 0.3, "near": 0.96}
    rule = SelectionRule.model_validate({"keep": {"cosine": {"at_least": least}}})
    select(int8, "close", rule)
    for t, slug in enumerate(int8.teachers):
        image, text = (np.asarray(tower(slug)[:], dtype=np.float64) for tower in (int8.image, int8.text))
        cosine = (image * text).sum(axis=1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
        clear = np.abs(cosine - least[slug]) > 1e-5
        expected = int8.available()[:, t] & (cosine >= least[slug])
        assert np.array_equal(int8.available("close")[clear, t], expected[clear])
        assert 0 < expected.sum() < int8.available()[:, t].sum()
    assert int8.verify(deep=True).sound


def test_int8_changes_few_judgements(store: FeatureStore, int8: FeatureStore) -> None:
    for one in (store, int8):
        select(one, "ranked", RANKED)
    same = store.available("ranked") == int8.available("ranked")
    assert store.available("ranked").any()
    assert same.mean() > 0.97


@pytest.mark.parametrize("method", [{"procrustes": {"reference": "near"}}, {"whitening": {}}])
def test_an_alignment_of_int8_is_that_of_float16_nearly(
    store: FeatureStore, int8: FeatureStore, tmp_path: Path, method: dict[str, Any]
) -> None:
    maps = []
    for name, one in (("float16", store), ("int8", int8)):
        out = tmp_path / f"{name}.safetensors"
        align(one, AlignConfig.model_validate({"out": out, "method": method, "dim": 8}))
        maps.append(load(out))
    for t, slug in enumerate(store.teachers):
        features = torch.from_numpy(np.array(store.image(slug))[store.available()[:, t]])
        first, second = (alignment(slug, "image", features) for alignment in maps)
        # Principal axes of near-equal length may turn: what counts is the similarities between aligned rows.
        agreement = torch.corrcoef(torch.stack([(first @ first.T).flatten(), (second @ second.T).flatten()]))[0, 1]
        assert agreement > 0.99


def test_an_alignment_behind_a_url_is_bit_for_bit_that_of_the_disk(
    store: FeatureStore, copied: FeatureStore, tmp_path: Path
) -> None:
    pytest.importorskip("obstore", reason="the extra remote is not installed")
    for name, one in (("disk", store), ("url", copied)):
        align(one, AlignConfig.model_validate({
            "out": tmp_path / f"{name}.safetensors", "method": {"whitening": {}}, "dim": 8, "selection": "ranked",
        }))  # fmt: skip
    assert (tmp_path / "disk.safetensors").read_bytes() == (tmp_path / "url.safetensors").read_bytes()


def test_a_selection_behind_a_url_is_read_verified_and_not_made_there(
    store: FeatureStore, copied: FeatureStore
) -> None:
    assert np.array_equal(copied.available("ranked"), store.available("ranked"))
    assert copied.verify().sound
    with pytest.raises(UserError, match="is not on this machine; `mmkd store pull` it first, and select there"):
        select(copied, "another", RANKED)
