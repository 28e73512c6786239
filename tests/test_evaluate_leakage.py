"""The leakage report finds copies that were planted, and no others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from planted_store import store_of

from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite
from mmkd.evaluate.leakage import Overlap, find_leakage
from mmkd.evaluate.neighbours import nearest
from mmkd.store import FeatureStore
from mmkd.store.errors import MmkdError
from mmkd.store.writer import ShardFeatures

DIM = 64


def make(root: Path, rows: list[dict[str, Any]], image: np.ndarray, weights: str = "11") -> Path:
    """A store of one encoder, the same in all stores with equal `weights`."""
    image = image.astype(np.float16)
    valid = np.full(len(rows), 3, dtype=np.uint8)
    return store_of(root, rows, ("split", "patient"), {"alpha": ShardFeatures(image, image, valid)}, weights)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A suite of 40 train and 30 test images (three a patient) and a training store, with planted copies.

    test0: bytes of train5. test1: nearly train6. test2: bytes of test10, another patient. test3: bytes of test4, the
    same patient. test6: nearly test12, another patient. test7: bytes of corpus3. test8: nearly corpus4.
    """
    folder = tmp_path_factory.mktemp("leakage")
    rng = np.random.default_rng(0)
    train, test, corpus = (rng.normal(size=(n, DIM)) for n in (40, 30, 50))
    evaluated = [{"key": f"train{i}", "split": "train", "patient": f"a{i}"} for i in range(40)]
    evaluated += [{"key": f"test{i}", "split": "test", "patient": f"p{i // 3}"} for i in range(30)]
    learned = [{"key": f"corpus{i}", "split": "train", "patient": f"c{i}"} for i in range(50)]
    for rows in (evaluated, learned):
        for row in rows:
            row["image_sha256"] = hashlib.sha256(row["key"].encode()).hexdigest()
    evaluated[40]["image_sha256"], test[0] = evaluated[5]["image_sha256"], train[5]
    test[1] = train[6] + 0.05 * rng.normal(size=DIM)
    evaluated[42]["image_sha256"], test[2] = evaluated[50]["image_sha256"], test[10]
    evaluated[43]["image_sha256"], test[3] = evaluated[44]["image_sha256"], test[4]
    test[6] = test[12] * 3 + 0.05 * rng.normal(size=DIM)  # length does not matter, direction does
    evaluated[47]["image_sha256"], test[7] = learned[3]["image_sha256"], corpus[3]
    test[8] = corpus[4] + 0.05 * rng.normal(size=DIM)
    make(folder / "store", evaluated, np.concatenate([train, test]))
    make(folder / "training", learned, corpus)
    make(folder / "other-weights", learned, corpus, weights="22")
    suite = folder / "suite.yaml"
    spec = {
        "dataset": "set", "group": "patient", "tasks": ["retrieval"],
        "rows": {"train": {"split": "train"}, "test": {"split": "test"}},
    }  # fmt: skip
    suite.write_text(yaml.safe_dump({"suite": "leaky", "store": "store", "datasets": [spec]}))
    return suite, folder / "training"


def found(overlap: Overlap) -> set[tuple[str, str, str]]:
    return {(pair.kind, pair.key, pair.other) for pair in overlap.pairs}


def test_planted_copies_are_found_and_no_others(planted: tuple[Path, Path]) -> None:
    suite, training = planted
    report = find_leakage(load_suite(suite), FeatureStore.open(training))
    by_place = {one.against: one for one in report.overlaps}
    assert list(by_place) == ["training corpus", "train", "test"]
    assert found(by_place["training corpus"]) == {("exact", "test7", "corpus3"), ("near", "test8", "corpus4")}
    assert found(by_place["train"]) == {("exact", "test0", "train5"), ("near", "test1", "train6")}
    # test3 and test4 are equal too, but of one patient
    assert found(by_place["test"]) == {
        ("exact", "test2", "test10"), ("exact", "test10", "test2"),
        ("near", "test6", "test12"), ("near", "test12", "test6"),
    }  # fmt: skip
    assert not report.clean
    assert by_place["train"].images == by_place["train"].featured == 30
    assert by_place["train"].median is not None
    assert by_place["train"].median < 0.5
    assert by_place["train"].highest is not None
    assert 0.98 < by_place["train"].highest < 1
    strict = find_leakage(load_suite(suite), cosine=1.0)
    assert [one.near for one in strict.overlaps] == [0, 0]


def test_text_and_json_say_the_same(planted: tuple[Path, Path]) -> None:
    text = CliRunner().invoke(evaluate, ["leakage", str(planted[0])])
    assert text.exit_code == 0, text.output
    assert "set test in train: 1 exact, 1 near of 30 images; nearest: median 0." in text.output
    assert "  exact: test0 = train5" in text.output
    assert "set test inside (other groups): 2 exact, 2 near of 30 images" in text.output
    assert "  ... and 1 more; --json lists all" in text.output
    corpus = CliRunner().invoke(evaluate, ["leakage", str(planted[0]), "--training", str(planted[1])])
    assert f"training corpus {planted[1]}" in corpus.output
    assert "set test in training corpus: 1 exact, 1 near of 30 images" in corpus.output
    content = json.loads(CliRunner().invoke(evaluate, ["leakage", str(planted[0]), "--json"]).output)
    assert [one["exact"] for one in content["overlaps"]] == [1, 2]
    assert len(content["overlaps"][1]["pairs"]) == 4
    assert (content["clean"], content["model"], content["training"]) == (False, "alpha", None)


def test_what_cannot_be_compared_is_said(planted: tuple[Path, Path]) -> None:
    suite, training = load_suite(planted[0]), FeatureStore.open(planted[1].with_name("other-weights"))
    with pytest.raises(MmkdError, match="alpha has different weights or preprocessing in the stores"):
        find_leakage(suite, training)
    with pytest.raises(MmkdError, match=r"beta is not in all of .*; in all of them: alpha"):
        find_leakage(suite, model="beta")
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(MmkdError, match="is no threshold; give one above 0 and up to 1"):
            find_leakage(suite, cosine=wrong)


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 7), st.integers(0, 99))
def test_nearest_in_blocks_is_the_argmax_of_the_whole_matrix(n: int, m: int, step: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, rows = (rng.integers(-2, 3, size=(k, 3)).astype(np.float32) for k in (n, m))  # small integers: many ties
    own, group = rng.integers(0, 4, n), rng.integers(0, 4, m)
    blocks = [(np.arange(m)[i : i + step], rows[i : i + step]) for i in range(0, m, step)]
    best, where = nearest(queries, blocks, own, group)
    scores = np.where(own[:, None] == group, -np.inf, queries @ rows.T) if m else np.full((n, 1), -np.inf)
    assert best.tolist() == scores.max(axis=1).tolist()
    assert where.tolist() == np.where(scores.max(axis=1) > -np.inf, scores.argmax(axis=1), -1).tolist()
